// The noise of `reference.noise`: Philox4x32-10 and Box-Muller on vectors.
//
// A group is one Philox call: four consecutive positions of one column. Groups are described by arrays (q = position / 4,
// column), because which groups a block of memory needs depends on its layout, and filling two short arrays costs little
// beside the 70 or so instructions a group.

namespace demp {
namespace DEMP_ISA {
namespace {

DEMP_INLINE U64 multiply_low_halves(U64 a, std::uint32_t m) {
#if DEMP_ISA_LEVEL == 2
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif DEMP_ISA_LEVEL == 1
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffull) * std::uint64_t{m};
#endif
}

DEMP_INLINE U64 exclusive_or(U64 a, U64 b, U64 c) {
#if DEMP_ISA_LEVEL == 2
  return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

struct Keys {
  U64 low[10], high[10];  // one a round, in every lane
};

inline __attribute__((always_inline)) Keys make_keys(std::uint64_t seed) {
  Keys keys;
  std::uint32_t low = (std::uint32_t)seed, high = (std::uint32_t)(seed >> 32);
  for (int i = 0; i < 10; ++i, low += kPhiloxW0, high += kPhiloxW1) {
    keys.low[i] = U64{} + std::uint64_t{low};
    keys.high[i] = U64{} + std::uint64_t{high};
  }
  return keys;
}

// The low halves of two vectors as one vector of 32-bit lanes. For `by_group` the lanes come in the order that
// `store_groups` wants, otherwise in the order of the groups.
template <bool by_group>
DEMP_INLINE I32 pack(U64 a, U64 b) {
#if DEMP_ISA_LEVEL == 2
  const __m512i order =
      by_group ? _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30)
               : _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (I32)_mm512_permutex2var_epi32((__m512i)a, order, (__m512i)b);
#elif DEMP_ISA_LEVEL == 1
  const __m256i halves = _mm256_castps_si256(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));  // 0 1 4 5 | 2 3 6 7
  return (I32)(by_group ? halves : _mm256_permute4x64_epi64(halves, 0xd8));
#else
  I32 lanes;
  for (int i = 0; i < L / 2; ++i) {
    lanes[i] = (std::int32_t)a[i];
    lanes[L / 2 + i] = (std::int32_t)b[i];
  }
  return lanes;
#endif
}

// Four vectors z[lane][group] to out[4 * group + lane].
DEMP_INLINE void store_groups(float* out, const F (&z)[4]) {
#if DEMP_ISA_LEVEL == 2
  const __m512 a = _mm512_unpacklo_ps((__m512)z[0], (__m512)z[1]), b = _mm512_unpackhi_ps((__m512)z[0], (__m512)z[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)z[2], (__m512)z[3]), d = _mm512_unpackhi_ps((__m512)z[2], (__m512)z[3]);
  const __m512d ad = _mm512_castps_pd(a), bd = _mm512_castps_pd(b), cd = _mm512_castps_pd(c), dd = _mm512_castps_pd(d);
  _mm512_storeu_pd((double*)out, _mm512_unpacklo_pd(ad, cd));
  _mm512_storeu_pd((double*)(out + 16), _mm512_unpackhi_pd(ad, cd));
  _mm512_storeu_pd((double*)(out + 32), _mm512_unpacklo_pd(bd, dd));
  _mm512_storeu_pd((double*)(out + 48), _mm512_unpackhi_pd(bd, dd));
#elif DEMP_ISA_LEVEL == 1
  const __m256 a = _mm256_unpacklo_ps((__m256)z[0], (__m256)z[1]), b = _mm256_unpackhi_ps((__m256)z[0], (__m256)z[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)z[2], (__m256)z[3]), d = _mm256_unpackhi_ps((__m256)z[2], (__m256)z[3]);
  const __m256d ad = _mm256_castps_pd(a), bd = _mm256_castps_pd(b), cd = _mm256_castps_pd(c), dd = _mm256_castps_pd(d);
  const __m256d g02 = _mm256_unpacklo_pd(ad, cd), g13 = _mm256_unpackhi_pd(ad, cd);
  const __m256d g46 = _mm256_unpacklo_pd(bd, dd), g57 = _mm256_unpackhi_pd(bd, dd);
  _mm256_storeu_pd((double*)out, _mm256_permute2f128_pd(g02, g13, 0x20));
  _mm256_storeu_pd((double*)(out + 8), _mm256_permute2f128_pd(g02, g13, 0x31));
  _mm256_storeu_pd((double*)(out + 16), _mm256_permute2f128_pd(g46, g57, 0x20));
  _mm256_storeu_pd((double*)(out + 24), _mm256_permute2f128_pd(g46, g57, 0x31));
#else
  for (int i = 0; i < L; ++i) {
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = z[lane][i];
  }
#endif
}

DEMP_INLINE void box_muller(I32 x0, I32 x1, F& z0, F& z1) {
  F sine, cosine;
  const F radius = box_muller_radius((I32)((U32)x0 >> 8) + 1);
  sine_cosine_turns(x1 & ~0xff, sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// The words of the V * L / 2 groups from g on, to the places of `generate`.
//
// Words are kept in 64-bit lanes of which only the low half counts: a 32x32->64 multiplication leaves its two results
// where the next round needs them, and the upper halves are never looked at. That makes 6 instructions a round on
// AVX-512 and 8 on AVX2; V = 4 vectors side by side hide the multiplications' latency.
template <int V, bool by_group>
DEMP_INLINE void philox_groups(const std::uint64_t* q, const std::uint64_t* column, std::int64_t g, std::uint32_t stream,
                               const Keys& keys, float* out, std::int64_t stride) {
  U64 x[4][V], a[V], b[V];
  for (int v = 0; v < V; ++v) {
    x[0][v] = load_bytes<U64>(q + g + v * (L / 2));
    x[1][v] = x[0][v] >> 32;
    x[2][v] = load_bytes<U64>(column + g + v * (L / 2));
    x[3][v] = U64{} + std::uint64_t{stream};
  }
  for (int i = 0; i < 10; ++i) {
    for (int v = 0; v < V; ++v) a[v] = multiply_low_halves(x[0][v], kPhiloxM0);
    for (int v = 0; v < V; ++v) b[v] = multiply_low_halves(x[2][v], kPhiloxM1);
    for (int v = 0; v < V; ++v) {
      x[0][v] = exclusive_or(b[v] >> 32, x[1][v], keys.low[i]);
      x[1][v] = b[v];
      x[2][v] = exclusive_or(a[v] >> 32, x[3][v], keys.high[i]);
      x[3][v] = a[v];
    }
  }
  for (int v = 0; v < V; v += 2, g += L) {
    for (int w = 0; w < 4; ++w) {
      store_bytes(by_group ? out + 4 * g + w * L : out + stride * w + g, pack<by_group>(x[w][v], x[w][v + 1]));
    }
  }
}

// Noise of `count` groups, rounded up to a multiple of L: arrays and output need room for that.
// by_group: out[4 * group + lane]; otherwise out[stride * lane + group].
//
// In two passes, words and then normals in their place, while they are in the first-level cache: neither pass alone
// waits for the other's long chains. 0.63 ns an element against 0.87 in one pass (AVX-512, 3.6 GHz), 0.97 against 1.28
// (AVX2); the 245 AVX-512 instructions for 64 elements would take 0.53 at two a cycle.
//
// 120 of the 245 are Philox's, which a specified stream fixes. Two cores take 0.31 ns an element, and half as much again to read,
// convert, mask, round and write it: 1.9 times a copy of float32 beyond the caches, but 4 times one of 16-bit elements, of
// which the copy moves twice as many. Polynomials just good enough for those would save 12 instructions and not change that.
template <bool by_group>
void generate(const std::uint64_t* q, const std::uint64_t* column, std::int64_t count, std::uint32_t stream,
              const Keys& keys, float* out, std::int64_t stride) {
  std::int64_t g = 0;
  for (; g + 2 * L <= count; g += 2 * L) philox_groups<4, by_group>(q, column, g, stream, keys, out, stride);
  for (; g < count; g += L) philox_groups<2, by_group>(q, column, g, stream, keys, out, stride);
  for (g = 0; g < count; g += L) {
    I32 words[4];
    for (int w = 0; w < 4; ++w) words[w] = load_bytes<I32>(by_group ? out + 4 * g + w * L : out + stride * w + g);
    F z[4];
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
    if (by_group) {
      store_groups(out + 4 * g, z);
    } else {
      for (int lane = 0; lane < 4; ++lane) store_bytes(out + stride * lane + g, z[lane]);
    }
  }
}

constexpr int kGroups = 512;  // a stage: 8 KiB of arrays and 8 KiB of noise, within the first-level cache

struct Stage {
  std::uint64_t q[kGroups + L], column[kGroups + L];
  float out[4 * (kGroups + L) + L];
};

// Copies n floats in whole vectors: up to L - 1 floats beyond n are read and written. Runs are copied in ascending
// order, so that the next one mends what the last one spilt.
DEMP_INLINE void copy_spilling(float* out, const float* in, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += L) store_bytes(out + i, load_bytes<F>(in + i));
}

// Noise of the elements [begin, end) of a contiguous (outer, channels, inner) tensor; out has room for 4 L more.
void noise_planes(float* out, std::int64_t begin, std::int64_t end, std::int64_t channels, std::int64_t inner,
                  std::uint64_t seed, Stage& stage, std::uint32_t stream = 0) {
  const Keys keys = make_keys(seed);
  const bool whole_groups = inner % 4 == 0 && begin % 4 == 0;  // memory order is then the order of the groups
  struct Run {
    float* to;
    const float* from;
    std::int64_t length;
  } runs[kGroups];
  std::int64_t plane = begin / inner, i = begin % inner;
  std::int64_t outer = plane / channels, channel = plane % channels;
  for (std::int64_t at = begin; at < end;) {
    float* const start = out + (at - begin);
    int groups = 0, count = 0;
    while (at < end && groups < kGroups) {
      const std::int64_t position = outer * inner + i;
      const int offset = int(position & 3);
      std::int64_t length = inner - i < end - at ? inner - i : end - at;
      const std::int64_t room = 4 * std::int64_t(kGroups - groups) - offset;
      if (length > room) length = room;
      runs[count++] = {out + (at - begin), stage.out + 4 * groups + offset, length};
      const int needed = int((offset + length + 3) / 4);
      for (int g = 0; g < needed; ++g) {
        stage.q[groups + g] = (std::uint64_t)(position / 4 + g);
        stage.column[groups + g] = (std::uint64_t)channel;
      }
      groups += needed;
      at += length;
      i += length;
      if (i == inner) {
        i = 0;
        if (++channel == channels) channel = 0, ++outer;
      }
    }
    if (whole_groups) {
      generate<true>(stage.q, stage.column, groups, stream, keys, start, 0);
      continue;
    }
    generate<true>(stage.q, stage.column, groups, stream, keys, stage.out, 0);
    for (int r = 0; r < count; ++r) copy_spilling(runs[r].to, runs[r].from, runs[r].length);
  }
}

// Noise of the rows [begin, end) of a (rows, columns) matrix, begin a multiple of 4; out has room for 4 L more.
// columns_of: the logical column of each column in memory; null if that is first_column and the ones after it.
void noise_rows(float* out, std::int64_t begin, std::int64_t end, std::int64_t columns,
                const std::uint64_t* columns_of, std::uint32_t stream, std::uint64_t seed, Stage& stage,
                std::int64_t first_column = 0) {
  const Keys keys = make_keys(seed);
  const std::int64_t width = columns < kGroups ? columns : kGroups;  // of one row in a stage
  const std::int64_t depth = kGroups / width;                        // rows of groups in a stage
  const std::int64_t last = (end + 3) / 4;
  for (std::int64_t c = 0; c < columns; c += width) {
    const std::int64_t w = columns - c < width ? columns - c : width;
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t k = 0; k < w; ++k) {
        stage.column[d * w + k] = columns_of ? columns_of[c + k] : (std::uint64_t)(first_column + c + k);
      }
    }
    for (std::int64_t q = begin / 4; q < last; q += depth) {
      const std::int64_t n = last - q < depth ? last - q : depth;
      float* const top = out + (4 * q - begin) * columns + c;
      for (std::int64_t d = 0; d < n; ++d) {
        for (std::int64_t k = 0; k < w; ++k) stage.q[d * w + k] = (std::uint64_t)(q + d);
      }
      if (w % L == 0 && 4 * (q + n) <= end) {  // vectors fit the rows: no need to stage
        for (std::int64_t d = 0; d < n; ++d) {
          generate<false>(stage.q + d * w, stage.column + d * w, w, stream, keys, top + 4 * d * columns, columns);
        }
        continue;
      }
      constexpr int stride = kGroups + L;
      generate<false>(stage.q, stage.column, n * w, stream, keys, stage.out, stride);
      for (std::int64_t d = 0; d < n; ++d) {
        for (int lane = 0; lane < 4 && 4 * (q + d) + lane < end; ++lane) {
          float* to = top + (4 * d + lane) * columns;
          const float* from = stage.out + stride * lane + d * w;
          if (w == columns) {
            copy_spilling(to, from, w);
          } else {  // part of a row: what follows is there already
            __builtin_memcpy(to, from, (std::size_t)w * sizeof(float));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
