// Compiles the file named by DEMP_ISA_SOURCE once for every instruction set, each time in a namespace of its own:
// demp::portable always (SSE2 on x86-64, NEON on 64-bit ARM, by the compiler's vector extension), demp::avx2 and
// demp::avx512 on x86-64. Which one runs is decided by `cpu_level()`.
//
// Everything else must be included before this file. The pragma changes the target of whatever follows it, and a std or
// torch inline function compiled for AVX-512 could be the copy that the linker keeps for the whole program. For the
// same reason the source has internal linkage throughout and calls no std template. No lambdas either: they do not
// inherit the pragma's target.
#ifndef DEMP_ISA_SOURCE
#error "define DEMP_ISA_SOURCE before including for_each.h"
#endif

#define DEMP_INLINE static inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own AVX-512 header (GCC bug 105593)
#endif

#define DEMP_ISA portable
#define DEMP_ISA_LEVEL 0
#include DEMP_ISA_SOURCE
#undef DEMP_ISA
#undef DEMP_ISA_LEVEL

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#define DEMP_ISA avx2
#define DEMP_ISA_LEVEL 1
#include DEMP_ISA_SOURCE
#undef DEMP_ISA
#undef DEMP_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2,prefer-vector-width=512")
#endif
#define DEMP_ISA avx512
#define DEMP_ISA_LEVEL 2
#include DEMP_ISA_SOURCE
#undef DEMP_ISA
#undef DEMP_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
