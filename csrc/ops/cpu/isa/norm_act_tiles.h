// What norm_act does with a tile: a few vectors side by side, down a number of rows. The channel parameters of a tile
// stay in registers; so do its sums, which are float here and double wherever tiles are added up.
//
// A tile of planes lies within one plane, so its lanes have one channel's parameters. A tile of rows lies in the columns of
// a band (several rows side by side, if channels are few), so every lane has its own.

namespace demp {
namespace DEMP_ISA {
namespace {

template <class T>
struct Lanes {
  typedef Ops<T> O;
  typedef typename O::Wide V;
  typedef decltype(V{}[0] + 0) S;
  typedef Ops<S> M;  // masks and counters of wide vectors
  typedef typename M::Vec I;
  static constexpr int n = O::wide_lanes;
  static constexpr int small = n >= 8 ? 1 : 8 / n;  // vectors: their bits are whole bytes
  static constexpr int large = DEMP_ISA_LEVEL > 0 && small == 1 ? 4 : small;
};

template <class T>
struct Context {
  const T *x, *residual, *grad;
  T *y, *grad_x, *grad_residual;
  std::uint8_t* mask;
  const float* noise;
  std::int64_t noise_at;  // the element that noise[0] belongs to
  typename Lanes<T>::S slope, noise_std;
  Act act;
  bool stream;
};

template <class T, int W>
struct PerChannel {
  typename Lanes<T>::V mean[W], scale[W], bias[W], slope_back[W], offset_back[W];
};

template <class T, int W>
struct Sums {
  typename Lanes<T>::V a[W] = {}, b[W] = {};
  typename Lanes<T>::I count[W] = {};
};

// Where a tile lies: first element, its bits' first byte, rows and how far apart, and, for a tile that is cut off
// at the right, how many elements of it there are. The same again in the planes of other images, `jump` elements and
// `byte_jump` bytes from the end of one tile to the next. ahead: how far on to start fetching what is read; 0: do not.
struct Place {
  std::int64_t at, byte, rows, stride, elements;
  std::int64_t planes = 1, jump = 0, byte_jump = 0, ahead = 0;

  std::int64_t all_rows() const { return rows * planes; }
  void next_row(std::int64_t& row) {
    at += stride, byte += stride / 8;
    if (++row == rows) row = 0, at += jump, byte += byte_jump;
  }
};

// Starts fetching vector `w` of a row `ahead` elements on into the second-level cache, once a cache line.
template <class T>
DEMP_INLINE void fetch_vector(const T* row, std::int64_t ahead, int w) {
  constexpr int bytes = Lanes<T>::n * int(sizeof(T));
  if (w * bytes % 64 == 0) __builtin_prefetch((const char*)row + ahead * (std::int64_t)sizeof(T) + w * bytes, 0, 2);
}

// A tile's loop is a function of its own, called through a pointer, so that what walks over planes and rows is compiled
// once for all of them. Parameters and sums are copied to local arrays: through the references the compiler would have to
// read and write them again after every store.
template <class T, int W>
using Loop = void (*)(const Context<T>&, const Place&, const PerChannel<T, W>&, Sums<T, W>&);

template <class T>
struct Loops {
  Loop<T, Lanes<T>::large> wide;  // null where small tiles do
  Loop<T, Lanes<T>::small> narrow, cut;
  bool sums, counts;  // which of `Sums` are used
};

// Lanes below n; zero in the others.
DEMP_INLINE F first_lanes(F v, std::int64_t n) {
  I32 index;
  for (int i = 0; i < L; ++i) index[i] = i;
  return (F)((I32)v & (I32)(index < (std::int32_t)n));
}
DEMP_INLINE D first_lanes(D v, std::int64_t n) {
  I64 index;
  for (int i = 0; i < L / 2; ++i) index[i] = i;
  return (D)((I64)v & (I64)(index < n));
}

// The first n elements at p; zero in the other lanes. n <= 0 touches no memory.
template <class T>
DEMP_INLINE typename Lanes<T>::V load_first(const T* p, std::int64_t n) {
  constexpr std::int64_t lanes = Lanes<T>::n;
#if DEMP_ISA_LEVEL == 2
  const unsigned mask = n <= 0 ? 0 : n >= lanes ? (1u << lanes) - 1 : (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return (F)_mm512_maskz_loadu_ps((__mmask16)mask, p);
  if constexpr (sizeof(T) == 8) return (D)_mm512_maskz_loadu_pd((__mmask8)mask, p);
  T in[lanes];
  _mm256_storeu_si256((__m256i*)in, _mm256_maskz_loadu_epi16((__mmask16)mask, p));
#else
  T in[lanes] = {};
  if (n > 0) __builtin_memcpy(in, p, (std::size_t)(n < lanes ? n : lanes) * sizeof(T));
#endif
  return Ops<T>::load_wide(in);
}

template <class T>
DEMP_INLINE void store_first(T* p, typename Lanes<T>::V v, std::int64_t n) {
  constexpr std::int64_t lanes = Lanes<T>::n;
#if DEMP_ISA_LEVEL == 2
  const unsigned mask = n <= 0 ? 0 : n >= lanes ? (1u << lanes) - 1 : (1u << n) - 1;
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)mask, (__m512)v);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (__mmask8)mask, (__m512d)v);
  } else {
    T out[lanes];
    Ops<T>::store_wide(out, v);
    _mm256_mask_storeu_epi16(p, (__mmask16)mask, _mm256_loadu_si256((const __m256i*)out));
  }
#else
  T out[lanes];
  Ops<T>::store_wide(out, v);
  if (n > 0) __builtin_memcpy(p, out, (std::size_t)(n < lanes ? n : lanes) * sizeof(T));
#endif
}

