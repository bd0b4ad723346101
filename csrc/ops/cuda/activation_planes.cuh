// The forward kernel for channel planes: x as (outer, channels, inner), inner a multiple of 8, memory aligned.
#pragma once

#include "ops/cuda/activation_common.cuh"

namespace demp {
namespace activation {

template <typename T>
struct Planes {
  const T* x;
  T* y;
  unsigned long long* active;
  std::uint8_t* mask;
  const std::int64_t* seed;
  std::int64_t outer, channels, inner;
  std::int64_t groups;                    // of a plane
  std::int64_t step_planes, step_groups;  // what the grid moves on by: step_planes * groups + step_groups
  Scalars<Wide<T>> scalars;
};

// Walks the groups of one channel without a division a step.
struct PlaneWalk {
  std::int64_t plane, group;
  template <typename T>
  __device__ __forceinline__ void next(const Planes<T>& p) {
    plane += p.step_planes;
    group += p.step_groups;
    if (group >= p.groups) {
      group -= p.groups;
      plane += 1;
    }
  }
};

// The active elements of M groups, `here` being the first; all of them must be inside. `here` is left behind the last.
template <typename T, Kind kind, Noise noise, int G, int M>
__device__ __forceinline__ unsigned plane_groups(const Planes<T>& p, PlaneWalk& here, std::uint64_t seed) {
  const std::int64_t channel = blockIdx.x;
  Group<T, G> x[M];
  std::int64_t at[M], position[M];
  unsigned count = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    position[m] = here.plane * p.inner + here.group * G;
    at[m] = (here.plane * p.channels + channel) * p.inner + here.group * G;
    x[m].load(p.x + at[m]);
    here.next(p);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const unsigned bits = bits_of(x[m]);
    count += __popc(bits);
    if constexpr (noise == Noise::none) {
#pragma unroll
      for (int i = 0; i < G; ++i) x[m].lane[i] = value_of<kind>(x[m].lane[i], p.scalars);
    } else {
#pragma unroll
      for (int i = 0; i < G; i += 4) {
        const Normals n = normals((position[m] + i) / 4, static_cast<std::uint32_t>(channel), 0, seed);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[m].lane[i + j] = value_of<kind>(x[m].lane[i + j], n.z[j], p.scalars);
      }
      if (kind == Kind::linear) p.mask[at[m] / 8] = static_cast<std::uint8_t>(bits);
    }
    x[m].store(p.y + at[m]);
  }
  return count;
}

// The sum of a count over the block, added to the channel's total.
__device__ __forceinline__ void add_block_count(unsigned count, unsigned long long* total) {
  DEMP_SHARED_ARRAY(unsigned, of_warp, kThreads / kWarp);
#pragma unroll
  for (int delta = kWarp / 2; delta > 0; delta /= 2) count += __shfl_down_sync(kAllLanes, count, delta);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long sum = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += of_warp[w];
    if (sum) atomicAdd(total, sum);
  }
}

template <typename T, Kind kind, Noise noise>
__global__ void __launch_bounds__(kThreads, kMinBlocks) activation_planes(const Planes<T> p) {
  constexpr int G = kGroup<T, noise>, M = kAtOnce<kind, noise>;
  const std::int64_t first = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  PlaneWalk here{first / p.groups, first % p.groups};
  const std::uint64_t seed = noise == Noise::none ? 0 : static_cast<std::uint64_t>(*p.seed);
  unsigned count = 0;
  // M steps move on by less than M (step_planes + 1) planes.
  while (here.plane + (M - 1) * (p.step_planes + 1) < p.outer) count += plane_groups<T, kind, noise, G, M>(p, here, seed);
#pragma unroll 1
  while (here.plane < p.outer) count += plane_groups<T, kind, noise, G, 1>(p, here, seed);
  add_block_count(count, p.active + blockIdx.x);
}

// From 64 words a plane on: below that a block would take in several planes at once, which the rows kernel does better.
template <typename T>
bool suits_planes(const ActivationForward& a) {
  return a.inner % 8 == 0 && a.inner >= 64 * kPerWord<T> && a.channels <= kMaxGridX;
}

template <typename T, Kind kind, Noise noise>
void launch_planes(const ActivationForward& a, const Scalars<Wide<T>>& scalars, cudaStream_t stream) {
  constexpr int G = kGroup<T, noise>;
  const std::int64_t plane_groups = a.inner / G, groups = plane_groups * a.outer;  // of a plane, of a channel
  const std::int64_t threads = std::min<std::int64_t>(kThreads, ceil_div<std::int64_t>(groups, kWarp) * kWarp);
  const std::int64_t useful = ceil_div(groups, threads * kAtOnce<kind, noise>);
  const unsigned splits = clamp_grid(std::min(useful, ceil_div(wanted_blocks(), a.channels)), kMaxGridY);
  const std::int64_t step = threads * splits;
  const Planes<T> p{static_cast<const T*>(a.x), static_cast<T*>(a.y), reinterpret_cast<unsigned long long*>(a.active), a.mask, a.seed,
                    a.outer, a.channels, a.inner, plane_groups, step / plane_groups, step % plane_groups, scalars};
  DEMP_LAUNCH((activation_planes<T, kind, noise>), dim3(static_cast<unsigned>(a.channels), splits),
              static_cast<unsigned>(threads), 0, stream, p);
}

}  // namespace activation
}  // namespace demp
