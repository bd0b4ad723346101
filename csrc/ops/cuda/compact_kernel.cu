// compact on NVIDIA GPUs: arguments and outputs here, kernel in compact.cuh. Indices are not looked at on the host; one
// out of range reads as zeros.
#include "ops/cuda/torch_cuda.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/channel_layout.h"
#include "common/gather_arguments.h"
#include "ops/cuda/compact.cuh"

namespace demp {
namespace {

using Index = std::optional<Tensor>;

const std::int64_t* values_of(const Index& index, std::vector<Tensor>& kept) {
  if (!index) return nullptr;
  kept.push_back(torch::stable::contiguous(*index));
  return kept.back().const_data_ptr<std::int64_t>();
}

std::vector<Tensor> compact_(std::vector<Tensor> sources, std::vector<Index> rows, std::vector<Index> columns) {
  check_compact("compact", sources, rows, columns);
  if (sources.empty()) return {};
  const DeviceGuard guard(sources[0].get_device_index());
  std::vector<Tensor> targets, kept;  // kept: dense copies that the launch reads
  std::vector<Gather> gathers;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    check_device("compact", "every source", sources[i], sources[0]);
    const auto format = memory_format(sources[i]);
    const bool channels_last = format != torch::headeronly::MemoryFormat::Contiguous;
    kept.push_back(channels_last ? sources[i] : torch::stable::contiguous(sources[i]));
    const Tensor source = kept.back();
    std::vector<std::int64_t> shape(source.sizes().begin(), source.sizes().end());
    const std::int64_t source_rows = shape[0], source_columns = source.dim() > 1 ? shape[1] : 1;
    if (rows[i]) shape[0] = rows[i]->numel();
    if (columns[i]) shape[1] = columns[i]->numel();
    targets.push_back(torch::stable::empty(shape, source.scalar_type(), std::nullopt, source.device(), std::nullopt, format));
    std::int64_t inner = 1;
    for (std::int64_t d = 2; d < source.dim(); ++d) inner *= source.size(d);
    const std::int64_t element = static_cast<std::int64_t>(source.element_size());
    gathers.push_back({source.const_data_ptr(), targets.back().mutable_data_ptr(), values_of(rows[i], kept), values_of(columns[i], kept),
                       source_rows, shape[0], channels_last ? inner : 1, source_columns, source.dim() > 1 ? shape[1] : 1,
                       channels_last ? element : inner * element});
    if (!can_gather(gathers.back())) fail("compact: sources[", i, "] has rows too long to index, got shape ", tuple_text(source.sizes()));
  }
  launch_gathers(gathers, current_stream(sources[0]));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return targets;
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CUDA, m) { m.impl("compact", TORCH_BOX(&demp::compact_)); }
