// The pybind11 module demp_kernels._host: host-side C++ that is no tensor op. It does not use torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/philox.h"
#include "host.h"

namespace py = pybind11;

namespace {

template <typename Pairs>
py::dict as_dict(const Pairs& pairs) {
  py::dict result;
  for (const auto& [name, value] : pairs) result[py::str(name)] = value;
  return result;
}

// The integers at `count` positions from `position` on, in the coordinates that the kernels use: one generator
// call for every four positions.
py::array_t<std::uint32_t> philox_stream(std::uint64_t seed, std::uint32_t stream, std::uint32_t column,
                                         std::uint64_t position, py::ssize_t count) {
  if (count < 0) throw py::value_error("philox_stream: count must not be negative, got " + std::to_string(count));
  const demp::PhiloxKey key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  py::array_t<std::uint32_t> result(count);
  std::uint32_t* out = result.mutable_data();
  demp::Philox4 lanes{};
  for (py::ssize_t i = 0; i < count; ++i) {
    const std::uint64_t at = position + static_cast<std::uint64_t>(i), quad = at / 4;
    if (i == 0 || at % 4 == 0) {
      lanes = demp::philox4x32_10({static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(quad >> 32), column, stream}, key);
    }
    out[i] = lanes[at % 4];
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side C++ of demp_kernels: CPU facts, the noise's integers, the allocator.";
  m.def("simd_level", &demp::simd_level);
  m.def("cpu_features", [] { return as_dict(demp::cpu_features()); });
  m.def(
      "philox4x32_10",
      [](std::array<std::uint32_t, 2> key, std::array<std::uint32_t, 4> counter) {
        return py::tuple(py::cast(demp::philox4x32_10(counter, key)));
      },
      py::arg("key"), py::arg("counter"));
  m.def("philox_stream", &philox_stream, py::arg("seed"), py::arg("stream"), py::arg("column"), py::arg("position"),
        py::arg("count"));
  m.def("tune_allocator", [] {
    const demp::AllocatorTuning result = demp::tune_allocator();
    return py::make_tuple(result.applied, result.reason);
  });
}
