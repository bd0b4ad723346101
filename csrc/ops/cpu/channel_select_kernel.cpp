// channel_select: y[:, c] = x[:, index[c]], or 0 where index[c] is -1.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/channel_layout.h"
#include "common/gather_arguments.h"
#include "common/parallel.h"

namespace {

using torch::stable::Tensor;

constexpr std::int64_t kTaskBytes = 128 << 10;

// x as (outer, channels, inner) in memory order.
struct Shape {
  std::int64_t outer, from, to, inner, element;
};

// Channels last (inner == 1): a missing channel reads channel 0 and is masked, so that the loop has no branch.
template <class T>
void select_rows(
    const T* x, T* y, const Shape& s, const std::vector<std::int32_t>& index, const std::vector<T>& mask,
    std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* from = x + row * s.from;
    T* to = y + row * s.to;
    for (std::int64_t c = 0; c < s.to; ++c) to[c] = from[index[c]] & mask[c];
  }
}

template <class T>
void channels_last(const Tensor& x, Tensor& y, const Shape& s, const std::int64_t* index) {
  std::vector<std::int32_t> places(s.to);
  std::vector<T> mask(s.to);
  for (std::int64_t c = 0; c < s.to; ++c) {
    places[c] = static_cast<std::int32_t>(std::max<std::int64_t>(index[c], 0));
    mask[c] = index[c] < 0 ? T(0) : static_cast<T>(~T(0));
  }
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(y.mutable_data_ptr());
  const std::int64_t grain = std::max<std::int64_t>(1, kTaskBytes / (s.to * s.element));
  demp::parallel_for(0, s.outer, grain, [&](std::int64_t begin, std::int64_t end) {
    select_rows(from, to, s, places, mask, begin, end);
  });
}

void planes(const Tensor& x, Tensor& y, const Shape& s, const std::int64_t* index) {
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const std::int64_t bytes = s.inner * s.element;
  const std::int64_t grain = std::max<std::int64_t>(1, kTaskBytes / bytes);
  demp::parallel_for(0, s.outer * s.to, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t plane = begin; plane < end; ++plane) {
      const std::int64_t channel = index[plane % s.to];
      char* target = to + plane * bytes;
      if (channel < 0) {
        std::memset(target, 0, bytes);
      } else {
        std::memcpy(target, from + (plane / s.to * s.from + channel) * bytes, bytes);
      }
    }
  });
}

Tensor channel_select(Tensor given, Tensor index, Tensor inverse, std::int64_t channel_dim) {
  demp::check_channel_select(given, index, inverse, channel_dim);
  const std::int64_t dim = channel_dim < 0 ? channel_dim + given.dim() : channel_dim;
  const auto format = demp::memory_format(given);
  const bool last = format != torch::headeronly::MemoryFormat::Contiguous && dim == 1;
  const Tensor x = last ? given : torch::stable::contiguous(given);
  index = torch::stable::contiguous(index);
  const std::int64_t* channels = index.const_data_ptr<std::int64_t>();

  const auto sizes = x.sizes();
  Shape s{1, sizes[dim], index.numel(), 1, static_cast<std::int64_t>(x.element_size())};
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (d == dim) continue;
    (d < dim || last ? s.outer : s.inner) *= sizes[d];
  }
  for (std::int64_t c = 0; c < s.to; ++c) {
    if (channels[c] < -1 || channels[c] >= s.from) {
      demp::fail("channel_select: index must be in [-1, ", s.from, "), got ", channels[c]);
    }
  }
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  shape[dim] = s.to;
  Tensor y = torch::stable::empty(
      shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      last ? format : torch::headeronly::MemoryFormat::Contiguous);
  if (y.numel() == 0) return y;
  if (s.from == 0) {
    torch::stable::zero_(y);
  } else if (s.inner > 1 || s.element > 8) {
    planes(x, y, s, channels);
  } else if (s.element == 1) {
    channels_last<std::uint8_t>(x, y, s, channels);
  } else if (s.element == 2) {
    channels_last<std::uint16_t>(x, y, s, channels);
  } else if (s.element == 4) {
    channels_last<std::uint32_t>(x, y, s, channels);
  } else {
    channels_last<std::uint64_t>(x, y, s, channels);
  }
  // The op says "like x": a channels_last x with units in another dimension was copied to be read.
  return format == torch::headeronly::MemoryFormat::Contiguous || last ? y : torch::stable::contiguous(y, format);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("channel_select", TORCH_BOX(&channel_select));
}
