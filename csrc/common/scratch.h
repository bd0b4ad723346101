// Memory for one share's work, and fetching memory ahead of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace demp {

// Memory aligned to a cache line and not initialised.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : storage_(new char[static_cast<std::size_t>(bytes) + 64]) {}
  template <class T>
  T* as() {
    return reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(storage_.get()) + 63) & ~std::uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> storage_;
};

// Starts fetching memory into the second-level cache, to be there after a piece of arithmetic that touches none.
inline void fetch_ahead(const void* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Whether an output of so many bytes is better written past the caches: it would push out what is still needed, be pushed
// out itself before anything reads it, and its lines would be read from memory only to be overwritten. Needs whole cache
// lines, so `p` at the beginning of one. In GB/s of a copy on two Zen 4 cores (16 MiB of third-level cache for them):
// 53 against 71 for 12 MiB, 35 against 62 for 64 MiB, 32 against 52 for 256 MiB.
// Where it would have stayed in the cache, relu alone is slower for it: 0.18-0.22 ms against 0.08-0.10 for 6.4 MB in 32 MiB of
// cache. A training step is not: with 16 MiB as the least it took 77-80 ms against 73-76 (ResNet-18, width 16) and 261-275
// against 254-258 (width 32); by the time something reads the output, convolutions have pushed it out.
inline bool streams(const void* p, std::int64_t bytes) {
  constexpr std::int64_t least = 4 << 20;
  return bytes >= least && reinterpret_cast<std::uintptr_t>(p) % 64 == 0;
}

// To be called by every thread that streamed, before others may read what it wrote.
inline void finish_streaming() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace demp
