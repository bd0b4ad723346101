// Loops of the weight noise op for one instruction set; see weight_noise_table.h.
#include "ops/cpu/isa/vector.h"
#include "ops/cpu/isa/math.h"
#include "ops/cpu/isa/noise.h"

namespace demp {
namespace DEMP_ISA {
namespace {

DEMP_INLINE void read_noise(const float* p, F& v) { v = load_bytes<F>(p); }
DEMP_INLINE void read_noise(const float* p, D& v) { v = __builtin_convertvector(load_bytes<HalfF>(p), D); }

template <class T>
DEMP_INLINE void add_packet(T* w, const float* noise, double std) {
  typedef Ops<T> O;
  typedef typename O::Wide W;
  typedef decltype(W{}[0] + 0) Scalar;
  for (int i = 0; i < O::parts; ++i) {
    const int at = i * O::wide_lanes;
    W xi;
    read_noise(noise + at, xi);
    O::store_wide(w + at, O::load_wide(w + at) + (W{} + (Scalar)std) * xi);
  }
}

template <class T>
void add(void* w_, const float* noise, std::int64_t n, double std) {
  constexpr int N = Ops<T>::N;
  T* w = (T*)w_;
  std::int64_t i = 0;
  for (; i + N <= n; i += N) add_packet<T>(w + i, noise + i, std);
  if (i == n) return;
  T rest[N] = {};
  float xi[N] = {};
  __builtin_memcpy(rest, w + i, (std::size_t)(n - i) * sizeof(T));
  __builtin_memcpy(xi, noise + i, (std::size_t)(n - i) * sizeof(float));
  add_packet<T>(rest, xi, std);
  __builtin_memcpy(w + i, rest, (std::size_t)(n - i) * sizeof(T));
}

void line(float* out, std::int64_t begin, std::int64_t end, std::uint32_t stream, std::uint64_t seed, void* stage) {
  // One plane long enough that its end is never reached: whole groups come out in order.
  noise_planes(out, begin, end, 1, std::int64_t{1} << 62, seed, *(Stage*)stage, stream);
}

void lines(float* out, std::int64_t begin, std::int64_t end, std::int64_t columns, std::int64_t first_column,
           const std::uint64_t* columns_of, std::uint32_t stream, std::uint64_t seed, void* stage) {
  noise_rows(out, begin, end, columns, columns_of, stream, seed, *(Stage*)stage, first_column);
}

constexpr WeightNoiseTable kWeightNoiseTable = {
    (std::int64_t)sizeof(Stage), 4 * L, {add<float>, add<double>, add<bfloat16>, add<float16>}, line, lines,
};

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
