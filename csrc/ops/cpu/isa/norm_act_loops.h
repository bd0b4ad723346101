// norm_act for one instruction set: cuts planes and rows into tiles (norm_act_tiles.h); see norm_act_table.h for what each
// function does.
#include "ops/cpu/isa/vector.h"
#include "ops/cpu/isa/math.h"
#include "ops/cpu/isa/noise.h"
#include "ops/cpu/isa/norm_act_tiles.h"

namespace demp {
namespace DEMP_ISA {
namespace {

// Rows that are summed in float before the sum goes on in double: adds an error of about 1e-7 of the sum of
// magnitudes, which averages out over the tiles.
constexpr std::int64_t kRowsInFloat = 64;
constexpr std::int64_t kNoiseBlock = 4096;  // elements

// Scratch: the arrays of `Columns` for every column of a period, noise of a block, the generator's stage.
constexpr std::int64_t kColumnBytes = 5 * 8 + 3 * 8 + 4 * 4, kBlockBytes = (kNoiseBlock + 4 * L) * 4;

DEMP_INLINE Stage& stage_in(void* scratch) { return *(Stage*)scratch; }
DEMP_INLINE float* noise_in(void* scratch) { return (float*)((char*)scratch + sizeof(Stage)); }

template <class T>
DEMP_INLINE Context<T> context(const NormAct& a) {
  typedef typename Lanes<T>::S S;
  return {(const T*)a.x, (const T*)a.residual, (const T*)a.grad, (T*)a.y, (T*)a.grad_x, (T*)a.grad_residual, a.mask,
          nullptr, 0, (S)a.parameters.slope, (S)a.parameters.noise_std, (Act)a.act};
}

// ---- planes: one channel's parameters in every lane -----------------------------------------------------------

template <class T>
struct Totals {
  static constexpr int lanes = Lanes<T>::n * Lanes<T>::large;
  double a[lanes] = {}, b[lanes] = {};
  std::int64_t count = 0;
};

template <class T, int W>
DEMP_INLINE PerChannel<T, W> broadcast(const NormAct& a, std::int64_t channel, double mean) {
  typedef typename Lanes<T>::S S;
  typedef typename Lanes<T>::V V;
  const bool all = a.scale != nullptr, back = a.slope_back != nullptr;
  PerChannel<T, W> p;
  for (int w = 0; w < W; ++w) {
    p.mean[w] = V{} + (S)mean;
    p.scale[w] = V{} + (S)(all ? a.scale[channel] : 0);
    p.bias[w] = V{} + (S)(all ? a.bias[channel] : 0);
    p.slope_back[w] = V{} + (S)(back ? a.slope_back[channel] : 0);
    p.offset_back[w] = V{} + (S)(back ? a.offset_back[channel] : 0);
  }
  return p;
}

template <class V>
DEMP_INLINE void add_lanes(double* to, V v) {
  decltype(v[0] + 0) lanes[sizeof(V) / sizeof(v[0])];
  store_bytes(lanes, v);
  for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) to[i] += (double)lanes[i];
}
template <class I>
DEMP_INLINE void add_counts(std::int64_t* to, I v) {
  decltype(v[0] + 0) lanes[sizeof(I) / sizeof(v[0])];
  store_bytes(lanes, v);
  for (int i = 0; i < int(sizeof(I) / sizeof(v[0])); ++i) to[i] += lanes[i];
}

template <class Tile, int W, class T>
DEMP_INLINE void flush(Sums<T, W>& s, Totals<T>& totals) {
  constexpr int n = Lanes<T>::n;
  for (int w = 0; w < W; ++w) {
    if (Tile::sums) {
      add_lanes(totals.a + w * n, s.a[w]);
      add_lanes(totals.b + w * n, s.b[w]);
    }
    if (Tile::counts) {
      std::int64_t counts[n] = {};
      add_counts(counts, s.count[w]);
      for (int i = 0; i < n; ++i) totals.count += counts[i];
    }
  }
  s = Sums<T, W>();
}

// Positions [from, to) of the planes of images [begin, end) of a channel.
template <class Tile>
void walk_planes(const NormAct& a, const Context<typename Tile::T>& c, std::int64_t channel, std::int64_t begin,
                 std::int64_t end, std::int64_t from, std::int64_t to, double mean, Totals<typename Tile::T>& totals) {
  typedef typename Tile::T T;
  constexpr int W = Lanes<T>::large, w = Lanes<T>::small, wide = W * Lanes<T>::n, narrow = w * Lanes<T>::n;
  const PerChannel<T, W> p = broadcast<T, W>(a, channel, mean);
  PerChannel<T, w> q;
  __builtin_memcpy(&q.mean, &p.mean, sizeof q.mean);
  __builtin_memcpy(&q.scale, &p.scale, sizeof q.scale);
  __builtin_memcpy(&q.bias, &p.bias, sizeof q.bias);
  __builtin_memcpy(&q.slope_back, &p.slope_back, sizeof q.slope_back);
  __builtin_memcpy(&q.offset_back, &p.offset_back, sizeof q.offset_back);
  Sums<T, W> s;
  Sums<T, w> r;
  std::int64_t pending = 0;
  const std::int64_t mask_bytes = (a.inner + 7) / 8;
  for (std::int64_t image = begin; image < end; ++image) {
    const std::int64_t plane = image * a.channels + channel;
    std::int64_t at = plane * a.inner + from, byte = plane * mask_bytes + from / 8, left = to - from;
    while (left >= wide) {
      std::int64_t rows = left / wide;
      if (rows > kRowsInFloat - pending) rows = kRowsInFloat - pending;
      Tile::template run<false, W>(c, Place{at, byte, rows, wide, 0}, p, s);
      at += rows * wide, byte += rows * wide / 8, left -= rows * wide;
      if ((pending += rows) >= kRowsInFloat) {
        flush<Tile, W>(s, totals);
        flush<Tile, w>(r, totals);
        pending = 0;
      }
    }
    if (left > 0) {
      const std::int64_t rows = left / narrow;
      Tile::template run<false, w>(c, Place{at, byte, rows, narrow, 0}, q, r);
      at += rows * narrow, byte += rows * narrow / 8, left -= rows * narrow;
      if (left > 0) Tile::template run<true, w>(c, Place{at, byte, 1, 0, left}, q, r);
      if ((pending += W / w) >= kRowsInFloat) {
        flush<Tile, W>(s, totals);
        flush<Tile, w>(r, totals);
        pending = 0;
      }
    }
  }
  flush<Tile, W>(s, totals);
  flush<Tile, w>(r, totals);
}

template <class T>
DEMP_INLINE void total(const Totals<T>& totals, double& a, double& b) {
  a = b = 0;
  for (int i = 0; i < Totals<T>::lanes; ++i) {
    a += totals.a[i];
    b += totals.b[i];
  }
}

template <class T>
DEMP_INLINE double element(const T* p) {
  return (double)load<true>(p, 1)[0];
}

// Sums around a guess of the mean: as accurate as sums around the mean as long as the two are not many standard
// deviations apart. Where they prove to be (a sample that is not like the rest), it is done again around the mean.
DEMP_INLINE bool guess_was_bad(double n, double a, double b) { return a * a > 64 * (n * b - a * a); }

DEMP_INLINE Moments moments(double n, double guess, double a, double b) {
  const double shift = a / n, m2 = b - a * shift;
  return {n, guess + shift, m2 < 0 ? 0 : m2};
}

template <class T>
void statistics_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, Moments& result) {
  typedef typename Lanes<T>::S S;
  const Context<T> c = context<T>(a);
  const double n = (double)(end - begin) * (double)a.inner;
  double guess = 0, sum = 0, squares = 0;
  for (int k = 0; k < 8; ++k) {
    const std::int64_t image = begin + (end - begin) * k / 8, i = a.inner * (2 * k + 1) / 16;
    guess += element(c.x + (image * a.channels + channel) * a.inner + i) / 8;
  }
  for (int attempt = 0; attempt < 2; ++attempt) {
    guess = (double)(S)guess;
    Totals<T> totals;
    walk_planes<StatisticsTile<T>>(a, c, channel, begin, end, 0, a.inner, guess, totals);
    total(totals, sum, squares);
    if (attempt == 1 || !guess_was_bad(n, sum, squares)) break;
    guess += sum / n;
  }
  result = moments(n, guess, sum, squares);
}

template <class T, Kind kind, bool added, bool noisy>
void forward_planes_of(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end,
                       std::int64_t& active, void* scratch) {
  Context<T> c = context<T>(a);
  Totals<T> totals;
  if (!noisy) {
    walk_planes<ForwardTile<T, kind, added, false>>(a, c, channel, begin, end, 0, a.inner, a.mean[channel], totals);
  } else {
    float* const noise = noise_in(scratch);
    c.noise = noise;
    for (std::int64_t image = begin; image < end; ++image) {
      for (std::int64_t from = 0; from < a.inner; from += kNoiseBlock) {
        const std::int64_t to = from + kNoiseBlock < a.inner ? from + kNoiseBlock : a.inner;
        c.noise_at = (image * a.channels + channel) * a.inner + from;
        noise_planes(noise, c.noise_at, c.noise_at + to - from, a.channels, a.inner, a.seed, stage_in(scratch));
        walk_planes<ForwardTile<T, kind, added, true>>(a, c, channel, image, image + 1, from, to, a.mean[channel], totals);
      }
    }
  }
  active = totals.count;
}

template <class T, Kind kind, bool added>
void sums_planes_of(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, double (&sums)[2]) {
  Totals<T> totals;
  walk_planes<GradientSumsTile<T, kind, added>>(a, context<T>(a), channel, begin, end, 0, a.inner, a.mean[channel], totals);
  total(totals, sums[0], sums[1]);
}

template <class T, Kind kind, bool added>
void input_planes_of(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end) {
  Totals<T> totals;
  walk_planes<GradientInputTile<T, kind, added>>(a, context<T>(a), channel, begin, end, 0, a.inner, a.mean[channel],
                                                 totals);
}

// ---- rows: every lane its own parameters ----------------------------------------------------------------------

// Arrays with an entry for each column of a band. The parameters are those of `NormAct`, as often as rows lie side by side.
template <class T>
struct Columns {
  typedef typename Lanes<T>::S S;
  S *mean, *scale, *bias, *slope_back, *offset_back;
  double *a, *b;
  std::int64_t* count;
};

template <class T>
DEMP_INLINE Columns<T> columns(const NormAct& a, void* scratch) {
  typedef typename Lanes<T>::S S;
  const std::int64_t n = a.period;
  // behind the noise of a block, which is kNoiseBlock elements or four periods
  double* d = (double*)((char*)scratch + sizeof(Stage) + kBlockBytes + n * 16);
  S* s = (S*)(d + 3 * n);
  Columns<T> k = {s, s + n, s + 2 * n, s + 3 * n, s + 4 * n, d, d + n, (std::int64_t*)(d + 2 * n)};
  for (std::int64_t i = 0, channel = 0; i < n; ++i) {
    if (a.mean) k.mean[i] = (S)a.mean[channel];
    if (a.scale) k.scale[i] = (S)a.scale[channel], k.bias[i] = (S)a.bias[channel];
    if (a.slope_back) k.slope_back[i] = (S)a.slope_back[channel], k.offset_back[i] = (S)a.offset_back[channel];
    k.a[i] = k.b[i] = 0;
    k.count[i] = 0;
    if (++channel == a.channels) channel = 0;
  }
  return k;
}

template <class Tile, bool cut, int W>
DEMP_INLINE void column_tile(const Context<typename Tile::T>& c, const Columns<typename Tile::T>& k, std::int64_t column,
                             Place place) {
  typedef typename Tile::T T;
  typedef typename Lanes<T>::V V;
  constexpr int n = Lanes<T>::n;
  PerChannel<T, W> p;
  for (int w = 0; w < W; ++w) {
    const std::int64_t i = column + w * n;
    p.mean[w] = load_bytes<V>(k.mean + i);
    p.scale[w] = load_bytes<V>(k.scale + i);
    p.bias[w] = load_bytes<V>(k.bias + i);
    p.slope_back[w] = load_bytes<V>(k.slope_back + i);
    p.offset_back[w] = load_bytes<V>(k.offset_back + i);
  }
  Sums<T, W> s;
  Tile::template run<cut, W>(c, place, p, s);
  for (int w = 0; w < W; ++w) {
    const std::int64_t i = column + w * n;
    if (Tile::sums) {
      add_lanes(k.a + i, s.a[w]);
      add_lanes(k.b + i, s.b[w]);
    }
    if (Tile::counts) add_counts(k.count + i, s.count[w]);
  }
}

// Columns [0, width) of `rows` bands that begin at element `at`.
template <class Tile>
DEMP_INLINE void band(const Context<typename Tile::T>& c, const Columns<typename Tile::T>& k, std::int64_t at,
                      std::int64_t rows, std::int64_t period, std::int64_t width) {
  typedef typename Tile::T T;
  constexpr int W = Lanes<T>::large, w = Lanes<T>::small, wide = W * Lanes<T>::n, narrow = w * Lanes<T>::n;
  std::int64_t i = 0;
  for (; i + wide <= width; i += wide) {
    column_tile<Tile, false, W>(c, k, i, Place{at + i, (at + i) / 8, rows, period, 0});
  }
  for (; i + narrow <= width; i += narrow) {
    column_tile<Tile, false, w>(c, k, i, Place{at + i, (at + i) / 8, rows, period, 0});
  }
  if (i < width) column_tile<Tile, true, w>(c, k, i, Place{at + i, (at + i) / 8, rows, period, width - i});
}

// Rows [begin, end) of (rows, channels). Tiles go down some rows and then right, within what the second-level cache holds.
template <class Tile>
void walk_rows(const NormAct& a, const Context<typename Tile::T>& c, const Columns<typename Tile::T>& k,
               std::int64_t begin, std::int64_t end) {
  const std::int64_t side_by_side = a.period / a.channels, bands = (end - begin) / side_by_side;
  std::int64_t rows = 65536 / (a.period * (std::int64_t)sizeof(typename Tile::T)), at = begin * a.channels;
  rows = rows < 4 ? 4 : rows > kRowsInFloat ? kRowsInFloat : rows;
  for (std::int64_t i = 0; i < bands; i += rows) {
    if (rows > bands - i) rows = bands - i;
    band<Tile>(c, k, at, rows, a.period, a.period);
    at += rows * a.period;
  }
  if (at < end * a.channels) band<Tile>(c, k, at, 1, a.period, end * a.channels - at);
}

// sums[channel] = the sums of its columns.
template <class T>
DEMP_INLINE void fold(const NormAct& a, const Columns<T>& k) {
  for (std::int64_t i = a.channels, channel = 0; i < a.period; ++i) {
    k.a[channel] += k.a[i];
    k.b[channel] += k.b[i];
    k.count[channel] += k.count[i];
    if (++channel == a.channels) channel = 0;
  }
}

template <class T>
void statistics_rows(const NormAct& a, std::int64_t begin, std::int64_t end, Moments* result, void* scratch) {
  typedef typename Lanes<T>::S S;
  const Context<T> c = context<T>(a);
  const double n = (double)(end - begin);
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Columns<T> k = columns<T>(a, scratch);
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      double guess = 0;
      if (attempt == 0) {
        for (int j = 0; j < 4; ++j) {
          guess += element(c.x + (begin + (end - begin) * j / 4) * a.channels + channel) / 4;
        }
      } else {
        guess = result[channel].mean;
      }
      for (std::int64_t i = channel; i < a.period; i += a.channels) k.mean[i] = (S)guess;
    }
    walk_rows<StatisticsTile<T>>(a, c, k, begin, end);
    fold(a, k);
    bool bad = false;
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      bad |= guess_was_bad(n, k.a[channel], k.b[channel]);
      result[channel] = moments(n, (double)k.mean[channel], k.a[channel], k.b[channel]);
    }
    if (!bad) return;
  }
}

