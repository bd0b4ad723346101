// The kernels of csrc/ops/cuda for the emulator: their launch functions with C arguments, for ctypes.
#include <stdexcept>
#include <vector>

#include "guarded.h"
#include "ops/cuda/activation.cuh"
#include "ops/cuda/compact.cuh"
#include "ops/cuda/weight_noise.cuh"

extern "C" {

const char* emulated_activation_forward(const void* x, void* y, std::int64_t* active, std::uint8_t* mask,
                                        const std::int64_t* seed, std::int64_t outer, std::int64_t channels,
                                        std::int64_t inner, double slope, double noise_std, std::int64_t act,
                                        std::int64_t type) {
  return guarded([&] {
    demp::launch_activation_forward({x, y, active, mask, seed, outer, channels, inner, slope, noise_std, demp::Act(act),
                                     demp::ElementType(type)}, nullptr);
  });
}

const char* emulated_activation_backward(const void* grad, const void* saved, const std::uint8_t* mask, void* result,
                                         std::int64_t elements, double slope, std::int64_t act, std::int64_t type) {
  return guarded([&] {
    demp::launch_activation_backward({grad, saved, mask, result, elements, slope, demp::Act(act), demp::ElementType(type)},
                                     nullptr);
  });
}

const char* emulated_philox(std::uint32_t* words, std::int64_t quad, std::int64_t column, std::int64_t stream, std::int64_t seed) {
  const demp::Words x = demp::philox(static_cast<std::uint64_t>(quad), static_cast<std::uint32_t>(column),
                                     static_cast<std::uint32_t>(stream), static_cast<std::uint64_t>(seed));
  std::copy_n(x.w, 4, words);
  return nullptr;
}

// A table has a row a tensor; pointers are integers.
struct WeightRow {
  std::int64_t data, live, rows, columns, taps, stream;
};

const char* emulated_weight_noise(const WeightRow* table, const std::int64_t* seed, std::int64_t count, double std_, std::int64_t type) {
  return guarded([&] {
    std::vector<demp::NoisyWeight> weights;
    for (const WeightRow* w = table; w != table + count; ++w) {
      weights.push_back({reinterpret_cast<void*>(w->data), reinterpret_cast<const bool*>(w->live), w->rows, w->columns,
                         w->taps, 0, static_cast<std::uint32_t>(w->stream), false});
    }
    demp::launch_weight_noise(demp::ElementType(type), weights, std_, seed, nullptr);
  });
}

struct GatherRow {
  std::int64_t source, target, rows, columns, source_rows, target_rows, between, source_columns, target_columns, column_bytes;
};

const char* emulated_gathers(const GatherRow* table, std::int64_t count) {
  return guarded([&] {
    std::vector<demp::Gather> gathers;
    for (const GatherRow* g = table; g != table + count; ++g) {
      gathers.push_back({reinterpret_cast<const void*>(g->source), reinterpret_cast<void*>(g->target),
                         reinterpret_cast<const std::int64_t*>(g->rows), reinterpret_cast<const std::int64_t*>(g->columns),
                         g->source_rows, g->target_rows, g->between, g->source_columns, g->target_columns, g->column_bytes});
      if (!demp::can_gather(gathers.back())) throw std::runtime_error("emulated_gathers: a row is too long");
    }
    demp::launch_gathers(gathers, nullptr);
  });
}

}  // extern "C"
