// Work for torch's threads, and equal shares of it with a number for each, so that it can have counters of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace demp {

// Threads to share work among.
inline std::int64_t thread_count() {
#if defined(__SANITIZE_THREAD__)
  return std::max<std::int64_t>(4, torch::stable::get_num_threads());  // several where torch itself is kept to one
#else
  return torch::stable::get_num_threads();
#endif
}

// body(begin, end) for pieces of [begin, end) of at least `grain`, on torch's threads.
template <class Body>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see the barriers of torch's OpenMP, which is not built for it, and would report every share
  // as a race with what comes after the loop. Nor would small tensors show a race, if they were not cut up too.
  (void)grain;
  const std::int64_t count = std::min(thread_count(), end - begin);
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t first = begin + (end - begin) * i / count, last = begin + (end - begin) * (i + 1) / count;
    threads.emplace_back([&body, first, last] { body(first, last); });
  }
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(begin, end, grain, body);
#endif
}

struct Shares {
  std::int64_t units, count;

  // `units` among the threads; none gets less than `grain` units, about what starting a thread is worth.
  Shares(std::int64_t units_, std::int64_t grain) : units(units_), count(1) {
#if defined(__SANITIZE_THREAD__)
    grain = 1;  // as above
#endif
    if (units > grain) {
      count = std::min(thread_count(), units / std::max<std::int64_t>(grain, 1));
    }
  }

  // share(i, begin, end) for each share i.
  template <class Share>
  void run(const Share& share) const {
    if (count == 1) {
      share(std::int64_t{0}, std::int64_t{0}, units);
      return;
    }
    parallel_for(0, count, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) share(i, start(i), start(i + 1));
    });
  }

 private:
  std::int64_t start(std::int64_t i) const { return units / count * i + std::min(i, units % count); }
};

}  // namespace demp
