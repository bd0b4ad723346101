// What the kernels need of their compiler: nvcc, or g++ with the grid emulator of tests/cuda/emulator, which runs the
// same source on the CPU. Launches and shared arrays go through macros, because the emulator must know of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEMP_LAUNCH(kernel, grid, block, dynamic_shared, stream, ...) \
  kernel<<<(grid), (block), (dynamic_shared), (stream)>>>(__VA_ARGS__)
#define DEMP_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DEMP_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "grid_emulator.h"
#endif

namespace demp {

// The numbers of ScalarType that the kernels know, in the order of `type_index` (common/checks.h).
enum class ElementType { float32, float64, bfloat16, float16 };

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

// Multiprocessors of the current device: what grids are sized by.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return emulator::multiprocessors();
#endif
}

inline void zero_memory(void* address, std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;  // the address may be null then
#ifdef __CUDACC__
  cudaMemsetAsync(address, 0, bytes, stream);
#else
  (void)stream;
  std::memset(address, 0, bytes);
#endif
}

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* p, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// ---- elements --------------------------------------------------------------------------------------------------

// The type that arithmetic is done in.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float to_wide(float x) { return x; }
__device__ __forceinline__ double to_wide(double x) { return x; }
__device__ __forceinline__ float to_wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T to_narrow(Wide<T> x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half to_narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- groups of elements: 16-byte words -------------------------------------------------------------------------

template <typename T>
constexpr int kPerWord = 16 / static_cast<int>(sizeof(T));

// A plain assignment is taken apart again and comes out as four narrow stores in some kernels (nvcc 13.0, seen in SASS).
__device__ __forceinline__ void store_word(void* p, uint4 word) {
#ifdef __CUDACC__
  __stwb(static_cast<uint4*>(p), word);
#else
  *static_cast<uint4*>(p) = word;
#endif
}

// N elements as they are in memory, converted one by one when used: 16-bit types then take half the registers.
template <typename T, int N>
struct Group {
  static_assert(N % kPerWord<T> == 0, "groups are whole words");
  T lane[N];

  // p must be aligned to 16 bytes.
  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < N; i += kPerWord<T>) {
      const uint4 word = *reinterpret_cast<const uint4*>(p + i);
      std::memcpy(&lane[i], &word, 16);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < N; i += kPerWord<T>) {
      uint4 word;
      std::memcpy(&word, &lane[i], 16);
      store_word(p + i, word);
    }
  }
};

}  // namespace demp
