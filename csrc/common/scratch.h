// Memory for one share's work.
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

}  // namespace demp
