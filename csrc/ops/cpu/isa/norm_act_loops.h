// norm_act for one instruction set: walks over planes and rows in tiles (norm_act_tiles.h); see norm_act_table.h for what
// each function does.
//
// Planes are walked channel by channel where the caller says so, the planes of a few images in one go, fetching the next
// ones by instruction: hardware prefetchers start anew on every plane, and a tile's call and the sum of its lanes cost as
// much as a plane of 28x28. (128, 32, 28, 28) in float32 on two Zen 4 cores, forward and backward of the op: 1.4 and 1.5 ms,
// against 1.6 and 1.9 ms image by image; with outputs written past the caches 1.1 and 1.3. Larger inputs gain more.
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
constexpr std::int64_t kChunkBytes = 32768;

// Scratch: the arrays of `Columns` for every column of a period, noise of a block, the generator's stage.
constexpr std::int64_t kColumnBytes = 5 * 8 + 3 * 8 + 4 * 4, kBlockBytes = (kNoiseBlock + 4 * L) * 4;

DEMP_INLINE Stage& stage_in(void* scratch) { return *(Stage*)scratch; }
DEMP_INLINE float* noise_in(void* scratch) { return (float*)((char*)scratch + sizeof(Stage)); }

template <class T>
DEMP_INLINE Context<T> context(const NormAct& a) {
  typedef typename Lanes<T>::S S;
  return {(const T*)a.x, (const T*)a.residual, (const T*)a.grad, (T*)a.y, (T*)a.grad_x, (T*)a.grad_residual, a.mask,
          nullptr, 0, (S)a.parameters.slope, (S)a.parameters.noise_std, (Act)a.act, a.parameters.stream};
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

// Arrays with an entry for each column of a band (rows) or each channel (planes): parameters, sums.
template <class T>
struct Columns {
  typedef typename Lanes<T>::S S;
  S *mean, *scale, *bias, *slope_back, *offset_back;
  double *a, *b;
  std::int64_t* count;
};

template <class T>
Columns<T> columns(const NormAct& a, void* scratch) {
  typedef typename Lanes<T>::S S;
  const std::int64_t n = a.period;
  // behind the noise of a block, which is kNoiseBlock elements or four periods
  double* d = (double*)((char*)scratch + sizeof(Stage) + kBlockBytes + n * 16);
  S* s = (S*)(d + 3 * n);
  Columns<T> k = {s, s + n, s + 2 * n, s + 3 * n, s + 4 * n, d, d + n, (std::int64_t*)(d + 2 * n)};
  const std::int64_t end = a.inner == 1 ? n : a.last_channel;
  for (std::int64_t i = a.first_channel, channel = i; i < end; ++i) {
    k.mean[i] = (S)(a.mean ? a.mean[channel] : 0);
    k.scale[i] = (S)(a.scale ? a.scale[channel] : 0);
    k.bias[i] = (S)(a.bias ? a.bias[channel] : 0);
    k.slope_back[i] = (S)(a.slope_back ? a.slope_back[channel] : 0);
    k.offset_back[i] = (S)(a.offset_back ? a.offset_back[channel] : 0);
    k.a[i] = k.b[i] = 0;
    k.count[i] = 0;
    if (++channel == a.channels) channel = 0;
  }
  return k;
}

// The sums of a channel's columns, in its first one.
template <class T>
DEMP_INLINE void fold(const NormAct& a, const Columns<T>& k) {
  for (std::int64_t i = a.channels, channel = 0; i < a.period; ++i) {
    k.a[channel] += k.a[i];
    k.b[channel] += k.b[i];
    k.count[channel] += k.count[i];
    if (++channel == a.channels) channel = 0;
  }
}

// ---- planes: one channel's parameters in every lane -----------------------------------------------------------

template <int W, class T>
DEMP_INLINE PerChannel<T, W> broadcast(const Columns<T>& k, std::int64_t channel) {
  typedef typename Lanes<T>::V V;
  PerChannel<T, W> p;
  for (int w = 0; w < W; ++w) {
    p.mean[w] = V{} + k.mean[channel];
    p.scale[w] = V{} + k.scale[channel];
    p.bias[w] = V{} + k.bias[channel];
    p.slope_back[w] = V{} + k.slope_back[channel];
    p.offset_back[w] = V{} + k.offset_back[channel];
  }
  return p;
}

// Sum of the lanes, pairwise. Planes may be as short as a vector or two, so it matters.
#if DEMP_ISA_LEVEL == 2
DEMP_INLINE float lane_sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
DEMP_INLINE double lane_sum(D v) { return _mm512_reduce_add_pd((__m512d)v); }
DEMP_INLINE std::int32_t lane_sum(I32 v) { return _mm512_reduce_add_epi32((__m512i)v); }
DEMP_INLINE std::int64_t lane_sum(I64 v) { return _mm512_reduce_add_epi64((__m512i)v); }
#else
#if DEMP_ISA_LEVEL == 1
DEMP_INLINE float lane_sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DEMP_INLINE std::int32_t lane_sum(I32 v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}
#endif
template <class V>
DEMP_INLINE auto lane_sum(V v) {
  constexpr int n = int(sizeof(V) / sizeof(v[0]));
  decltype(v[0] + 0) lanes[n];
  store_bytes(lanes, v);
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
#endif

template <int W, class T>
DEMP_INLINE void flush(const Loops<T>& loops, Sums<T, W>& s, const Columns<T>& k, std::int64_t channel) {
  for (int half = W / 2; half > 0; half /= 2) {
    for (int w = 0; w < half; ++w) {
      s.a[w] += s.a[w + half];
      s.b[w] += s.b[w + half];
      s.count[w] += s.count[w + half];
    }
  }
  if (loops.sums) {
    k.a[channel] += (double)lane_sum(s.a[0]);
    k.b[channel] += (double)lane_sum(s.b[0]);
  }
  if (loops.counts) k.count[channel] += lane_sum(s.count[0]);
}

// The part of `place` with `rows` rows of `stride` elements, in each of its planes.
DEMP_INLINE Place cut_place(const NormAct& a, Place place, std::int64_t rows, std::int64_t stride, std::int64_t elements) {
  place.rows = rows, place.stride = stride, place.elements = elements;
  place.jump = a.channels * a.inner - rows * stride;
  place.byte_jump = a.channels * ((a.inner + 7) / 8) - rows * stride / 8;
  return place;
}

// Positions [from, to) of the planes of one channel, that of image `image` and of `planes` - 1 after it.
template <class T>
DEMP_INLINE void walk_run(const Loops<T>& loops, const NormAct& a, const Context<T>& c, const Columns<T>& k,
                          std::int64_t image, std::int64_t planes, std::int64_t channel, std::int64_t from, std::int64_t to) {
  constexpr int W = Lanes<T>::large, w = Lanes<T>::small, wide = W * Lanes<T>::n, narrow = w * Lanes<T>::n;
  const std::int64_t plane = image * a.channels + channel, plane_bytes = (a.inner + 7) / 8;
  Place place{plane * a.inner + from, plane * plane_bytes + from / 8, 0, 0, 0, planes, 0, 0, 0};
  if (a.ahead) place.ahead = (a.backwards ? -planes : planes) * a.channels * a.inner;
  std::int64_t left = to - from;
  const std::int64_t most = planes > 1 ? left : kRowsInFloat;  // rows at once: several planes are few rows
  if (loops.wide && left >= wide) {
    const PerChannel<T, W> p = broadcast<W>(k, channel);
    for (std::int64_t rows; (rows = left / wide) > 0; left -= rows * wide) {
      if (rows > most) rows = most;
      Sums<T, W> s;
      loops.wide(c, cut_place(a, place, rows, wide, 0), p, s);
      flush<W>(loops, s, k, channel);
      place.at += rows * wide, place.byte += rows * wide / 8;
    }
  }
  if (left == 0) return;
  const PerChannel<T, w> p = broadcast<w>(k, channel);
  for (std::int64_t rows; (rows = left / narrow) > 0; left -= rows * narrow) {
    if (rows > most) rows = most;
    Sums<T, w> s;
    loops.narrow(c, cut_place(a, place, rows, narrow, 0), p, s);
    flush<w>(loops, s, k, channel);
    place.at += rows * narrow, place.byte += rows * narrow / 8;
  }
  if (left == 0) return;
  Sums<T, w> s;
  loops.cut(c, cut_place(a, place, 1, 0, left), p, s);
  flush<w>(loops, s, k, channel);
}

// Images whose planes of one channel are walked through in one go: as few as sums in float allow, and as the first-level
// cache holds with all channels of the call.
template <class T>
std::int64_t images_at_once(const Loops<T>& loops, const NormAct& a) {
  constexpr int narrow = Lanes<T>::small * Lanes<T>::n, wide = Lanes<T>::large * Lanes<T>::n;
  if (a.noisy || a.pieces > 1) return 1;
  const std::int64_t rows = loops.wide ? a.inner / wide + wide / narrow : a.inner / narrow + 1;
  const std::int64_t bytes = (a.last_channel - a.first_channel) * a.inner * (std::int64_t)sizeof(T);
  std::int64_t images = kRowsInFloat / rows;
  if (images > kChunkBytes / bytes) images = kChunkBytes / bytes;
  return images < 1 ? 1 : images;
}

// The images of one chunk, or the pieces of one image.
template <class T>
DEMP_INLINE void walk_chunk(const Loops<T>& loops, const NormAct& a, Context<T>& c, const Columns<T>& k, std::int64_t unit,
                            std::int64_t units, void* scratch) {
  const std::int64_t image = unit / a.pieces;
  const std::int64_t from = unit % a.pieces * a.piece, to = from + a.piece < a.inner ? from + a.piece : a.inner;
  for (std::int64_t channel = a.first_channel; channel < a.last_channel; ++channel) {
    if (!a.noisy) {
      walk_run(loops, a, c, k, image, units, channel, from, to);
      continue;
    }
    const std::int64_t plane = image * a.channels + channel;
    for (std::int64_t start = from; start < to; start += kNoiseBlock) {
      const std::int64_t stop = start + kNoiseBlock < to ? start + kNoiseBlock : to;
      c.noise = noise_in(scratch);
      c.noise_at = plane * a.inner + start;
      noise_planes(noise_in(scratch), c.noise_at, c.noise_at + stop - start, a.channels, a.inner, a.seed, stage_in(scratch));
      walk_run(loops, a, c, k, image, 1, channel, start, stop);
    }
  }
}

template <class T>
void walk_planes(const Loops<T>& loops, const NormAct& a, const Columns<T>& k, std::int64_t begin, std::int64_t end,
                 void* scratch) {
  Context<T> c = context<T>(a);
  const std::int64_t chunk = images_at_once(loops, a), chunks = (end - begin + chunk - 1) / chunk;
  for (std::int64_t i = 0; i < chunks; ++i) {
    const std::int64_t unit = begin + chunk * (a.backwards ? chunks - 1 - i : i);
    walk_chunk(loops, a, c, k, unit, chunk < end - unit ? chunk : end - unit, scratch);
  }
}

// ---- rows: every lane its own parameters ----------------------------------------------------------------------

template <class V>
DEMP_INLINE void add_lanes(double* to, V v) {
  decltype(v[0] + 0) lanes[sizeof(V) / sizeof(v[0])];
  store_bytes(lanes, v);
  for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) to[i] += (double)lanes[i];
}
template <class I>
DEMP_INLINE void add_lanes(std::int64_t* to, I v) {
  decltype(v[0] + 0) lanes[sizeof(I) / sizeof(v[0])];
  store_bytes(lanes, v);
  for (int i = 0; i < int(sizeof(I) / sizeof(v[0])); ++i) to[i] += lanes[i];
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
    if (loops.counts) add_lanes(k.count + i, s.count[w]);
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
      column_tile<W>(loops, loops.wide, c, k, i, Place{at + i, (at + i) / 8, rows, period, 0});
    }
  }
  for (; i + narrow <= width; i += narrow) {
    column_tile<w>(loops, loops.narrow, c, k, i, Place{at + i, (at + i) / 8, rows, period, 0});
  }
  if (i < width) column_tile<w>(loops, loops.cut, c, k, i, Place{at + i, (at + i) / 8, rows, period, width - i});
}

