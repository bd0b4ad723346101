// grad_x = grad * act'(x), flat over memory: grad and saved (or a bit an element) read once, grad_x written once.
#pragma once

#include "ops/cuda/activation_common.cuh"

namespace demp {
namespace activation {

template <typename T>
struct Flat {
  const T* grad;
  const T* saved;
  const std::uint8_t* mask;
  T* result;
  std::int64_t elements, groups;
  Scalars<Wide<T>> scalars;
};

template <Kind kind, typename T>
__device__ __forceinline__ T gradient_of(T grad, T saved, bool live, const Scalars<Wide<T>>& s) {
  if (kind == Kind::smooth) return to_narrow<T>(to_wide(grad) * derivative(s.act, to_wide(saved)));
  return live ? grad : to_narrow<T>(below_zero(s.act, to_wide(grad), s.slope));
}

// M groups, `apart` groups from each other.
template <typename T, Kind kind, bool from_bits, int G, int M>
__device__ __forceinline__ void backward_groups(const Flat<T>& f, std::int64_t at, std::int64_t apart) {
  Group<T, G> grad[M], saved[M];
  unsigned bits[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    grad[m].load(f.grad + at + m * apart * G);
    if (from_bits) bits[m] = f.mask[at / 8 + m * apart];
    else saved[m].load(f.saved + at + m * apart * G);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < G; ++i) {
      T& g = grad[m].lane[i];
      const bool live = from_bits ? bits[m] >> i & 1 : is_active(to_wide(saved[m].lane[i]));
      g = gradient_of<kind>(g, saved[m].lane[i], live, f.scalars);
    }
    grad[m].store(f.result + at + m * apart * G);
  }
}

template <typename T, Kind kind, bool from_bits>
__global__ void __launch_bounds__(kThreads, kMinBlocks) activation_backward(const Flat<T> f) {
  constexpr int G = from_bits ? 8 : kPerWord<T>, M = kAtOnce<kind, Noise::none>;
  for (std::int64_t tile = blockIdx.x; tile * M * kThreads < f.groups; tile += gridDim.x) {
    const std::int64_t first = (tile * M * kThreads + threadIdx.x) * G;
    if constexpr (!kScalarOnly<T>) {
      if (f.scalars.aligned && (tile + 1) * M * kThreads * G <= f.elements) {
        backward_groups<T, kind, from_bits, G, M>(f, first, kThreads);
        continue;
      }
    }
#pragma unroll 1
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = first + std::int64_t{m} * kThreads * G;
      const std::int64_t end = at + G < f.elements ? at + G : f.elements;
#pragma unroll 1
      for (std::int64_t i = at; i < end; ++i) {
        const T saved = from_bits ? T{} : f.saved[i];
        const bool live = from_bits ? f.mask[i / 8] >> (i % 8) & 1 : is_active(to_wide(saved));
        f.result[i] = gradient_of<kind>(f.grad[i], saved, live, f.scalars);
      }
    }
  }
}

template <typename T, Kind kind, bool from_bits>
void launch_backward(const ActivationBackward& a, cudaStream_t stream) {
  constexpr int G = from_bits ? 8 : kPerWord<T>, M = kAtOnce<kind, Noise::none>;
  const bool aligned = is_aligned(a.grad, 16) && is_aligned(a.result, 16) && (from_bits || is_aligned(a.saved, 16));
  const Flat<T> f{static_cast<const T*>(a.grad), static_cast<const T*>(a.saved), a.mask, static_cast<T*>(a.result),
                  a.elements, ceil_div<std::int64_t>(a.elements, G), {a.act, a.slope, 0.0, aligned}};
  const std::int64_t useful = ceil_div<std::int64_t>(f.groups, kThreads * M);
  DEMP_LAUNCH((activation_backward<T, kind, from_bits>), clamp_grid(std::min(useful, wanted_blocks()), kMaxGridX), kThreads, 0,
              stream, f);
}

}  // namespace activation
}  // namespace demp
