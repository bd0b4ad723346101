// The functions that weight_noise_loops.h provides for one instruction set. Element types are indexed as in
// activation_table.h.
#pragma once

#include <cstdint>

#include "ops/cpu/isa/types.h"

namespace demp {

struct WeightNoiseTable {
  std::int64_t stage_bytes;  // scratch for the noise functions
  std::int64_t noise_slack;  // floats that `out` needs beyond the last element

  // w += std * noise
  void (*add[4])(void* w, const float* noise, std::int64_t n, double std);
  // Noise of the positions [begin, end) of column 0.
  void (*noise_line)(float* out, std::int64_t begin, std::int64_t end, std::uint32_t stream, std::uint64_t seed, void* stage);
  // Noise of the rows [begin, end), begin a multiple of 4; columns_of as in noise.h.
  void (*noise_rows)(float* out, std::int64_t begin, std::int64_t end, std::int64_t columns, std::int64_t first_column,
                     const std::uint64_t* columns_of, std::uint32_t stream, std::uint64_t seed, void* stage);
};

}  // namespace demp
