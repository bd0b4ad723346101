// The four passes over x: statistics, normalise; sums, input. Each is what a thread does with M groups of G elements, of
// one channel (K = 1, planes) or of G neighbouring channels (K = G, rows); norm_act_walk.cuh walks them over memory.
#pragma once

#include "ops/cuda/norm_act_common.cuh"

namespace demp {
namespace norm_act {

// Groups whose loads a thread has in flight; see activation::kAtOnce. Smooth activations take eight elements at once: each
// is an erfc and an exp in the code.
template <int G, Kind kind>
constexpr int kGroupsAtOnce = G == 1 ? 1 : kind == Kind::smooth ? 8 / G : 4;

// The same for a pass that reads two tensors: four words of 16-bit types make sm_100 spill 72 bytes in rows.
template <int G, Kind kind>
constexpr int kPairsAtOnce = G == 8 && kind == Kind::linear ? 2 : kGroupsAtOnce<G, kind>;

// Chan, Golub, LeVeque: count, mean and sum of squared deviations of two sets together.
template <typename W>
__device__ __forceinline__ void merge_moments(Part<W, 3>& a, const Part<W, 3>& b) {
  if (b.v[0] == W(0)) return;
  const W n = a.v[0] + b.v[0], share = b.v[0] / n, delta = b.v[1] - a.v[1];
  a.v[2] += b.v[2] + delta * delta * (a.v[0] * share);
  a.v[1] += delta * share;
  a.v[0] = n;
}

// Moments of x - (the channel's first element): the groups of a step by two passes over registers, then merged. Neither the
// sum of squares nor a mean far from zero ever costs digits.
template <typename Element>
struct Statistics {
  using T = Element;
  using W = Wide<T>;
  using Channel = W;
  using Part = norm_act::Part<W, 3>;
  static constexpr bool kReduces = true;
  template <int G>
  static constexpr int kAtOnce = 4;

  const T* x;
  std::int64_t inner;
  W* partial;  // (3, splits, channels)

  template <int K>
  struct Sums {
    W n, mean[K], m2[K];
  };

  __device__ __forceinline__ Channel channel(std::int64_t c) const { return to_wide(x[c * inner]); }

  template <int G, int M, int K>
  __device__ __forceinline__ void step(const Places<M>& here, std::int64_t, const Channel (&first)[K], Sums<K>& sums) const {
    constexpr int kPerChannel = G / K;
    Elements<T, G> x_[M];
#pragma unroll
    for (int m = 0; m < M; ++m) x_[m].load(x + here.at[m]);
    W n = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) n += here.valid[m] ? W(kPerChannel) : W(0);
    const W total = sums.n + n, share = n / total;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      W sum = 0, squares = 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < kPerChannel; ++i) sum += here.valid[m] ? to_wide(x_[m].lane[k + i]) - first[k] : W(0);
      }
      const W mean = sum / n, delta = mean - sums.mean[k];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < kPerChannel; ++i) {
          const W d = here.valid[m] ? to_wide(x_[m].lane[k + i]) - first[k] - mean : W(0);
          squares = std::fma(d, d, squares);
        }
      }
      sums.mean[k] += delta * share;
      sums.m2[k] += squares + delta * delta * (sums.n * share);
    }
    sums.n = total;
  }

  template <int K>
  __device__ __forceinline__ Part part(const Sums<K>& sums, int k) const {
    return {{sums.n, sums.mean[k], sums.m2[k]}};
  }
  static __device__ __forceinline__ void merge(Part& a, const Part& b) { merge_moments(a, b); }
  __device__ __forceinline__ void finish(const Part& all, std::int64_t c, std::int64_t channels) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) partial[(std::int64_t{i} * gridDim.y + blockIdx.y) * channels + c] = all.v[i];
  }
};

