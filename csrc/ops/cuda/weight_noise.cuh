// weight noise on a GPU: t += std * live[row] * xi over a list of tensors of one type, in one launch. What it computes is
// in demp_kernels/ops/weight_noise.py.
//
// Four consecutive rows of a column share a Philox call. A thread takes such a quad of rows, one 16-byte word wide where
// the tensor allows it and one element wide otherwise. Quads without a live row are neither read nor written.
#pragma once

#include <vector>

#include "ops/cuda/noise.cuh"
#include "ops/cuda/tensor_list.cuh"

namespace demp {

struct NoisyWeight {
  void* data;
  const bool* live;           // nullptr: all rows
  std::int64_t rows, columns;  // memory is (rows, columns)
  std::int64_t taps;          // memory columns are (taps, columns / taps), logical ones (columns / taps, taps)
  std::int64_t first_tile;
  std::uint32_t stream;
  bool words;  // columns and data are multiples of 16 bytes
};

namespace weight_noise {

constexpr int kThreads = 256;

// One quad of rows, N columns from `column` on.
template <typename T, int N>
__device__ __forceinline__ void add_noise(const NoisyWeight& w, std::int64_t quad, std::int64_t column, Wide<T> std_, std::uint64_t seed) {
  bool live[4], any = false;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const std::int64_t row = 4 * quad + m;
    live[m] = row < w.rows && (!w.live || w.live[row]);
    any = any || live[m];
  }
  if (!any) return;
  T* const data = static_cast<T*>(w.data) + 4 * quad * w.columns + column;
  T x[4][N];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    if (!live[m]) continue;
    if constexpr (N > 1) {
      const uint4 word = *reinterpret_cast<const uint4*>(data + m * w.columns);
      std::memcpy(x[m], &word, 16);
    } else {
      x[m][0] = data[m * w.columns];
    }
  }
  const std::int64_t channels = w.columns / w.taps;
  std::int64_t tap = w.taps == 1 ? 0 : column / channels, channel = column - tap * channels;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Normals n = normals(quad, static_cast<std::uint32_t>(channel * w.taps + tap), w.stream, seed);
#pragma unroll
    for (int m = 0; m < 4; ++m) x[m][i] = to_narrow<T>(to_wide(x[m][i]) + std_ * n.z[m]);
    channel += 1;
    if (channel == channels) {
      channel = 0;
      tap += 1;
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    if (!live[m]) continue;
    if constexpr (N > 1) {
      uint4 word;
      std::memcpy(&word, x[m], 16);
      store_word(data + m * w.columns, word);
    } else {
      data[m * w.columns] = x[m][0];
    }
  }
}

template <typename T, int capacity>
__global__ void __launch_bounds__(kThreads) weight_noise_rows(const __grid_constant__ TensorList<NoisyWeight, capacity> list,
                                                               Wide<T> std_, const std::int64_t* seed_at) {
  const std::uint64_t seed = static_cast<std::uint64_t>(*seed_at);
  for (std::int64_t tile = blockIdx.x; tile < list.tiles; tile += gridDim.x) {
    const NoisyWeight& w = entry_of(list, tile);
    const std::int64_t item = (tile - w.first_tile) * kThreads + threadIdx.x;
    const std::int64_t across = w.words ? w.columns / kPerWord<T> : w.columns;
    const std::int64_t quad = item / across, place = item - quad * across;
    if (4 * quad >= w.rows) continue;
    if (w.words) add_noise<T, kPerWord<T>>(w, quad, place * kPerWord<T>, std_, seed);
    else add_noise<T, 1>(w, quad, place, std_, seed);
  }
}

template <typename T>
void launch(const std::vector<NoisyWeight>& weights, double std_, const std::int64_t* seed, cudaStream_t stream) {
  std::vector<NoisyWeight> usable;
  for (NoisyWeight w : weights) {
    w.words = w.columns % kPerWord<T> == 0 && is_aligned(w.data, 16);
    if (w.rows * w.columns > 0) usable.push_back(w);
  }
  auto tiles_of = [](const NoisyWeight& w) {
    return ceil_div<std::int64_t>(ceil_div<std::int64_t>(w.rows, 4) * (w.words ? w.columns / kPerWord<T> : w.columns), kThreads);
  };
  for_each_list(usable, tiles_of, [&](const auto& list) {
    constexpr int capacity = sizeof(list.entry) / sizeof(NoisyWeight);
    // Eight blocks a multiprocessor are resident; a few more even out tiles of unequal work.
    const std::int64_t blocks = std::min<std::int64_t>(list.tiles, std::int64_t{32} * multiprocessors());
    DEMP_LAUNCH((weight_noise_rows<T, capacity>), static_cast<unsigned>(blocks), kThreads, 0, stream, list,
                static_cast<Wide<T>>(std_), seed);
  });
}

}  // namespace weight_noise

inline void launch_weight_noise(ElementType type, const std::vector<NoisyWeight>& weights, double std_,
                                const std::int64_t* seed, cudaStream_t stream) {
  switch (type) {
    case ElementType::float32: return weight_noise::launch<float>(weights, std_, seed, stream);
    case ElementType::float64: return weight_noise::launch<double>(weights, std_, seed, stream);
    case ElementType::bfloat16: return weight_noise::launch<__nv_bfloat16>(weights, std_, seed, stream);
    case ElementType::float16: return weight_noise::launch<__half>(weights, std_, seed, stream);
  }
}

}  // namespace demp
