// Vectors of one instruction set: types, loads, stores, masks, conversions. Included by for_each.h's sources only.
//
// A packet is one vector of elements of type T, Ops<T>::N of them. `Mask` says for each whether it is active.
// Arithmetic is done on F (float) for float and the 16-bit types, on D (double) for double.

namespace demp {
namespace DEMP_ISA {
namespace {

constexpr int kBytes = DEMP_ISA_LEVEL == 2 ? 64 : DEMP_ISA_LEVEL == 1 ? 32 : 16;
constexpr int L = kBytes / 4;  // float lanes

typedef float F __attribute__((vector_size(kBytes)));
typedef double D __attribute__((vector_size(kBytes)));
typedef std::int16_t I16 __attribute__((vector_size(kBytes)));
typedef std::int32_t I32 __attribute__((vector_size(kBytes)));
typedef std::int64_t I64 __attribute__((vector_size(kBytes)));
typedef std::uint32_t U32 __attribute__((vector_size(kBytes)));
typedef std::uint64_t U64 __attribute__((vector_size(kBytes)));
typedef std::uint16_t HalfU16 __attribute__((vector_size(kBytes / 2)));  // L 16-bit integers
typedef float HalfF __attribute__((vector_size(kBytes / 2)));            // L / 2 floats

template <class V, class T>
DEMP_INLINE V load_bytes(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
DEMP_INLINE void store_bytes(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// Copies a vector's bytes past the caches, where the instruction set can; p is a multiple of `bytes`.
template <int bytes>
DEMP_INLINE void stream_bytes(void* p, const void* from) {
#if DEMP_ISA_LEVEL == 2
  if constexpr (bytes == 64) return _mm512_stream_si512((__m512i*)p, _mm512_loadu_si512(from));
#endif
#if DEMP_ISA_LEVEL >= 1
  if constexpr (bytes == 32) return _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)from));
#endif
#if defined(__SSE2__)
  if constexpr (bytes == 16) return _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)from));
#endif
  __builtin_memcpy(p, from, bytes);
}
DEMP_INLINE F splat(float x) { return F{} + x; }
DEMP_INLINE D splat(double x) { return D{} + x; }
DEMP_INLINE F select(I32 mask, F a, F b) { return (F)((mask & (I32)a) | (~mask & (I32)b)); }

// Not x <= 0, so that NaN is active; as an integer mask of the element's width.
#if DEMP_ISA_LEVEL == 1  // one comparison; GCC makes a comparison and a blend of the negation
DEMP_INLINE I32 active_lanes(F x) { return (I32)_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NLE_UQ); }
DEMP_INLINE I64 active_lanes(D x) { return (I64)_mm256_cmp_pd((__m256d)x, _mm256_setzero_pd(), _CMP_NLE_UQ); }
#else
DEMP_INLINE I32 active_lanes(F x) { return ~(I32)(x <= 0.0f); }
DEMP_INLINE I64 active_lanes(D x) { return ~(I64)(x <= 0.0); }
#endif
// For 16-bit floats, from the bits: positive, or NaN of either sign (above infinity without the sign).
DEMP_INLINE I16 active_lanes(I16 x, std::int16_t infinity) { return (I16)(x > 0) | (I16)((x & 0x7fff) > infinity); }

