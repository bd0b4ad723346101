// The functions that norm_act_loops.h provides for one instruction set, indexed by element type as in activation_table.h.
// Each works on a part of the tensor, by one thread: images [begin, end) of a channel, or rows [begin, end).
#pragma once

#include <cstdint>

#include "ops/cpu/isa/activation_table.h"

namespace demp {

struct NormAct {
  // x and what is like it. Memory order is (outer, channels, inner); inner is 1 where the channels are last.
  const void *x, *residual, *grad;
  void *y, *grad_x, *grad_residual;
  std::uint8_t* mask;  // bits of the active elements, where a residual was added before relu or leaky_relu
  std::int64_t outer, channels, inner;
  std::int64_t period;  // channels last: columns in a band, a multiple of `channels` and of the type's `group`

  int act;
  bool added, noisy;
  Parameters parameters;
  std::uint64_t seed;

  // Per channel: z = (x - mean) * scale + bias; grad_x = dz * scale - (x - mean) * slope_back - offset_back.
  const double *mean, *scale, *bias, *slope_back, *offset_back;
};

// Of n values: their mean and the sum of squared deviations from it.
struct Moments {
  double n, mean, m2;
};

struct NormActTable {
  int group[kTypes];  // elements whose bits are whole bytes: what a period is a multiple of
  int tile[kTypes];   // better a multiple of this as well

  void (*statistics_planes[kTypes])(const NormAct&, std::int64_t channel, std::int64_t begin, std::int64_t end, Moments&);
  void (*forward_planes[kTypes])(const NormAct&, std::int64_t channel, std::int64_t begin, std::int64_t end,
                                 std::int64_t& active, void* scratch);
  // sums: of dz and of dz * (x - mean). Writes grad_residual.
  void (*sums_planes[kTypes])(const NormAct&, std::int64_t channel, std::int64_t begin, std::int64_t end, double (&sums)[2]);
  void (*input_planes[kTypes])(const NormAct&, std::int64_t channel, std::int64_t begin, std::int64_t end);

  // The same for rows; `begin` is a multiple of 4 and of period / channels. Arrays have one entry a channel.
  void (*statistics_rows[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, Moments*, void* scratch);
  void (*forward_rows[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch);
  void (*sums_rows[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, double (*sums)[2], void* scratch);
  void (*input_rows[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, void* scratch);

  std::int64_t scratch_bytes;         // aligned to 64 bytes, plus
  std::int64_t scratch_bytes_column;  // as often as a period has columns (0 for planes)
};

}  // namespace demp
