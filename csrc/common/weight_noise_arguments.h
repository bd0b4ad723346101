// weight_noise_'s arguments, checked for the kernels of every device. The words are those of
// demp_kernels/ops/weight_noise.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace demp {

inline void check_weight_noise(const std::vector<Tensor>& tensors, const std::vector<std::optional<Tensor>>& live,
                               double std_, const Tensor& seed) {
  if (!(std_ >= 0 && std::isfinite(std_))) fail("weight_noise_: std must be finite and >= 0, got ", number_text(std_));
  if (live.size() != tensors.size()) {
    fail("weight_noise_: live must have one entry a tensor (", tensors.size(), "), got ", live.size());
  }
  const Tensor& first = tensors.empty() ? seed : tensors[0];
  check_seed("weight_noise_", seed, first);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (type_index(t.scalar_type()) < 0) {
      fail("weight_noise_: tensors[", i, "] must be float32, bfloat16, float16 or float64, got ", dtype_name(t.scalar_type()));
    }
    if (!same_device(t, first)) {
      fail("weight_noise_: tensors[", i, "] must be on ", device_text(first), " like the first, got ", device_text(t));
    }
    for (std::int64_t d = 0; d < t.dim(); ++d) {
      if (t.stride(d) == 0 && t.size(d) > 1 && t.numel() > 0) {
        fail("weight_noise_: tensors[", i, "] must have memory for each of its elements, got shape ", tuple_text(t.sizes()),
             " with strides ", tuple_text(t.strides()));
      }
    }
    if (!live[i]) continue;
    const Tensor& rows = *live[i];
    const std::int64_t count = t.dim() ? t.size(0) : 1;
    if (rows.scalar_type() != ScalarType::Bool || rows.dim() != 1 || rows.size(0) != count || !same_device(rows, first)) {
      fail("weight_noise_: live[", i, "] must be bool of shape (", count, ",) on ", device_text(first), ", got ",
           dtype_name(rows.scalar_type()), " of shape ", tuple_text(rows.sizes()), " on ", device_text(rows));
    }
  }
}

}  // namespace demp
