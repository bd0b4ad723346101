// activation's arguments, checked and read, for the kernels of every device. The words are those of
// demp_kernels/ops/activation.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "common/checks.h"

namespace demp {

// Index of an activation, the order of `enum class Act`.
inline int check_activation(const std::string& activation) {
  static const char* const names[] = {"relu", "leaky_relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 5; ++i) {
    if (activation == names[i]) return i;
  }
  fail("activation: activation must be one of relu, leaky_relu, gelu, gelu_tanh, silu, got ", activation);
}

inline bool is_piecewise_linear(int act) { return act <= 1; }  // relu, leaky_relu

struct ActivationView {
  int act, type;
  std::int64_t outer, channels, inner;  // memory order is (outer, channels, inner)
  bool noisy;

  bool with_mask() const { return noisy && is_piecewise_linear(act); }
};

inline ActivationView check_activation_forward(const Tensor& x, const std::string& activation, double slope,
                                               std::int64_t channel_dim, double noise_std,
                                               const std::optional<Tensor>& seed) {
  ActivationView view{};
  view.act = check_activation(activation);
  view.type = type_index(x.scalar_type());
  if (view.type < 0) {
    fail("activation: x must be float32, bfloat16, float16 or float64, got ", dtype_name(x.scalar_type()));
  }
  const std::int64_t dims = x.dim();
  if (dims < 2) fail("activation: x must have a channel dimension, got shape ", tuple_text(x.sizes()));
  if (channel_dim < -dims || channel_dim >= dims) {
    fail("activation: channel_dim must be between ", -dims, " and ", dims - 1, " for x of shape ",
         tuple_text(x.sizes()), ", got ", channel_dim);
  }
  if (channel_dim < 0) channel_dim += dims;
  const bool contiguous = x.is_contiguous();
  if (!contiguous && !(channel_dim == 1 && is_channels_last(x))) {
    fail("activation: x must be contiguous, or channels_last with channel_dim 1, got strides ",
         tuple_text(x.strides()));
  }
  if (!std::isfinite(slope)) fail("activation: slope must be finite, got ", number_text(slope));
  if (!(noise_std >= 0 && std::isfinite(noise_std))) {
    fail("activation: noise_std must be finite and >= 0, got ", number_text(noise_std));
  }
  view.noisy = noise_std > 0;
  if (view.noisy) {
    if (!seed) fail("activation: seed is needed when noise_std > 0, got None");
    check_seed("activation", *seed, x);
  }
  view.channels = x.size(channel_dim);
  view.outer = view.inner = 1;
  for (std::int64_t d = 0; d < dims; ++d) {
    if (d != channel_dim) (d < channel_dim || !contiguous ? view.outer : view.inner) *= x.size(d);
  }
  return view;
}

inline void check_activation_in_place(const ActivationView& view, const std::string& activation, double slope) {
  if (!is_piecewise_linear(view.act)) {
    fail("activation: only relu and leaky_relu can be done in place, got ", activation);
  }
  if (activation == "leaky_relu" && !(slope > 0)) {
    fail("activation: slope must be > 0 in place, got ", number_text(slope));
  }
}

inline ActivationView check_activation_count(const Tensor& x, std::int64_t channel_dim, const Tensor& active,
                                             const std::optional<Tensor>& seen) {
  const ActivationView view = check_activation_forward(x, "relu", 0, channel_dim, 0, std::nullopt);
  check_device("activation", "active", active, x);
  if (active.scalar_type() != ScalarType::Long || active.dim() != 1 || active.size(0) != view.channels ||
      !active.is_contiguous()) {
    fail("activation: active must be contiguous int64 of shape (", view.channels, ",), got ",
         dtype_name(active.scalar_type()), " of shape ", tuple_text(active.sizes()));
  }
  if (seen) {
    check_device("activation", "seen", *seen, x);
    if (seen->scalar_type() != ScalarType::Long || seen->dim() != 0) {
      fail("activation: seen must be int64 of shape (), got ", dtype_name(seen->scalar_type()), " of shape ",
           tuple_text(seen->sizes()));
    }
  }
  return view;
}

struct ActivationBackwardView {
  int act, type;
  bool from_bits;  // the mask says which elements were active, otherwise saved
};

inline ActivationBackwardView check_activation_backward(const Tensor& grad, const Tensor& saved, const Tensor& mask,
                                                        const std::string& activation) {
  const int act = check_activation(activation), type = type_index(grad.scalar_type());
  if (type < 0) {
    fail("activation: grad must be float32, bfloat16, float16 or float64, got ", dtype_name(grad.scalar_type()));
  }
  if (!is_dense(grad)) {
    fail("activation: grad must be contiguous or channels_last, got strides ", tuple_text(grad.strides()));
  }
  if (mask.scalar_type() != ScalarType::Byte) {
    fail("activation: mask must be uint8, got ", dtype_name(mask.scalar_type()));
  }
  check_device("activation", "saved", saved, grad);
  check_device("activation", "mask", mask, grad);
  const std::int64_t n = grad.numel();
  const bool from_bits = mask.numel() > 0 && is_piecewise_linear(act);
  if (from_bits && mask.numel() != (n + 7) / 8) {
    fail("activation: mask must have ", (n + 7) / 8, " bytes for grad of shape ", tuple_text(grad.sizes()), ", got ",
         mask.numel());
  }
  if (!from_bits && (saved.scalar_type() != grad.scalar_type() || !same_shape(saved, grad) || !same_order(saved, grad))) {
    fail("activation: saved must be like grad (", dtype_name(grad.scalar_type()), ", shape ", tuple_text(grad.sizes()),
         ", strides ", tuple_text(grad.strides()), "), got ", dtype_name(saved.scalar_type()), ", shape ",
         tuple_text(saved.sizes()), ", strides ", tuple_text(saved.strides()));
  }
  return {act, type, from_bits};
}

}  // namespace demp
