// Arguments of the gathers, compact and channel_select, checked for the kernels of every device. The words are those of
// demp_kernels/ops/compact.py and channel_select.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace demp {

template <class... Name>
void check_index(const Tensor& index, const Tensor& like, const Name&... name) {
  if (index.dim() == 1 && index.scalar_type() == ScalarType::Long && same_device(index, like)) return;
  fail(name..., " must be a 1-D int64 tensor on ", device_text(like), ", got ", dtype_name(index.scalar_type()),
       " of shape ", tuple_text(index.sizes()), " on ", device_text(index));
}

inline void check_compact(const char* op, const std::vector<Tensor>& sources,
                          const std::vector<std::optional<Tensor>>& rows,
                          const std::vector<std::optional<Tensor>>& columns) {
  const std::size_t count = sources.size();
  if (rows.size() != count) fail(op, ": rows must have one entry a source (", count, "), got ", rows.size());
  if (columns.size() != count) fail(op, ": columns must have one entry a source (", count, "), got ", columns.size());
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t needed = columns[i] ? 2 : 1;
    if (sources[i].dim() < needed) {
      fail(op, ": sources[", i, "] must have at least ", needed, " dimensions, got shape ",
           tuple_text(sources[i].sizes()));
    }
    if (!same_device(sources[i], sources[0])) {
      fail(op, ": sources[", i, "] must be on ", device_text(sources[0]), " like the first, got ", device_text(sources[i]));
    }
    if (rows[i]) check_index(*rows[i], sources[i], op, ": rows[", i, "]");
    if (columns[i]) check_index(*columns[i], sources[i], op, ": columns[", i, "]");
  }
}

inline void check_channel_select(const Tensor& x, const Tensor& index, const Tensor& inverse, std::int64_t channel_dim) {
  if (channel_dim < -x.dim() || channel_dim >= x.dim()) {
    fail("channel_select: channel_dim must be a dimension of x of shape ", tuple_text(x.sizes()), ", got ", channel_dim);
  }
  check_index(index, x, "channel_select: index");
  check_index(inverse, x, "channel_select: inverse");
  const std::int64_t channels = x.size(channel_dim < 0 ? channel_dim + x.dim() : channel_dim);
  if (inverse.numel() != channels) {
    fail("channel_select: inverse must have an entry for each of the ", channels, " channels of x, got ",
         inverse.numel());
  }
}

}  // namespace demp
