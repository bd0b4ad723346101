// norm_act on the CPU; what it computes is in demp_kernels/ops/norm_act.py. The loops are in isa/norm_act_loops.h,
// compiled here once for every instruction set; this file checks, shares the work out and combines the sums.
//
// Contiguous tensors are shared out by channel: a channel's statistics, then its outputs, so that what a core's cache
// holds is read from memory once. Where there are fewer channels than threads their images are shared out as well.
// Channels-last tensors are shared out by rows, in two passes. Sums are combined in a fixed order: the same number of
// threads gives the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/checks.h"
#include "common/parallel.h"
#include "common/philox.h"
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

bool is_piecewise_linear(int act) { return act == int(Act::relu) || act == int(Act::leaky_relu); }

// ---- checks ---------------------------------------------------------------------------------------------------

void check_like(const char* name, const Tensor& value, const Tensor& x) {
  if (value.scalar_type() == x.scalar_type() && same_shape(value, x) && same_order(value, x)) return;
  fail("norm_act: ", name, " must be like x (", dtype_name(x.scalar_type()), ", shape ", tuple_text(x.sizes()),
       ", strides ", tuple_text(x.strides()), "), got ", dtype_name(value.scalar_type()), ", shape ",
       tuple_text(value.sizes()), ", strides ", tuple_text(value.strides()));
}

ScalarType wide(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

void check_parameter(const char* name, const std::optional<Tensor>& value, const Tensor& x) {
  if (!value) return;
  const ScalarType type = x.scalar_type(), got = value->scalar_type();
  if (value->dim() == 1 && value->size(0) == x.size(1) && (got == type || got == wide(type))) return;
  fail("norm_act: ", name, " must have shape (", x.size(1), ",) and dtype ", dtype_name(type), " or ",
       dtype_name(wide(type)), ", got shape ", tuple_text(value->sizes()), " and dtype ", dtype_name(got));
}

void check_statistic(const char* name, const Tensor& value, const Tensor& x) {
  const ScalarType type = wide(x.scalar_type());
  if (value.dim() == 1 && value.size(0) == x.size(1) && value.scalar_type() == type) return;
  fail("norm_act: ", name, " must have shape (", x.size(1), ",) and dtype ", dtype_name(type), ", got shape ",
       tuple_text(value.sizes()), " and dtype ", dtype_name(value.scalar_type()));
}

struct Problem : NormAct {
  int type;
  bool rows;
  std::int64_t n;  // values of a channel
};

Problem check(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const std::string& activation, double slope, double eps) {
  static const char* const names[kActs] = {"relu", "leaky_relu", "gelu", "gelu_tanh", "silu"};
  Problem p{};
  p.act = -1;
  for (int i = 0; i < kActs; ++i) {
    if (activation == names[i]) p.act = i;
  }
  if (p.act < 0) {
    fail("norm_act: activation must be one of relu, leaky_relu, gelu, gelu_tanh, silu, got ", activation);
  }
  p.type = type_index(x.scalar_type());
  if (p.type < 0) fail("norm_act: x must be float32, bfloat16, float16 or float64, got ", dtype_name(x.scalar_type()));
  if (x.dim() < 2) fail("norm_act: x must have shape (N, C, *), got shape ", tuple_text(x.sizes()));
  const bool contiguous = x.is_contiguous();
  if (!contiguous && !is_channels_last(x)) {
    fail("norm_act: x must be contiguous or channels_last, got strides ", tuple_text(x.strides()));
  }
  const std::int64_t numel = x.numel();
  if (numel > 0 && numel == x.size(1)) {
    fail("norm_act: x must have more than one value per channel, got shape ", tuple_text(x.sizes()));
  }
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
  if (residual) check_like("residual", *residual, x);
  if (!(eps > 0 && std::isfinite(eps))) fail("norm_act: eps must be finite and > 0, got ", number_text(eps));
  p.channels = x.size(1);
  p.n = p.channels ? numel / p.channels : 0;
  p.outer = x.size(0);
  p.inner = p.outer ? p.n / p.outer : 0;
  p.rows = !contiguous || p.inner == 1;
  if (p.rows) p.outer = p.n, p.inner = 1;
  p.x = x.const_data_ptr();
  p.parameters = {slope, 0};
  return p;
}

std::int64_t mask_numel(const Problem& p, const Tensor& x, std::int64_t (&shape)[2]) {
  shape[0] = p.rows ? 1 : x.size(0) * x.size(1);
  std::int64_t plane = 1;
  for (std::int64_t d = 2; d < x.dim(); ++d) plane *= x.size(d);
  shape[1] = ((p.rows ? x.numel() : plane) + 7) / 8;
  return shape[0] * shape[1];
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

Tensor tensor_of(const std::vector<double>& values, const Tensor& like, ScalarType type) {
  Tensor result = torch::stable::new_empty(like, {std::int64_t(values.size())}, type);
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

class Scratch {
 public:
  explicit Scratch(const Problem& p)
      : storage_(new char[std::size_t(table().scratch_bytes + table().scratch_bytes_column * p.period + 64)]) {}
  void* get() { return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(storage_.get()) + 63) & ~std::uintptr_t{63}); }

 private:
  std::unique_ptr<char[]> storage_;
};

// Rows side by side make bands whose length suits the vectors, and every channel has its columns in a band.
std::int64_t period_of(const Problem& p) {
  const std::int64_t whole = std::lcm(p.channels, std::int64_t(table().tile[p.type]));
  return whole <= 4096 ? whole : std::lcm(p.channels, std::int64_t(table().group[p.type]));
}

// part(slot, first, last) for shares of the rows; slots are numbered from 0 to `count`.
struct RowShares {
  std::int64_t unit, rows;
  Shares shares;
  explicit RowShares(const Problem& p)
      : unit(4 * (p.period / p.channels)), rows(p.outer),
        shares((p.outer + unit - 1) / unit, std::max<std::int64_t>(1, kGrain / (unit * p.channels))) {}
  template <class Part>
  void run(const Part& part) const {
    shares.run([&](std::int64_t slot, std::int64_t first, std::int64_t last) {
      part(slot, std::min(rows, first * unit), std::min(rows, last * unit));
    });
  }
};

// part(channel, slot, first, last) for shares of the images of every channel; with one slot, `whole(channel)` does a
// channel from beginning to end, while it is in the cache.
struct PlaneShares {
  std::int64_t slots, images;
  explicit PlaneShares(const Problem& p) : slots(1), images(p.outer) {
    const std::int64_t threads = torch::stable::get_num_threads();
    if (p.channels < threads && p.channels * p.n > 2 * kGrain) {
      slots = std::min(p.outer, (2 * threads + p.channels - 1) / p.channels);
    }
  }
  std::int64_t start(std::int64_t slot) const { return images * slot / slots; }
  template <class Part>
  void run(const Problem& p, const Part& part) const {
    const Shares shares(p.channels * slots, std::max<std::int64_t>(1, kGrain * slots / p.n));
    shares.run([&](std::int64_t, std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) part(i / slots, i % slots, start(i % slots), start(i % slots + 1));
    });
  }
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

  void set(std::int64_t channel, const Moments& m) {
    const std::size_t i = std::size_t(channel);
    mean[i] = rounded(m.mean, type);
    var[i] = rounded(m.m2 / m.n, type);
    scale[i] = rounded(weight[i] / std::sqrt(var[i] + eps), type);
  }
};

