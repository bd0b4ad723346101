// channel_select on NVIDIA GPUs: the gather of compact.cuh over the columns of (outer, channels, inner). Indices are not
// looked at on the host; one out of range, -1 above all, reads as zeros.
#include "ops/cuda/torch_cuda.h"

#include <cstdint>
#include <vector>

#include "common/channel_layout.h"
#include "common/gather_arguments.h"
#include "ops/cuda/compact.cuh"

namespace demp {
namespace {

Tensor channel_select(Tensor given, Tensor index, Tensor inverse, std::int64_t channel_dim) {
  check_channel_select(given, index, inverse, channel_dim);
  const DeviceGuard guard(given.get_device_index());
  const std::int64_t dim = channel_dim < 0 ? channel_dim + given.dim() : channel_dim;
  const auto format = memory_format(given);
  const bool channels_last = format != torch::headeronly::MemoryFormat::Contiguous, last = channels_last && dim == 1;
  const Tensor x = last ? given : torch::stable::contiguous(given), channels = torch::stable::contiguous(index);

  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::int64_t outer = 1, inner = 1;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (d != dim) (d < dim || last ? outer : inner) *= shape[d];
  }
  const std::int64_t from = shape[dim], to = shape[dim] = channels.numel();
  Tensor y = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  last ? format : torch::headeronly::MemoryFormat::Contiguous);
  const Gather gather{x.const_data_ptr(), y.mutable_data_ptr(), nullptr, channels.const_data_ptr<std::int64_t>(), outer, outer, 1,
                      from, to, inner * static_cast<std::int64_t>(x.element_size())};
  if (!can_gather(gather)) fail("channel_select: x has rows too long to index, got shape ", tuple_text(x.sizes()));
  launch_gathers({gather}, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  // "Like x": a channels_last x with its channels in another dimension was copied to be read.
  return channels_last && !last ? torch::stable::contiguous(y, format) : y;
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CUDA, m) { m.impl("channel_select", TORCH_BOX(&demp::channel_select)); }
