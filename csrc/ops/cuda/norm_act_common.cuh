// What the kernels of norm_act share: arguments, the parameters of a channel, places in memory, bits of a mask.
#pragma once

#include <type_traits>

#include "ops/cuda/activation_common.cuh"

namespace demp {

// Values of any element type, one a channel. No data: all are a constant.
struct ChannelValues {
  void* data;
  ElementType type;
};

struct NormActShape {
  // Memory order is (outer, channels, inner); rows: inner is 1 and outer counts all rows.
  std::int64_t outer, channels, inner;
  bool rows;
  ElementType type;

  std::int64_t n() const { return outer * inner; }  // values of a channel
};

struct NormActForward {
  NormActShape shape;
  const void *x, *residual;  // residual: nullptr where none is added
  ChannelValues weight, bias;
  void* y;
  std::int64_t* active;
  void *mean, *var;
  std::uint8_t* mask;        // with a residual for relu and leaky_relu, otherwise unused
  const std::int64_t* seed;  // on the device; nullptr: no noise
  void* workspace;           // norm_act_workspace() values of the wide type
  double slope, eps, noise_std;
  Act act;
};

struct NormActBackward {
  NormActShape shape;
  const void *grad, *x, *residual;  // residual: where one was added for the smooth activations
  ChannelValues weight, bias;
  const void *mean, *var;
  const std::uint8_t* mask;  // where a residual was added for relu and leaky_relu
  void *grad_x, *grad_residual;  // grad_residual: nullptr where no residual was added
  ChannelValues grad_weight, grad_bias;
  void* workspace;
  double slope, eps;
  Act act;
};

namespace norm_act {

using activation::clamp_grid;
using activation::kMaxGridX;
using activation::kMaxGridY;
using activation::kMinBlocks;
using activation::kScalarOnly;
using activation::kThreads;
using activation::wanted_blocks;

template <typename W>
__device__ __forceinline__ W read(const ChannelValues& v, std::int64_t i) {
  switch (v.type) {
    case ElementType::float32: return static_cast<W>(static_cast<const float*>(v.data)[i]);
    case ElementType::float64: return static_cast<W>(static_cast<const double*>(v.data)[i]);
    case ElementType::bfloat16: return static_cast<W>(to_wide(static_cast<const __nv_bfloat16*>(v.data)[i]));
    default: return static_cast<W>(to_wide(static_cast<const __half*>(v.data)[i]));
  }
}

__device__ __forceinline__ void write(const ChannelValues& v, std::int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  switch (v.type) {
    case ElementType::float32: static_cast<float*>(v.data)[i] = rounded; break;
    case ElementType::float64: static_cast<double*>(v.data)[i] = value; break;
    case ElementType::bfloat16: static_cast<__nv_bfloat16*>(v.data)[i] = to_narrow<__nv_bfloat16>(rounded); break;
    default: static_cast<__half*>(v.data)[i] = to_narrow<__half>(rounded);
  }
}

template <typename W>
__device__ __forceinline__ W inverse_deviation(W var, W eps) {
  return W(1) / std::sqrt(var + eps);
}

// z = (x - mean) * scale + bias. Forward and backward take it from here, with an explicit fma, so that they agree on its
// sign to the last bit: the compiler contracts products and sums as it likes, kernel by kernel.
template <typename W>
struct Affine {
  W mean, scale, bias;
  __device__ __forceinline__ W operator()(W x) const { return std::fma(x - mean, scale, bias); }
};

template <typename W>
struct Normalisation {
  const W *mean, *var;
  ChannelValues weight, bias;
  W eps, slope;
  Act act;

  template <typename Arguments>
  explicit Normalisation(const Arguments& a)
      : mean(static_cast<const W*>(a.mean)), var(static_cast<const W*>(a.var)), weight(a.weight), bias(a.bias),
        eps(static_cast<W>(a.eps)), slope(static_cast<W>(a.slope)), act(a.act) {}

  __device__ __forceinline__ Affine<W> channel(std::int64_t c) const {
    const W invstd = inverse_deviation(var[c], eps);
    return {mean[c], weight.data ? invstd * read<W>(weight, c) : invstd, bias.data ? read<W>(bias, c) : W(0)};
  }
};

// Kernels for single elements (G = 1) do every activation, those for words one kind each.
template <int G, Kind kind>
__device__ __forceinline__ bool is_linear(Act act) {
  return kind == Kind::linear || (G == 1 && (act == Act::relu || act == Act::leaky_relu));
}

// Where M groups of a thread are. Groups that are not `valid` have the place of one that is, for loads; they are not
// stored and add nothing.
template <int M>
struct Places {
  std::int64_t at[M], bit[M], position[M];  // in memory; in the mask; the coordinate that noise depends on
  bool valid[M];
};

// One element, or a 16-byte word of them.
template <typename T, int G>
struct Elements : Group<T, G> {};
template <typename T>
struct Elements<T, 1> {
  T lane[1];
  __device__ __forceinline__ void load(const T* p) { lane[0] = *p; }
  __device__ __forceinline__ void store(T* p) const { *p = lane[0]; }
};

// Writes the bits of G elements to a byte that 8 / G neighbouring lanes share; `bit` is a multiple of G.
template <int G>
__device__ __forceinline__ void write_bits(std::uint8_t* mask, std::int64_t bit, unsigned bits, bool valid) {
  constexpr unsigned kLanes = 8 / G;
  const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % kWarp;
  if constexpr (kLanes > 1) {
    const unsigned lanes = ((1u << kLanes) - 1) << (lane / kLanes * kLanes);
    bits <<= G * (lane % kLanes);
#pragma unroll
    for (unsigned apart = 1; apart < kLanes; apart *= 2) bits |= __shfl_xor_sync(lanes, bits, static_cast<int>(apart));
  }
  if (valid && lane % kLanes == 0) mask[bit / 8] = static_cast<std::uint8_t>(bits);
}

__device__ __forceinline__ unsigned read_bits(const std::uint8_t* mask, std::int64_t bit) { return mask[bit / 8] >> (bit % 8); }

// A few numbers that are added up, or merged, over a block.
template <typename Number, int N>
struct Part {
  Number v[N];
};

}  // namespace norm_act
}  // namespace demp