#if DEMP_ISA_LEVEL == 2
DEMP_INLINE F square_root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
#elif DEMP_ISA_LEVEL == 1
DEMP_INLINE F square_root(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
#elif defined(__SSE2__)
DEMP_INLINE F square_root(F x) { return (F)_mm_sqrt_ps((__m128)x); }
#else
DEMP_INLINE F square_root(F x) {
  for (int i = 0; i < L; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
#endif

// ---- masks ----------------------------------------------------------------------------------------------------
// AVX-512 has mask registers. Elsewhere a mask is an integer vector of -1 and 0, and its bits are gathered.

#if DEMP_ISA_LEVEL == 2

struct MaskF {
  typedef __mmask16 Mask;
  static constexpr int N = L;
  DEMP_INLINE Mask active(I32 x) { return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  DEMP_INLINE I32 keep(Mask m, I32 x) { return (I32)_mm512_maskz_mov_epi32(m, (__m512i)x); }
  DEMP_INLINE I32 choose(Mask m, I32 a, I32 b) { return (I32)_mm512_mask_mov_epi32((__m512i)b, m, (__m512i)a); }
  DEMP_INLINE I32 add(I32 count, Mask m) {
    return (I32)_mm512_mask_sub_epi32((__m512i)count, m, (__m512i)count, _mm512_set1_epi32(-1));
  }
};
struct MaskD {
  typedef __mmask8 Mask;
  static constexpr int N = L / 2;
  DEMP_INLINE Mask active(I64 x) { return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_NLE_UQ); }
  DEMP_INLINE I64 keep(Mask m, I64 x) { return (I64)_mm512_maskz_mov_epi64(m, (__m512i)x); }
  DEMP_INLINE I64 choose(Mask m, I64 a, I64 b) { return (I64)_mm512_mask_mov_epi64((__m512i)b, m, (__m512i)a); }
  DEMP_INLINE I64 add(I64 count, Mask m) {
    return (I64)_mm512_mask_sub_epi64((__m512i)count, m, (__m512i)count, _mm512_set1_epi64(-1));
  }
};
template <std::int16_t infinity>
struct Mask16 {
  typedef __mmask32 Mask;
  static constexpr int N = 2 * L;
  DEMP_INLINE Mask active(I16 x) {
    const __m512i magnitude = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(0x7fff));
    return _mm512_cmpgt_epi16_mask((__m512i)x, _mm512_setzero_si512()) |
           _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(infinity));
  }
  DEMP_INLINE I16 keep(Mask m, I16 x) { return (I16)_mm512_maskz_mov_epi16(m, (__m512i)x); }
  DEMP_INLINE I16 choose(Mask m, I16 a, I16 b) { return (I16)_mm512_mask_mov_epi16((__m512i)b, m, (__m512i)a); }
  DEMP_INLINE I16 add(I16 count, Mask m) {
    return (I16)_mm512_mask_sub_epi16((__m512i)count, m, (__m512i)count, _mm512_set1_epi16(-1));
  }
};
template <class M>
DEMP_INLINE std::uint64_t to_bits(typename M::Mask m) {
  return m;
}
template <class M>
DEMP_INLINE typename M::Mask from_bits(std::uint64_t bits) {
  return (typename M::Mask)bits;
}

#else

template <class V, class Lane>
struct VectorMask {
  typedef V Mask;
  typedef Lane Integer;
  static constexpr int N = kBytes / sizeof(Lane);
  DEMP_INLINE V keep(Mask m, V x) { return m & x; }
  DEMP_INLINE V choose(Mask m, V a, V b) { return (m & a) | (~m & b); }
  DEMP_INLINE V add(V count, Mask m) { return count - m; }
};
struct MaskF : VectorMask<I32, std::int32_t> {
  DEMP_INLINE Mask active(I32 x) { return active_lanes((F)x); }
};
struct MaskD : VectorMask<I64, std::int64_t> {
  DEMP_INLINE Mask active(I64 x) { return active_lanes((D)x); }
};
template <std::int16_t infinity>
struct Mask16 : VectorMask<I16, std::int16_t> {
  DEMP_INLINE I16 active(I16 x) { return active_lanes(x, infinity); }
};

#if DEMP_ISA_LEVEL == 1
DEMP_INLINE std::uint64_t gather_bits(I32 m) { return (unsigned)_mm256_movemask_ps((__m256)m); }
DEMP_INLINE std::uint64_t gather_bits(I64 m) { return (unsigned)_mm256_movemask_pd((__m256d)m); }
DEMP_INLINE std::uint64_t gather_bits(I16 m) {
  const __m256i bytes = _mm256_packs_epi16((__m256i)m, _mm256_setzero_si256());  // per 128-bit half: 8 bytes, 8 zeros
  const std::uint64_t bits = (unsigned)_mm256_movemask_epi8(bytes);
  return (bits & 0xff) | (bits >> 8 & 0xff00);
}
#elif defined(__SSE2__)
DEMP_INLINE std::uint64_t gather_bits(I32 m) { return (unsigned)_mm_movemask_ps((__m128)m); }
DEMP_INLINE std::uint64_t gather_bits(I64 m) { return (unsigned)_mm_movemask_pd((__m128d)m); }
DEMP_INLINE std::uint64_t gather_bits(I16 m) {
  return (unsigned)_mm_movemask_epi8(_mm_packs_epi16((__m128i)m, _mm_setzero_si128()));
}
#else
template <class V>
DEMP_INLINE std::uint64_t gather_bits(V m) {
  std::uint64_t bits = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(m[0])); ++i) bits |= std::uint64_t(m[i] & 1) << i;
  return bits;
}
#endif
template <class M>
DEMP_INLINE std::uint64_t to_bits(typename M::Mask m) {
  return gather_bits(m);
}
template <class M>
DEMP_INLINE typename M::Mask from_bits(std::uint64_t bits) {
  typename M::Mask lane_bit;
  for (int i = 0; i < M::N; ++i) lane_bit[i] = (typename M::Integer)(1ull << i);  // a constant once unrolled
  return (typename M::Mask)(((typename M::Mask{} + (typename M::Integer)bits) & lane_bit) != 0);
}