template <bool cut, class T>
DEMP_INLINE typename Lanes<T>::V load(const T* p, std::int64_t n) {
  if constexpr (cut) return load_first(p, n);
  return Ops<T>::load_wide(p);
}

template <bool cut, class T>
DEMP_INLINE void store(T* p, typename Lanes<T>::V v, std::int64_t n) {
  if constexpr (cut) {
    store_first(p, v, n);
  } else {
    Ops<T>::store_wide(p, v);
  }
}

// The same for what is not read again here: past the caches, if they are too small for it.
template <bool cut, class T>
DEMP_INLINE void store_output(const Context<T>& c, T* p, typename Lanes<T>::V v, std::int64_t n) {
  if (!cut && c.stream) {
    T out[Lanes<T>::n];
    Ops<T>::store_wide(out, v);
    stream_bytes<sizeof out>(p, out);
  } else {
    store<cut>(p, v, n);
  }
}

// gelu, gelu_tanh and silu, and their derivatives. Calls, since they cost little beside the functions, and the loops, of
// which there are many, get short.
template <class V>
static __attribute__((noinline)) V smooth_value(V z, Act act) {
  if (act == Act::gelu) return activate<Act::gelu>(z, z);
  if (act == Act::gelu_tanh) return activate<Act::gelu_tanh>(z, z);
  return activate<Act::silu>(z, z);
}
template <class V>
static __attribute__((noinline)) V smooth_slope(V z, Act act) {
  if (act == Act::gelu) return derivative<Act::gelu>(z);
  if (act == Act::gelu_tanh) return derivative<Act::gelu_tanh>(z);
  return derivative<Act::silu>(z);
}

// What stands on a plain relu can be told at compile time; all other activations share their code.
template <bool relu, class T>
DEMP_INLINE typename Lanes<T>::V value(const Context<T>& c, typename Lanes<T>::V z, typename Lanes<T>::M::Mask live) {
  typedef typename Lanes<T>::I I;
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::M M;
  if (relu) return (V)M::keep(live, (I)z);
  if (c.act == Act::leaky_relu) return (V)M::choose(live, (I)z, (I)(z * c.slope));
  return smooth_value(z, c.act);
}

DEMP_INLINE void noise_lanes(const float* p, F& v) { v = load_bytes<F>(p); }
DEMP_INLINE void noise_lanes(const float* p, D& v) { v = __builtin_convertvector(load_bytes<HalfF>(p), D); }

// a: sum of x - mean, b: of (x - mean)^2; `mean` is a guess.
template <class T_>
struct StatisticsTile {
  typedef T_ T;
  static constexpr bool sums_up = true, counts = false, wide = true;

