// What the gathers share: the format of their results, and the check of an index.
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

template <class... Name>
void check_index(const Tensor& t, const Name&... name) {
  if (t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_cpu()) return;
  fail(name..., " must be a 1-D int64 tensor on cpu, got ", dtype_name(t.scalar_type()), " of shape ",
       tuple_text(t.sizes()), " on ", t.is_cpu() ? "cpu" : "another device");
}

}  // namespace demp