// Tiles go down some rows and then right, within what the second-level cache holds.
template <class T>
void walk_rows(const Loops<T>& loops, const NormAct& a, const Columns<T>& k, std::int64_t begin, std::int64_t end,
               void* scratch) {
  const std::int64_t side_by_side = a.period / a.channels, most = loops.sums ? kRowsInFloat : 4 * kRowsInFloat;
  std::int64_t bands = 131072 / (a.period * (std::int64_t)sizeof(T));
  bands = bands < 4 ? 4 : bands > most ? most : bands;
  if (a.noisy) {
    bands = kNoiseBlock / (4 * a.period) * 4;  // in fours: whole groups of noise
    bands = bands < 4 ? 4 : bands;
  }
  Context<T> c = context<T>(a);
  const std::int64_t block = bands * side_by_side;
  for (std::int64_t first = begin; first < end; first += block) {
    const std::int64_t rows = block < end - first ? block : end - first, at = first * a.channels;
    if (a.noisy) {
      c.noise = noise_in(scratch);
      c.noise_at = at;
      noise_rows(noise_in(scratch), first, first + rows, a.channels, nullptr, 0, a.seed, stage_in(scratch));
    }
    const std::int64_t whole = rows / side_by_side, rest = rows % side_by_side;
    if (whole > 0) band(loops, c, k, at, whole, a.period, a.period);
    if (rest > 0) band(loops, c, k, at + whole * a.period, 1, a.period, rest * a.channels);
  }
}

