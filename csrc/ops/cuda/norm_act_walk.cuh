// Walks a pass (norm_act_passes.cuh) over memory, and reduces what it sums up.
//
//   planes  a block stays in one channel and walks its planes; parts are merged by shuffles. For contiguous tensors.
//   rows    a thread keeps G neighbouring channels and walks down the rows, as many threads beside each other as make
//           128 bytes; parts are merged through shared memory. For channels innermost.
//
// G is a 16-byte word where memory is aligned and planes (rows: channels) are whole words, otherwise 1: then a warp still
// reads a whole stretch of memory, with more instructions.
//
// Every order of merging is fixed and no float is added atomically: on one device the same input gives the same bits.
#pragma once

#include "ops/cuda/norm_act_passes.cuh"

namespace demp {
namespace norm_act {

constexpr int kColumns = 64;  // channels of a block of rows at most

struct Planes {
  std::int64_t outer, channels, inner;
  std::int64_t stride_bits;               // bits of a plane in the mask: whole bytes
  std::int64_t groups;                    // of a plane, with those that fill up its last byte where bits are written
  std::int64_t step_planes, step_groups;  // what the grid moves on by: step_planes * groups + step_groups
};

template <typename Pass, typename P>
__device__ __forceinline__ void merge_block(P& mine) {
  DEMP_SHARED_ARRAY(P, of_warp, kThreads / kWarp);
#pragma unroll
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    P other = mine;
#pragma unroll
    for (auto& v : other.v) v = __shfl_down_sync(kAllLanes, v, static_cast<unsigned>(delta));
    Pass::merge(mine, other);
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) Pass::merge(mine, of_warp[w]);
  }
}

template <typename Pass, int G>
__global__ void __launch_bounds__(kThreads, kMinBlocks) norm_act_planes(const Pass pass, const Planes p) {
  constexpr int M = Pass::template kAtOnce<G>;
  const std::int64_t c = blockIdx.x, first = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  const typename Pass::Channel channel[1] = {pass.channel(c)};
  typename Pass::template Sums<1> sums{};
  std::int64_t plane = first / p.groups, group = first % p.groups;
  while (plane < p.outer) {
    Places<M> here;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const std::int64_t place = group * G;
      here.valid[m] = plane < p.outer && place < p.inner;
      here.at[m] = here.valid[m] ? (plane * p.channels + c) * p.inner + place : c * p.inner;
      here.bit[m] = here.valid[m] ? (plane * p.channels + c) * p.stride_bits + place : 0;
      here.position[m] = plane * p.inner + place;
      plane += p.step_planes;
      group += p.step_groups;
      if (group >= p.groups) {
        group -= p.groups;
        plane += 1;
      }
    }
    pass.template step<G>(here, c, channel, sums);
  }
  if constexpr (Pass::kReduces) {
    typename Pass::Part part = pass.part(sums, 0);
    merge_block<Pass>(part);
    if (threadIdx.x == 0) pass.finish(part, c, p.channels);
  }
}

// Merges the parts of threads below each other; the first row of threads gets them. blockDim.y is a power of two.
template <typename Pass, int G, typename P>
__device__ __forceinline__ void merge_down(P (&mine)[G]) {
  DEMP_SHARED_ARRAY(P, parts, kThreads * G);
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y >= half && threadIdx.y < 2 * half) {
#pragma unroll
      for (int i = 0; i < G; ++i) parts[i * kThreads + thread] = mine[i];
    }
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int i = 0; i < G; ++i) Pass::merge(mine[i], parts[i * kThreads + thread + half * blockDim.x]);
    }
  }
}

