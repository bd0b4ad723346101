// norm_act on a GPU; what it computes is in demp_kernels/ops/norm_act.py. Each direction is three launches on one stream: a
// pass that sums up, a small kernel that combines the parts of each channel, a pass that writes the output
// (norm_act_passes.cuh, norm_act_combine.cuh). Forward reads x twice and writes y once, the residual once; backward reads
// x and grad twice and writes grad_x once; with a residual its gradient is written by the first pass and read by the
// second, in place of grad.
//
// Statistics and sums are merged in a fixed order, so results do not change from run to run on one device; counts are
// integer sums, whose atomics may come in any order. Nothing synchronises with the host and the seed is read on the
// device: launches can be captured in a CUDA graph.
#pragma once

#include "ops/cuda/norm_act_combine.cuh"

namespace demp {
namespace norm_act {

// One launch of a pass, by words where they fit.
template <typename T, template <typename, Kind> class Pass, typename Make>
unsigned launch_kind(const NormActShape& s, bool words, Act act, bool with_bits, const Make& make, cudaStream_t stream) {
  if constexpr (!kScalarOnly<T>) {
    if (words && kind_of(act) == Kind::linear) {
      return launch_pass<kPerWord<T>>(make(static_cast<Pass<T, Kind::linear>*>(nullptr)), s, with_bits, stream);
    }
    if (words) return launch_pass<kPerWord<T>>(make(static_cast<Pass<T, Kind::smooth>*>(nullptr)), s, with_bits, stream);
  }
  return launch_pass<1>(make(static_cast<Pass<T, Kind::smooth>*>(nullptr)), s, with_bits, stream);
}

template <typename T>
unsigned launch_statistics(const NormActForward& a, cudaStream_t stream) {
  using W = Wide<T>;
  const Statistics<T> pass{static_cast<const T*>(a.x), a.shape.inner, static_cast<W*>(a.workspace)};
  if constexpr (!kScalarOnly<T>) {
    if (suits_words<T>(a.shape, {a.x})) return launch_pass<kPerWord<T>>(pass, a.shape, false, stream);
  }
  return launch_pass<1>(pass, a.shape, false, stream);
}

template <typename T>
void launch_of_type(const NormActForward& a, cudaStream_t stream) {
  using W = Wide<T>;
  const NormActShape& s = a.shape;
  const std::int64_t splits = s.n() ? launch_statistics<T>(a, stream) : 0;
  const Moments<W> moments{static_cast<const W*>(a.workspace), splits, s.channels, s.inner, {const_cast<void*>(a.x), s.type},
                           static_cast<W*>(a.mean), static_cast<W*>(a.var), a.active};
  DEMP_LAUNCH(norm_act_moments<W>, combine_grid(s.channels), combine_block(), 0, stream, moments);
  if (s.n() == 0) return;

  const bool bits = a.residual && kind_of(a.act) == Kind::linear, in_pass = bits && (!s.rows || s.channels % 8 == 0);
  auto make = [&](auto* which) {
    return std::remove_pointer_t<decltype(which)>{
        Normalisation<W>(a), static_cast<const T*>(a.x), static_cast<const T*>(a.residual), static_cast<T*>(a.y),
        in_pass ? a.mask : nullptr, reinterpret_cast<unsigned long long*>(a.active), a.seed, static_cast<W>(a.noise_std)};
  };
  const bool words = !a.seed && suits_words<T>(s, {a.x, a.residual, a.y});
  launch_kind<T, Normalise>(s, words, a.act, in_pass, make, stream);
  if (bits && !in_pass) {
    const std::int64_t elements = s.outer * s.channels;
    const std::int64_t blocks = std::min(ceil_div<std::int64_t>(elements, kThreads * 8), wanted_blocks());
    DEMP_LAUNCH(norm_act_bits<T>, clamp_grid(blocks, kMaxGridX), kThreads, 0, stream,
                make(static_cast<Normalise<T, Kind::linear>*>(nullptr)), a.mask, elements, s.channels);
  }
}

template <typename T>
void launch_of_type(const NormActBackward& a, cudaStream_t stream) {
  using W = Wide<T>;
  const NormActShape& s = a.shape;
  W* totals = static_cast<W*>(a.workspace);  // then the parts
  W* partial = totals + 2 * s.channels;
  std::int64_t splits = 0;
  if (s.n()) {
    auto make = [&](auto* which) {
      return std::remove_pointer_t<decltype(which)>{
          Normalisation<W>(a), static_cast<const T*>(a.grad), static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
          a.mask, static_cast<T*>(a.grad_residual), partial};
    };
    const bool words = suits_words<T>(s, {a.grad, a.x, a.residual, a.grad_residual});
    splits = launch_kind<T, GradientSums>(s, words, a.act, false, make, stream);
  }
  const Gradients<W> gradients{partial, splits, s.channels, static_cast<const W*>(a.var), a.eps, totals, a.grad_weight, a.grad_bias};
  DEMP_LAUNCH(norm_act_gradients<W>, combine_grid(s.channels), combine_block(), 0, stream, gradients);
  if (s.n() == 0) return;

  const void* source = a.grad_residual ? a.grad_residual : a.grad;
  auto make = [&](auto* which) {
    return std::remove_pointer_t<decltype(which)>{
        Normalisation<W>(a), static_cast<const T*>(source), static_cast<const T*>(a.x), a.grad_residual != nullptr,
        static_cast<T*>(a.grad_x), totals, s.channels, static_cast<W>(s.n())};
  };
  // Nothing is left to differentiate where dz was stored: the kernel for relu then serves all.
  const Act act = a.grad_residual ? Act::relu : a.act;
  launch_kind<T, Input>(s, suits_words<T>(s, {source, a.x, a.grad_x}), act, false, make, stream);
}

template <typename Arguments>
void launch(const Arguments& a, cudaStream_t stream) {
  if (a.shape.channels == 0) return;
  switch (a.shape.type) {
    case ElementType::float32: return launch_of_type<float>(a, stream);
    case ElementType::float64: return launch_of_type<double>(a, stream);
    case ElementType::bfloat16: return launch_of_type<__nv_bfloat16>(a, stream);
    case ElementType::float16: return launch_of_type<__half>(a, stream);
  }
}

}  // namespace norm_act

// Values of the wide type that forward and backward need in `workspace`.
inline std::int64_t norm_act_workspace(const NormActShape& s) { return (3 * norm_act::max_splits(s) + 2) * s.channels; }

inline void launch_norm_act_forward(const NormActForward& a, cudaStream_t stream) { norm_act::launch(a, stream); }
inline void launch_norm_act_backward(const NormActBackward& a, cudaStream_t stream) { norm_act::launch(a, stream); }

}  // namespace demp
