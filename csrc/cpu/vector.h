// Short vectors in the compiler's own extension (GCC and Clang): one source for every instruction set.
//
// Included once per instruction set, inside an anonymous namespace: see tile_kernels.inl. REPLEARN_VECTOR_BYTES
// is the width of a register there.

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(REPLEARN_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(REPLEARN_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(REPLEARN_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(REPLEARN_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Bits = typename VectorOf<T>::bits;

template <typename T>
constexpr int64_t lanes = REPLEARN_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// The first `count` lanes; the others are 0. A full vector is one unaligned load.
template <typename T>
inline Vec<T> load(const T* from, int64_t count = lanes<T>) {
  Vec<T> v{};
  if (count == lanes<T>)
    __builtin_memcpy(&v, from, sizeof(v));
  else
    __builtin_memcpy(&v, from, count * sizeof(T));
  return v;
}

template <typename T>
inline void store(T* to, Vec<T> v, int64_t count = lanes<T>) {
  if (count == lanes<T>)
    __builtin_memcpy(to, &v, sizeof(v));
  else
    __builtin_memcpy(to, &v, count * sizeof(T));
}

// The larger of each lane; `b` where `a` is NaN (a NaN reaches the sums instead, through exp).
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <typename T>
inline T horizontal_sum(Vec<T> v) {
  T total = 0;
  for (int64_t k = 0; k < lanes<T>; ++k) total += v[k];
  return total;
}

template <typename T>
inline T horizontal_max(Vec<T> v) {
  T largest = v[0];
  for (int64_t k = 1; k < lanes<T>; ++k) largest = v[k] > largest ? v[k] : largest;
  return largest;
}

// exp's constants. ln 2 is split so that n * ln2_high is exact for every n that occurs.
template <typename T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float lowest = -86.6f, highest = 88.72283f;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  static constexpr int32_t round_bits = 0x4B400000;  // its bits
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};
template <>
struct Exp<double> {
  static constexpr double lowest = -707.7, highest = 709.78271289338397;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t round_bits = 0x4338000000000000;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};

// exp(x) to 2 units in the last place (tests/test_cpp.py): x = n ln 2 + r, |r| <= ln 2 / 2, exp(r) by its Taylor
// polynomial, whose first term left out is below 1e-8 relative in fp32 and 1e-17 in fp64. NaN stays NaN; results
// below 2.5e-38 (fp64: 5e-308), twice the smallest normal number, are 0.
template <typename T>
inline Vec<T> exp(Vec<T> x) {
  using C = Exp<T>;
  const Vec<T> lowest = splat<T>(C::lowest), highest = splat<T>(C::highest);
  const auto vanishes = x < lowest, overflows = x > highest;
  x = vanishes ? lowest : x;
  x = overflows ? highest : x;
  const Vec<T> shifted = x * C::log2e + C::round;
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  // 1 + r (1 + r / 2 (1 + r / 3 (...))), with the coefficients 1 / k! folded at compile time.
  T coefficients[C::degree + 1] = {1};
  for (int k = 1; k <= C::degree; ++k) coefficients[k] = coefficients[k - 1] / k;
  Vec<T> p = splat<T>(coefficients[C::degree]);
  for (int k = C::degree - 1; k >= 0; --k) p = p * r + coefficients[k];
  // 2^(n-1), the other factor 2 going to p: n = 128 (1024) has no exponent of its own.
  Bits<T> bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  const Bits<T> power_bits = (bits - C::round_bits + (C::bias - 1)) << C::mantissa;
  Vec<T> power;
  __builtin_memcpy(&power, &power_bits, sizeof(power));
  const Vec<T> result = (p + p) * power;
  return vanishes ? Vec<T>{} : overflows ? splat<T>(__builtin_inf()) : result;
}
