// What the kernels of activation share: arguments, scalars, the work on one group of elements.
#pragma once

#include <type_traits>

#include "ops/cuda/activation_math.cuh"
#include "ops/cuda/device.cuh"
#include "ops/cuda/noise.cuh"

namespace demp {

struct ActivationForward {
  const void* x;
  void* y;  // may be x
  std::int64_t* active;
  std::uint8_t* mask;        // needed with noise for relu and leaky_relu, otherwise unused
  const std::int64_t* seed;  // on the device; nullptr: no noise
  std::int64_t outer, channels, inner;
  double slope, noise_std;
  Act act;
  ElementType type;
};

struct ActivationBackward {
  const void* grad;
  const void* saved;
  const std::uint8_t* mask;  // nullptr: saved tells
  void* result;
  std::int64_t elements;
  double slope;
  Act act;
  ElementType type;
};

namespace activation {

constexpr int kThreads = 256;
constexpr int kBlocksAMultiprocessor = 8;  // 2048 threads, as many as can be resident

// float64 is for checking gradients: it takes the path of elements that are not aligned, which has no vectors.
template <typename T>
constexpr bool kScalarOnly = std::is_same_v<T, double>;

// Which elements of a thread share a Philox call (four consecutive positions of one channel).
enum class Noise {
  none,
  down,    // four rows of a column: channels innermost, whole words a row
  across,  // four neighbours: planes of a multiple of four elements
  single,  // none: every element makes its own call, at four times the arithmetic
};

// Elements a thread takes at once: with noise 8, one byte of bits, otherwise one word.
template <typename T, Noise noise>
constexpr int kGroup = noise == Noise::none ? kPerWord<T> : 8;

// Groups whose loads a thread has in flight: 64 bytes, 16 KiB a block. Fewer where arithmetic takes the time: ptxas works
// on all groups at once and would spill (smooth activations on sm_100: 100 bytes with four groups), and a Philox call for
// every element makes long code.
template <Kind kind, Noise noise>
constexpr int kAtOnce = noise == Noise::single ? 1 : kind == Kind::smooth ? 2 : 4;

// Resident blocks that ptxas must leave registers for: up to 128 a thread. Two blocks have 32 KiB of loads in flight on a
// multiprocessor, more than an H100's bandwidth times its latency asks for (18 KiB); a third would make sm_100 spill.
constexpr int kMinBlocks = 2;

template <typename W>
struct Scalars {
  W slope, noise_std;
  Act act;
  bool aligned;
  Scalars(Act act, double slope, double noise_std, bool aligned)
      : slope(static_cast<W>(slope)), noise_std(static_cast<W>(noise_std)), act(act), aligned(aligned) {}
};

template <typename T, int N>
__device__ __forceinline__ unsigned bits_of(const Group<T, N>& x) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) bits |= static_cast<unsigned>(is_active(to_wide(x.lane[i]))) << i;
  return bits;
}

// y of one element; z is its noise.
template <Kind kind, typename T>
__device__ __forceinline__ T value_of(T x, float z, const Scalars<Wide<T>>& s) {
  const Wide<T> wide = to_wide(x), step = is_active(wide) ? s.noise_std * z : Wide<T>(0);
  return to_narrow<T>(activate<kind>(s.act, wide, s.slope) + step);
}

template <Kind kind, typename T>
__device__ __forceinline__ T value_of(T x, const Scalars<Wide<T>>& s) {
  return to_narrow<T>(activate<kind>(s.act, to_wide(x), s.slope));
}

inline std::int64_t wanted_blocks() { return std::int64_t{kBlocksAMultiprocessor} * multiprocessors(); }

constexpr std::int64_t kMaxGridX = 0x7FFFFFFF, kMaxGridY = 65535;

inline unsigned clamp_grid(std::int64_t blocks, std::int64_t limit) {
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(blocks, limit)));
}

}  // namespace activation
}  // namespace demp