// ---- what the table holds -------------------------------------------------------------------------------------

template <class T>
void walk(const Loops<T>& loops, const NormAct& a, const Columns<T>& k, std::int64_t begin, std::int64_t end,
          void* scratch) {
  (a.inner == 1 ? walk_rows<T> : walk_planes<T>)(loops, a, k, begin, end, scratch);
  fold(a, k);
}

// Of the values of channel `channel`, number `i` of the `n` from unit or row `begin` to `end`.
template <class T>
DEMP_INLINE double sample(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t channel, int i, int n) {
  const std::int64_t unit = begin + (end - begin) * i / n, image = unit / a.pieces;
  const std::int64_t position = a.inner == 1 ? 0 : unit % a.pieces * a.piece + i;
  return (double)load_first((const T*)a.x + (image * a.channels + channel) * a.inner + position % a.inner, 1)[0];
}

// Eight bits of it. 16-bit elements lie on a coarse grid, so the last bits of all their differences from one value are the
// same, and if a sum drops them, it drops them every time: the mean of 12544 halves was off by 3e-6, now by 1e-7.
DEMP_INLINE double coarse(double value) {
  if (!(value > -1e38 && value < 1e38)) return value;  // a float64 that no float holds
  float rounded = (float)value;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  bits &= 0xffff0000u;
  __builtin_memcpy(&rounded, &bits, sizeof bits);
  return (double)rounded;
}

