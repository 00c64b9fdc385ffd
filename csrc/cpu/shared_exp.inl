// One exp for a row and its columns; included by tile_kernels.inl.
//
//     E(v) = 2^(log2(e) steepness v - c)        exp(l_ij - l_i) = E(v_ij) / E(v_i)        exp(l_ij - l_j) = E(v_ij) / E(v_j)
//
// with one whole number c for a tile. It serves wherever the logits of all rows and columns lie in one window, and costs
// no accuracy there: 2^-c is exact, and the exponent's fraction is formed by fused multiply-adds, from v itself, so that
// it carries no rounding of a difference. What lies below the window is 0.

// In powers of two: how far apart the maxima may lie. Their middle is put at 1: in fp32 they are at most 2^60, which leaves
// room for sums of 2^60 entries, and at least 2^-60, where entries count down to 2^-65 of the maximum.
template <typename T>
struct Window;
template <>
struct Window<float> {
  static constexpr float spread = 120;
};
template <>
struct Window<double> {
  static constexpr double spread = 1000;
};

// The smallest and the largest of some maxima.
template <typename T>
struct Range {
  T low, high;
};

template <typename T>
inline Range<T> range_of(const T* values, int64_t count, Range<T> range) {
  Vec<T> low = splat<T>(range.low), high = splat<T>(range.high);
  for_vectors<T>(0, count, [&](int64_t k, auto n) {
    // The lanes behind the last value are given one that changes nothing. Not `low` and `high` themselves: those lanes
    // hold what they have collected from the vectors before.
    const Vec<T> v = only<T>(load(values + k, n), n, range.low);
    low = v < low ? v : low;
    high = v > high ? v : high;
  });
  return {-horizontal_max<T>(-low), horizontal_max<T>(high)};
}

template <typename T>
class SharedExp {
  using C = Exp<T>;
  static constexpr T kRound = C::round - C::bias;  // rounds what it is added to
  // The power of two is one too small and the polynomial twice as large: no product is a subnormal number, each of which
  // would take a hundred times as long.
  static constexpr int kBias = C::bias - 1;
  static constexpr T kMostBits = T(1 << 20);
  static constexpr int64_t kLeastEntries = 1024;

 public:
  // Whether the window holds the tile's maxima. Not, of a NaN or an infinity; nor without a fused multiply-add, whose
  // single rounding is what keeps the fraction exact; nor of a tile too small to gain by it; nor if `lowest_` overflows.
  static bool serves(const Tile<T>& tile, Range<T> range) {
#if defined(REPLEARN_INTRINSIC) || defined(__aarch64__)
    const T bits = tile.steepness * C::log2e, largest = range.high * bits;
    return tile.rows * tile.columns >= kLeastEntries && bits >= T(1e-30) &&
           (range.high - range.low) * bits <= Window<T>::spread && largest <= kMostBits && largest >= -kMostBits;
#else
    return false;
#endif
  }

  SharedExp(Range<T> range, T steepness)
      : bits_(steepness * C::log2e), rest_(steepness * C::log2e_rest + __builtin_fma(steepness, C::log2e, -bits_)) {
    const T c = (range.high + range.low) * T(0.5) * bits_ + kRound - kRound;  // a whole number
    round_ = kRound + kBias - c;
    lowest_ = (c - kBias - T(0.25)) / bits_;  // whose power of two is exactly 0
  }

  // Of v up to the largest of the range, in place. Step by step for all R, which are independent: a processor's scheduler
  // holds some hundred operations, five chains of these one after another, and those hide half of each other's latency.
  template <int R>
  void operator()(Vec<T> (&v)[R]) const {
    const Vec<T> lowest = splat<T>(lowest_);
    Vec<T> shifted[R], f[R];
    for (int r = 0; r < R; ++r) {
      v[r] = max(lowest, v[r]);  // a NaN stays
      shifted[r] = multiply_add(v[r], splat<T>(bits_), splat<T>(round_));
    }
    for (int r = 0; r < R; ++r) f[r] = round_ - shifted[r];
    for (int r = 0; r < R; ++r) f[r] = multiply_add(v[r], splat<T>(bits_), f[r]);
    for (int r = 0; r < R; ++r) f[r] = multiply_add(v[r], splat<T>(rest_), f[r]);
    for (int r = 0; r < R; ++r) v[r] = splat<T>(kPowers.of[C::degree]);
#pragma GCC unroll 16
    for (int k = C::degree - 1; k >= 0; --k)
      for (int r = 0; r < R; ++r) v[r] = v[r] * f[r] + kPowers.of[k];
    for (int r = 0; r < R; ++r) {
      Bits<T> exponent;
      __builtin_memcpy(&exponent, &shifted[r], sizeof(exponent));
      exponent <<= C::mantissa;
      Vec<T> power;
      __builtin_memcpy(&power, &exponent, sizeof(power));
      v[r] *= power;
    }
  }
  Vec<T> operator()(Vec<T> v) const {
    Vec<T> one[] = {v};
    (*this)(one);
    return one[0];
  }

 private:
  // exp's polynomial, in f = r / ln 2, times 2.
  struct Powers {
    T of[C::degree + 1] = {};
    constexpr Powers() {
      double factor = 2;
      for (int k = 0; k <= C::degree; ++k, factor *= 0.69314718055994530942) of[k] = T(factor * C::coefficients[k]);
    }
  };
  static constexpr Powers kPowers{};

  T bits_, rest_;  // log2(e) steepness, and what its rounding left
  T round_, lowest_;
};