void forward_rows(Problem& p, Statistics& s, std::int64_t* active) {
  const NormActTable& t = table();
  p.period = period_of(p);
  const RowShares shares(p);
  const std::size_t count = std::size_t(shares.shares.count), channels = std::size_t(p.channels);
  std::vector<Moments> moments(count * channels, Moments{0, 0, 0});
  shares.run([&](std::int64_t slot, std::int64_t first, std::int64_t last) {
    Scratch scratch(p);
    if (first < last) t.statistics_rows[p.type](p, first, last, &moments[std::size_t(slot) * channels], scratch.get());
  });
  for (std::size_t c = 0; c < channels; ++c) {
    for (std::size_t slot = 1; slot < count; ++slot) merge(moments[c], moments[slot * channels + c]);
    s.set(std::int64_t(c), moments[c]);
  }
  p.mean = s.mean.data(), p.scale = s.scale.data(), p.bias = s.bias.data();
  std::vector<std::int64_t> counts(count * channels, 0);
  shares.run([&](std::int64_t slot, std::int64_t first, std::int64_t last) {
    Scratch scratch(p);
    if (first < last) t.forward_rows[p.type](p, first, last, &counts[std::size_t(slot) * channels], scratch.get());
  });
  for (std::size_t c = 0; c < channels; ++c) {
    active[c] = 0;
    for (std::size_t slot = 0; slot < count; ++slot) active[c] += counts[slot * channels + c];
  }
}