  template <bool cut, int W>
  static void run(const Context<T>& context, const Place& where, const PerChannel<T, W>& per_channel, Sums<T, W>& sums) {
    const Context<T> c = context;
    const PerChannel<T, W> p = per_channel;
    Place place = where;
    constexpr int n = Lanes<T>::n;
    typename Lanes<T>::V a[W] = {}, b[W] = {};
    for (std::int64_t left_rows = place.all_rows(), row = 0; left_rows > 0; --left_rows, place.next_row(row)) {
      if (place.ahead) {
        for (int w = 0; w < W; ++w) fetch_vector(c.x + place.at, place.ahead, w);
      }
      for (int w = 0; w < W; ++w) {
        const std::int64_t left = place.elements - w * n;
        typename Lanes<T>::V d = load<cut>(c.x + place.at + w * n, left) - p.mean[w];
        if (cut) d = first_lanes(d, left);
        a[w] += d;
        b[w] += d * d;
      }
    }
    for (int w = 0; w < W; ++w) sums.a[w] += a[w], sums.b[w] += b[w];
  }
};

// y, the active elements and, with a residual before relu or leaky_relu, their bits.
template <class T_, bool relu, bool added>
struct ForwardTile {
  typedef T_ T;
  static constexpr bool sums_up = false, counts = true, wide = relu;

  template <bool cut, int W>
  static void run(const Context<T>& context, const Place& where, const PerChannel<T, W>& per_channel, Sums<T, W>& sums) {
    const Context<T> c = context;
    const PerChannel<T, W> p = per_channel;
    Place place = where;
    typedef typename Lanes<T>::V V;
    typedef typename Lanes<T>::I I;
    typedef typename Lanes<T>::M M;
    constexpr int n = Lanes<T>::n;
    I count[W] = {};
    const bool keeps_bits = added && (relu || c.act == Act::leaky_relu);
    for (std::int64_t left_rows = place.all_rows(), row = 0; left_rows > 0; --left_rows, place.next_row(row)) {
      std::uint64_t bits = 0;
      if (added && place.ahead) {
        for (int w = 0; w < W; ++w) fetch_vector(c.residual + place.at, place.ahead, w);
      }
      for (int w = 0; w < W; ++w) {
        const std::int64_t left = place.elements - w * n, at = place.at + w * n;
        V z = (load<cut>(c.x + at, left) - p.mean[w]) * p.scale[w] + p.bias[w];
        if (added) z += load<cut>(c.residual + at, left);
        if (cut) z = first_lanes(z, left);
        const typename M::Mask live = M::active((I)z);
        count[w] = M::add(count[w], live);
        V y = value<relu>(c, z, live);
        if (c.noise) {
          V xi;
          noise_lanes(c.noise + (at - c.noise_at), xi);
          y += (V)M::keep(live, (I)(xi * c.noise_std));
        }
        if (keeps_bits) bits |= to_bits<M>(live) << (w * n);
        store_output<cut>(c, c.y + at, y, left);
      }
      if (keeps_bits) {
        __builtin_memcpy(c.mask + place.byte, &bits, cut ? std::size_t(place.elements + 7) / 8 : std::size_t(W * n / 8));
      }
    }
    for (int w = 0; w < W; ++w) sums.count[w] += count[w];
  }
};

// dz = grad * act'(z): z again from x, or its sign from the bits. `centred` is x - mean.
template <bool relu, bool added, bool cut, int W, class T>
DEMP_INLINE typename Lanes<T>::V activation_gradient(const Context<T>& c, const PerChannel<T, W>& p, int w,
                                                     std::int64_t at, std::int64_t left, std::uint64_t bits,
                                                     typename Lanes<T>::V centred) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::I I;
  typedef typename Lanes<T>::M M;
  const V grad = load<cut>(c.grad + at, left);
  const bool linear = relu || c.act == Act::leaky_relu;
  typename M::Mask live;
  if (added && linear) {
    live = from_bits<M>(bits >> (w * Lanes<T>::n));
  } else {
    V z = centred * p.scale[w] + p.bias[w];
    if (added) z += load<cut>(c.residual + at, left);
    if (!linear) return grad * smooth_slope(z, c.act);
    live = M::active((I)z);
  }
  if (relu) return (V)M::keep(live, (I)grad);
  return (V)M::choose(live, (I)grad, (I)(grad * c.slope));
}

