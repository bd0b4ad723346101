// The kernels of csrc/ops/cuda for the emulator: their launch functions with C arguments, for ctypes.
#include <exception>
#include <string>

#include "ops/cuda/activation.cuh"

namespace {

thread_local std::string message;

template <typename Body>
const char* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

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

}  // extern "C"
