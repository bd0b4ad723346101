#include "host.h"

#include <cstdlib>

#ifdef __linux__
#include <features.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "ops/cpu/isa/types.h"

namespace demp {

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtin asks cpuid and xgetbv: true means that the operating system saves the registers too.
  return {
      {"avx2", __builtin_cpu_supports("avx2") != 0},         {"fma", __builtin_cpu_supports("fma") != 0},
      {"avx512f", __builtin_cpu_supports("avx512f") != 0},   {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512dq", __builtin_cpu_supports("avx512dq") != 0}, {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
  };
#elif defined(__aarch64__)
  return {{"neon", true}};  // part of every 64-bit ARM
#else
  return {};
#endif
}

std::string simd_level() {
  switch (cpu_level()) {
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    case Level::portable:
      break;
  }
#if defined(__aarch64__)
  return "neon";  // what compilers make of the portable code there
#else
  return "portable";
#endif
}

#if defined(__GLIBC__)
namespace {

// Blocks that glibc took straight from the kernel, which it gives back as soon as they are freed.
size_t mapped_blocks() {
#if __GLIBC_PREREQ(2, 33)
  return mallinfo2().hblks;
#else
  return static_cast<size_t>(mallinfo().hblks);
#endif
}

size_t bytes_in_use() {
#if __GLIBC_PREREQ(2, 33)
  const auto info = mallinfo2();
#else
  const auto info = mallinfo();
#endif
  return static_cast<size_t>(info.uordblks) + static_cast<size_t>(info.hblkhd);
}

}  // namespace

AllocatorTuning tune_allocator() {
  // Older releases of glibc refuse a threshold above half a heap, 32 MiB on 64-bit systems: take that then.
  size_t kept = size_t{1} << 30;
  if (!mallopt(M_MMAP_THRESHOLD, static_cast<int>(kept))) {
    kept = size_t{32} << 20;
    if (!mallopt(M_MMAP_THRESHOLD, static_cast<int>(kept))) return {false, "glibc refused M_MMAP_THRESHOLD"};
  }
  if (!mallopt(M_TRIM_THRESHOLD, 2147483647)) return {false, "glibc refused M_TRIM_THRESHOLD"};
  // Grow the heap in large strides: each growth is a system call and a fresh range to fault in.
  if (!mallopt(M_TOP_PAD, 64 << 20)) return {false, "glibc refused M_TOP_PAD"};

  // mallopt succeeds even where another allocator was preloaded in front of glibc's: look at a real block.
  const size_t mapped = mapped_blocks(), in_use = bytes_in_use();
  void* block = std::malloc(kept / 2);
  const bool from_glibc = bytes_in_use() >= in_use + kept / 2;
  const bool stays = mapped_blocks() == mapped;
  std::free(block);
  if (block == nullptr) return {false, "no memory to try the settings with"};
  if (!from_glibc) return {false, "another allocator than glibc's serves malloc"};
  if (!stays) return {false, "glibc still maps large blocks one by one"};
  return {true, ""};
}
#else
AllocatorTuning tune_allocator() { return {false, "the C library is not glibc"}; }
#endif

}  // namespace demp
