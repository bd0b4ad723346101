// New tensors on the CPU. `torch::stable::empty_like` and `new_empty` look an operator up by its name and dispatch it, 3 and
// 1.5 us; this is a call into the allocator, 0.3 us, which shows where a whole activation takes 10.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/checks.h"

namespace demp {

inline Tensor new_tensor(std::int64_t dims, const std::int64_t* sizes, const std::int64_t* strides, ScalarType type) {
  AtenTensorHandle made;
  const std::int32_t dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  // torch 2.11 does not have STABLE_TORCH_ERROR_CODE_CHECK yet
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor new_vector(std::int64_t size, ScalarType type) {
  const std::int64_t stride = 1;
  return new_tensor(1, &size, &stride, type);
}

inline Tensor new_matrix(std::int64_t rows, std::int64_t columns, ScalarType type) {
  const std::int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return new_tensor(2, sizes, strides, type);
}

inline Tensor new_contiguous(const std::vector<std::int64_t>& sizes, ScalarType type) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0; step *= sizes[d]) strides[d] = step;
  return new_tensor(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), type);
}

// Of the shape, strides and type of a dense x.
inline Tensor new_like(const Tensor& x) {
  if (x.numel() == 0) return torch::stable::empty_like(x);  // strides may be anything there
  return new_tensor(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

}  // namespace demp