// y = act(z) (+ noise), the active elements of each channel, and their bits where a residual went into z.
template <typename Element, Kind kind>
struct Normalise {
  using T = Element;
  using W = Wide<T>;
  using Channel = Affine<W>;
  using Part = norm_act::Part<unsigned, 1>;
  static constexpr bool kReduces = true;
  template <int G>
  static constexpr int kAtOnce = kGroupsAtOnce<G, kind>;

  Normalisation<W> norm;
  const T *x, *residual;
  T* y;
  std::uint8_t* mask;  // nullptr: not here
  unsigned long long* active;
  const std::int64_t* seed;  // only for single elements
  W noise_std;

  template <int K>
  struct Sums {
    unsigned count[K];
  };

  __device__ __forceinline__ Channel channel(std::int64_t c) const { return norm.channel(c); }

  template <int G>
  __device__ __forceinline__ W value(W z, std::int64_t position, std::int64_t channel) const {
    const W y = is_linear<G, kind>(norm.act) ? activate<Kind::linear>(norm.act, z, norm.slope)
                                             : activate<Kind::smooth>(norm.act, z, norm.slope);
    if constexpr (G == 1) {
      if (seed && is_active(z)) {
        return y + noise_std * normal(position, static_cast<std::uint32_t>(channel), 0, static_cast<std::uint64_t>(*seed));
      }
    }
    return y;
  }

  template <int G, int M, int K>
  __device__ __forceinline__ void step(const Places<M>& here, std::int64_t c, const Channel (&channel)[K], Sums<K>& sums) const {
    Elements<T, G> x_[M], r[M];
#pragma unroll
    for (int m = 0; m < M; ++m) x_[m].load(x + here.at[m]);
    if (residual) {
#pragma unroll
      for (int m = 0; m < M; ++m) r[m].load(residual + here.at[m]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < G; ++i) {
        W z = channel[K == 1 ? 0 : i](to_wide(x_[m].lane[i]));
        if (residual) z += to_wide(r[m].lane[i]);
        bits |= static_cast<unsigned>(here.valid[m] && is_active(z)) << i;
        x_[m].lane[i] = to_narrow<T>(value<G>(z, here.position[m], c + (K == 1 ? 0 : i)));
      }
#pragma unroll
      for (int k = 0; k < K; ++k) sums.count[k] += K == 1 ? __popc(bits) : bits >> k & 1;
      if (here.valid[m]) x_[m].store(y + here.at[m]);
      if (mask) write_bits<G>(mask, here.bit[m], bits, here.valid[m]);
    }
  }

  template <int K>
  __device__ __forceinline__ Part part(const Sums<K>& sums, int k) const {
    return {{sums.count[k]}};
  }
  static __device__ __forceinline__ void merge(Part& a, const Part& b) { a.v[0] += b.v[0]; }
  __device__ __forceinline__ void finish(const Part& all, std::int64_t c, std::int64_t) const {
    if (all.v[0]) atomicAdd(&active[c], static_cast<unsigned long long>(all.v[0]));
  }
};

// dz = grad * act'(z): its sums over a channel, alone and times x - mean; where a residual was added it is stored, being the
// residual's gradient.
template <typename Element, Kind kind>
struct GradientSums {
  using T = Element;
  using W = Wide<T>;
  using Channel = Affine<W>;
  using Part = norm_act::Part<W, 2>;
  static constexpr bool kReduces = true;
  template <int G>
  static constexpr int kAtOnce = kPairsAtOnce<G, kind>;

  Normalisation<W> norm;
  const T *grad, *x, *residual;
  const std::uint8_t* mask;
  T* grad_residual;
  W* partial;  // (2, splits, channels)

  template <int K>
  struct Sums {
    W dz[K], centred[K];
  };

  __device__ __forceinline__ Channel channel(std::int64_t c) const { return norm.channel(c); }

