// Elementary functions on vectors. Coefficients are minimax fits made for this file (Lawson iteration); the errors
// stated were measured over every input that can occur (logarithm, sine, cosine: all 2^24) or a dense grid. They hold
// with fused multiply-add; without it (SSE2) they are up to twice as large.

namespace demp {
namespace DEMP_ISA {
namespace {

DEMP_INLINE F round_to_float(I32 x) { return __builtin_convertvector(x, F); }

// exp(x), 1.1 ulp. Above 88.4 infinity, below -87.7 zero; NaN stays NaN.
DEMP_INLINE F exp_lanes(F x) {
  x = select((I32)(x > 89.0f), splat(89.0f), x);
  x = select((I32)(x < -88.0f), splat(-88.0f), x);
  const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to x / ln 2 is in the low bits
  const F n = shifted - 12582912.0f;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = 1.38145930e-3f * r + 8.36871564e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  return p * (F)(((I32)shifted - 0x4b400000 + 127) << 23);
}

// s = 1 / (1 + exp(-x)) and s (1 - s), both from exp(-|x|): 1 - s alone would lose all digits where s is near 1.
DEMP_INLINE void sigmoid_lanes(F x, F& s, F& s_times_rest) {
  const F e = exp_lanes(-(F)((I32)x & 0x7fffffff)), inverse = 1.0f / (1.0f + e);
  s = select((I32)(x < 0.0f), e * inverse, inverse);
  s_times_rest = e * inverse * inverse;
}

// The standard normal distribution function and density: Phi(-t) = exp(-t^2 / 2) s p(s) with s = 1 / (1 + 0.35 t), t >= 0.
// Absolute error of both below 1e-7.
DEMP_INLINE void normal_lanes(F x, F& cdf, F& pdf) {
  const F t = (F)((I32)x & 0x7fffffff), e = exp_lanes(x * x * -0.5f), s = 1.0f / (1.0f + 0.35f * t);
  F p = -2.91469526e-2f * s + 0.143976495f;
  p = p * s + -0.255723774f;
  p = p * s + 0.159184471f;
  p = p * s + -2.31164992e-2f;
  p = p * s + 0.105510615f;
  p = p * s + 0.119832270f;
  p = p * s + 0.139861941f;
  p = p * s + 0.139621407f;
  const F tail = e * (s * p);
  cdf = select((I32)(x > 0.0f), 1.0f - tail, tail);
  pdf = e * 0.398942280f;
}

// sqrt(-2 ln(n 2^-24)) for n in [1, 2^24]: the logarithm is good to 1.5 ulp.
DEMP_INLINE F box_muller_radius(I32 n) {
  const I32 bits = (I32)round_to_float(n);
  const I32 exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const F z = (F)(bits - (exponent << 23)) - 1.0f;
  F q = -0.174689472f * z + 0.286147326f;
  q = q * z + -0.298360676f;
  q = q * z + 0.331410646f;
  q = q * z + -0.399241388f;
  q = q * z + 0.500035107f;
  q = q * z + -0.666679025f;
  q = q * z + 0.999999821f;
  q = q * z + -2.0f;
  return square_root(round_to_float(24 - exponent) * 1.38629436f + q * z);
}

// sine and cosine of 2 pi a 2^-32, for integers a whose low 8 bits are zero: 1.5 ulp.
DEMP_INLINE void sine_cosine_turns(I32 a, F& sine, F& cosine) {
  const I32 quadrant = (I32)((U32)a + 0x20000000u) >> 30;
  const F t = round_to_float((I32)((U32)a - ((U32)quadrant << 30))) * 2.3283064365386963e-10f;  // [-1/8, 1/8), exact
  const F u = t * t;
  F s = -75.3935623f * u + 81.5923538f;
  s = s * u + -41.3416634f;
  s = s * u + 6.28318548f;
  s = s * t;
  F c = -83.6659012f * u + 64.9232254f;
  c = c * u + -19.7391682f;
  c = c * u + 1.0f;
  const I32 swap = -(quadrant & 1);
  const I32 sine_sign = (quadrant & 2) << 30, cosine_sign = ((quadrant + 1) & 2) << 30;
  sine = (F)((I32)select(swap, c, s) ^ sine_sign);
  cosine = (F)((I32)select(swap, s, c) ^ cosine_sign);
}

// ---- activations and their derivatives ------------------------------------------------------------------------

constexpr double kTanhScale = 0.7978845608028654;  // sqrt(2 / pi)
constexpr double kTanhCubic = 0.044715;

// x where active, slope * x elsewhere; slope is 0 for relu, whose zero is a true zero even for infinite x.
template <Act act>
DEMP_INLINE F activate(F x, F slope) {
  if constexpr (act == Act::relu) return (F)(active_lanes(x) & (I32)x);
  if constexpr (act == Act::leaky_relu) return select(active_lanes(x), x, x * slope);
  if constexpr (act == Act::silu) return x / (1.0f + exp_lanes(-x));
  if constexpr (act == Act::gelu_tanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u)
    const F u = x * (float(2 * kTanhScale) + float(2 * kTanhScale * kTanhCubic) * (x * x));
    return x / (1.0f + exp_lanes(-u));
  }
  F cdf, pdf;
  normal_lanes(x, cdf, pdf);
  return x * cdf;
}

// act'(x) of the smooth activations.
template <Act act>
DEMP_INLINE F derivative(F x) {
  if constexpr (act == Act::silu) {
    F s, rest;
    sigmoid_lanes(x, s, rest);
    return s + x * rest;
  }
  if constexpr (act == Act::gelu_tanh) {
    const F square = x * x;
    F s, rest;
    sigmoid_lanes(x * (float(2 * kTanhScale) + float(2 * kTanhScale * kTanhCubic) * square), s, rest);
    return s + x * rest * (float(2 * kTanhScale) + float(6 * kTanhScale * kTanhCubic) * square);
  }
  F cdf, pdf;
  normal_lanes(x, cdf, pdf);
  return cdf + x * pdf;
}

// float64 goes through the C library, an element at a time.
template <Act act>
DEMP_INLINE D activate(D x, D slope) {
  if constexpr (act == Act::relu) return (D)(active_lanes(x) & (I64)x);
  if constexpr (act == Act::leaky_relu) {
    const I64 m = active_lanes(x);
    return (D)((m & (I64)x) | (~m & (I64)(x * slope)));
  }
  for (int i = 0; i < L / 2; ++i) {
    const double v = x[i];
    if constexpr (act == Act::silu) x[i] = v / (1.0 + ::exp(-v));
    if constexpr (act == Act::gelu) x[i] = v * (0.5 * ::erfc(v * -0.7071067811865476));
    if constexpr (act == Act::gelu_tanh) x[i] = v / (1.0 + ::exp(-2 * kTanhScale * v * (1.0 + kTanhCubic * v * v)));
  }
  return x;
}

template <Act act>
DEMP_INLINE D derivative(D x) {
  for (int i = 0; i < L / 2; ++i) {
    const double v = x[i];
    if constexpr (act == Act::silu) {
      const double s = 1.0 / (1.0 + ::exp(-v));
      x[i] = s * (1.0 + v * (1.0 - s));
    }
    if constexpr (act == Act::gelu) {
      x[i] = 0.5 * ::erfc(v * -0.7071067811865476) + v * (0.3989422804014327 * ::exp(-0.5 * v * v));
    }
    if constexpr (act == Act::gelu_tanh) {
      const double s = 1.0 / (1.0 + ::exp(-2 * kTanhScale * v * (1.0 + kTanhCubic * v * v)));
      x[i] = s + v * s * (1.0 - s) * (2 * kTanhScale * (1.0 + 3 * kTanhCubic * v * v));
    }
  }
  return x;
}

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
