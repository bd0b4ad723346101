// activation on the CPU; what it computes is in demp_kernels/ops/activation.py. The loops are in
// isa/activation_loops.h, compiled here once for every instruction set (isa/for_each.h); this file cuts tensors into
// blocks and shares. No compiler flag beyond -O2 or -O3 is needed.
//
// Counts are integers summed over shares in order: the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/activation_arguments.h"
#include "common/allocate.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/scratch.h"
#include "ops/cpu/isa/activation_table.h"

#define DEMP_ISA_SOURCE "ops/cpu/isa/activation_loops.h"
#include "ops/cpu/isa/for_each.h"

namespace demp {
namespace {

#if defined(__x86_64__)
// What is limited by memory runs with 32-byte vectors: relu with counts took 0.93 to 1.28 of a copy with them and 0.94 to
// 1.44 with 64-byte ones (Zen 4, third-level cache and beyond). Arithmetic gains from the wide ones.
ActivationTable wide_arithmetic() {
  ActivationTable t = avx512::kActivationTable;
  const ActivationTable& narrow = avx2::kActivationTable;
  for (int type = 0; type < kTypes; ++type) {
    for (Act act : {Act::relu, Act::leaky_relu}) {
      const int a = int(act);
      t.flat[type][a] = narrow.flat[type][a];
      t.rows[type][a] = narrow.rows[type][a];
      t.backward[type][a] = narrow.backward[type][a];
      t.backward_bits[type][a] = narrow.backward_bits[type][a];
    }
  }
  return t;
}
#endif

const ActivationTable& table() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::avx512: {
      static const ActivationTable mixed = wide_arithmetic();
      return mixed;
    }
    case Level::avx2: return avx2::kActivationTable;
    case Level::portable: break;
  }
#endif
  return portable::kActivationTable;
}

struct Forward : ActivationView {
  Parameters parameters;
  std::uint64_t seed;
};

Forward read_forward(const Tensor& x, const std::string& activation, double slope, std::int64_t channel_dim,
                     double noise_std, const std::optional<Tensor>& seed) {
  Forward f{check_activation_forward(x, activation, slope, channel_dim, noise_std, seed), {slope, noise_std, false}, 0};
  if (f.noisy) f.seed = std::uint64_t(*seed->const_data_ptr<std::int64_t>());
  return f;
}

// ---- forward --------------------------------------------------------------------------------------------------

// Elements that are worth another thread: about 10 us of work.
std::int64_t grain(const Forward& f) { return f.noisy ? 8192 : is_piecewise_linear(f.act) ? 65536 : 16384; }

// One array of counters a share, a cache line apart, summed into `active` at the end.
class Counters {
 public:
  Counters(std::int64_t* active, std::int64_t channels, std::int64_t shares)
      : active_(active), channels_(channels), stride_(channels + 16), shares_(shares) {
    std::fill_n(active, channels, 0);
    if (shares > 1) storage_.resize(std::size_t(stride_ * shares));
  }
  std::int64_t* of(std::int64_t share) { return shares_ > 1 ? storage_.data() + stride_ * share + 8 : active_; }
  void sum() {
    if (shares_ == 1) return;
    for (std::int64_t s = 0; s < shares_; ++s) {
      for (std::int64_t c = 0; c < channels_; ++c) active_[c] += of(s)[c];
    }
  }

 private:
  std::int64_t* active_;
  std::int64_t channels_, stride_, shares_;
  std::vector<std::int64_t> storage_;
};

const char* at(const void* p, std::int64_t element, int size) { return static_cast<const char*>(p) + element * size; }
char* at(void* p, std::int64_t element, int size) { return static_cast<char*>(p) + element * size; }

