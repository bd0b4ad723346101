// What every instruction set's code shares: element types and the choice of a level.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace demp {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

enum class Act { relu, leaky_relu, gelu, gelu_tanh, silu };
constexpr int kActs = 5;

enum class Level { portable = 0, avx2 = 1, avx512 = 2 };

// The widest level that this CPU and operating system run. DEMP_SIMD (portable, avx2 or avx512) lowers it, for tests.
inline Level cpu_level() {
#if defined(__x86_64__)
  static const Level level = [] {
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);  // older compilers' builtin has no name for it
    const bool avx2 =
        f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* wish = std::getenv("DEMP_SIMD");
    if (!avx2 || (wish && !std::strcmp(wish, "portable"))) return Level::portable;
    if (!avx512 || (wish && !std::strcmp(wish, "avx2"))) return Level::avx2;
    return Level::avx512;
  }();
  return level;
#else
  return Level::portable;
#endif
}

}  // namespace demp