// The sums are taken around a guess of the mean: as accurate as around the mean itself as long as the two are not many
// standard deviations apart. Where they prove to be (a sample that is not like the rest) it is done again, around the mean.
template <class T>
void statistics(const NormAct& a, std::int64_t begin, std::int64_t end, Moments* result, void* scratch) {
  typedef typename Lanes<T>::S S;
  const std::int64_t last = end - 1, image = last / a.pieces;
  // units are pieces, of which the last of an image may be shorter
  double n = (double)(end - begin);
  if (a.inner > 1) {
    n = ((double)image * a.inner + (last % a.pieces + 1 == a.pieces ? a.inner : (last % a.pieces + 1) * a.piece)) -
        ((double)(begin / a.pieces) * a.inner + begin % a.pieces * a.piece);
  }
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Columns<T> k = columns<T>(a, scratch);
    for (std::int64_t channel = a.first_channel; channel < a.last_channel; ++channel) {
      double guess = attempt ? result[channel].mean : 0;
      for (int i = 0; i < 4 && !attempt; ++i) guess += sample<T>(a, begin, end, channel, i, 4) / 4;
      if (!attempt) guess = coarse(guess);
      for (std::int64_t i = channel; i < a.period; i += a.channels) k.mean[i] = (S)guess;
    }
    walk(loops_of<StatisticsTile<T>>(), a, k, begin, end, scratch);
    bool bad = false;
    for (std::int64_t channel = a.first_channel; channel < a.last_channel; ++channel) {
      const double shift = k.a[channel] / n, m2 = k.b[channel] - k.a[channel] * shift;
      bad |= k.a[channel] * shift > 64 * m2;
      result[channel] = {n, (double)k.mean[channel] + shift, m2 < 0 ? 0 : m2};
    }
    if (!bad) return;
  }
}

template <class T>
void forward(const NormAct& a, std::int64_t begin, std::int64_t end, std::int64_t* active, void* scratch) {
  const Columns<T> k = columns<T>(a, scratch);
  walk(forward_loops<T>(a), a, k, begin, end, scratch);
  for (std::int64_t channel = a.first_channel; channel < a.last_channel; ++channel) active[channel] = k.count[channel];
}

template <class T>
void sums(const NormAct& a, std::int64_t begin, std::int64_t end, GradientSums* result, void* scratch) {
  const Columns<T> k = columns<T>(a, scratch);
  walk(sums_loops<T>(a), a, k, begin, end, scratch);
  for (std::int64_t channel = a.first_channel; channel < a.last_channel; ++channel) result[channel] = {k.a[channel], k.b[channel]};
}

template <class T>
void input(const NormAct& a, std::int64_t begin, std::int64_t end, void* scratch) {
  walk(input_loops<T>(a), a, columns<T>(a, scratch), begin, end, scratch);
}

// clang-format off
#define DEMP_EACH_TYPE(f) {f<float>, f<double>, f<bfloat16>, f<float16>}
#define DEMP_EACH_WIDTH(w) \
  {Lanes<float>::n * Lanes<float>::w, Lanes<double>::n * Lanes<double>::w, Lanes<bfloat16>::n * Lanes<bfloat16>::w, \
   Lanes<float16>::n * Lanes<float16>::w}

constexpr NormActTable kNormActTable = {
    DEMP_EACH_WIDTH(small),
    DEMP_EACH_WIDTH(large),
    DEMP_EACH_TYPE(statistics),
    DEMP_EACH_TYPE(forward),
    DEMP_EACH_TYPE(sums),
    DEMP_EACH_TYPE(input),
    (std::int64_t)sizeof(Stage) + kBlockBytes,
    kColumnBytes,
};
#undef DEMP_EACH_TYPE
#undef DEMP_EACH_WIDTH
// clang-format on

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