template <class T, Kind kind, bool added, bool noisy>
void forward_rows_of(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch) {
  Context<T> c = context<T>(a);
  const Columns<T> k = columns<T>(a, scratch);
  if (!noisy) {
    walk_rows<ForwardTile<T, kind, added, false>>(a, c, k, begin, end);
  } else {
    float* const noise = noise_in(scratch);
    std::int64_t bands = kNoiseBlock / (4 * a.period) * 4;  // in fours: whole groups of noise
    if (bands == 0) bands = 4;
    std::int64_t block = bands * (a.period / a.channels);
    c.noise = noise;
    for (std::int64_t row = begin; row < end; row += block) {
      if (block > end - row) block = end - row;
      c.noise_at = row * a.channels;
      noise_rows(noise, row, row + block, a.channels, nullptr, 0, a.seed, stage_in(scratch));
      walk_rows<ForwardTile<T, kind, added, true>>(a, c, k, row, row + block);
    }
  }
  fold(a, k);
  for (std::int64_t channel = 0; channel < a.channels; ++channel) active[channel] = k.count[channel];
}

template <class T, Kind kind, bool added>
void sums_rows_of(const NormAct& a, std::int64_t begin, std::int64_t end, double (*sums)[2], void* scratch) {
  const Columns<T> k = columns<T>(a, scratch);
  walk_rows<GradientSumsTile<T, kind, added>>(a, context<T>(a), k, begin, end);
  fold(a, k);
  for (std::int64_t channel = 0; channel < a.channels; ++channel) {
    sums[channel][0] = k.a[channel];
    sums[channel][1] = k.b[channel];
  }
}

