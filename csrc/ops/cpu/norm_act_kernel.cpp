// norm_act on the CPU; what it computes is in demp_kernels/ops/norm_act.py. The loops are in isa/norm_act_loops.h,
// compiled here once for every instruction set; this file checks, shares the work out and combines the sums.
//
// Contiguous tensors are shared out by channel: the planes of a few channels are gone through twice, for the sums and then,
// while the second-level cache holds them, for the outputs. Where channels are too few for the threads they are shared out
// by image (and by pieces of planes, where images are few), channels-last ones by rows. That takes two passes over
// everything: sums of every share, combined in a fixed order, so that the same number of threads gives the same bits; then
// the outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/allocate.h"
#include "common/norm_act_arguments.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/scratch.h"
#include "ops/cpu/isa/norm_act_table.h"

#define DEMP_ISA_SOURCE "ops/cpu/isa/norm_act_loops.h"
#include "ops/cpu/isa/for_each.h"

namespace demp {
namespace {

const NormActTable& table() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case Level::avx512: return avx512::kNormActTable;
    case Level::avx2: return avx2::kNormActTable;
    case Level::portable: break;
  }
#endif
  return portable::kNormActTable;
}

// ---- arguments ------------------------------------------------------------------------------------------------

struct Problem : NormAct {
  int type;
  bool rows;
  std::int64_t n;  // values of a channel
};

Problem problem_of(const NormActView& view, const Tensor& x, double slope) {
  Problem p{};
  p.act = view.act, p.type = view.type, p.rows = view.rows, p.n = view.n;
  p.outer = view.outer, p.channels = view.channels, p.inner = view.inner;
  p.x = x.const_data_ptr();
  p.last_channel = p.channels;
  p.parameters = {slope, 0, false};
  return p;
}

// ---- channel parameters ---------------------------------------------------------------------------------------

double rounded(double value, ScalarType type) { return type == ScalarType::Double ? value : double(float(value)); }

std::vector<double> values_of(const std::optional<Tensor>& t, std::int64_t channels, double otherwise) {
  std::vector<double> values(std::size_t(channels), otherwise);
  if (!t) return values;
  const std::int64_t stride = t->stride(0);
  const void* p = t->const_data_ptr();
  for (std::int64_t i = 0; i < channels; ++i) {
    double& v = values[std::size_t(i)];
    switch (t->scalar_type()) {
      case ScalarType::Float: v = static_cast<const float*>(p)[i * stride]; break;
      case ScalarType::Double: v = static_cast<const double*>(p)[i * stride]; break;
      case ScalarType::BFloat16: v = double(float(static_cast<const c10::BFloat16*>(p)[i * stride])); break;
      default: v = double(float(static_cast<const c10::Half*>(p)[i * stride]));
    }
  }
  return values;
}

Tensor tensor_of(const std::vector<double>& values, ScalarType type) {
  Tensor result = new_vector(std::int64_t(values.size()), type);
  void* p = result.mutable_data_ptr();
  for (std::size_t i = 0; i < values.size(); ++i) {
    switch (type) {
      case ScalarType::Float: static_cast<float*>(p)[i] = float(values[i]); break;
      case ScalarType::Double: static_cast<double*>(p)[i] = values[i]; break;
      case ScalarType::BFloat16: static_cast<c10::BFloat16*>(p)[i] = float(values[i]); break;
      default: static_cast<c10::Half*>(p)[i] = float(values[i]);
    }
  }
  return result;
}

// scale = weight / sqrt(var + eps), from the rounded statistics, so that forward and backward agree on it.
std::vector<double> scales(const std::vector<double>& weight, const std::vector<double>& var, double eps, ScalarType type) {
  std::vector<double> scale(weight.size());
  for (std::size_t i = 0; i < scale.size(); ++i) scale[i] = rounded(weight[i] / std::sqrt(var[i] + eps), type);
  return scale;
}

// ---- sharing out ----------------------------------------------------------------------------------------------

constexpr std::int64_t kGrain = 32768;  // elements that are worth another thread

std::int64_t scratch_bytes(std::int64_t period) {
  return table().scratch_bytes + table().scratch_bytes_column * period;
}

