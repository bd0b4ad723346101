// weight noise on the CPU; what it computes is in demp_kernels/ops/weight_noise.py. The loops are in
// isa/weight_noise_loops.h, compiled here once for every instruction set (isa/for_each.h).
//
// The whole list is cut into pieces of a few thousand elements, which the threads share: 62 tensors of a ResNet are one
// parallel loop. An element's noise depends on its coordinates alone, so the pieces do not show in the result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/parallel.h"
#include "common/philox.h"
#include "common/scratch.h"
#include "common/weight_noise_arguments.h"
#include "ops/cpu/isa/weight_noise_table.h"

#define DEMP_ISA_SOURCE "ops/cpu/isa/weight_noise_loops.h"
#include "ops/cpu/isa/for_each.h"

namespace demp {
namespace {

const WeightNoiseTable& table() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::avx512: return avx512::kWeightNoiseTable;
    case Level::avx2: return avx2::kWeightNoiseTable;
    case Level::portable: break;
  }
#endif
  return portable::kWeightNoiseTable;
}

struct Dimension {
  std::int64_t size, stride, logical;  // logical: its stride in the row's columns
};

// A tensor as rows (dim 0) of columns.
struct Target {
  char* data;
  int type, size;
  std::uint32_t stream;
  std::int64_t rows, columns, row_stride;
  const bool* live;  // or null
  std::int64_t live_stride;
  bool dense;                                   // every row is one block of memory, and so are all rows together
  std::vector<std::uint64_t> memory_to_column;  // dense, but the columns in another order; empty if in order
  std::vector<Dimension> dimensions;            // of a row, if not dense
};

// Dimensions of a row from the outermost in memory to the innermost, those of size 1 left out.
std::vector<Dimension> row_dimensions(const Tensor& t) {
  std::vector<Dimension> dimensions;
  std::int64_t logical = 1;
  for (std::int64_t d = t.dim() - 1; d > 0; --d) {
    if (t.size(d) != 1) dimensions.push_back({t.size(d), t.stride(d), logical});
    logical *= t.size(d);
  }
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  std::reverse(dimensions.begin(), dimensions.end());
  return dimensions;
}

std::vector<std::uint64_t> columns_in_memory_order(const std::vector<Dimension>& dimensions, std::int64_t columns) {
  std::vector<std::uint64_t> order(1, 0);
  order.reserve(std::size_t(columns));
  for (const Dimension& d : dimensions) {  // from the outermost: each column so far becomes d.size columns
    std::vector<std::uint64_t> finer;
    finer.reserve(order.size() * std::size_t(d.size));
    for (std::uint64_t base : order) {
      for (std::int64_t i = 0; i < d.size; ++i) finer.push_back(base + std::uint64_t(i * d.logical));
    }
    order = std::move(finer);
  }
  return order;
}

Target make_target(const Tensor& t, const std::optional<Tensor>& live, std::uint32_t stream) {
  Target target{};
  target.data = static_cast<char*>(t.mutable_data_ptr());
  target.type = type_index(t.scalar_type());
  target.size = int(t.element_size());
  target.stream = stream;
  target.rows = t.dim() ? t.size(0) : 1;
  target.columns = t.numel() / target.rows;
  target.row_stride = t.dim() ? t.stride(0) : 0;
  if (live) {
    target.live = static_cast<const bool*>(live->const_data_ptr());
    target.live_stride = live->stride(0);
  }
  target.dense = t.is_contiguous();
  if (target.dense) return target;
  std::vector<Dimension> dimensions = row_dimensions(t);
  std::int64_t block = 1;
  bool packed = true;
  for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
    packed = packed && d->stride == block;
    block *= d->size;
  }
  target.dense = packed && (target.rows == 1 || target.row_stride == target.columns);
  if (target.dense) {
    target.memory_to_column = columns_in_memory_order(dimensions, target.columns);
  } else {
    target.dimensions = std::move(dimensions);
  }
  return target;
}

// A piece of a target: rows [row, row_end) of columns [column, column_end).
struct Piece {
  const Target* target;
  std::int64_t row, row_end, column, column_end;

  std::int64_t width() const { return column_end - column; }
  std::int64_t elements() const { return (row_end - row) * width(); }
};

constexpr std::int64_t kPiece = 4096;  // elements: noise and weights stay in the first-level cache

