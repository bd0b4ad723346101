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
__device__ __forceinline__ W sigmoid(W x) {
  return W(1) / (W(1) + std::exp(-x));
}

template <typename W>
__device__ __forceinline__ W normal_cdf(W x) {
  return W(0.5) * std::erfc(x * W(-0.70710678118654752));
}

constexpr double kTanhScale = 0.79788456080286536;  // sqrt(2 / pi)
constexpr double kTanhCubic = 0.044715;

// gelu_tanh through the sigmoid: (1 + tanh u) / 2 = sigmoid(2 u).
template <typename W>
__device__ __forceinline__ W twice_tanh_argument(W x) {
  return x * (W(2 * kTanhScale) + W(2 * kTanhScale * kTanhCubic) * x * x);
}

template <Kind kind, typename W>
__device__ __forceinline__ W activate(Act act, W x, W slope) {
  if (kind == Kind::linear) return is_active(x) ? x : below_zero(act, x, slope);
  if (act == Act::silu) return x / (W(1) + std::exp(-x));
  if (act == Act::gelu) return x * normal_cdf(x);
  return x / (W(1) + std::exp(-twice_tanh_argument(x)));
}

// act'(x) of the smooth activations.
template <typename W>
__device__ __forceinline__ W derivative(Act act, W x) {
  if (act == Act::silu) {
    const W s = sigmoid(x);
    return s * (W(1) + x * (W(1) - s));
  }
  if (act == Act::gelu) return normal_cdf(x) + x * W(0.39894228040143268) * std::exp(W(-0.5) * x * x);
  const W s = sigmoid(twice_tanh_argument(x));
  return s + x * s * (W(1) - s) * (W(2 * kTanhScale) + W(6 * kTanhScale * kTanhCubic) * x * x);
}

}  // namespace demp
