// What the gathers share: the format of their results.
#pragma once

#include <torch/headeronly/core/MemoryFormat.h>

#include "common/checks.h"

namespace demp {

// As reference.memory_format: contiguous wins where a tensor is both.
inline torch::headeronly::MemoryFormat memory_format(const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  if (t.is_contiguous() || !is_channels_last(t)) return MemoryFormat::Contiguous;
  return t.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

}  // namespace demp
