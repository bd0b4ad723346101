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

}  // namespace demp