template <class T, Kind kind, bool added>
void input_rows_of(const NormAct& a, std::int64_t begin, std::int64_t end, void* scratch) {
  walk_rows<GradientInputTile<T, kind, added>>(a, context<T>(a), columns<T>(a, scratch), begin, end);
}

// ---- the table ------------------------------------------------------------------------------------------------

// f<T, kind, added>(...) for the activation and residual of `a`; noisy: f<T, kind, added, noisy>.
#define DEMP_BY_KIND(f, T, ...)                                                                      \
  switch ((Act)a.act) {                                                                              \
    case Act::relu: return a.added ? f<T, Kind::relu, true>(__VA_ARGS__) : f<T, Kind::relu, false>(__VA_ARGS__); \
    case Act::leaky_relu:                                                                            \
      return a.added ? f<T, Kind::leaky_relu, true>(__VA_ARGS__) : f<T, Kind::leaky_relu, false>(__VA_ARGS__); \
    default: return a.added ? f<T, Kind::smooth, true>(__VA_ARGS__) : f<T, Kind::smooth, false>(__VA_ARGS__); \
  }

template <class T, Kind kind, bool added>
void forward_planes_noise(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end,
                          std::int64_t& active, void* scratch) {
  return a.noisy ? forward_planes_of<T, kind, added, true>(a, channel, begin, end, active, scratch)
                 : forward_planes_of<T, kind, added, false>(a, channel, begin, end, active, scratch);
}
template <class T, Kind kind, bool added>
void forward_rows_noise(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch) {
  return a.noisy ? forward_rows_of<T, kind, added, true>(a, begin, end, active, scratch)
                 : forward_rows_of<T, kind, added, false>(a, begin, end, active, scratch);
}

