// Equal shares of work for torch's threads, with a number for each share, so that it can have counters of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace demp {

struct Shares {
  std::int64_t units, count;

  // `units` among the threads; none gets less than `grain` units, about what starting a thread is worth.
  Shares(std::int64_t units_, std::int64_t grain) : units(units_), count(1) {
    if (units > grain) {
      count = std::min<std::int64_t>(torch::stable::get_num_threads(), units / std::max<std::int64_t>(grain, 1));
    }
  }

  // share(i, begin, end) for each share i.
  template <class Share>
  void run(const Share& share) const {
    if (count == 1) {
      share(std::int64_t{0}, std::int64_t{0}, units);
      return;
    }
    torch::stable::parallel_for(0, count, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) share(i, start(i), start(i + 1));
    });
  }

 private:
  std::int64_t start(std::int64_t i) const { return units / count * i + std::min(i, units % count); }
};

}  // namespace demp
