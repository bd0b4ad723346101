// norm_act's arguments, checked and read, for the kernels of every device. The words are those of
// demp_kernels/ops/norm_act.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "common/checks.h"

namespace demp {

struct NormActView {
  int act, type;  // indices: the order of `enum class Act`, and of `type_index`
  // Memory order is (outer, channels, inner); rows: the channels are last, inner is 1 and outer counts all rows.
  std::int64_t outer, channels, inner;
  bool rows;
  std::int64_t n;                     // values of a channel
  std::int64_t mask_runs, mask_bytes;  // shape of the mask, if there is one

  bool is_linear() const { return act <= 1; }  // relu, leaky_relu
};

// The type that statistics have.
inline ScalarType norm_act_wide(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline void check_norm_act_like(const char* name, const Tensor& value, const Tensor& x) {
  if (value.scalar_type() != x.scalar_type() || !same_shape(value, x) || !same_order(value, x)) {
    fail("norm_act: ", name, " must be like x (", dtype_name(x.scalar_type()), ", shape ", tuple_text(x.sizes()),
         ", strides ", tuple_text(x.strides()), "), got ", dtype_name(value.scalar_type()), ", shape ",
         tuple_text(value.sizes()), ", strides ", tuple_text(value.strides()));
  }
  check_device("norm_act", name, value, x);
}

inline void check_norm_act_parameter(const char* name, const std::optional<Tensor>& value, const Tensor& x) {
  if (!value) return;
  const ScalarType type = x.scalar_type(), got = value->scalar_type();
  if (value->dim() != 1 || value->size(0) != x.size(1) || (got != type && got != norm_act_wide(type))) {
    fail("norm_act: ", name, " must have shape (", x.size(1), ",) and dtype ", dtype_name(type), " or ",
         dtype_name(norm_act_wide(type)), ", got shape ", tuple_text(value->sizes()), " and dtype ", dtype_name(got));
  }
  check_device("norm_act", name, *value, x);
}

inline void check_norm_act_statistic(const char* name, const Tensor& value, const Tensor& x) {
  const ScalarType type = norm_act_wide(x.scalar_type());
  if (value.dim() != 1 || value.size(0) != x.size(1) || value.scalar_type() != type) {
    fail("norm_act: ", name, " must have shape (", x.size(1), ",) and dtype ", dtype_name(type), ", got shape ",
         tuple_text(value.sizes()), " and dtype ", dtype_name(value.scalar_type()));
  }
  check_device("norm_act", name, value, x);
}

// What forward and backward share.
inline NormActView check_norm_act(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& residual, const std::string& activation, double slope,
                                   double eps) {
  static const char* const names[] = {"relu", "leaky_relu", "gelu", "gelu_tanh", "silu"};
  NormActView v{};
  v.act = -1;
  for (int i = 0; i < 5; ++i) {
    if (activation == names[i]) v.act = i;
  }
  if (v.act < 0) {
    fail("norm_act: activation must be one of relu, leaky_relu, gelu, gelu_tanh, silu, got ", activation);
  }
  v.type = type_index(x.scalar_type());
  if (v.type < 0) fail("norm_act: x must be float32, bfloat16, float16 or float64, got ", dtype_name(x.scalar_type()));
  if (x.dim() < 2) fail("norm_act: x must have shape (N, C, *), got shape ", tuple_text(x.sizes()));
  const bool contiguous = x.is_contiguous();
  if (!contiguous && !is_channels_last(x)) {
    fail("norm_act: x must be contiguous or channels_last, got strides ", tuple_text(x.strides()));
  }
  const std::int64_t numel = x.numel();
  if (numel > 0 && numel == x.size(1)) {
    fail("norm_act: x must have more than one value per channel, got shape ", tuple_text(x.sizes()));
  }
  check_norm_act_parameter("weight", weight, x);
  check_norm_act_parameter("bias", bias, x);
  if (residual) check_norm_act_like("residual", *residual, x);
  if (!std::isfinite(slope)) fail("norm_act: slope must be finite, got ", number_text(slope));
  if (!(eps > 0 && std::isfinite(eps))) fail("norm_act: eps must be finite and > 0, got ", number_text(eps));
  std::int64_t plane = 1;
  for (std::int64_t d = 2; d < x.dim(); ++d) plane *= x.size(d);
  v.channels = x.size(1);
  v.n = x.size(0) * plane;
  v.rows = !contiguous || plane == 1;
  v.outer = v.rows ? v.n : x.size(0);
  v.inner = v.rows ? 1 : plane;
  v.mask_runs = v.rows ? 1 : x.size(0) * x.size(1);
  v.mask_bytes = ((v.rows ? numel : plane) + 7) / 8;
  return v;
}

// Whether there is noise.
inline bool check_norm_act_noise(const Tensor& x, double noise_std, const std::optional<Tensor>& seed) {
  if (!(noise_std >= 0 && std::isfinite(noise_std))) {
    fail("norm_act: noise_std must be finite and >= 0, got ", number_text(noise_std));
  }
  if (noise_std == 0) return false;
  if (!seed) fail("norm_act: seed is needed when noise_std > 0, got None");
  check_seed("norm_act", *seed, x);
  return true;
}

inline NormActView check_norm_act_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                           const Tensor& mean, const Tensor& var, const Tensor& mask,
                                           const std::string& activation, double slope, double eps, bool added) {
  const NormActView v = check_norm_act(x, weight, bias, residual, activation, slope, eps);
  check_norm_act_like("grad", grad, x);
  check_norm_act_statistic("mean", mean, x);
  check_norm_act_statistic("var", var, x);
  if (added && v.is_linear()) {
    if (mask.scalar_type() != ScalarType::Byte || mask.dim() != 2 || mask.size(0) != v.mask_runs ||
        mask.size(1) != v.mask_bytes) {
      fail("norm_act: mask must be uint8 of shape (", v.mask_runs, ", ", v.mask_bytes, "), got ",
           dtype_name(mask.scalar_type()), " of shape ", tuple_text(mask.sizes()));
    }
    check_device("norm_act", "mask", mask, x);
  } else if (added && !residual) {
    fail("norm_act: residual is needed for ", activation, " where one was added, got None");
  }
  return v;
}

}  // namespace demp
