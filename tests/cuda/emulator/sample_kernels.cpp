// Kernels for the emulator's own tests: each right, or with one planted mistake (`Mistake`), to show that it is found.
#include <cstring>

#include "grid_emulator.h"
#include "guarded.h"

namespace {

enum Mistake { kNone, kDroppedBarrier, kWrongTree, kLoadPastEnd, kMisaligned, kDroppedWarpSync, kPlainCount, kDivergentBarrier, kWrongMask };

// total = sum of x and positive = number of x > 0, over a grid of 64-thread blocks.
__global__ void sum_and_count(const float* x, unsigned n, float* total, unsigned* positive, Mistake mistake) {
  DEMP_SHARED_ARRAY(float, part, 64);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned end = mistake == kLoadPastEnd ? n + 1 : n;
  const float value = i < end ? x[i] : 0.0f;
  part[threadIdx.x] = value;
  if (mistake != kDroppedBarrier) __syncthreads();
  const unsigned first = mistake == kWrongTree ? 16 : 32;  // 16: the upper half never arrives
  for (unsigned half = first; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(total, part[0]);
  if (value > 0.0f) {
    if (mistake == kPlainCount) *positive += 1;
    else atomicAdd(positive, 1u);
  }
}

// Each lane takes its neighbour's value through shared memory.
__global__ void rotate_warp(const float* x, float* y, Mistake mistake) {
  DEMP_SHARED_ARRAY(float, slot, 32);
  slot[threadIdx.x] = x[threadIdx.x];
  if (mistake != kDroppedWarpSync) __syncwarp();
  y[threadIdx.x] = slot[(threadIdx.x + 1) % 32];
}

// y = x by 16-byte words; kMisaligned starts one float late.
__global__ void copy_words(const float* x, float* y, Mistake mistake) {
  const uint4* source = reinterpret_cast<const uint4*>(x + (mistake == kMisaligned));
  reinterpret_cast<uint4*>(y)[threadIdx.x] = source[threadIdx.x];
}

// The sum of 32 values, by shuffles.
__global__ void sum_warp(const float* x, float* y, Mistake mistake) {
  float value = x[threadIdx.x];
  if (mistake == kDivergentBarrier && threadIdx.x < 16) {
    __syncthreads();
  }
  const unsigned mask = mistake == kWrongMask ? 0xFFFFu : ~0u;
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(mask, value, delta);
  if (threadIdx.x == 0) *y = value;
}

}  // namespace

extern "C" {
const char* sample_sum_and_count(const float* x, unsigned n, float* total, unsigned* positive, int mistake) {
  return guarded([&] { DEMP_LAUNCH(sum_and_count, (n + 63) / 64, 64, 0, nullptr, x, n, total, positive, Mistake(mistake)); });
}
const char* sample_rotate_warp(const float* x, float* y, int mistake) {
  return guarded([&] { DEMP_LAUNCH(rotate_warp, 1, 32, 0, nullptr, x, y, Mistake(mistake)); });
}
const char* sample_copy_words(const float* x, float* y, int words, int mistake) {
  return guarded([&] { DEMP_LAUNCH(copy_words, 1, words, 0, nullptr, x, y, Mistake(mistake)); });
}
const char* sample_sum_warp(const float* x, float* y, int mistake) {
  return guarded([&] { DEMP_LAUNCH(sum_warp, 1, 32, 0, nullptr, x, y, Mistake(mistake)); });
}
}