// Channel planes: (outer, channels, inner) with inner > 1. Blocks are flat pieces of memory, whatever the planes' size;
// counts come from the blocks' bits.
void forward_planes(const Forward& f, const void* x, void* y, int size, std::int64_t* active, std::uint8_t* mask) {
  const ActivationTable& t = table();
  const std::int64_t n = f.outer * f.channels * f.inner, block = f.noisy ? 1024 : 16384;
  const Shares shares((n + kBlockBits - 1) / kBlockBits, grain(f) / kBlockBits);
  Counters counters(active, f.channels, shares.count);
  shares.run([&](std::int64_t share, std::int64_t first, std::int64_t last) {
    alignas(64) std::uint8_t bits[16384 / 8 + 8];
    Scratch noise(f.noisy ? (block + t.noise_slack) * 4 : 0), stage(f.noisy ? t.stage_bytes : 0);
    const std::int64_t end = std::min(n, last * kBlockBits);
    for (std::int64_t i = first * kBlockBits; i < end; i += block) {
      const std::int64_t m = std::min(block, end - i);
      if (f.noisy) {
        fetch_ahead(at(x, i, size), m * size);
        t.noise_planes(noise.as<float>(), i, i + m, f.channels, f.inner, f.seed, stage.as<char>());
        t.noisy[f.type][f.act](at(x, i, size), at(y, i, size), m, f.parameters, bits, noise.as<float>());
        if (mask) std::memcpy(mask + i / 8, bits, std::size_t(m + 7) / 8);
      } else {
        t.flat[f.type][f.act](at(x, i, size), at(y, i, size), m, f.parameters, bits);
      }
      t.count_planes(bits, i, i + m, f.channels, f.inner, counters.of(share));
    }
    finish_streaming();
  });
  counters.sum();
}

// Rows: (rows, channels), the channel innermost.
void forward_rows(const Forward& f, const void* x, void* y, int size, std::int64_t* active, std::uint8_t* mask) {
  const ActivationTable& t = table();
  const std::int64_t rows = f.outer, channels = f.channels, packet = t.packet[f.type];
  // Rows side by side that fill whole vectors, unless their counters outgrow the first-level cache, and enough of them
  // to make a long loop.
  std::int64_t together = packet / std::gcd(channels, packet);
  if (together * channels > 2048) together = 1;
  together *= std::max<std::int64_t>(1, 512 / (together * channels));
  constexpr std::int64_t unit = 8;  // rows: whole groups of noise, whole bytes of bits
  const Shares shares((rows + unit - 1) / unit, grain(f) / (unit * channels));
  Counters counters(active, channels, shares.count);
  shares.run([&](std::int64_t share, std::int64_t first, std::int64_t last) {
    std::vector<std::int64_t> lanes(std::size_t(together * channels + packet));
    RowCounts counts{lanes.data(), together, 0, counters.of(share)};
    const std::int64_t begin = first * unit, end = std::min(rows, last * unit);
    Parameters parameters = f.parameters;
    // vectors start anew after `together` rows, or after a block of rows
    parameters.stream &= together * channels * size % 64 == 0 && unit * channels * size % 64 == 0;
    if (!f.noisy) {
      t.rows[f.type][f.act](at(x, begin * channels, size), at(y, begin * channels, size), end - begin, channels,
                            parameters, counts);
    } else {
      const std::int64_t block = unit * std::max<std::int64_t>(1, 1024 / (unit * channels));
      Scratch noise((block * channels + t.noise_slack) * 4), stage(t.stage_bytes), bits(block * channels / 8 + 8);
      for (std::int64_t r = begin; r < end; r += block) {
        const std::int64_t m = std::min(block, end - r), i = r * channels;
        t.count_rows[f.type](at(x, i, size), m, channels, counts);  // before y, which may be x, is written
        fetch_ahead(at(x, i + m * channels, size), std::min(block, end - r - m) * channels * size);
        t.noise_rows(noise.as<float>(), r, r + m, channels, f.seed, stage.as<char>());
        t.noisy[f.type][f.act](at(x, i, size), at(y, i, size), m * channels, parameters,
                               mask ? mask + i / 8 : bits.as<std::uint8_t>(), noise.as<float>());
      }
    }
    finish_streaming();
    t.finish_rows[f.type](channels, counts);
  });
  counters.sum();
}

// Fills y, which may be x; returns active and mask.
std::tuple<Tensor, Tensor> run_forward(Forward f, const Tensor& x, const Tensor& y) {
  const std::int64_t n = x.numel();
  f.parameters.stream = x.const_data_ptr() != y.const_data_ptr() && streams(y.const_data_ptr(), n * x.element_size());
  const bool with_mask = f.with_mask();
  Tensor active = new_vector(f.channels, ScalarType::Long);
  Tensor mask = new_vector(with_mask ? (n + 7) / 8 : 0, ScalarType::Byte);
  std::int64_t* counts = active.mutable_data_ptr<std::int64_t>();
  if (n == 0) {
    std::fill_n(counts, f.channels, 0);
    return {active, mask};
  }
  std::uint8_t* bits = with_mask ? mask.mutable_data_ptr<std::uint8_t>() : nullptr;
  (f.inner == 1 ? forward_rows : forward_planes)(f, x.const_data_ptr(), y.mutable_data_ptr(), int(x.element_size()),
                                                 counts, bits);
  return {active, mask};
}