void cut(const Target& t, std::vector<Piece>& pieces) {
  const std::int64_t width = std::min(t.columns, kPiece / 4);
  const std::int64_t height = std::max<std::int64_t>(4, kPiece / width / 4 * 4);  // whole groups of four rows
  for (std::int64_t r = 0; r < t.rows; r += height) {
    for (std::int64_t c = 0; c < t.columns; c += width) {
      pieces.push_back({&t, r, std::min(t.rows, r + height), c, std::min(t.columns, c + width)});
    }
  }
}

// Address of element (row, column) of a target that is not dense.
char* element(const Target& t, std::int64_t row, std::int64_t column) {
  std::int64_t offset = row * t.row_stride;
  for (const Dimension& d : t.dimensions) offset += column / d.logical % d.size * d.stride;
  return t.data + offset * t.size;
}

void add_strided(const Target& t, const Piece& p, const float* noise, double std_, char* copy) {
  char* to = copy;
  for (std::int64_t r = p.row; r < p.row_end; ++r) {
    for (std::int64_t c = p.column; c < p.column_end; ++c, to += t.size) std::memcpy(to, element(t, r, c), std::size_t(t.size));
  }
  table().add[t.type](copy, noise, p.elements(), std_);
  const char* from = copy;
  for (std::int64_t r = p.row; r < p.row_end; ++r) {
    for (std::int64_t c = p.column; c < p.column_end; ++c, from += t.size) std::memcpy(element(t, r, c), from, std::size_t(t.size));
  }
}

void add_noise(const Piece& p, double std_, std::uint64_t seed, float* noise, char* stage, char* copy) {
  const WeightNoiseTable& loops = table();
  const Target& t = *p.target;
  if (t.live) {
    bool any = false;
    for (std::int64_t r = p.row; r < p.row_end; ++r) any = any || t.live[r * t.live_stride];
    if (!any) return;
  }
  const std::int64_t width = p.width();
  char* at = t.data + (p.row * t.columns + p.column) * t.size;
  if (t.dense) {
    for (std::int64_t r = p.row; r < p.row_end; ++r) fetch_ahead(at + (r - p.row) * t.columns * t.size, width * t.size);
  }
  if (t.columns == 1) {
    loops.noise_line(noise, p.row, p.row_end, t.stream, seed, stage);
  } else {
    const std::uint64_t* columns = t.memory_to_column.empty() ? nullptr : t.memory_to_column.data() + p.column;
    loops.noise_rows(noise, p.row, p.row_end, width, p.column, columns, t.stream, seed, stage);
  }
  if (t.live) {
    for (std::int64_t r = p.row; r < p.row_end; ++r) {
      // x + -0.0 is x for every x, zeros of both signs included
      if (!t.live[r * t.live_stride]) std::fill_n(noise + (r - p.row) * width, width, -0.0f);
    }
  }
  if (!t.dense) return add_strided(t, p, noise, std_, copy);
  if (width == t.columns) return loops.add[t.type](at, noise, p.elements(), std_);
  for (std::int64_t r = p.row; r < p.row_end; ++r, at += t.columns * t.size, noise += width) {
    loops.add[t.type](at, noise, width, std_);
  }
}

void weight_noise_(std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> live, double std_, const Tensor& seed) {
  check_weight_noise(tensors, live, std_, seed);
  if (!(std_ > 0)) return;
  std::vector<Target> targets;
  targets.reserve(tensors.size());  // pieces point into it
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    targets.push_back(make_target(tensors[i], live[i], std::uint32_t(i + 1)));
    cut(targets.back(), pieces);
  }
  std::vector<std::int64_t> starts;  // of each piece among all elements
  starts.reserve(pieces.size());
  std::int64_t total = 0;
  for (const Piece& piece : pieces) {
    starts.push_back(total);
    total += piece.elements();
  }
  const std::uint64_t key = std::uint64_t(*seed.const_data_ptr<std::int64_t>());
  const Shares shares(total, 2 * kPiece);
  shares.run([&](std::int64_t, std::int64_t begin, std::int64_t end) {
    const WeightNoiseTable& loops = table();
    Scratch noise((kPiece + loops.noise_slack) * 4), stage(loops.stage_bytes), copy(kPiece * 8);
    const auto first = std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin();
    for (std::size_t i = std::size_t(first); i < pieces.size() && starts[i] < end; ++i) {
      add_noise(pieces[i], std_, key, noise.as<float>(), stage.as<char>(), copy.as<char>());
    }
  });
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) { m.impl("weight_noise_", TORCH_BOX(&demp::weight_noise_)); }