template <class T>
void forward_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, std::int64_t& active,
                    void* scratch) {
  DEMP_BY_KIND(forward_planes_noise, T, a, channel, begin, end, active, scratch)
}
template <class T>
void sums_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, double (&sums)[2]) {
  DEMP_BY_KIND(sums_planes_of, T, a, channel, begin, end, sums)
}
template <class T>
void input_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end) {
  DEMP_BY_KIND(input_planes_of, T, a, channel, begin, end)
}
template <class T>
void forward_rows(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch) {
  DEMP_BY_KIND(forward_rows_noise, T, a, begin, end, active, scratch)
}
template <class T>
void sums_rows(const NormAct& a, std::int64_t begin, std::int64_t end, double (*sums)[2], void* scratch) {
  DEMP_BY_KIND(sums_rows_of, T, a, begin, end, sums, scratch)
}
template <class T>
void input_rows(const NormAct& a, std::int64_t begin, std::int64_t end, void* scratch) {
  DEMP_BY_KIND(input_rows_of, T, a, begin, end, scratch)
}

// clang-format off
#define DEMP_EACH_TYPE(f) {f<float>, f<double>, f<bfloat16>, f<float16>}
#define DEMP_EACH_WIDTH(w) \
  {Lanes<float>::n * Lanes<float>::w, Lanes<double>::n * Lanes<double>::w, Lanes<bfloat16>::n * Lanes<bfloat16>::w, \
   Lanes<float16>::n * Lanes<float16>::w}

constexpr NormActTable kNormActTable = {
    DEMP_EACH_WIDTH(small),
    DEMP_EACH_WIDTH(large),
    DEMP_EACH_TYPE(statistics_planes),
    DEMP_EACH_TYPE(forward_planes),
    DEMP_EACH_TYPE(sums_planes),
    DEMP_EACH_TYPE(input_planes),
    DEMP_EACH_TYPE(statistics_rows),
    DEMP_EACH_TYPE(forward_rows),
    DEMP_EACH_TYPE(sums_rows),
    DEMP_EACH_TYPE(input_rows),
    (std::int64_t)sizeof(Stage) + kBlockBytes,
    kColumnBytes,
};
#undef DEMP_EACH_TYPE
#undef DEMP_EACH_WIDTH
#undef DEMP_BY_KIND
// clang-format on

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