// Whether every thread gets about as many channels, of planes.
bool by_channel(const Problem& p) {
  const std::int64_t threads = torch::stable::get_num_threads();
  return !p.rows && (p.channels + threads - 1) / threads * threads * 7 <= p.channels * 8;
}

int element_size(const Problem& p) { return p.type == 0 ? 4 : p.type == 1 ? 8 : 2; }

// part(channels, scratch) for a few channels at a time, the fields of `channels` set for them: one where planes are large,
// and where they are small enough of them to make a few cache lines that belong to no other channels.
template <class Part>
void run_by_channel(const Problem& p, const Part& part) {
  const std::int64_t group = std::max<std::int64_t>(1, 2048 / (p.inner * element_size(p)));
  Shares(p.channels, std::max<std::int64_t>(1, kGrain / p.n)).run([&](std::int64_t, std::int64_t first, std::int64_t last) {
    Scratch scratch(scratch_bytes(p.channels));
    Problem channels = p;
    channels.pieces = 1, channels.piece = p.inner, channels.period = p.channels, channels.ahead = true;
    for (std::int64_t c = first; c < last; c += group) {
      channels.first_channel = c, channels.last_channel = std::min(last, c + group);
      part(channels, scratch.as<void>());
    }
    finish_streaming();
  });
}

// Whether `output` is written past the caches; every run of vectors must begin at a cache line.
bool streams_output(const Problem& p, const void* output) {
  return streams(output, p.n * p.channels * element_size(p)) && (p.rows ? p.period : p.inner) * element_size(p) % 64 == 0;
}

// part(share, first, last, scratch) for shares of the rows or of the pieces of images; shares are numbered from 0.
class Parts {
 public:
  explicit Parts(Problem& p) : Parts(p, set_units(p)) {}

  std::size_t count() const { return std::size_t(shares_.count); }

  template <class Part>
  void run(const Part& part) const {
    shares_.run([&](std::int64_t share, std::int64_t first, std::int64_t last) {
      Scratch scratch(scratch_bytes(period_));
      first = std::min(total_, first * unit_), last = std::min(total_, last * unit_);
      if (first < last) part(share, first, last, scratch.as<void>());
      finish_streaming();
    });
  }

 private:
  Parts(const Problem& p, std::int64_t unit)
      : unit_(unit), total_(p.outer * p.pieces), period_(p.period),
        shares_((total_ + unit - 1) / unit, std::max<std::int64_t>(1, kGrain * total_ / (unit * p.n * p.channels))) {}

  // Sets pieces, piece and period; returns how many rows or pieces stay together.
  static std::int64_t set_units(Problem& p) {
    p.pieces = 1, p.piece = p.inner, p.period = p.channels;
    if (p.rows) {
      // rows side by side make bands whose length suits the vectors
      const std::int64_t whole = std::lcm(p.channels, std::int64_t(table().tile[p.type]));
      p.period = whole <= 4096 ? whole : std::lcm(p.channels, std::int64_t(table().group[p.type]));
      return 4 * (p.period / p.channels);
    }
    const std::int64_t threads = torch::stable::get_num_threads();
    if (p.outer < 4 * threads && p.inner >= 8192) {
      p.pieces = std::min(p.inner / 4096, (4 * threads + p.outer - 1) / p.outer);
      p.piece = (p.inner + p.pieces * 64 - 1) / (p.pieces * 64) * 64;
      p.pieces = (p.inner + p.piece - 1) / p.piece;
    }
    return 1;
  }

  std::int64_t unit_, total_, period_;
  Shares shares_;
};

// Chan, Golub, LeVeque: the moments of two sets together.
void merge(Moments& into, const Moments& other) {
  if (other.n == 0) return;
  const double n = into.n + other.n, d = other.mean - into.mean;
  into.m2 += other.m2 + d * d * (into.n * other.n / n);
  into.mean += d * (other.n / n);
  into.n = n;
}

// ---- forward --------------------------------------------------------------------------------------------------

struct Statistics {
  std::vector<double> mean, var, scale, bias, weight;
  double eps;
  ScalarType type;

