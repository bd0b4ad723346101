// weight noise on NVIDIA GPUs: arguments here, kernel in weight_noise.cuh. Every element is written by one thread: the
// result does not depend on any order.
#include "ops/cuda/torch_cuda.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/weight_noise_arguments.h"
#include "ops/cuda/weight_noise.cuh"

namespace demp {
namespace {

void weight_noise_(std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> live, double std_, Tensor seed) {
  check_weight_noise(tensors, live, std_, seed);
  if (tensors.empty() || std_ == 0) return;
  const DeviceGuard guard(seed.get_device_index());
  const cudaStream_t stream = current_stream(seed);
  std::vector<NoisyWeight> by_type[4];
  std::vector<Tensor> kept;                           // rows whose memory the launches read
  std::vector<std::pair<Tensor, Tensor>> copied_back;  // strided tensors, and the dense copies that get the noise
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Tensor t = tensors[i];
    if (t.numel() == 0) continue;
    if (!is_dense(t)) {
      copied_back.emplace_back(t, torch::stable::contiguous(t));
      t = copied_back.back().second;
    }
    const bool* rows = nullptr;
    if (live[i]) {
      kept.push_back(torch::stable::contiguous(*live[i]));
      rows = kept.back().const_data_ptr<bool>();
    }
    const std::int64_t row_count = t.dim() ? t.size(0) : 1, columns = t.numel() / row_count;
    const std::int64_t taps = t.is_contiguous() ? 1 : columns / t.size(1);
    by_type[type_index(t.scalar_type())].push_back(
        {t.mutable_data_ptr(), rows, row_count, columns, taps, 0, static_cast<std::uint32_t>(1 + i), false});
  }
  for (int type = 0; type < 4; ++type) {
    if (by_type[type].empty()) continue;
    launch_weight_noise(ElementType(type), by_type[type], std_, seed.const_data_ptr<std::int64_t>(), stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (auto& [tensor, copy] : copied_back) torch::stable::copy_(tensor, copy);
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CUDA, m) { m.impl("weight_noise_", TORCH_BOX(&demp::weight_noise_)); }