#endif

// ---- element types --------------------------------------------------------------------------------------------
// load_wide and store_wide handle part `i` of a packet in the type that arithmetic is done in.

template <class T>
struct Ops;

template <>
struct Ops<float> : MaskF {
  typedef I32 Vec;
  typedef std::int32_t Count;
  typedef F Wide;
  static constexpr int parts = 1, wide_lanes = L;
  DEMP_INLINE F load_wide(const float* p) { return load_bytes<F>(p); }
  DEMP_INLINE void store_wide(float* p, F v) { store_bytes(p, v); }
};

template <>
struct Ops<double> : MaskD {
  typedef I64 Vec;
  typedef std::int64_t Count;
  typedef D Wide;
  static constexpr int parts = 1, wide_lanes = L / 2;
  DEMP_INLINE D load_wide(const double* p) { return load_bytes<D>(p); }
  DEMP_INLINE void store_wide(double* p, D v) { store_bytes(p, v); }
};

DEMP_INLINE U32 widen_integers(const void* p) {
  return __builtin_convertvector(load_bytes<HalfU16>((const char*)p), U32);
}
DEMP_INLINE void store_narrow(void* p, U32 v) { store_bytes((char*)p, __builtin_convertvector(v, HalfU16)); }

template <>
struct Ops<bfloat16> : Mask16<0x7f80> {
  typedef I16 Vec;
  typedef std::int16_t Count;
  typedef F Wide;
  static constexpr int parts = 2, wide_lanes = L;
  DEMP_INLINE F load_wide(const bfloat16* p) { return (F)(widen_integers(p) << 16); }
  // To nearest, ties to even; NaN stays NaN (the rounding increment could carry it into infinity).
  DEMP_INLINE void store_wide(bfloat16* p, F v) {
    const U32 bits = (U32)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32 nan = (U32)(v != v);
    store_narrow(p, (nan & 0x7fc0u) | (~nan & rounded));
  }
};

template <>
struct Ops<float16> : Mask16<0x7c00> {
  typedef I16 Vec;
  typedef std::int16_t Count;
  typedef F Wide;
  static constexpr int parts = 2, wide_lanes = L;
#if DEMP_ISA_LEVEL == 2
  DEMP_INLINE F load_wide(const float16* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  DEMP_INLINE void store_wide(float16* p, F v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif DEMP_ISA_LEVEL == 1
  DEMP_INLINE F load_wide(const float16* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  DEMP_INLINE void store_wide(float16* p, F v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  // Exponents are rebiased by adding to the bits; subnormal halves become normal by a subtraction of floats.
  DEMP_INLINE F load_wide(const float16* p) {
    const U32 h = widen_integers(p), sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
    const U32 exponent = magnitude & (0x7c00u << 13);
    const U32 normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
    const U32 subnormal = (U32)((F)(magnitude + (113u << 23)) - (F)(U32{} + (113u << 23)));
    const U32 is_special = (U32)(exponent == (0x7c00u << 13)), is_subnormal = (U32)(exponent == 0u);
    return (F)(sign | (is_special & special) | (is_subnormal & subnormal) | (~(is_special | is_subnormal) & normal));
  }
  DEMP_INLINE void store_wide(float16* p, F v) {
    const U32 bits = (U32)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const U32 special = 0x7c00u + ((U32)(magnitude > 0x7f800000u) & 0x200u);
    const F shifted = (F)magnitude + 0.5f;  // its last mantissa bit is worth the smallest half
    const U32 subnormal = (U32)shifted - (126u << 23);
    const U32 normal = (magnitude + ((magnitude >> 13) & 1u) - (112u << 23) + 0xfffu) >> 13;
    const U32 is_special = (U32)(magnitude >= (143u << 23)), is_subnormal = (U32)(magnitude < (113u << 23));
    store_narrow(p, sign | (is_special & special) | (~is_special & ((is_subnormal & subnormal) | (~is_subnormal & normal))));
  }
#endif
};

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