std::tuple<Tensor, Tensor, Tensor> activation_forward(const Tensor& x, std::string activation, double slope,
                                                      std::int64_t channel_dim, double noise_std,
                                                      std::optional<Tensor> seed) {
  const Forward f = read_forward(x, activation, slope, channel_dim, noise_std, seed);
  Tensor y = new_like(x);
  auto [active, mask] = run_forward(f, x, y);
  return {y, active, mask};
}

std::tuple<Tensor, Tensor> activation_forward_(Tensor x, std::string activation, double slope, std::int64_t channel_dim,
                                               double noise_std, std::optional<Tensor> seed) {
  const Forward f = read_forward(x, activation, slope, channel_dim, noise_std, seed);
  check_activation_in_place(f, activation, slope);
  return run_forward(f, x, x);
}

// ---- counting alone -------------------------------------------------------------------------------------------

void activation_count_(const Tensor& x, std::int64_t channel_dim, Tensor active, std::optional<Tensor> seen) {
  const ActivationView view = check_activation_count(x, channel_dim, active, seen);
  const ActivationTable& t = table();
  std::int64_t* counts = active.mutable_data_ptr<std::int64_t>();
  const std::int64_t n = x.numel(), rows = view.outer, channels = view.channels;
  const int size = int(x.element_size());
  const void* elements = x.const_data_ptr();
  if (seen && channels > 0) *seen->mutable_data_ptr<std::int64_t>() += n / channels;
  if (n == 0) return;
  if (view.inner == 1) {
    const std::int64_t together = std::max<std::int64_t>(1, 512 / channels);
    std::vector<std::int64_t> lanes(std::size_t(together * channels + t.packet[view.type]));
    RowCounts row_counts{lanes.data(), together, 0, counts};
    t.count_rows[view.type](elements, rows, channels, row_counts);
    t.finish_rows[view.type](channels, row_counts);
    return;
  }
  constexpr std::int64_t block = 4096;
  alignas(64) char ignored[block * 8];
  alignas(64) std::uint8_t bits[block / 8 + 8];
  for (std::int64_t i = 0; i < n; i += block) {
    const std::int64_t m = std::min(block, n - i);
    t.flat[view.type][int(Act::relu)](at(elements, i, size), ignored, m, {0, 0, false}, bits);
    t.count_planes(bits, i, i + m, channels, view.inner, counts);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------

Tensor activation_backward(const Tensor& grad, const Tensor& saved, const Tensor& mask, std::string activation,
                           double slope) {
  const ActivationBackwardView view = check_activation_backward(grad, saved, mask, activation);
  const int act = view.act, type = view.type;
  const bool from_bits = view.from_bits;
  const std::int64_t n = grad.numel();
  Tensor result = new_like(grad);
  if (n == 0) return result;
  const ActivationTable& t = table();
  const int size = int(grad.element_size());
  const void* g = grad.const_data_ptr();
  const void* s = from_bits ? mask.const_data_ptr() : saved.const_data_ptr();
  void* out = result.mutable_data_ptr();
  const Parameters parameters{slope, 0, streams(out, n * size)};
  const Shares shares((n + kBlockBits - 1) / kBlockBits, (is_piecewise_linear(act) ? 65536 : 16384) / kBlockBits);
  shares.run([&](std::int64_t, std::int64_t first, std::int64_t last) {
    const std::int64_t i = first * kBlockBits, m = std::min(n, last * kBlockBits) - i;
    if (from_bits) {
      t.backward_bits[type][act](at(g, i, size), static_cast<const std::uint8_t*>(s) + i / 8, at(out, i, size), m, parameters);
    } else {
      t.backward[type][act](at(g, i, size), at(s, i, size), at(out, i, size), m, parameters);
    }
    finish_streaming();
  });
  return result;
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("activation_forward", TORCH_BOX(&demp::activation_forward));
  m.impl("activation_forward_", TORCH_BOX(&demp::activation_forward_));
  m.impl("activation_count_", TORCH_BOX(&demp::activation_count_));
  m.impl("activation_backward", TORCH_BOX(&demp::activation_backward));
}