  void set(std::size_t i, const Moments& m) {
    mean[i] = rounded(m.mean, type);
    var[i] = rounded(m.m2 / m.n, type);
    // Divided by an infinite deviation, z would be the bias, and a unit that diverged could look dead: NaN instead.
    if (std::isinf(var[i])) var[i] = std::numeric_limits<double>::quiet_NaN();
    scale[i] = rounded(weight[i] / std::sqrt(var[i] + eps), type);
  }
};

void forward_by_channel(Problem& p, Statistics& s, std::int64_t* active) {
  const NormActTable& t = table();
  p.parameters.stream = streams_output(p, p.y);
  std::vector<Moments> moments(std::size_t(p.channels));
  run_by_channel(p, [&](Problem& channels, void* scratch) {
    channels.backwards = false;
    t.statistics[p.type](channels, 0, p.outer, moments.data(), scratch);
    for (std::int64_t c = channels.first_channel; c < channels.last_channel; ++c) s.set(std::size_t(c), moments[std::size_t(c)]);
    channels.backwards = true;
    t.forward[p.type](channels, 0, p.outer, active, scratch);
  });
}

void run_forward(Problem& p, Statistics& s, std::int64_t* active) {
  p.mean = s.mean.data(), p.scale = s.scale.data(), p.bias = s.bias.data();
  if (by_channel(p)) return forward_by_channel(p, s, active);
  const NormActTable& t = table();
  const Parts parts(p);
  p.parameters.stream = streams_output(p, p.y);
  const std::size_t count = parts.count(), channels = std::size_t(p.channels);
  std::vector<Moments> moments(count * channels, Moments{0, 0, 0});
  parts.run([&](std::int64_t share, std::int64_t first, std::int64_t last, void* scratch) {
    t.statistics[p.type](p, first, last, &moments[std::size_t(share) * channels], scratch);
  });
  for (std::size_t c = 0; c < channels; ++c) {
    for (std::size_t share = 1; share < count; ++share) merge(moments[c], moments[share * channels + c]);
    s.set(c, moments[c]);
  }
  std::vector<std::int64_t> counts(count * channels, 0);
  parts.run([&](std::int64_t share, std::int64_t first, std::int64_t last, void* scratch) {
    t.forward[p.type](p, first, last, &counts[std::size_t(share) * channels], scratch);
  });
  for (std::size_t c = 0; c < channels; ++c) {
    active[c] = 0;
    for (std::size_t share = 0; share < count; ++share) active[c] += counts[share * channels + c];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_forward(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
    std::string activation, double slope, double eps, double noise_std, std::optional<Tensor> seed) {
  const NormActView view = check_norm_act(x, weight, bias, residual, activation, slope, eps);
  Problem p = problem_of(view, x, slope);
  p.noisy = check_norm_act_noise(x, noise_std, seed);
  if (p.noisy) p.seed = std::uint64_t(*seed->const_data_ptr<std::int64_t>());
  p.parameters.noise_std = noise_std;
  p.added = residual.has_value();
  p.residual = p.added ? residual->const_data_ptr() : nullptr;
  const bool bits = p.added && view.is_linear();
  Tensor y = new_like(x);
  Tensor active = new_vector(p.channels, ScalarType::Long);
  Tensor mask = bits ? new_matrix(view.mask_runs, view.mask_bytes, ScalarType::Byte) : new_vector(0, ScalarType::Byte);
  const ScalarType type = norm_act_wide(x.scalar_type());
  const std::size_t channels = std::size_t(p.channels);
  Statistics s{std::vector<double>(channels), std::vector<double>(channels), std::vector<double>(channels),
               values_of(bias, p.channels, 0), values_of(weight, p.channels, 1), eps, type};
  std::int64_t* counts = active.mutable_data_ptr<std::int64_t>();
  if (x.numel() == 0) {
    std::fill_n(counts, channels, 0);
  } else {
    p.y = y.mutable_data_ptr();
    p.mask = bits ? mask.mutable_data_ptr<std::uint8_t>() : nullptr;
    run_forward(p, s, counts);
  }
  return {y, active, tensor_of(s.mean, type), tensor_of(s.var, type), mask};
}

// ---- backward -------------------------------------------------------------------------------------------------

struct Gradients {
  std::vector<double> weight, bias;  // their gradients
  std::vector<double> slope_back, offset_back;
  const std::vector<double>&scale, &var;
  double eps;
  ScalarType type;

  void set(std::size_t i, const GradientSums& sums, double n) {
    const double invstd = 1 / std::sqrt(var[i] + eps);
    bias[i] = sums.dz;
    weight[i] = sums.dz_centred * invstd;
    slope_back[i] = rounded(scale[i] * invstd * weight[i] / n, type);
    offset_back[i] = rounded(scale[i] * sums.dz / n, type);
  }
};

void backward_by_channel(Problem& p, Gradients& g) {
  const NormActTable& t = table();
  p.parameters.stream = streams_output(p, p.grad_x);
  std::vector<GradientSums> sums(std::size_t(p.channels));
  run_by_channel(p, [&](Problem& channels, void* scratch) {
    channels.backwards = false;
    t.sums[p.type](channels, 0, p.outer, sums.data(), scratch);
    for (std::int64_t c = channels.first_channel; c < channels.last_channel; ++c) {
      g.set(std::size_t(c), sums[std::size_t(c)], double(p.n));
    }
    channels.backwards = true;
    t.input[p.type](channels, 0, p.outer, scratch);
  });
}

void run_backward(Problem& p, Gradients& g) {
  p.slope_back = g.slope_back.data(), p.offset_back = g.offset_back.data();
  if (by_channel(p)) return backward_by_channel(p, g);
  const NormActTable& t = table();
  const Parts parts(p);
  p.parameters.stream = streams_output(p, p.grad_x);
  const std::size_t count = parts.count(), channels = std::size_t(p.channels);
  std::vector<GradientSums> sums(count * channels, GradientSums{0, 0});
  parts.run([&](std::int64_t share, std::int64_t first, std::int64_t last, void* scratch) {
    t.sums[p.type](p, first, last, &sums[std::size_t(share) * channels], scratch);
  });
  for (std::size_t c = 0; c < channels; ++c) {
    GradientSums& all = sums[c];
    for (std::size_t share = 1; share < count; ++share) {
      all.dz += sums[share * channels + c].dz;
      all.dz_centred += sums[share * channels + c].dz_centred;
    }
    g.set(c, all, double(p.n));
  }
  parts.run([&](std::int64_t, std::int64_t first, std::int64_t last, void* scratch) {
    t.input[p.type](p, first, last, scratch);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> residual, const Tensor& mean, const Tensor& var, const Tensor& mask, std::string activation,
    double slope, double eps, bool added) {
  const NormActView view =
      check_norm_act_backward(grad, x, weight, bias, residual, mean, var, mask, activation, slope, eps, added);
  Problem p = problem_of(view, x, slope);
  p.added = added;
  if (added && view.is_linear()) p.mask = const_cast<std::uint8_t*>(mask.const_data_ptr<std::uint8_t>());
  else if (added) p.residual = residual->const_data_ptr();
  const ScalarType type = norm_act_wide(x.scalar_type());
  const std::size_t channels = std::size_t(p.channels);
  const std::vector<double> means = values_of(mean, p.channels, 0), vars = values_of(var, p.channels, 0);
  const std::vector<double> biases = values_of(bias, p.channels, 0);
  const std::vector<double> scale = scales(values_of(weight, p.channels, 1), vars, eps, type);
  Gradients g{std::vector<double>(channels), std::vector<double>(channels), std::vector<double>(channels),
              std::vector<double>(channels), scale, vars, eps, type};
  Tensor grad_x = new_like(x);
  Tensor grad_residual = added ? new_like(grad) : new_vector(0, grad.scalar_type());
  if (x.numel() > 0) {
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_residual = added ? grad_residual.mutable_data_ptr() : nullptr;
    p.mean = means.data(), p.scale = scale.data(), p.bias = biases.data();
    run_backward(p, g);
  }
  return {grad_x, tensor_of(g.weight, weight ? weight->scalar_type() : type),
          tensor_of(g.bias, bias ? bias->scalar_type() : type), grad_residual};
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("norm_act_forward", TORCH_BOX(&demp::norm_act_forward));
  m.impl("norm_act_backward", TORCH_BOX(&demp::norm_act_backward));
}
