// One launch for a whole list of tensors: a table of them is the kernel's argument, so that it is captured by value in a
// CUDA graph and costs no copy to the device. Work is cut into tiles; a block takes tiles one after another and looks up
// which tensor each is of.
#pragma once

#include <type_traits>
#include <vector>

#include "ops/cuda/device.cuh"

namespace demp {

// Entry must have `std::int64_t first_tile`; entries are in its order, and tile 0 is the first of entry 0.
template <typename Entry, int capacity>
struct TensorList {
  int count;
  std::int64_t tiles;
  Entry entry[capacity];
};

// An argument may have 32764 bytes (nvcc 12.1 on); most lists are short, and a short table is a cheaper launch.
constexpr int kArgumentBytes = 32000;
template <typename Entry>
constexpr int kLongList = kArgumentBytes / static_cast<int>(sizeof(Entry));
template <typename Entry>
constexpr int kShortList = 2048 / static_cast<int>(sizeof(Entry));

template <typename Entry, int capacity>
__device__ __forceinline__ const Entry& entry_of(const TensorList<Entry, capacity>& list, std::int64_t tile) {
  int low = 0, high = list.count;  // the last entry that does not begin after `tile` is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.entry[middle].first_tile <= tile ? low : high) = middle;
  }
  return list.entry[low];
}

// Calls run(list) for as many lists as the entries fill; `tiles_of(entry)` says how many tiles an entry has.
template <typename Entry, typename TilesOf, typename Run>
void for_each_list(const std::vector<Entry>& entries, const TilesOf& tiles_of, const Run& run) {
  auto fill = [&](auto& list, std::size_t begin, std::size_t end) {
    list.count = static_cast<int>(end - begin);
    list.tiles = 0;
    for (std::size_t i = begin; i < end; ++i) {
      Entry& entry = list.entry[i - begin];
      entry = entries[i];
      entry.first_tile = list.tiles;
      list.tiles += tiles_of(entry);
    }
    if (list.tiles > 0) run(list);
  };
  for (std::size_t begin = 0; begin < entries.size(); begin += kLongList<Entry>) {
    const std::size_t end = std::min<std::size_t>(entries.size(), begin + kLongList<Entry>);
    if (end - begin <= static_cast<std::size_t>(kShortList<Entry>)) {
      TensorList<Entry, kShortList<Entry>> list;
      fill(list, begin, end);
    } else {
      TensorList<Entry, kLongList<Entry>> list;
      fill(list, begin, end);
    }
  }
}

// A divisor below 2^31, for numerators below 2^31: a multiplication and a shift instead of twenty instructions.
// (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.)
struct Divisor {
  std::uint32_t value, multiplier, shift;

  static Divisor of(std::int64_t d) {
    std::uint32_t shift = 0;
    while ((std::int64_t{1} << shift) < d) ++shift;
    const std::uint64_t excess = (std::uint64_t{1} << shift) - static_cast<std::uint64_t>(d);
    return {static_cast<std::uint32_t>(d), static_cast<std::uint32_t>((excess << 32) / static_cast<std::uint64_t>(d) + 1), shift};
  }
  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  // n / value, and n becomes n % value.
  __device__ __forceinline__ std::uint32_t divide(std::uint32_t& n) const {
    const std::uint32_t q = quotient(n);
    n -= q * value;
    return q;
  }
};

}  // namespace demp