template <typename Pass, int G>
__global__ void __launch_bounds__(kThreads, kMinBlocks) norm_act_rows(const Pass pass, std::int64_t rows, std::int64_t channels) {
  constexpr int M = Pass::template kAtOnce<G>;
  // Through shared memory, not G times by every thread: with its divisions and types it is 30,000 instructions for G = 8.
  DEMP_SHARED_ARRAY(typename Pass::Channel, channels_of_block, kColumns);
  const std::int64_t block_c = std::int64_t{blockIdx.x} * blockDim.x * G, c = block_c + threadIdx.x * G;
#pragma unroll 1
  for (unsigned i = threadIdx.y * blockDim.x + threadIdx.x; i < blockDim.x * G; i += blockDim.x * blockDim.y) {
    if (block_c + i < channels) channels_of_block[i] = pass.channel(block_c + i);
  }
  __syncthreads();
  typename Pass::template Sums<G> sums{};
  if (c < channels) {
    typename Pass::Channel channel[G];
#pragma unroll
    for (int i = 0; i < G; ++i) channel[i] = channels_of_block[threadIdx.x * G + i];
    const std::int64_t tile = std::int64_t{M} * blockDim.y;
    for (std::int64_t row = blockIdx.y * tile + threadIdx.y; row < rows; row += gridDim.y * tile) {
      Places<M> here;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        here.position[m] = row + std::int64_t{m} * blockDim.y;
        here.valid[m] = here.position[m] < rows;
        here.at[m] = here.bit[m] = here.valid[m] ? here.position[m] * channels + c : c;
      }
      pass.template step<G>(here, c, channel, sums);
    }
  }
  if constexpr (Pass::kReduces) {
    typename Pass::Part parts[G];
#pragma unroll
    for (int i = 0; i < G; ++i) parts[i] = pass.part(sums, i);
    merge_down<Pass>(parts);
    if (threadIdx.y == 0 && c < channels) {
#pragma unroll
      for (int i = 0; i < G; ++i) pass.finish(parts[i], c + i, channels);
    }
  }
}

// ---- launches --------------------------------------------------------------------------------------------------

// The most parts a channel's sums come in: what workspaces are sized by.
inline std::int64_t max_splits(const NormActShape& s) {
  const std::int64_t beside = s.rows ? ceil_div<std::int64_t>(s.channels, kColumns) : s.channels;
  return std::max<std::int64_t>(1, ceil_div(wanted_blocks(), std::max<std::int64_t>(1, beside)));
}

inline unsigned splits_of(const NormActShape& s, std::int64_t useful, std::int64_t beside) {
  return clamp_grid(std::min({useful, ceil_div(wanted_blocks(), beside), max_splits(s)}), kMaxGridY);
}

// Returns how many parts the sums come in. with_bits: the pass writes a mask.
template <int G, typename Pass>
unsigned launch_pass(const Pass& pass, const NormActShape& s, bool with_bits, cudaStream_t stream) {
  constexpr int M = Pass::template kAtOnce<G>;
  if (s.rows) {
    const std::int64_t groups = s.channels / G;
    const unsigned x = static_cast<unsigned>(std::min<std::int64_t>(groups, G == 1 ? 32 : 8));
    unsigned y = 1;
    while (2 * x * y <= kThreads) y *= 2;
    const std::int64_t beside = ceil_div<std::int64_t>(groups, x);
    const unsigned splits = splits_of(s, ceil_div<std::int64_t>(s.outer, std::int64_t{y} * M), beside);
    DEMP_LAUNCH((norm_act_rows<Pass, G>), dim3(static_cast<unsigned>(beside), splits), dim3(x, y), 0, stream, pass, s.outer, s.channels);
    return splits;
  }
  const std::int64_t padded = ceil_div<std::int64_t>(s.inner, 8) * 8, plane_groups = (with_bits ? padded : s.inner) / G;
  const std::int64_t groups = plane_groups * s.outer;  // of a channel
  const std::int64_t threads = std::min<std::int64_t>(kThreads, ceil_div<std::int64_t>(groups, kWarp) * kWarp);
  const unsigned splits = splits_of(s, ceil_div(groups, threads * M), s.channels);
  const std::int64_t step = threads * splits;
  const Planes planes{s.outer, s.channels, s.inner, padded, plane_groups, step / plane_groups, step % plane_groups};
  DEMP_LAUNCH((norm_act_planes<Pass, G>), dim3(static_cast<unsigned>(s.channels), splits), static_cast<unsigned>(threads), 0,
              stream, pass, planes);
  return splits;
}

template <typename T>
bool suits_words(const NormActShape& s, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (!is_aligned(p, 16)) return false;
  }
  return (s.rows ? s.channels : s.inner) % kPerWord<T> == 0;
}

}  // namespace norm_act
}  // namespace demp
