// Argument checks: the words of the ones in demp_kernels/ops/, which turn a failure here into a ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>

namespace demp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK puts file and line in front, so the text would differ from the one Python gives.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "dtype " + std::to_string(static_cast<int>(type));
  }
}

// The way Python prints tuples: (), (3,), (2, 3).
template <class Numbers>
std::string tuple_text(const Numbers& numbers) {
  std::string text = "(";
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(numbers[i]);
  }
  return text + (numbers.size() == 1 ? ",)" : ")");
}

inline std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// Dense in the order (N, *, C): torch's channels_last and channels_last_3d. Dimensions of size 1 may have any stride.
inline bool is_channels_last(const Tensor& x) {
  const std::int64_t dims = x.dim();
  if (dims != 4 && dims != 5) return false;
  std::int64_t expected = 1;
  for (std::int64_t i = 0; i < dims; ++i) {
    const std::int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (x.size(d) == 1) continue;
    if (x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline bool is_dense(const Tensor& x) { return x.is_contiguous() || is_channels_last(x); }

// Two dense tensors of one shape hold their elements in the same order.
inline bool same_order(const Tensor& a, const Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || (is_channels_last(a) && is_channels_last(b));
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (std::int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Index of an element type in the kernels' tables (isa/activation_table.h), or -1.
inline int type_index(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return -1;
  }
}

// Torch's name of a tensor's device.
inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (!same_device(t, like)) fail(op, ": ", name, " must be on ", device_text(like), ", got ", device_text(t));
}

inline void check_seed(const char* op, const Tensor& seed, const Tensor& like) {
  if (seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.size(0) == 1 && same_device(seed, like)) return;
  fail(op, ": seed must be int64 of shape (1,) on ", device_text(like), ", got ", dtype_name(seed.scalar_type()),
       " of shape ", tuple_text(seed.sizes()), " on ", device_text(seed));
}

}  // namespace demp
