// The gather of compact and channel_select on a GPU: a list of tensors in one launch, rows and columns together, any
// element size. What they compute is in demp_kernels/ops/compact.py and channel_select.py.
//
//   target[r, a, c, u] = source[rows[r], a, columns[c], u], zero where an index is not one of the source's
//
// for contiguous targets (row, between, column, unit) in units of 1 to 16 bytes: `between` is the taps of a channels_last
// weight, the units of a column those of a contiguous one. Every byte kept is read once and written once; the order of the
// target decides which thread does what, so writes are coalesced, and reads are wherever whole stretches are kept.
#pragma once

#include <vector>

#include "ops/cuda/tensor_list.cuh"

namespace demp {

struct Gather {
  const void* source;
  void* target;
  const std::int64_t* rows;     // on the device; nullptr: all
  const std::int64_t* columns;  // likewise
  std::int64_t source_rows, target_rows, between, source_columns, target_columns;
  std::int64_t column_bytes;
};

// A Gather in units, as the kernel wants it.
struct GatherEntry {
  const unsigned char* source;
  unsigned char* target;
  const std::int64_t* rows;
  const std::int64_t* columns;
  std::int64_t source_rows, between, source_columns, target_rows, first_tile;
  Divisor row_units, between_units, column_units;  // of the target: a row, one of `between`, a column
  std::uint32_t unit;
};

namespace compact {

constexpr int kThreads = 256;
constexpr int kUnits = 4;  // loads in flight a thread
constexpr std::int64_t kMaxRowUnits = std::int64_t{1} << 30;

template <typename Unit>
__device__ __forceinline__ void copy_tile(const GatherEntry& g, std::int64_t tile) {
  const std::int64_t total = g.target_rows * g.row_units.value, first = tile * kThreads * kUnits + threadIdx.x;
  // One 64-bit division a tile: the threads' own are relative to the row that the tile begins in.
  const std::int64_t base_row = tile * kThreads * kUnits / g.row_units.value, base = base_row * g.row_units.value;
  const Unit* const source = reinterpret_cast<const Unit*>(g.source);
  Unit* const target = reinterpret_cast<Unit*>(g.target);
  Unit copied[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const std::int64_t at = first + i * kThreads;
    copied[i] = Unit{};
    if (at >= total) continue;
    std::uint32_t rest = static_cast<std::uint32_t>(at - base);
    std::int64_t row = base_row + g.row_units.divide(rest);
    const std::int64_t between = g.between_units.divide(rest);
    std::int64_t column = g.column_units.divide(rest);
    if (g.rows) row = g.rows[row];
    if (g.columns) column = g.columns[column];
    if (row < 0 || row >= g.source_rows || column < 0 || column >= g.source_columns) continue;
    copied[i] = source[((row * g.between + between) * g.source_columns + column) * g.column_units.value + rest];
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const std::int64_t at = first + i * kThreads;
    if (at < total) target[at] = copied[i];
  }
}

template <int capacity>
__global__ void __launch_bounds__(kThreads) compact_rows_and_columns(const __grid_constant__ TensorList<GatherEntry, capacity> list) {
  for (std::int64_t tile = blockIdx.x; tile < list.tiles; tile += gridDim.x) {
    const GatherEntry& g = entry_of(list, tile);
    const std::int64_t own = tile - g.first_tile;
    switch (g.unit) {
      case 16: copy_tile<uint4>(g, own); break;
      case 8: copy_tile<uint2>(g, own); break;
      case 4: copy_tile<std::uint32_t>(g, own); break;
      case 2: copy_tile<std::uint16_t>(g, own); break;
      default: copy_tile<std::uint8_t>(g, own); break;
    }
  }
}

// Without a selection of columns a row is one stretch, and without one of rows either the whole tensor is; such stretches
// are cut up again into rows of 1 KiB where they can be, so that any size can be divided by 32-bit arithmetic.
inline Gather in_long_stretches(Gather g) {
  if (g.columns) return g;
  g.column_bytes *= g.between * g.source_columns;
  g.between = g.source_columns = g.target_columns = 1;
  if (g.rows) return g;
  const std::int64_t bytes = g.column_bytes * g.target_rows;
  g.column_bytes = bytes % 1024 == 0 ? 1024 : bytes % 16 == 0 ? 16 : 1;
  g.source_rows = g.target_rows = bytes / g.column_bytes;
  return g;
}

inline std::int64_t unit_of(const Gather& g) {
  std::int64_t unit = 16;
  while (g.column_bytes % unit || !is_aligned(g.source, unit) || !is_aligned(g.target, unit)) unit /= 2;
  return unit;
}

inline std::int64_t bytes_of(const Gather& g) { return g.target_rows * g.between * g.target_columns * g.column_bytes; }

inline GatherEntry in_units(const Gather& g) {
  const std::int64_t unit = unit_of(g), column = g.column_bytes / unit, between = g.target_columns * column;
  return {static_cast<const unsigned char*>(g.source), static_cast<unsigned char*>(g.target), g.rows, g.columns, g.source_rows,
          g.between, g.source_columns, g.target_rows, 0, Divisor::of(g.between * between), Divisor::of(between),
          Divisor::of(column), static_cast<std::uint32_t>(unit)};
}

}  // namespace compact

// Whether the kernel can take a gather: the units of a row of its target must be countable in 30 bits.
inline bool can_gather(const Gather& gather) {
  const Gather g = compact::in_long_stretches(gather);
  return g.between * g.target_columns * g.column_bytes / compact::unit_of(g) < compact::kMaxRowUnits;
}

inline void launch_gathers(const std::vector<Gather>& gathers, cudaStream_t stream) {
  std::vector<GatherEntry> entries;
  for (const Gather& g : gathers) {
    if (compact::bytes_of(g) > 0) entries.push_back(compact::in_units(compact::in_long_stretches(g)));
  }
  auto tiles_of = [](const GatherEntry& g) {
    return ceil_div<std::int64_t>(g.target_rows * g.row_units.value, compact::kThreads * compact::kUnits);
  };
  for_each_list(entries, tiles_of, [&](const auto& list) {
    constexpr int capacity = sizeof(list.entry) / sizeof(GatherEntry);
    const std::int64_t blocks = std::min<std::int64_t>(list.tiles, std::int64_t{32} * multiprocessors());
    DEMP_LAUNCH((compact::compact_rows_and_columns<capacity>), static_cast<unsigned>(blocks), compact::kThreads, 0, stream, list);
  });
}

}  // namespace demp