DEMP_INLINE std::uint64_t load_bits(const std::uint8_t* p, std::int64_t bytes) {
  std::uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    if (i < bytes) bits |= std::uint64_t(p[i]) << (8 * i);
  }
  return bits;
}

// a: sum of dz, b: of dz * (x - mean). With a residual, dz is its gradient.
template <class T_, bool relu, bool added>
struct GradientSumsTile {
  typedef T_ T;
  static constexpr bool sums_up = true, counts = false, wide = relu;

  template <bool cut, int W>
  static void run(const Context<T>& context, const Place& where, const PerChannel<T, W>& per_channel, Sums<T, W>& sums) {
    const Context<T> c = context;
    const PerChannel<T, W> p = per_channel;
    Place place = where;
    typedef typename Lanes<T>::V V;
    constexpr int n = Lanes<T>::n;
    typename Lanes<T>::V a[W] = {}, b[W] = {};
    const bool from_mask = added && (relu || c.act == Act::leaky_relu);
    for (std::int64_t left_rows = place.all_rows(), row = 0; left_rows > 0; --left_rows, place.next_row(row)) {
      std::uint64_t bits = 0;
      if (from_mask && !cut) __builtin_memcpy(&bits, c.mask + place.byte, std::size_t(W * n / 8));
      if (from_mask && cut) bits = load_bits(c.mask + place.byte, (place.elements + 7) / 8);
      if (place.ahead) {
        for (int w = 0; w < W; ++w) {
          fetch_vector(c.x + place.at, place.ahead, w);
          fetch_vector(c.grad + place.at, place.ahead, w);
        }
      }
      for (int w = 0; w < W; ++w) {
        const std::int64_t left = place.elements - w * n, at = place.at + w * n;
        const V centred = load<cut>(c.x + at, left) - p.mean[w];
        V dz = activation_gradient<relu, added, cut, W>(c, p, w, at, left, bits, centred);
        if (cut) dz = first_lanes(dz, left);
        if (added) store<cut>(c.grad_residual + at, dz, left);
        a[w] += dz;
        b[w] += dz * centred;
      }
    }
    for (int w = 0; w < W; ++w) sums.a[w] += a[w], sums.b[w] += b[w];
  }
};

// grad_x, with dz from the residual's gradient if there is one (`relu` is then of no account).
template <class T_, bool relu, bool added>
struct GradientInputTile {
  typedef T_ T;
  static constexpr bool sums_up = false, counts = false, wide = relu;

  template <bool cut, int W>
  static void run(const Context<T>& context, const Place& where, const PerChannel<T, W>& per_channel, Sums<T, W>&) {
    const Context<T> c = context;
    const PerChannel<T, W> p = per_channel;
    Place place = where;
    typedef typename Lanes<T>::V V;
    constexpr int n = Lanes<T>::n;
    for (std::int64_t left_rows = place.all_rows(), row = 0; left_rows > 0; --left_rows, place.next_row(row)) {
      for (int w = 0; w < W; ++w) {
        const std::int64_t left = place.elements - w * n, at = place.at + w * n;
        const V centred = load<cut>(c.x + at, left) - p.mean[w];
        V dz;
        if constexpr (added) {
          dz = load<cut>(c.grad_residual + at, left);
        } else {
          dz = activation_gradient<relu, false, cut, W>(c, p, w, at, left, 0, centred);
        }
        store_output<cut>(c, c.grad_x + at, dz * p.scale[w] - (centred * p.slope_back[w] + p.offset_back[w]), left);
      }
    }
  }
};

template <class Tile, class T = typename Tile::T>
constexpr Loops<T> loops_of() {
  constexpr int large = Lanes<T>::large, small = Lanes<T>::small;
  if constexpr (Tile::wide && large > small) {
    return {Tile::template run<false, large>, Tile::template run<false, small>, Tile::template run<true, small>,
            Tile::sums_up, Tile::counts};
  } else {
    return {nullptr, Tile::template run<false, small>, Tile::template run<true, small>, Tile::sums_up, Tile::counts};
  }
}

}  // namespace
}  // namespace DEMP_ISA
}  // namespace demp
