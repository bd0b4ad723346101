// activation on a GPU: y = act(x) + noise on the active elements, the active elements of each channel, their bits, in one
// pass: x is read once, y (and a bit an element) written once. What it computes is in demp_kernels/ops/activation.py.
//
// Memory is (outer, channels, inner). Two shapes of kernel:
//   planes  (activation_planes.cuh) a block stays in one channel and walks its planes, stretches of `inner` elements;
//           counts are reduced over the block: one atomic a block. For planes of whole 16-byte words, long enough to
//           keep a block busy.
//   rows    (activation_rows.cuh) everything else, channels_last above all (inner = 1): a thread keeps its columns and
//           walks down the rows with counters in registers; one atomic a channel a block.
// The backward pass knows no channels and is flat (activation_backward.cuh).
//
// Counts are integer sums, so the order of atomics does not change them. Nothing synchronises with the host and the seed is
// read on the device: launches can be captured in a CUDA graph.
#pragma once

#include "ops/cuda/activation_backward.cuh"
#include "ops/cuda/activation_planes.cuh"
#include "ops/cuda/activation_rows.cuh"

namespace demp {
namespace activation {

template <typename T, Kind kind>
void launch_forward(const ActivationForward& a, cudaStream_t stream) {
  const Scalars<Wide<T>> scalars(a.act, a.slope, a.noise_std, is_aligned(a.x, 16) && is_aligned(a.y, 16));
  const bool noisy = a.seed != nullptr;
  // float64 and smooth activations with noise are rare: one kernel that can do everything is enough for them, where each
  // more of these would take as long to compile as all kernels without noise.
  if constexpr (kScalarOnly<T> || kind == Kind::smooth) {
    if (noisy) return launch_rows<T, kind, Noise::single>(a, scalars, stream);
  }
  if constexpr (!kScalarOnly<T>) {
    const bool planes = suits_planes<T>(a) && scalars.aligned;
    if constexpr (kind == Kind::linear) {
      if (noisy && planes) return launch_planes<T, kind, Noise::across>(a, scalars, stream);
      if (noisy && a.inner == 1 && a.channels % 8 == 0) return launch_rows<T, kind, Noise::down>(a, scalars, stream);
      if (noisy && a.inner % 4 == 0) return launch_rows<T, kind, Noise::across>(a, scalars, stream);
      if (noisy) return launch_rows<T, kind, Noise::single>(a, scalars, stream);
    }
    if (planes) return launch_planes<T, kind, Noise::none>(a, scalars, stream);
  }
  launch_rows<T, kind, Noise::none>(a, scalars, stream);
}

template <typename T>
void launch_of_type(const ActivationForward& a, cudaStream_t stream) {
  kind_of(a.act) == Kind::linear ? launch_forward<T, Kind::linear>(a, stream) : launch_forward<T, Kind::smooth>(a, stream);
}

template <typename T>
void launch_of_type(const ActivationBackward& a, cudaStream_t stream) {
  if (kind_of(a.act) == Kind::smooth) return launch_backward<T, Kind::smooth, false>(a, stream);
  a.mask ? launch_backward<T, Kind::linear, true>(a, stream) : launch_backward<T, Kind::linear, false>(a, stream);
}

template <typename Arguments>
void launch(const Arguments& a, cudaStream_t stream) {
  switch (a.type) {
    case ElementType::float32: return launch_of_type<float>(a, stream);
    case ElementType::float64: return launch_of_type<double>(a, stream);
    case ElementType::bfloat16: return launch_of_type<__nv_bfloat16>(a, stream);
    case ElementType::float16: return launch_of_type<__half>(a, stream);
  }
}

}  // namespace activation

// Fills y, active and, with noise, mask.
inline void launch_activation_forward(const ActivationForward& a, cudaStream_t stream) {
  zero_memory(a.active, sizeof(std::int64_t) * a.channels, stream);
  if (a.outer * a.channels * a.inner > 0) activation::launch(a, stream);
}

inline void launch_activation_backward(const ActivationBackward& a, cudaStream_t stream) {
  if (a.elements > 0) activation::launch(a, stream);
}

}  // namespace demp
