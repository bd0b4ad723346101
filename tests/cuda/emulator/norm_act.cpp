// norm_act's kernels for the emulator: their launch functions with C arguments, for ctypes.
#include "guarded.h"
#include "ops/cuda/norm_act.cuh"

namespace {

// Pointers are integers; every field has eight bytes.
struct Arguments {
  std::int64_t outer, channels, inner, rows, type, act, weight_type, bias_type;
  double slope, eps, noise_std;
  std::int64_t x, residual, weight, bias, mean, var, mask, workspace;
  std::int64_t y, active, seed;                                             // forward
  std::int64_t grad, grad_x, grad_residual, grad_weight, grad_bias;  // backward

  demp::NormActShape shape() const { return {outer, channels, inner, rows != 0, demp::ElementType(type)}; }
};

void* at(std::int64_t address) { return reinterpret_cast<void*>(address); }

demp::ChannelValues values(std::int64_t address, std::int64_t type) { return {at(address), demp::ElementType(type)}; }

}  // namespace

extern "C" {

std::int64_t emulated_norm_act_workspace(const Arguments* a) { return demp::norm_act_workspace(a->shape()); }

const char* emulated_norm_act_forward(const Arguments* a) {
  return guarded([&] {
    demp::launch_norm_act_forward({a->shape(), at(a->x), at(a->residual), values(a->weight, a->weight_type),
                                   values(a->bias, a->bias_type), at(a->y), static_cast<std::int64_t*>(at(a->active)), at(a->mean),
                                   at(a->var), static_cast<std::uint8_t*>(at(a->mask)), static_cast<std::int64_t*>(at(a->seed)),
                                   at(a->workspace), a->slope, a->eps, a->noise_std, demp::Act(a->act)}, nullptr);
  });
}

const char* emulated_norm_act_backward(const Arguments* a) {
  return guarded([&] {
    demp::launch_norm_act_backward({a->shape(), at(a->grad), at(a->x), at(a->residual), values(a->weight, a->weight_type),
                                    values(a->bias, a->bias_type), at(a->mean), at(a->var), static_cast<std::uint8_t*>(at(a->mask)),
                                    at(a->grad_x), at(a->grad_residual), values(a->grad_weight, a->weight_type),
                                    values(a->grad_bias, a->bias_type), at(a->workspace), a->slope, a->eps, demp::Act(a->act)},
                                   nullptr);
  });
}

}  // extern "C"
