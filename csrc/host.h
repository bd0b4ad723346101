// Facts about the machine and the process that concern no tensor: what the _host module binds.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace demp {

struct AllocatorTuning {
  bool applied;
  std::string reason;  // why not; empty when applied
};

// Whether the CPU and the operating system both support a feature, for the features that matter to the
// kernels, in a fixed order: {"avx2", true}, ...
std::vector<std::pair<std::string, bool>> cpu_features();

// The instruction set that the CPU kernels choose here: "avx512", "avx2", "neon" or "portable". DEMP_SIMD lowers it.
std::string simd_level();

// Makes glibc keep freed memory instead of returning it to the kernel, so that the large tensors of the next
// training step do not fault in page by page. Process-wide, and lasts until the process ends.
AllocatorTuning tune_allocator();

}  // namespace demp
