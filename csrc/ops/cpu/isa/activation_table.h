// The functions that activation_loops.h provides for one instruction set. Element types are indexed float, double,
// bfloat16, float16; activations as in Act. All of them are called with blocks of a tensor, by one thread.
#pragma once

#include <cstdint>

#include "ops/cpu/isa/types.h"

namespace demp {

constexpr int kTypes = 4;
constexpr int kBlockBits = 64;  // elements whose bits fill a word: what tensors are cut into

// Counts of active elements by channel, for a (rows, channels) matrix.
struct RowCounts {
  void* lanes;          // one counter of the element's width for each column of `rows` rows; zero between blocks
  std::int64_t rows;    // rows side by side in `lanes`: enough to fill whole vectors, where that is not too long
  std::int64_t pending; // what the largest counter can have reached
  std::int64_t* active; // (channels,), where full counters go
};

struct Parameters {
  double slope;
  double noise_std;
  bool stream;  // the output goes past the caches; it is then aligned to whole cache lines
};

struct ActivationTable {
  int packet[kTypes];  // elements in a vector

  // y = act(x), over n elements. bits: one an element, 1 where active, in whole bytes.
  void (*flat[kTypes][kActs])(const void* x, void* y, std::int64_t n, Parameters, std::uint8_t* bits);
  // The same plus noise_std * noise on the active elements.
  void (*noisy[kTypes][kActs])(const void* x, void* y, std::int64_t n, Parameters, std::uint8_t* bits, const float* noise);
  // y = act(x) over rows of channels, counting.
  void (*rows[kTypes][kActs])(const void* x, void* y, std::int64_t rows, std::int64_t channels, Parameters, RowCounts&);
  // Counting only.
  void (*count_rows[kTypes])(const void* x, std::int64_t rows, std::int64_t channels, RowCounts&);
  // Adds the counters to `active` and zeroes them.
  void (*finish_rows[kTypes])(std::int64_t channels, RowCounts&);
  // Adds the bits of elements [begin, end) of an (outer, channels, inner) tensor to active.
  void (*count_planes)(const std::uint8_t* bits, std::int64_t begin, std::int64_t end, std::int64_t channels,
                       std::int64_t inner, std::int64_t* active);

  // out = grad * act'(x), knowing x or, for relu and leaky_relu, y from `saved`.
  void (*backward[kTypes][kActs])(const void* grad, const void* saved, void* out, std::int64_t n, Parameters);
  // The same for relu and leaky_relu from the bits.
  void (*backward_bits[kTypes][2])(const void* grad, const std::uint8_t* bits, void* out, std::int64_t n, Parameters);

  std::int64_t stage_bytes;   // scratch for the functions below
  std::int64_t noise_slack;   // floats that `out` needs beyond the last element
  void (*noise_planes)(float* out, std::int64_t begin, std::int64_t end, std::int64_t channels, std::int64_t inner,
                       std::uint64_t seed, void* stage);
  void (*noise_rows)(float* out, std::int64_t begin, std::int64_t end, std::int64_t columns, std::uint64_t seed,
                     void* stage);
};

}  // namespace demp
