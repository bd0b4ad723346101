// Loops of the activation op for one instruction set; see activation_table.h for what each does.
#include "ops/cpu/isa/vector.h"
#include "ops/cpu/isa/math.h"
#include "ops/cpu/isa/noise.h"

namespace demp {
namespace DEMP_ISA {
namespace {

DEMP_INLINE void load_noise(const float* p, F& v) { v = load_bytes<F>(p); }
DEMP_INLINE void load_noise(const float* p, D& v) { v = __builtin_convertvector(load_bytes<HalfF>(p), D); }
DEMP_INLINE F where_active(F x, F v) { return (F)(active_lanes(x) & (I32)v); }
DEMP_INLINE D where_active(D x, D v) { return (D)(active_lanes(x) & (I64)v); }

// Stores a vector's worth of elements, as `Parameters::stream` says.
template <class T, class V>
DEMP_INLINE void store_output(T* p, V v, Parameters parameters) {
  if (parameters.stream) {
    stream_bytes<sizeof v>(p, &v);
  } else {
    store_bytes(p, v);
  }
}

// One vector of elements: y = act(x), plus noise on the active ones; which were active. y may be x.
template <class T, Act act, bool noisy>
DEMP_INLINE typename Ops<T>::Mask packet(const T* x, T* y, const float* noise, Parameters parameters) {
  typedef Ops<T> O;
  typedef typename O::Wide W;
  const typename O::Vec v = load_bytes<typename O::Vec>(x);
  const typename O::Mask mask = O::active(v);
  if constexpr (act == Act::relu && !noisy) {
    store_output(y, O::keep(mask, v), parameters);  // relu needs no arithmetic: 16-bit types stay as they are
  } else {
    typedef decltype(W{}[0] + 0) Scalar;
    const W slope = W{} + (Scalar)parameters.slope, noise_std = W{} + (Scalar)parameters.noise_std;
    T out[O::N];
    W in[O::parts];
    for (int i = 0; i < O::parts; ++i) in[i] = O::load_wide(x + i * O::wide_lanes);
    for (int i = 0; i < O::parts; ++i) {
      W value = activate<act>(in[i], slope);
      if constexpr (noisy) {
        W xi;
        load_noise(noise + i * O::wide_lanes, xi);
        value = value + where_active(in[i], noise_std * xi);
      }
      O::store_wide(out + i * O::wide_lanes, value);
    }
    store_output(y, load_bytes<typename O::Vec>(out), parameters);
  }
  return mask;
}

template <class T, Act act, bool noisy>
DEMP_INLINE std::uint64_t block(const T* x, T* y, const float* noise, Parameters parameters) {
  typedef Ops<T> O;
  std::uint64_t word = 0;
  for (int i = 0; i < kBlockBits; i += O::N) {
    word |= to_bits<O>(packet<T, act, noisy>(x + i, y + i, noise + i, parameters)) << i;
  }
  return word;
}

template <class T, Act act, bool noisy>
void flat_loop(const T* x, T* y, std::int64_t n, Parameters parameters, std::uint8_t* bits, const float* noise) {
  std::int64_t i = 0;
  for (; i + kBlockBits <= n; i += kBlockBits) {
    const std::uint64_t word = block<T, act, noisy>(x + i, y + i, noisy ? noise + i : noise, parameters);
    __builtin_memcpy(bits + i / 8, &word, 8);
  }
  if (i == n) return;
  T in[kBlockBits] = {}, out[kBlockBits];  // zeros are not active
  float xi[kBlockBits] = {};
  const std::size_t rest = (std::size_t)(n - i);
  __builtin_memcpy(in, x + i, rest * sizeof(T));
  if (noisy) __builtin_memcpy(xi, noise + i, rest * sizeof(float));
  parameters.stream = false;
  const std::uint64_t word = block<T, act, noisy>(in, out, xi, parameters);
  __builtin_memcpy(y + i, out, rest * sizeof(T));
  __builtin_memcpy(bits + i / 8, &word, (rest + 7) / 8);
}

template <class T, Act act>
void flat(const void* x, void* y, std::int64_t n, Parameters parameters, std::uint8_t* bits) {
  flat_loop<T, act, false>((const T*)x, (T*)y, n, parameters, bits, nullptr);
}

template <class T, Act act>
void noisy(const void* x, void* y, std::int64_t n, Parameters parameters, std::uint8_t* bits, const float* noise) {
  flat_loop<T, act, true>((const T*)x, (T*)y, n, parameters, bits, noise);
}

// One row of counters' worth of elements. Memory is walked in order: taking four rows at a time, to touch the counters a
// quarter as often, was up to 2x slower outside the first-level cache (1.03 to 1.9 against 0.93 to 1.4 of a copy).
template <class T, Act act, bool write>
DEMP_INLINE void count_row(const T* x, T* y, std::int64_t length, Parameters parameters, typename Ops<T>::Count* counts) {
  typedef Ops<T> O;
  typedef typename O::Vec V;
  std::int64_t i = 0;
  constexpr int line = 64 / (O::N * (int)sizeof(T)) * 2;  // packets of two cache lines, written one right after the other
  for (; i + line * O::N <= length; i += line * O::N) {
    typename O::Mask mask[line];
    for (int k = 0; k < line; ++k) {
      const T* from = x + i + k * O::N;
      mask[k] = write ? packet<T, act, false>(from, y + i + k * O::N, nullptr, parameters) : O::active(load_bytes<V>(from));
    }
    for (int k = 0; k < line; ++k) {
      typename Ops<T>::Count* to = counts + i + k * O::N;
      store_bytes(to, O::add(load_bytes<V>(to), mask[k]));
    }
  }
  for (; i + O::N <= length; i += O::N) {
    const typename O::Mask mask =
        write ? packet<T, act, false>(x + i, y + i, nullptr, parameters) : O::active(load_bytes<V>(x + i));
    store_bytes(counts + i, O::add(load_bytes<V>(counts + i), mask));
  }
  if (i == length) return;
  const std::size_t rest = (std::size_t)(length - i) * sizeof(T);
  T in[O::N] = {}, out[O::N];
  __builtin_memcpy(in, x + i, rest);
  parameters.stream = false;
  const typename O::Mask mask = packet<T, act, false>(in, out, nullptr, parameters);
  if (write) __builtin_memcpy(y + i, out, rest);
  store_bytes(counts + i, O::add(load_bytes<V>(counts + i), mask));
}

template <class T>
void finish_rows(std::int64_t channels, RowCounts& state) {
  typename Ops<T>::Count* counts = (typename Ops<T>::Count*)state.lanes;
  for (std::int64_t k = 0; k < state.rows; ++k) {
    for (std::int64_t c = 0; c < channels; ++c) {
      state.active[c] += counts[k * channels + c];
      counts[k * channels + c] = 0;
    }
  }
  state.pending = 0;
}

template <class T, Act act, bool write>
DEMP_INLINE void row_loop(const T* x, T* y, std::int64_t rows, std::int64_t channels, Parameters parameters,
                          RowCounts& state) {
  typedef typename Ops<T>::Count Count;
  constexpr std::int64_t limit = sizeof(Count) == 2 ? 0x7fff : 0x7fffffff;
  while (rows > 0) {
    const std::int64_t taken = rows < state.rows ? rows : state.rows;
    if (state.pending == limit) finish_rows<T>(channels, state);
    count_row<T, act, write>(x, y, taken * channels, parameters, (Count*)state.lanes);
    ++state.pending;
    x += taken * channels;
    y = write ? y + taken * channels : y;
    rows -= taken;
  }
}

template <class T, Act act>
void rows(const void* x, void* y, std::int64_t rows, std::int64_t channels, Parameters parameters, RowCounts& state) {
  row_loop<T, act, true>((const T*)x, (T*)y, rows, channels, parameters, state);
}

template <class T>
void count_rows(const void* x, std::int64_t rows, std::int64_t channels, RowCounts& state) {
  row_loop<T, Act::relu, false>((const T*)x, nullptr, rows, channels, Parameters{}, state);
}

DEMP_INLINE std::uint64_t word_at(const std::uint8_t* bits, std::int64_t word) {
  std::uint64_t value;
  __builtin_memcpy(&value, bits + 8 * word, 8);
  return value;
}

// Ones among the bits [begin, end); reads up to 8 bytes beyond.
DEMP_INLINE std::int64_t ones(const std::uint8_t* bits, std::int64_t begin, std::int64_t end) {
  if (end - begin <= 57) {  // within 8 bytes wherever it starts: planes of 7x7 and less
    std::uint64_t word;
    __builtin_memcpy(&word, bits + begin / 8, 8);
    return __builtin_popcountll(word >> (begin % 8) & (~0ull >> (64 - (end - begin))));
  }
  const std::int64_t first = begin / 64, last = (end - 1) / 64;
  const std::uint64_t head = ~0ull << (begin % 64), tail = ~0ull >> (63 - (end - 1) % 64);
  if (first == last) return __builtin_popcountll(word_at(bits, first) & head & tail);
  std::int64_t sum = __builtin_popcountll(word_at(bits, first) & head) + __builtin_popcountll(word_at(bits, last) & tail);
  for (std::int64_t w = first + 1; w < last; ++w) sum += __builtin_popcountll(word_at(bits, w));
  return sum;
}

void count_planes(const std::uint8_t* bits, std::int64_t begin, std::int64_t end, std::int64_t channels,
                  std::int64_t inner, std::int64_t* active) {
  std::int64_t channel = begin / inner % channels, left = inner - begin % inner;
  const std::int64_t n = end - begin;
  for (std::int64_t i = 0; i < n; left = inner) {
    const std::int64_t length = left < n - i ? left : n - i;
    active[channel] += ones(bits, i, i + length);
    i += length;
    if (++channel == channels) channel = 0;
  }
}

// ---- backward -------------------------------------------------------------------------------------------------

template <class T, Act act>
DEMP_INLINE void masked_gradient(const T* grad, typename Ops<T>::Mask mask, T* out, Parameters parameters) {
  typedef Ops<T> O;
  typedef typename O::Wide W;
  typedef decltype(W{}[0] + 0) Scalar;
  const typename O::Vec g = load_bytes<typename O::Vec>(grad);
  if constexpr (act == Act::relu) {
    store_output(out, O::keep(mask, g), parameters);
  } else {
    T scaled[O::N];
    for (int i = 0; i < O::parts; ++i) {
      O::store_wide(scaled + i * O::wide_lanes, O::load_wide(grad + i * O::wide_lanes) * (W{} + (Scalar)parameters.slope));
    }
    store_output(out, O::choose(mask, g, load_bytes<typename O::Vec>(scaled)), parameters);
  }
}

template <class T, Act act>
DEMP_INLINE void gradient(const T* grad, const T* saved, T* out, Parameters parameters) {
  typedef Ops<T> O;
  if constexpr (act == Act::relu || act == Act::leaky_relu) {
    masked_gradient<T, act>(grad, O::active(load_bytes<typename O::Vec>(saved)), out, parameters);
  } else {
    T product[O::N];
    for (int i = 0; i < O::parts; ++i) {
      const int at = i * O::wide_lanes;
      O::store_wide(product + at, O::load_wide(grad + at) * derivative<act>(O::load_wide(saved + at)));
    }
    store_output(out, load_bytes<typename O::Vec>(product), parameters);
  }
}

template <class T, Act act>
void backward(const void* grad_, const void* saved_, void* out_, std::int64_t n, Parameters parameters) {
  constexpr int N = Ops<T>::N;
  const T* grad = (const T*)grad_;
  const T* saved = (const T*)saved_;
  T* out = (T*)out_;
  std::int64_t i = 0;
  for (; i + N <= n; i += N) gradient<T, act>(grad + i, saved + i, out + i, parameters);
  if (i == n) return;
  T g[N] = {}, s[N] = {}, o[N];
  const std::size_t rest = (std::size_t)(n - i) * sizeof(T);
  __builtin_memcpy(g, grad + i, rest);
  __builtin_memcpy(s, saved + i, rest);
  parameters.stream = false;
  gradient<T, act>(g, s, o, parameters);
  __builtin_memcpy(out + i, o, rest);
}

template <class T, Act act>
DEMP_INLINE void bits_block(const T* grad, std::uint64_t word, T* out, Parameters parameters) {
  typedef Ops<T> O;
  for (int i = 0; i < kBlockBits; i += O::N) {
    masked_gradient<T, act>(grad + i, from_bits<O>(word >> i), out + i, parameters);
  }
}

template <class T, Act act>
void backward_bits(const void* grad_, const std::uint8_t* bits, void* out_, std::int64_t n, Parameters parameters) {
  const T* grad = (const T*)grad_;
  T* out = (T*)out_;
  std::int64_t i = 0;
  for (; i + kBlockBits <= n; i += kBlockBits) bits_block<T, act>(grad + i, word_at(bits, i / kBlockBits), out + i, parameters);
  if (i == n) return;
  T g[kBlockBits] = {}, o[kBlockBits];
  std::uint64_t word = 0;
  const std::size_t rest = (std::size_t)(n - i);
  __builtin_memcpy(g, grad + i, rest * sizeof(T));
  __builtin_memcpy(&word, bits + i / 8, (rest + 7) / 8);
  parameters.stream = false;
  bits_block<T, act>(g, word, o, parameters);
  __builtin_memcpy(out + i, o, rest * sizeof(T));
}

void stage_noise_planes(float* out, std::int64_t begin, std::int64_t end, std::int64_t channels, std::int64_t inner,
                        std::uint64_t seed, void* stage) {
  noise_planes(out, begin, end, channels, inner, seed, *(Stage*)stage);
}

void stage_noise_rows(float* out, std::int64_t begin, std::int64_t end, std::int64_t columns, std::uint64_t seed,
                      void* stage) {
  noise_rows(out, begin, end, columns, nullptr, 0, seed, *(Stage*)stage);
}

// clang-format off
#define DEMP_EACH_ACT(f, T) \
  {f<T, Act::relu>, f<T, Act::leaky_relu>, f<T, Act::gelu>, f<T, Act::gelu_tanh>, f<T, Act::silu>}
#define DEMP_EACH_TYPE_AND_ACT(f) \
  {DEMP_EACH_ACT(f, float), DEMP_EACH_ACT(f, double), DEMP_EACH_ACT(f, bfloat16), DEMP_EACH_ACT(f, float16)}
#define DEMP_EACH_TYPE(f) {f<float>, f<double>, f<bfloat16>, f<float16>}
#define DEMP_TWO_ACTS(f, T) {f<T, Act::relu>, f<T, Act::leaky_relu>}

constexpr ActivationTable kActivationTable = {
    {L, L / 2, 2 * L, 2 * L},
    DEMP_EACH_TYPE_AND_ACT(flat),
    DEMP_EACH_TYPE_AND_ACT(noisy),
    DEMP_EACH_TYPE_AND_ACT(rows),
    DEMP_EACH_TYPE(count_rows),
    DEMP_EACH_TYPE(finish_rows),
    count_planes,
    DEMP_EACH_TYPE_AND_ACT(backward),
    {DEMP_TWO_ACTS(backward_bits, float), DEMP_TWO_ACTS(backward_bits, double),
     DEMP_TWO_ACTS(backward_bits, bfloat16), DEMP_TWO_ACTS(backward_bits, float16)},
    (std::int64_t)sizeof(Stage),
    4 * L,
    stage_noise_planes,
    stage_noise_rows,
};
#undef DEMP_EACH_ACT
#undef DEMP_EACH_TYPE_AND_ACT
#undef DEMP_EACH_TYPE
#undef DEMP_TWO_ACTS
// clang-format on

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
