// Between the passes of norm_act: a channel's parts become its statistics, or the gradients of its parameters.
#pragma once

#include "ops/cuda/norm_act_walk.cuh"

namespace demp {
namespace norm_act {

constexpr unsigned kCombineChannels = 8, kCombineRows = 32;  // of a block: 32 bytes of every row of parts

struct MergeMoments {
  static __device__ __forceinline__ void merge(Part<double, 3>& a, const Part<double, 3>& b) { merge_moments(a, b); }
};
struct AddSums {
  static __device__ __forceinline__ void merge(Part<double, 2>& a, const Part<double, 2>& b) {
    a.v[0] += b.v[0];
    a.v[1] += b.v[1];
  }
};

// All parts of channel c, in double; the first row of threads gets them.
template <typename Rule, int N, typename W>
__device__ __forceinline__ Part<double, N> combined(const W* partial, std::int64_t splits, std::int64_t c, std::int64_t channels) {
  Part<double, N> all[1] = {};
  for (std::int64_t split = threadIdx.y; c < channels && split < splits; split += kCombineRows) {
    Part<double, N> part;
#pragma unroll
    for (int i = 0; i < N; ++i) part.v[i] = partial[(i * splits + split) * channels + c];
    Rule::merge(all[0], part);
  }
  merge_down<Rule>(all);
  return all[0];
}

template <typename W>
struct Moments {
  const W* partial;
  std::int64_t splits, channels, inner;
  ChannelValues x;  // its first elements were taken off
  W *mean, *var;
  std::int64_t* active;  // set to 0, for the next pass to count in
};

template <typename W>
__global__ void __launch_bounds__(kThreads) norm_act_moments(const Moments<W> a) {
  const std::int64_t c = std::int64_t{blockIdx.x} * kCombineChannels + threadIdx.x;
  const Part<double, 3> all = combined<MergeMoments, 3>(a.partial, a.splits, c, a.channels);
  if (threadIdx.y != 0 || c >= a.channels) return;
  const bool any = a.splits > 0;
  a.mean[c] = any ? static_cast<W>(read<double>(a.x, c * a.inner) + all.v[1]) : W(0);
  const W var = any ? static_cast<W>(all.v[2] / all.v[0]) : W(0);
  // NaN where it is infinite: divided by that, z would be the bias, and a unit that diverged could look dead.
  a.var[c] = var + (var - var);
  a.active[c] = 0;
}

template <typename W>
struct Gradients {
  const W* partial;
  std::int64_t splits, channels;
  const W* var;
  double eps;
  W* totals;  // (2, channels)
  ChannelValues grad_weight, grad_bias;
};

template <typename W>
__global__ void __launch_bounds__(kThreads) norm_act_gradients(const Gradients<W> a) {
  const std::int64_t c = std::int64_t{blockIdx.x} * kCombineChannels + threadIdx.x;
  const Part<double, 2> all = combined<AddSums, 2>(a.partial, a.splits, c, a.channels);
  if (threadIdx.y != 0 || c >= a.channels) return;
  a.totals[c] = static_cast<W>(all.v[0]);
  a.totals[a.channels + c] = static_cast<W>(all.v[1]);
  write(a.grad_bias, c, all.v[0]);
  write(a.grad_weight, c, all.v[1] / std::sqrt(a.var[c] + a.eps));
}

inline dim3 combine_block() { return dim3(kCombineChannels, kCombineRows); }
inline unsigned combine_grid(std::int64_t channels) {
  return static_cast<unsigned>(ceil_div<std::int64_t>(channels, kCombineChannels));
}

// The mask of rows whose length is no multiple of 8, where a byte has bits of two rows: a thread a byte, after the others.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_act_bits(const Normalise<T, Kind::linear> pass, std::uint8_t* mask,
                                                         std::int64_t elements, std::int64_t channels) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads * 8;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < elements; at += step) {
    std::int64_t c = at % channels;
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < 8 && at + i < elements; ++i) {
      const Wide<T> z = pass.channel(c)(to_wide(pass.x[at + i])) + to_wide(pass.residual[at + i]);
      bits |= static_cast<unsigned>(is_active(z)) << i;
      c = c + 1 == channels ? 0 : c + 1;
    }
    mask[at / 8] = static_cast<std::uint8_t>(bits);
  }
}

}  // namespace norm_act
}  // namespace demp
