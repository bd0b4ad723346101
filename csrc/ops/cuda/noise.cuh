// The noise of `reference.noise` on a GPU: the integers exactly, the normals to about 1e-5.
#pragma once

#include "common/philox.h"
#include "ops/cuda/device.cuh"

namespace demp {

struct Words {
  std::uint32_t w[4];
};
struct Normals {
  float z[4];
};

// Philox4x32-10 with counter (quad low, quad high, column, stream), as `philox4x32_10` of common/philox.h.
__device__ __forceinline__ Words philox(std::uint64_t quad, std::uint32_t column, std::uint32_t stream, std::uint64_t seed) {
  std::uint32_t c0 = static_cast<std::uint32_t>(quad), c1 = static_cast<std::uint32_t>(quad >> 32), c2 = column, c3 = stream;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{kPhiloxM0} * c0, b = std::uint64_t{kPhiloxM1} * c2;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(a);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// sqrt(-2 ln u), u = ((word >> 8) + 1) 2^-24. The device's fast logarithm is good to 2^-21 absolute, which near u = 1
// would be larger than the result: there, where 1 - u = v is small and exact, its series is used (v^5 / 5 < 2^-32).
__device__ __forceinline__ float normal_radius(std::uint32_t word) {
  const std::uint32_t n = word >> 8;
  const float v = static_cast<float>(0xFFFFFFu - n) * 0x1p-24f;
  const float near_one = v * (1.0f + v * (0.5f + v * (1.0f / 3.0f + v * 0.25f)));
  const float elsewhere = -__logf(static_cast<float>(n + 1) * 0x1p-24f);
  return sqrtf(2.0f * (v < 0x1p-6f ? near_one : elsewhere));
}

// 2 pi (word >> 8) 2^-24, less a whole turn from pi on: the device's fast sine and cosine are good to 2^-21 within +-pi.
__device__ __forceinline__ float normal_angle(std::uint32_t word) {
  return static_cast<float>(static_cast<std::int32_t>(word) >> 8) * 3.7450704e-07f;
}

// The normals of positions 4 quad ... 4 quad + 3 of a column.
__device__ __forceinline__ Normals normals(std::uint64_t quad, std::uint32_t column, std::uint32_t stream, std::uint64_t seed) {
  const Words x = philox(quad, column, stream, seed);
  const float r0 = normal_radius(x.w[0]), a0 = normal_angle(x.w[1]);
  const float r1 = normal_radius(x.w[2]), a1 = normal_angle(x.w[3]);
  return {{r0 * __cosf(a0), r0 * __sinf(a0), r1 * __cosf(a1), r1 * __sinf(a1)}};
}

// The normal of one position: a whole Philox call for it.
__device__ __forceinline__ float normal(std::uint64_t position, std::uint32_t column, std::uint32_t stream, std::uint64_t seed) {
  const Words x = philox(position / 4, column, stream, seed);
  const bool second = position & 2;
  const float r = normal_radius(second ? x.w[2] : x.w[0]), a = normal_angle(second ? x.w[3] : x.w[1]);
  return r * (position & 1 ? __sinf(a) : __cosf(a));
}

}  // namespace demp
