// CUDA's device language for g++: what the kernels of csrc/ops/cuda use of it, on top of runtime.h. Found through
// csrc/ops/cuda/device.cuh, which includes it when the compiler is not nvcc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

using dim3 = emulator::Dim3;
using cudaStream_t = void*;

#define threadIdx (emulator::position().thread)
#define blockIdx (emulator::position().block)
#define blockDim (emulator::position().block_size)
#define gridDim (emulator::position().grid_size)

// The macros that device.cuh gives both compilers: a launch, and shared arrays, which an emulator has to know of.
#define DEMP_LAUNCH(kernel, grid, block, dynamic_shared, stream, ...) \
  ((void)(stream), emulator::launch((grid), (block), (dynamic_shared), [&] { kernel(__VA_ARGS__); }))
#define DEMP_SHARED_ARRAY(type, name, count)                              \
  static const char name##_key = 0;                                      \
  type* const name = static_cast<type*>(emulator::shared_array(&name##_key, sizeof(type) * (count)))
#define DEMP_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::dynamic_shared())

// ---- barriers and warp operations ------------------------------------------------------------------------------

#define __syncthreads() emulator::wait_for_block(__FILE__, __LINE__)
inline void __syncwarp(std::uint32_t mask = ~0u) { emulator::wait_for_warp(mask); }

namespace emulator {

template <typename T>
T shuffle(std::uint32_t mask, T value, int source, int width) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const std::uint64_t* all = exchange(mask, bits);
  const int first = static_cast<int>(lane()) / width * width;
  if (source < first || source >= first + width) return value;  // from outside the group: one's own
  if (!(mask >> source & 1)) fail("a shuffle from a lane that its mask leaves out");
  T result;
  std::memcpy(&result, &all[source], sizeof result);
  return result;
}

}  // namespace emulator

template <typename T>
T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(mask, value, static_cast<int>(emulator::lane() + delta), width);
}
template <typename T>
T __shfl_xor_sync(std::uint32_t mask, T value, int bits, int width = 32) {
  return emulator::shuffle(mask, value, static_cast<int>(emulator::lane()) ^ bits, width);
}
template <typename T>
T __shfl_sync(std::uint32_t mask, T value, int source, int width = 32) {
  const int first = static_cast<int>(emulator::lane()) / width * width;
  return emulator::shuffle(mask, value, first + (source & (width - 1)), width);
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, int predicate) {
  const std::uint64_t* all = emulator::exchange(mask, predicate != 0);
  std::uint32_t bits = 0;
  for (unsigned k = 0; k < 32; ++k) bits |= static_cast<std::uint32_t>(all[k] & 1) << k;
  return bits;
}

// ---- atomics ---------------------------------------------------------------------------------------------------

// Not instrumented: their loads and stores are reported as one atomic access, and nothing comes between them.
#define EMULATED_ATOMIC(name, expression)                                     \
  template <typename T>                                                       \
  __attribute__((no_sanitize("thread"), noinline)) T name(T* address, T value) { \
    emulator::atomic_access(address, sizeof(T));                              \
    const T before = *address;                                                \
    *address = static_cast<T>(expression);                                    \
    return before;                                                            \
  }
EMULATED_ATOMIC(atomicAdd, before + value)
EMULATED_ATOMIC(atomicOr, before | value)
EMULATED_ATOMIC(atomicMax, std::max(before, value))
#undef EMULATED_ATOMIC

// ---- vector types and integer functions ------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32);
}
inline int __popc(std::uint32_t x) { return __builtin_popcount(x); }
inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- approximate functions: the host's exact ones --------------------------------------------------------------

inline float __logf(float x) { return std::log(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }

// ---- half and bfloat16 -----------------------------------------------------------------------------------------

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }

inline __half __float2half_rn(float x) {
  const std::uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  auto with_sign = [sign](std::uint32_t rest) { return __half{static_cast<std::uint16_t>(sign | rest)}; };
  if (magnitude > 0x7F800000) return {0x7FFF};
  if (magnitude >= 0x477FF000) return with_sign(0x7C00);  // rounds to infinity
  if (magnitude < 0x38800000) {                           // subnormal: a multiple of 2^-24
    return with_sign(static_cast<std::uint32_t>(std::nearbyint(__uint_as_float(magnitude) * 0x1p24f)));
  }
  const std::uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return with_sign((rounded - 0x38000000) >> 13);
}
inline float __half2float(__half x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
  const float magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                                        : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
