// norm_act for one instruction set: cuts planes and rows into tiles (norm_act_tiles.h); see norm_act_table.h for what each
// function does.
#include "ops/cpu/isa/vector.h"
#include "ops/cpu/isa/math.h"
#include "ops/cpu/isa/noise.h"
#include "ops/cpu/isa/norm_act_tiles.h"

namespace demp {
namespace DEMP_ISA {
namespace {

// Rows that are summed in float before the sum goes on in double: an error of some 1e-7 of the sum of magnitudes, which
// averages out over the tiles.
constexpr std::int64_t kRowsInFloat = 128;
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

template <class T>
Loops<T> forward_loops(const NormAct& a) {
  if ((Act)a.act != Act::relu) return a.added ? loops_of<ForwardTile<T, false, true>>() : loops_of<ForwardTile<T, false, false>>();
  return a.added ? loops_of<ForwardTile<T, true, true>>() : loops_of<ForwardTile<T, true, false>>();
}
template <class T>
Loops<T> sums_loops(const NormAct& a) {
  if ((Act)a.act != Act::relu) {
    return a.added ? loops_of<GradientSumsTile<T, false, true>>() : loops_of<GradientSumsTile<T, false, false>>();
  }
  return a.added ? loops_of<GradientSumsTile<T, true, true>>() : loops_of<GradientSumsTile<T, true, false>>();
}
template <class T>
Loops<T> input_loops(const NormAct& a) {
  if (a.added) return loops_of<GradientInputTile<T, true, true>>();
  return (Act)a.act == Act::relu ? loops_of<GradientInputTile<T, true, false>>() : loops_of<GradientInputTile<T, false, false>>();
}

// ---- planes: one channel's parameters in every lane -----------------------------------------------------------

template <class T>
struct Totals {
  static constexpr int lanes = Lanes<T>::n;
  double a[lanes] = {}, b[lanes] = {};
  std::int64_t count[lanes] = {};
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

template <int W, class T>
DEMP_INLINE void flush(const Loops<T>& loops, Sums<T, W>& s, Totals<T>& totals) {
  for (int half = W / 2; half > 0; half /= 2) {
    for (int w = 0; w < half; ++w) {
      s.a[w] += s.a[w + half];
      s.b[w] += s.b[w + half];
      s.count[w] += s.count[w + half];
    }
  }
  if (loops.sums) {
    add_lanes(totals.a, s.a[0]);
    add_lanes(totals.b, s.b[0]);
  }
  if (loops.counts) add_counts(totals.count, s.count[0]);
  s = Sums<T, W>();
}

// Positions [from, to) of the planes of images [begin, end) of a channel.
template <class T>
void walk_planes(const Loops<T>& loops, const NormAct& a, const Context<T>& c, std::int64_t channel, std::int64_t begin,
                 std::int64_t end, std::int64_t from, std::int64_t to, double mean, Totals<T>& totals) {
  constexpr int W = Lanes<T>::large, w = Lanes<T>::small, wide = W * Lanes<T>::n, narrow = w * Lanes<T>::n;
  const PerChannel<T, W> p = broadcast<T, W>(a, channel, mean);
  const PerChannel<T, w> q = broadcast<T, w>(a, channel, mean);
  Sums<T, W> s;
  Sums<T, w> r;
  std::int64_t pending = 0;
  const std::int64_t mask_bytes = (a.inner + 7) / 8;
  for (std::int64_t image = begin; image < end; ++image) {
    const std::int64_t plane = image * a.channels + channel;
    const std::int64_t ahead = image + 1 < end ? a.channels * a.inner : 0;
    std::int64_t at = plane * a.inner + from, byte = plane * mask_bytes + from / 8, left = to - from;
    while (left > 0) {
      std::int64_t rows, width = narrow;
      if (loops.wide && left >= wide) {
        width = wide;
        rows = left / wide < kRowsInFloat ? left / wide : kRowsInFloat;
        loops.wide(c, Place{at, byte, rows, wide, 0, ahead}, p, s);
      } else if (left >= narrow) {
        rows = left / narrow < kRowsInFloat ? left / narrow : kRowsInFloat;
        loops.narrow(c, Place{at, byte, rows, narrow, 0, ahead}, q, r);
      } else {
        rows = 1;
        loops.cut(c, Place{at, byte, 1, 0, left, 0}, q, r);
      }
      at += rows * width, byte += rows * width / 8, left -= rows * width;
      if ((pending += rows) >= kRowsInFloat) {
        flush<W>(loops, s, totals);
        flush<w>(loops, r, totals);
        pending = 0;
      }
    }
  }
  flush<W>(loops, s, totals);
  flush<w>(loops, r, totals);
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
    walk_planes(loops_of<StatisticsTile<T>>(), a, c, channel, begin, end, 0, a.inner, guess, totals);
    total(totals, sum, squares);
    if (attempt == 1 || !guess_was_bad(n, sum, squares)) break;
    guess += sum / n;
  }
  result = moments(n, guess, sum, squares);
}

template <class T>
void forward_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, std::int64_t& active,
                    void* scratch) {
  const Loops<T> loops = forward_loops<T>(a);
  Context<T> c = context<T>(a);
  Totals<T> totals;
  if (!a.noisy) {
    walk_planes(loops, a, c, channel, begin, end, 0, a.inner, a.mean[channel], totals);
  } else {
    float* const noise = noise_in(scratch);
    c.noise = noise;
    for (std::int64_t image = begin; image < end; ++image) {
      for (std::int64_t from = 0; from < a.inner; from += kNoiseBlock) {
        const std::int64_t to = from + kNoiseBlock < a.inner ? from + kNoiseBlock : a.inner;
        c.noise_at = (image * a.channels + channel) * a.inner + from;
        noise_planes(noise, c.noise_at, c.noise_at + to - from, a.channels, a.inner, a.seed, stage_in(scratch));
        walk_planes(loops, a, c, channel, image, image + 1, from, to, a.mean[channel], totals);
      }
    }
  }
  active = 0;
  for (int i = 0; i < Totals<T>::lanes; ++i) active += totals.count[i];
}

template <class T>
void sums_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end, double (&sums)[2]) {
  Totals<T> totals;
  walk_planes(sums_loops<T>(a), a, context<T>(a), channel, begin, end, 0, a.inner, a.mean[channel], totals);
  total(totals, sums[0], sums[1]);
}

template <class T>
void input_planes(const NormAct& a, std::int64_t channel, std::int64_t begin, std::int64_t end) {
  Totals<T> totals;
  walk_planes(input_loops<T>(a), a, context<T>(a), channel, begin, end, 0, a.inner, a.mean[channel], totals);
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

// The columns from `column` on: parameters from their arrays, sums to theirs.
template <int W, class T>
void column_tile(const Loops<T>& loops, Loop<T, W> loop, const Context<T>& c, const Columns<T>& k, std::int64_t column,
                 Place place) {
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
  loop(c, place, p, s);
  for (int w = 0; w < W; ++w) {
    const std::int64_t i = column + w * n;
    if (loops.sums) {
      add_lanes(k.a + i, s.a[w]);
      add_lanes(k.b + i, s.b[w]);
    }
    if (loops.counts) add_counts(k.count + i, s.count[w]);
  }
}

// Columns [0, width) of `rows` bands that begin at element `at`.
template <class T>
void band(const Loops<T>& loops, const Context<T>& c, const Columns<T>& k, std::int64_t at, std::int64_t rows,
          std::int64_t period, std::int64_t width) {
  constexpr int W = Lanes<T>::large, w = Lanes<T>::small, wide = W * Lanes<T>::n, narrow = w * Lanes<T>::n;
  std::int64_t i = 0;
  if (loops.wide) {
    for (; i + wide <= width; i += wide) {
      column_tile<W>(loops, loops.wide, c, k, i, Place{at + i, (at + i) / 8, rows, period, 0, 0});
    }
  }
  for (; i + narrow <= width; i += narrow) {
    column_tile<w>(loops, loops.narrow, c, k, i, Place{at + i, (at + i) / 8, rows, period, 0, 0});
  }
  if (i < width) column_tile<w>(loops, loops.cut, c, k, i, Place{at + i, (at + i) / 8, rows, period, width - i, 0});
}

// Rows [begin, end) of (rows, channels). Tiles go down some rows and then right, within what the second-level cache holds.
template <class T>
void walk_rows(const Loops<T>& loops, const NormAct& a, const Context<T>& c, const Columns<T>& k, std::int64_t begin,
               std::int64_t end) {
  const std::int64_t side_by_side = a.period / a.channels, bands = (end - begin) / side_by_side;
  const std::int64_t most = loops.sums ? kRowsInFloat : 4 * kRowsInFloat;
  std::int64_t rows = 131072 / (a.period * (std::int64_t)sizeof(T)), at = begin * a.channels;
  rows = rows < 4 ? 4 : rows > most ? most : rows;
  for (std::int64_t i = 0; i < bands; i += rows) {
    if (rows > bands - i) rows = bands - i;
    band(loops, c, k, at, rows, a.period, a.period);
    at += rows * a.period;
  }
  if (at < end * a.channels) band(loops, c, k, at, 1, a.period, end * a.channels - at);
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
    walk_rows(loops_of<StatisticsTile<T>>(), a, c, k, begin, end);
    fold(a, k);
    bool bad = false;
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      bad |= guess_was_bad(n, k.a[channel], k.b[channel]);
      result[channel] = moments(n, (double)k.mean[channel], k.a[channel], k.b[channel]);
    }
    if (!bad) return;
  }
}

template <class T>
void forward_rows(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch) {
  const Loops<T> loops = forward_loops<T>(a);
  Context<T> c = context<T>(a);
  const Columns<T> k = columns<T>(a, scratch);
  if (!a.noisy) {
    walk_rows(loops, a, c, k, begin, end);
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
      walk_rows(loops, a, c, k, row, row + block);
    }
  }
  fold(a, k);
  for (std::int64_t channel = 0; channel < a.channels; ++channel) active[channel] = k.count[channel];
}

template <class T>
void sums_rows(const NormAct& a, std::int64_t begin, std::int64_t end, double (*sums)[2], void* scratch) {
  const Columns<T> k = columns<T>(a, scratch);
  walk_rows(sums_loops<T>(a), a, context<T>(a), k, begin, end);
  fold(a, k);
  for (std::int64_t channel = 0; channel < a.channels; ++channel) {
    sums[channel][0] = k.a[channel];
    sums[channel][1] = k.b[channel];
  }
}

template <class T>
void input_rows(const NormAct& a, std::int64_t begin, std::int64_t end, void* scratch) {
  walk_rows(input_loops<T>(a), a, context<T>(a), columns<T>(a, scratch), begin, end);
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
// clang-format on

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