void forward_planes(Problem& p, Statistics& s, std::int64_t* active) {
  const NormActTable& t = table();
  const PlaneShares shares(p);
  Problem with = p;  // the same with the channel parameters, which statistics_planes must not see
  with.mean = s.mean.data(), with.scale = s.scale.data(), with.bias = s.bias.data();
  if (shares.slots == 1) {
    shares.run(p, [&](std::int64_t c, std::int64_t, std::int64_t first, std::int64_t last) {
      Moments m;
      t.statistics_planes[p.type](p, c, first, last, m);
      s.set(c, m);
      Scratch scratch(p);
      t.forward_planes[p.type](with, c, first, last, active[c], scratch.get());
    });
    return;
  }
  const std::size_t slots = std::size_t(shares.slots);
  std::vector<Moments> moments(std::size_t(p.channels) * slots);
  shares.run(p, [&](std::int64_t c, std::int64_t slot, std::int64_t first, std::int64_t last) {
    t.statistics_planes[p.type](p, c, first, last, moments[std::size_t(c) * slots + std::size_t(slot)]);
  });
  for (std::int64_t c = 0; c < p.channels; ++c) {
    Moments& all = moments[std::size_t(c) * slots];
    for (std::size_t slot = 1; slot < slots; ++slot) merge(all, (&all)[slot]);
    s.set(c, all);
  }
  std::vector<std::int64_t> counts(std::size_t(p.channels) * slots);
  shares.run(p, [&](std::int64_t c, std::int64_t slot, std::int64_t first, std::int64_t last) {
    Scratch scratch(p);
    t.forward_planes[p.type](with, c, first, last, counts[std::size_t(c) * slots + std::size_t(slot)], scratch.get());
  });
  for (std::int64_t c = 0; c < p.channels; ++c) {
    active[c] = std::accumulate(&counts[std::size_t(c) * slots], &counts[std::size_t(c) * slots] + slots, std::int64_t{0});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_forward(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
    std::string activation, double slope, double eps, double noise_std, std::optional<Tensor> seed) {
  Problem p = check(x, weight, bias, residual, activation, slope, eps);
  if (!(noise_std >= 0 && std::isfinite(noise_std))) {
    fail("norm_act: noise_std must be finite and >= 0, got ", number_text(noise_std));
  }
  p.noisy = noise_std > 0;
  if (p.noisy) {
    if (!seed) fail("norm_act: seed is needed when noise_std > 0, got None");
    check_seed("norm_act", *seed, x);
    p.seed = std::uint64_t(*seed->const_data_ptr<std::int64_t>());
  }
  p.parameters.noise_std = noise_std;
  p.added = residual.has_value();
  p.residual = p.added ? residual->const_data_ptr() : nullptr;
  std::int64_t mask_shape[2] = {0, 0};
  const bool bits = p.added && is_piecewise_linear(p.act);
  if (bits) mask_numel(p, x, mask_shape);
  Tensor y = torch::stable::empty_like(x);
  Tensor active = torch::stable::new_empty(x, {p.channels}, ScalarType::Long);
  Tensor mask = bits ? torch::stable::new_empty(x, {mask_shape[0], mask_shape[1]}, ScalarType::Byte)
                     : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  const ScalarType type = wide(x.scalar_type());
  const std::size_t channels = std::size_t(p.channels);
  Statistics s{std::vector<double>(channels), std::vector<double>(channels), std::vector<double>(channels),
               values_of(bias, p.channels, 0), values_of(weight, p.channels, 1), eps, type};
  std::int64_t* counts = active.mutable_data_ptr<std::int64_t>();
  if (x.numel() == 0) {
    std::fill_n(counts, channels, 0);
  } else {
    p.y = y.mutable_data_ptr();
    p.mask = bits ? mask.mutable_data_ptr<std::uint8_t>() : nullptr;
    (p.rows ? forward_rows : forward_planes)(p, s, counts);
  }
  return {y, active, tensor_of(s.mean, x, type), tensor_of(s.var, x, type), mask};
}

// ---- backward -------------------------------------------------------------------------------------------------

struct Gradients {
  std::vector<double> weight, bias;                // in: nothing; out: the gradients
  std::vector<double> slope_back, offset_back;
  const std::vector<double>&scale, &var;
  double eps;
  ScalarType type;

  // From the sums of dz and dz * (x - mean) over n values.
  void set(std::int64_t channel, double dz, double dz_centred, double n) {
    const std::size_t i = std::size_t(channel);
    const double invstd = 1 / std::sqrt(var[i] + eps);
    bias[i] = dz;
    weight[i] = dz_centred * invstd;
    slope_back[i] = rounded(scale[i] * invstd * weight[i] / n, type);
    offset_back[i] = rounded(scale[i] * dz / n, type);
  }
};

void backward_rows(Problem& p, Gradients& g) {
  const NormActTable& t = table();
  p.period = period_of(p);
  const RowShares shares(p);
  const std::size_t count = std::size_t(shares.shares.count), channels = std::size_t(p.channels);
  std::vector<double> sums(2 * count * channels, 0.0);
  shares.run([&](std::int64_t slot, std::int64_t first, std::int64_t last) {
    Scratch scratch(p);
    double* own = &sums[2 * std::size_t(slot) * channels];
    if (first < last) t.sums_rows[p.type](p, first, last, reinterpret_cast<double(*)[2]>(own), scratch.get());
  });
  for (std::size_t c = 0; c < channels; ++c) {
    double dz = 0, dz_centred = 0;
    for (std::size_t slot = 0; slot < count; ++slot) {
      dz += sums[2 * (slot * channels + c)];
      dz_centred += sums[2 * (slot * channels + c) + 1];
    }
    g.set(std::int64_t(c), dz, dz_centred, double(p.n));
  }
  p.slope_back = g.slope_back.data(), p.offset_back = g.offset_back.data();
  shares.run([&](std::int64_t, std::int64_t first, std::int64_t last) {
    Scratch scratch(p);
    if (first < last) t.input_rows[p.type](p, first, last, scratch.get());
  });
}

void backward_planes(Problem& p, Gradients& g) {
  const NormActTable& t = table();
  const PlaneShares shares(p);
  p.slope_back = g.slope_back.data(), p.offset_back = g.offset_back.data();
  if (shares.slots == 1) {
    shares.run(p, [&](std::int64_t c, std::int64_t, std::int64_t first, std::int64_t last) {
      double sums[2];
      t.sums_planes[p.type](p, c, first, last, sums);
      g.set(c, sums[0], sums[1], double(p.n));
      t.input_planes[p.type](p, c, first, last);
    });
    return;
  }
  const std::size_t slots = std::size_t(shares.slots);
  std::vector<double> sums(2 * std::size_t(p.channels) * slots);
  shares.run(p, [&](std::int64_t c, std::int64_t slot, std::int64_t first, std::int64_t last) {
    double* own = &sums[2 * (std::size_t(c) * slots + std::size_t(slot))];
    t.sums_planes[p.type](p, c, first, last, *reinterpret_cast<double(*)[2]>(own));
  });
  for (std::int64_t c = 0; c < p.channels; ++c) {
    double dz = 0, dz_centred = 0;
    for (std::size_t slot = 0; slot < slots; ++slot) {
      dz += sums[2 * (std::size_t(c) * slots + slot)];
      dz_centred += sums[2 * (std::size_t(c) * slots + slot) + 1];
    }
    g.set(c, dz, dz_centred, double(p.n));
  }
  shares.run(p, [&](std::int64_t c, std::int64_t, std::int64_t first, std::int64_t last) {
    t.input_planes[p.type](p, c, first, last);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> residual, const Tensor& mean, const Tensor& var, const Tensor& mask, std::string activation,
    double slope, double eps, bool added) {
  Problem p = check(x, weight, bias, residual, activation, slope, eps);
  check_like("grad", grad, x);
  check_statistic("mean", mean, x);
  check_statistic("var", var, x);
  p.added = added;
  if (added && is_piecewise_linear(p.act)) {
    std::int64_t shape[2];
    mask_numel(p, x, shape);
    if (mask.scalar_type() != ScalarType::Byte || mask.dim() != 2 || mask.size(0) != shape[0] ||
        mask.size(1) != shape[1]) {
      fail("norm_act: mask must be uint8 of shape (", shape[0], ", ", shape[1], "), got ",
           dtype_name(mask.scalar_type()), " of shape ", tuple_text(mask.sizes()));
    }
    p.mask = const_cast<std::uint8_t*>(mask.const_data_ptr<std::uint8_t>());
  } else if (added) {
    if (!residual) fail("norm_act: residual is needed for ", activation, " where one was added, got None");
    p.residual = residual->const_data_ptr();
  }
  const ScalarType type = wide(x.scalar_type());
  const std::size_t channels = std::size_t(p.channels);
  const std::vector<double> means = values_of(mean, p.channels, 0), vars = values_of(var, p.channels, 0);
  const std::vector<double> biases = values_of(bias, p.channels, 0);
  const std::vector<double> scale = scales(values_of(weight, p.channels, 1), vars, eps, type);
  Gradients g{std::vector<double>(channels), std::vector<double>(channels), std::vector<double>(channels),
              std::vector<double>(channels), scale, vars, eps, type};
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_residual = added ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {0});
  if (x.numel() > 0) {
    p.grad = grad.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_residual = added ? grad_residual.mutable_data_ptr() : nullptr;
    p.mean = means.data(), p.scale = scale.data(), p.bias = biases.data();
    (p.rows ? backward_rows : backward_planes)(p, g);
  }
  return {grad_x, tensor_of(g.weight, x, weight ? weight->scalar_type() : type),
          tensor_of(g.bias, x, bias ? bias->scalar_type() : type), grad_residual};
}

}  // namespace
}  // namespace demp

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("norm_act_forward", TORCH_BOX(&demp::norm_act_forward));
  m.impl("norm_act_backward", TORCH_BOX(&demp::norm_act_backward));
}