  template <int G, int M, int K>
  __device__ __forceinline__ void step(const Places<M>& here, std::int64_t, const Channel (&channel)[K], Sums<K>& sums) const {
    Elements<T, G> g[M], x_[M], r[M];
    unsigned bits[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      g[m].load(grad + here.at[m]);
      x_[m].load(x + here.at[m]);
      if (mask) bits[m] = read_bits(mask, here.bit[m]);
      else if (residual) r[m].load(residual + here.at[m]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < G; ++i) {
        const int k = K == 1 ? 0 : i;
        const W x_wide = to_wide(x_[m].lane[i]), grad_wide = to_wide(g[m].lane[i]);
        W z = channel[k](x_wide), dz;
        if (residual) z += to_wide(r[m].lane[i]);
        if (is_linear<G, kind>(norm.act)) {
          const bool live = mask ? bits[m] >> i & 1 : is_active(z);
          dz = live ? grad_wide : below_zero(norm.act, grad_wide, norm.slope);
        } else {
          dz = grad_wide * derivative(norm.act, z);
        }
        g[m].lane[i] = to_narrow<T>(dz);
        if (!here.valid[m]) dz = 0;
        sums.dz[k] += dz;
        sums.centred[k] = std::fma(dz, x_wide - channel[k].mean, sums.centred[k]);
      }
      if (grad_residual && here.valid[m]) g[m].store(grad_residual + here.at[m]);
    }
  }

  template <int K>
  __device__ __forceinline__ Part part(const Sums<K>& sums, int k) const {
    return {{sums.dz[k], sums.centred[k]}};
  }
  static __device__ __forceinline__ void merge(Part& a, const Part& b) {
    a.v[0] += b.v[0];
    a.v[1] += b.v[1];
  }
  __device__ __forceinline__ void finish(const Part& all, std::int64_t c, std::int64_t channels) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) partial[(std::int64_t{i} * gridDim.y + blockIdx.y) * channels + c] = all.v[i];
  }
};

// grad_x = scale (dz - mean(dz) - (x - mean) / (var + eps) * mean(dz (x - mean))); dz is read where it was stored and
// recomputed where not.
template <typename Element, Kind kind>
struct Input {
  using T = Element;
  using W = Wide<T>;
  struct Channel {
    Affine<W> z;
    W slope, offset;
  };
  static constexpr bool kReduces = false;
  template <int G>
  static constexpr int kAtOnce = kPairsAtOnce<G, kind>;

  Normalisation<W> norm;
  const T *grad, *x;
  bool is_dz;  // grad is
  T* grad_x;
  const W* totals;  // (2, channels): the sums
  std::int64_t channels;
  W n;

  template <int K>
  struct Sums {};

  __device__ __forceinline__ Channel channel(std::int64_t c) const {
    const Affine<W> z = norm.channel(c);
    const W invstd = inverse_deviation(norm.var[c], norm.eps);
    return {z, z.scale * invstd * invstd * (totals[channels + c] / n), z.scale * (totals[c] / n)};
  }

  template <int G, int M, int K>
  __device__ __forceinline__ void step(const Places<M>& here, std::int64_t, const Channel (&channel)[K], Sums<K>&) const {
    Elements<T, G> g[M], x_[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      g[m].load(grad + here.at[m]);
      x_[m].load(x + here.at[m]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < G; ++i) {
        const Channel& c = channel[K == 1 ? 0 : i];
        const W x_wide = to_wide(x_[m].lane[i]), z = c.z(x_wide);
        W dz = to_wide(g[m].lane[i]);
        if (is_linear<G, kind>(norm.act) || (G == 1 && is_dz)) {
          dz = is_dz || is_active(z) ? dz : below_zero(norm.act, dz, norm.slope);
        } else {
          dz *= derivative(norm.act, z);
        }
        g[m].lane[i] = to_narrow<T>(std::fma(c.z.mean - x_wide, c.slope, std::fma(dz, c.z.scale, -c.offset)));
      }
      if (here.valid[m]) g[m].store(grad_x + here.at[m]);
    }
  }
};

}  // namespace norm_act
}  // namespace demp
