// activation on NVIDIA GPUs: arguments and outputs here, kernels in activation.cuh. Counts are sums of integers: the
// order of the atomics does not change them.
#include "ops/cuda/torch_cuda.h"

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/activation_arguments.h"
#include "ops/cuda/activation.cuh"

namespace demp {
namespace {

// Fills y, which may be x; returns active and mask.
std::tuple<Tensor, Tensor> run_forward(const ActivationView& view, const Tensor& x, const Tensor& y, double slope,
                                       double noise_std, const std::optional<Tensor>& seed) {
  const std::int64_t n = x.numel();
  Tensor active = torch::stable::new_empty(x, {view.channels}, ScalarType::Long);
  Tensor mask = torch::stable::new_empty(x, {view.with_mask() ? (n + 7) / 8 : 0}, ScalarType::Byte);
  launch_activation_forward({x.const_data_ptr(), y.mutable_data_ptr(), active.mutable_data_ptr<std::int64_t>(),
                             mask.mutable_data_ptr<std::uint8_t>(), view.noisy ? seed->const_data_ptr<std::int64_t>() : nullptr,
                             view.outer, view.channels, view.inner, slope, noise_std, Act(view.act), ElementType(view.type)},
                            current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {active, mask};
}

std::tuple<Tensor, Tensor, Tensor> activation_forward(const Tensor& x, std::string activation, double slope,
                                                      std::int64_t channel_dim, double noise_std,
                                                      std::optional<Tensor> seed) {
  const ActivationView view = check_activation_forward(x, activation, slope, channel_dim, noise_std, seed);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  auto [active, mask] = run_forward(view, x, y, slope, noise_std, seed);
  return {y, active, mask};
}

std::tuple<Tensor, Tensor> activation_forward_(Tensor x, std::string activation, double slope, std::int64_t channel_dim,
                                               double noise_std, std::optional<Tensor> seed) {
  const ActivationView view = check_activation_forward(x, activation, slope, channel_dim, noise_std, seed);
  check_activation_in_place(view, activation, slope);
  const DeviceGuard guard(x.get_device_index());
  return run_forward(view, x, x, slope, noise_std, seed);
}

Tensor activation_backward(const Tensor& grad, const Tensor& saved, const Tensor& mask, std::string activation,
                           double slope) {
  const ActivationBackwardView view = check_activation_backward(grad, saved, mask, activation);
  const DeviceGuard guard(grad.get_device_index());
  Tensor result = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return result;
  launch_activation_backward({grad.const_data_ptr(), view.from_bits ? nullptr : saved.const_data_ptr(),
                              view.from_bits ? mask.const_data_ptr<std::uint8_t>() : nullptr, result.mutable_data_ptr(),
                              grad.numel(), slope, Act(view.act), ElementType(view.type)},
                             current_stream(grad));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CUDA, m) {
  m.impl("activation_forward", TORCH_BOX(&demp::activation_forward));
  m.impl("activation_forward_", TORCH_BOX(&demp::activation_forward_));
  m.impl("activation_backward", TORCH_BOX(&demp::activation_backward));
}
