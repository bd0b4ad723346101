// The forward kernel for channel rows: x as (outer, channels, inner), any sizes, any alignment.
//
// Memory is cut into long rows of `together` rows of channels * inner elements, as many as make a multiple of 8: every
// long row starts on a 16-byte word and on a whole byte of bits, whatever the width, and a thread that keeps its columns
// keeps its channels. Narrow networks need this: 13 channels in channels_last, planes of 7x7.
#pragma once

#include "ops/cuda/activation_common.cuh"

namespace demp {
namespace activation {

template <typename T>
struct Rows {
  const T* x;
  T* y;
  unsigned long long* active;
  std::uint8_t* mask;
  const std::int64_t* seed;
  std::int64_t elements;
  std::int64_t long_rows, columns;  // a long row has `columns` elements, in `together` rows
  std::int64_t channels, inner, together;
  int slots;  // counters of a block
  Scalars<Wide<T>> scalars;
};

// Where a column of a long row belongs.
struct Column {
  std::int64_t row, channel, place;  // row within the long row, channel, place among its `inner` elements
  template <typename T>
  static __device__ __forceinline__ Column of(std::int64_t column, const Rows<T>& r) {
    const std::int64_t width = r.channels * r.inner;
    if (r.columns <= 0xFFFFFFFF) {  // 64-bit divisions take a hundred instructions
      const std::uint32_t c = static_cast<std::uint32_t>(column), w = static_cast<std::uint32_t>(width);
      const std::uint32_t inner = static_cast<std::uint32_t>(r.inner), rest = c % w;
      return {c / w, rest / inner, rest % inner};
    }
    const std::int64_t rest = column % width;
    return {column / width, rest / r.inner, rest % r.inner};
  }
  // One column on.
  template <typename T>
  __device__ __forceinline__ void next(const Rows<T>& r) {
    place += 1;
    if (place == r.inner) {
      place = 0;
      channel += 1;
    }
    if (channel == r.channels) {
      channel = 0;
      row += 1;
    }
  }
  // The coordinate that noise depends on.
  template <typename T>
  __device__ __forceinline__ std::int64_t position(std::int64_t long_row, const Rows<T>& r) const {
    return (long_row * r.together + row) * r.inner + place;
  }
};

// A block's counters, for the channels from `first` on, round the end.
struct Slots {
  unsigned* counts;
  std::int64_t first, channels;
  __device__ __forceinline__ void add(std::int64_t channel, unsigned count) const {
    if (count) atomicAdd(&counts[channel < first ? channel - first + channels : channel - first], count);
  }
};

// y for the elements of one group; `start` is where its first element belongs.
template <typename T, Kind kind, Noise noise, int G>
__device__ __forceinline__ void row_values(Group<T, G>& x, Column start, std::int64_t long_row, const Rows<T>& r, std::uint64_t seed) {
  constexpr int kShared = noise == Noise::across ? 4 : 1;
#pragma unroll
  for (int i = 0; i < G; i += kShared) {
    const std::int64_t position = start.position(long_row, r);
    const std::uint32_t channel = static_cast<std::uint32_t>(start.channel);
    if constexpr (noise == Noise::none) {
      x.lane[i] = value_of<kind>(x.lane[i], r.scalars);
    } else if constexpr (noise == Noise::across) {
      const Normals n = normals(position / 4, channel, 0, seed);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x.lane[i + j] = value_of<kind>(x.lane[i + j], n.z[j], r.scalars);
        start.next(r);
      }
    } else {
      x.lane[i] = value_of<kind>(x.lane[i], normal(position, channel, 0, seed), r.scalars);
      start.next(r);
    }
  }
}

// M groups in the columns from `column` on: of long rows `row`, `row + apart`, ... All must be inside.
template <typename T, Kind kind, Noise noise, int G, int M>
__device__ __forceinline__ void row_groups(const Rows<T>& r, std::int64_t column, const Column& start, std::int64_t row,
                                           std::int64_t apart, std::uint64_t seed, unsigned (&active)[G]) {
  Group<T, G> x[M];
  const std::int64_t at = row * r.columns + column, step = apart * r.columns;
#pragma unroll
  for (int m = 0; m < M; ++m) x[m].load(r.x + at + m * step);
  unsigned bits[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    bits[m] = bits_of(x[m]);
#pragma unroll
    for (int i = 0; i < G; ++i) active[i] += bits[m] >> i & 1;
  }
  if constexpr (noise == Noise::down) {
#pragma unroll
    for (int i = 0; i < G; ++i) {
      const Normals n = normals(row / 4, static_cast<std::uint32_t>(column + i), 0, seed);
#pragma unroll
      for (int m = 0; m < M; ++m) x[m].lane[i] = value_of<kind>(x[m].lane[i], n.z[m], r.scalars);
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (noise != Noise::down) row_values<T, kind, noise, G>(x[m], start, row + m * apart, r, seed);
    x[m].store(r.y + at + m * step);
    if (noise != Noise::none && kind == Kind::linear) r.mask[(at + m * step) / 8] = static_cast<std::uint8_t>(bits[m]);
  }
}

// Up to G elements one by one: the last ones, and memory that is not aligned.
template <typename T, Kind kind, Noise noise, int G>
__device__ __forceinline__ void row_elements(const Rows<T>& r, std::int64_t column, Column here, std::int64_t row,
                                             std::uint64_t seed, const Slots& slots) {
  const std::int64_t at = row * r.columns + column;
  unsigned bits = 0;
#pragma unroll 1
  for (int i = 0; i < G && at + i < r.elements; ++i) {
    const T x = r.x[at + i];
    const unsigned active = is_active(to_wide(x));
    bits |= active << i;
    slots.add(here.channel, active);
    if constexpr (noise == Noise::none) {
      r.y[at + i] = value_of<kind>(x, r.scalars);
    } else {
      const float z = normal(here.position(row, r), static_cast<std::uint32_t>(here.channel), 0, seed);
      r.y[at + i] = value_of<kind>(x, z, r.scalars);
    }
    here.next(r);
  }
  if (noise != Noise::none && kind == Kind::linear && at < r.elements) r.mask[at / 8] = static_cast<std::uint8_t>(bits);
}

template <typename T, Kind kind, Noise noise>
__global__ void __launch_bounds__(kThreads, kMinBlocks) activation_rows(const Rows<T> r) {
  constexpr int G = kGroup<T, noise>, M = kAtOnce<kind, noise>;
  DEMP_DYNAMIC_SHARED(unsigned, counts);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < r.slots; i += threads) counts[i] = 0;
  __syncthreads();

  const std::int64_t block_column = std::int64_t{blockIdx.x} * blockDim.x * G, column = block_column + threadIdx.x * G;
  const Slots slots{counts, Column::of(block_column, r).channel, r.channels};
  if (column < r.columns) {
    const Column start = Column::of(column, r);
    const std::uint64_t seed = noise == Noise::none ? 0 : static_cast<std::uint64_t>(*r.seed);
    unsigned active[G] = {};
    // The rows of a thread: neighbours where they share noise, otherwise apart, so that a warp's loads lie together.
    const std::int64_t apart = noise == Noise::down ? 1 : blockDim.y, tile = std::int64_t{M} * blockDim.y;
    std::int64_t row = blockIdx.y * tile + threadIdx.y * (noise == Noise::down ? M : 1);
    for (; row < r.long_rows; row += gridDim.y * tile) {
      // The last group of the tile decides, so that all threads of a block go the same way.
      const bool whole = (row + (M - 1) * apart) * r.columns + column + G <= r.elements;
      if (!kScalarOnly<T> && r.scalars.aligned && whole) {
        if constexpr (!kScalarOnly<T>) row_groups<T, kind, noise, G, M>(r, column, start, row, apart, seed, active);
        continue;
      }
#pragma unroll 1
      for (std::int64_t here = row; here < row + M * apart && here < r.long_rows; here += apart) {
        const bool vector = !kScalarOnly<T> && noise != Noise::down && r.scalars.aligned;
        if (vector && here * r.columns + column + G <= r.elements) {
          if constexpr (!kScalarOnly<T> && noise != Noise::down) {
            row_groups<T, kind, noise, G, 1>(r, column, start, here, apart, seed, active);
          }
        } else {
          row_elements<T, kind, noise, G>(r, column, start, here, seed, slots);
        }
      }
    }
    Column here = start;
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < G; ++i) {
      const std::int64_t channel = here.channel;
      sum += active[i];
      here.next(r);
      if (i == G - 1 || here.channel != channel) {
        slots.add(channel, sum);
        sum = 0;
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < r.slots; i += threads) {
    const std::int64_t channel = slots.first + i < r.channels ? slots.first + i : slots.first + i - r.channels;
    if (counts[i]) atomicAdd(&r.active[channel], static_cast<unsigned long long>(counts[i]));
  }
}

template <typename T, Kind kind, Noise noise>
void launch_rows(const ActivationForward& a, const Scalars<Wide<T>>& scalars, cudaStream_t stream) {
  constexpr int G = kGroup<T, noise>;
  const std::int64_t width = a.channels * a.inner;
  std::int64_t together = 1;
  while (together * width % 8 != 0) together *= 2;
  const std::int64_t columns = together * width, long_rows = ceil_div(a.outer, together), groups = columns / G;
  // As many columns as fit into a block, shared out evenly, and as many rows beside each other as fill it.
  const std::int64_t blocks_x = ceil_div<std::int64_t>(groups, kThreads);
  const unsigned threads_x = static_cast<unsigned>(ceil_div(groups, blocks_x)), threads_y = kThreads / threads_x;
  const int slots = static_cast<int>(std::min<std::int64_t>(a.channels, std::int64_t{threads_x} * G / a.inner + 2));
  const std::int64_t useful = ceil_div<std::int64_t>(long_rows, std::int64_t{threads_y} * kAtOnce<kind, noise>);
  const unsigned blocks_y = clamp_grid(std::min(useful, ceil_div(wanted_blocks(), blocks_x)), kMaxGridY);
  const Rows<T> r{static_cast<const T*>(a.x), static_cast<T*>(a.y), reinterpret_cast<unsigned long long*>(a.active), a.mask, a.seed,
                  a.outer * width, long_rows, columns, a.channels, a.inner, together, slots, scalars};
  DEMP_LAUNCH((activation_rows<T, kind, noise>), dim3(static_cast<unsigned>(blocks_x), blocks_y), dim3(threads_x, threads_y),
              sizeof(unsigned) * slots, stream, r);
}

}  // namespace activation
}  // namespace demp
