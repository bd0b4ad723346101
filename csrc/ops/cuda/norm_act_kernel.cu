// norm_act on NVIDIA GPUs: arguments and outputs here, kernels in norm_act.cuh. Statistics and sums are merged in a fixed
// order, counts are sums of integers: the order of blocks changes nothing.
#include "ops/cuda/torch_cuda.h"

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/norm_act_arguments.h"
#include "ops/cuda/norm_act.cuh"

namespace demp {
namespace {

NormActShape shape_of(const NormActView& v) { return {v.outer, v.channels, v.inner, v.rows, ElementType(v.type)}; }

ChannelValues values_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), ElementType(type_index(t.scalar_type()))}; }
ChannelValues values_of(const std::optional<Tensor>& t) { return t ? values_of(*t) : ChannelValues{nullptr, ElementType::float32}; }

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_forward(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
    std::string activation, double slope, double eps, double noise_std, std::optional<Tensor> seed) {
  const NormActView view = check_norm_act(x, weight, bias, residual, activation, slope, eps);
  const bool noisy = check_norm_act_noise(x, noise_std, seed), bits = residual && view.is_linear();
  const DeviceGuard guard(x.get_device_index());
  const NormActShape shape = shape_of(view);
  const ScalarType wide = norm_act_wide(x.scalar_type());
  weight = contiguous(weight), bias = contiguous(bias);
  Tensor y = torch::stable::empty_like(x);
  Tensor active = torch::stable::new_empty(x, {view.channels}, ScalarType::Long);
  Tensor mean = torch::stable::new_empty(x, {view.channels}, wide);
  Tensor var = torch::stable::new_empty(x, {view.channels}, wide);
  Tensor mask = bits ? torch::stable::new_empty(x, {view.mask_runs, view.mask_bytes}, ScalarType::Byte)
                     : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  Tensor workspace = torch::stable::new_empty(x, {norm_act_workspace(shape)}, wide);
  launch_norm_act_forward({shape, x.const_data_ptr(), data_of(residual), values_of(weight), values_of(bias), y.mutable_data_ptr(),
                           active.mutable_data_ptr<std::int64_t>(), mean.mutable_data_ptr(), var.mutable_data_ptr(),
                           mask.mutable_data_ptr<std::uint8_t>(), noisy ? seed->const_data_ptr<std::int64_t>() : nullptr,
                           workspace.mutable_data_ptr(), slope, eps, noise_std, Act(view.act)},
                          current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, active, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> residual, const Tensor& mean, const Tensor& var, const Tensor& mask, std::string activation,
    double slope, double eps, bool added) {
  const NormActView view = check_norm_act_backward(grad, x, weight, bias, residual, mean, var, mask, activation, slope, eps, added);
  const DeviceGuard guard(x.get_device_index());
  const NormActShape shape = shape_of(view);
  const ScalarType wide = norm_act_wide(x.scalar_type());
  weight = contiguous(weight), bias = contiguous(bias);
  const Tensor dense_mean = torch::stable::contiguous(mean), dense_var = torch::stable::contiguous(var);
  const Tensor dense_mask = torch::stable::contiguous(mask);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(x, {view.channels}, weight ? weight->scalar_type() : wide);
  Tensor grad_bias = torch::stable::new_empty(x, {view.channels}, bias ? bias->scalar_type() : wide);
  Tensor grad_residual = added ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {0});
  Tensor workspace = torch::stable::new_empty(x, {norm_act_workspace(shape)}, wide);
  launch_norm_act_backward({shape, grad.const_data_ptr(), x.const_data_ptr(),
                            added && !view.is_linear() ? data_of(residual) : nullptr, values_of(weight), values_of(bias),
                            dense_mean.const_data_ptr(), dense_var.const_data_ptr(),
                            added && view.is_linear() ? dense_mask.const_data_ptr<std::uint8_t>() : nullptr,
                            grad_x.mutable_data_ptr(), added ? grad_residual.mutable_data_ptr() : nullptr, values_of(grad_weight),
                            values_of(grad_bias), workspace.mutable_data_ptr(), slope, eps, Act(view.act)},
                           current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CUDA, m) {
  m.impl("norm_act_forward", TORCH_BOX(&demp::norm_act_forward));
  m.impl("norm_act_backward", TORCH_BOX(&demp::norm_act_backward));
}
