// The functions that norm_act_loops.h provides for one instruction set, indexed by element type as in activation_table.h.
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

  // inner > 1: planes are cut into `pieces` of `piece` elements (a multiple of 64; the last is shorter).
  // inner == 1: rows are done in bands of `period` columns, a multiple of `channels` and of the type's `group`.
  std::int64_t pieces, piece, period;
  // inner > 1: only the channels [first_channel, last_channel) are looked at. `backwards`: the images from the last to the
  // first, to begin with what the caches still hold. `ahead`: fetch what the caches do not hold yet (x and grad for sums, the
  // residual for y).
  std::int64_t first_channel, last_channel;
  bool backwards, ahead;

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

// Sums of dz and of dz * (x - mean).
struct GradientSums {
  double dz, dz_centred;
};

// All work on a share of the tensor, by one thread. [begin, end) counts rows where inner is 1 (`begin` a multiple of 4 and of
// period / channels), otherwise the pieces of the images, each with all channels: unit u is piece u % pieces of image
// u / pieces. Arrays have one entry a channel.
struct NormActTable {
  int group[kTypes];  // elements whose bits are whole bytes: what a period is a multiple of
  int tile[kTypes];   // better a multiple of this as well

  void (*statistics[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, Moments*, void* scratch);
  void (*forward[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch);
  // Writes grad_residual as well.
  void (*sums[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, GradientSums*, void* scratch);
  void (*input[kTypes])(const NormAct&, std::int64_t begin, std::int64_t end, void* scratch);

  std::int64_t scratch_bytes;         // aligned to 64 bytes, plus
  std::int64_t scratch_bytes_column;  // as often as a period has columns
};

}  // namespace demp
