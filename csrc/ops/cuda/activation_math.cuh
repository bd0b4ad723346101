// The activations and their derivatives for one element, in float or double. See demp_kernels/reference.py.
#pragma once

#include "ops/cuda/device.cuh"

namespace demp {

enum class Act { relu, leaky_relu, gelu, gelu_tanh, silu };

// Kernels are compiled once for each kind, not for each activation: they wait for memory, and a choice that is the same
// for all threads costs nothing there.
enum class Kind { linear, smooth };

inline Kind kind_of(Act act) { return act == Act::relu || act == Act::leaky_relu ? Kind::linear : Kind::smooth; }

// NaN counts as active: a diverged unit is never taken for a dead one.
template <typename W>
__device__ __forceinline__ bool is_active(W x) {
  return !(x <= W(0));
}

// relu's zero is a true zero, also for x = -inf.
template <typename W>
__device__ __forceinline__ W below_zero(Act act, W x, W slope) {
  return act == Act::relu ? W(0) : x * slope;
}

template <typename W>
__device__ __forceinline__ W normal_cdf(W x) {
  return W(0.5) * std::erfc(x * W(-0.70710678118654752));
}

// silu and gelu_tanh are both x sigmoid(u), with u = x for silu and (1 + tanh v) / 2 = sigmoid(2 v) for gelu_tanh.
template <typename W>
__device__ __forceinline__ W gate_argument(Act act, W x) {
  return act == Act::silu ? x : x * (W(2 * 0.79788456080286536) + W(2 * 0.79788456080286536 * 0.044715) * x * x);
}

template <typename W>
__device__ __forceinline__ W gate_slope(Act act, W x) {
  return act == Act::silu ? W(1) : W(2 * 0.79788456080286536) + W(6 * 0.79788456080286536 * 0.044715) * x * x;
}

template <Kind kind, typename W>
__device__ __forceinline__ W activate(Act act, W x, W slope) {
  if (kind == Kind::linear) return is_active(x) ? x : below_zero(act, x, slope);
  return act == Act::gelu ? x * normal_cdf(x) : x / (W(1) + std::exp(-gate_argument(act, x)));
}

// act'(x) of the smooth activations.
template <typename W>
__device__ __forceinline__ W derivative(Act act, W x) {
  if (act == Act::gelu) return normal_cdf(x) + x * W(0.39894228040143268) * std::exp(W(-0.5) * x * x);
  const W s = W(1) / (W(1) + std::exp(-gate_argument(act, x)));
  return s + x * s * (W(1) - s) * gate_slope(act, x);
}

}  // namespace demp
