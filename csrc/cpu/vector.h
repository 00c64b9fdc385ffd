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

// How many lanes of a vector are meant: all, or the first few.
template <typename T>
struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
inline Vec<T> load(const T* from, Whole<T> = {}) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof(v));  // one unaligned load
  return v;
}
template <typename T>
inline Vec<T> load(const T* from, Part part) {
  Vec<T> v{};
  __builtin_memcpy(&v, from, part.count * sizeof(T));
  return v;
}

template <typename T>
inline void store(T* to, Vec<T> v, Whole<T> = {}) {
  __builtin_memcpy(to, &v, sizeof(v));
}
template <typename T>
inline void store(T* to, Vec<T> v, Part part) {
  __builtin_memcpy(to, &v, part.count * sizeof(T));
}

template <typename T>
inline Bits<T> load_groups(const Group<T>* from, Whole<T> = {}) {
  Bits<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <typename T>
inline Bits<T> load_groups(const Group<T>* from, Part part) {
  Bits<T> v{};
  __builtin_memcpy(&v, from, part.count * sizeof(Group<T>));
  return v;
}

template <typename T>
inline void store_groups(Group<T>* to, Bits<T> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// a b + c with one rounding, and the correctly rounded square root. Intrinsics, as what a compiler makes of `a * b + c` is
// its own choice. (__AVX512F__ is no sign of the set: some compilers know it only after they have read the whole file.)
#if defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 64
#define REPLEARN_INTRINSIC(name) _mm512_##name
#elif defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 32
#define REPLEARN_INTRINSIC(name) _mm256_##name
#endif
#if defined(REPLEARN_INTRINSIC)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return REPLEARN_INTRINSIC(fmadd_ps)(a, b, c); }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return REPLEARN_INTRINSIC(fmadd_pd)(a, b, c); }
inline Vec<float> square_root(Vec<float> v) { return REPLEARN_INTRINSIC(sqrt_ps)(v); }
inline Vec<double> square_root(Vec<double> v) { return REPLEARN_INTRINSIC(sqrt_pd)(v); }
#elif defined(__aarch64__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
inline Vec<float> square_root(Vec<float> v) { return vsqrtq_f32(v); }
inline Vec<double> square_root(Vec<double> v) { return vsqrtq_f64(v); }
#else
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }
template <typename V>
inline V multiply_add(V a, V b, V c) {
  for (size_t k = 0; k < sizeof(V) / sizeof(a[0]); ++k) c[k] = multiply_add(a[k], b[k], c[k]);
  return c;
}
template <typename V>
inline V square_root(V v) {
  for (size_t k = 0; k < sizeof(V) / sizeof(v[0]); ++k) v[k] = square_root(v[k]);
  return v;
}
#endif

// a > b ? a : b of each lane: `b` where one is NaN. One instruction on x86, which compilers do not see in the ternary.
#if defined(REPLEARN_INTRINSIC)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return REPLEARN_INTRINSIC(max_ps)(a, b); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return REPLEARN_INTRINSIC(max_pd)(a, b); }
#else
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}
#endif

// j, j + 1, ...: the columns that the lanes of a vector at column j stand for.
template <typename T>
inline Bits<T> lane_index(int64_t j) {
  Bits<T> index;
  for (int64_t k = 0; k < lanes<T>; ++k) index[k] = k;
  return index + static_cast<Group<T>>(j);
}

// Bit k tells whether lane k of a mask is set.
#if defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 64
inline uint32_t lane_bits(Bits<float> mask) { return _mm512_movepi32_mask((__m512i)mask); }
inline uint32_t lane_bits(Bits<double> mask) { return _mm512_movepi64_mask((__m512i)mask); }
#elif defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 32
inline uint32_t lane_bits(Bits<float> mask) { return _mm256_movemask_ps((__m256)mask); }
inline uint32_t lane_bits(Bits<double> mask) { return _mm256_movemask_pd((__m256d)mask); }
#else
template <typename B>
inline uint32_t lane_bits(B mask) {
  uint32_t bits = 0;
  for (size_t k = 0; k < sizeof(mask) / sizeof(mask[0]); ++k) bits |= (mask[k] & 1u) << k;
  return bits;
}
#endif

template <typename T>
inline bool any(Bits<T> mask) {
  return lane_bits(mask) != 0;
}

// Folded in halves: lane by lane, each step would wait for the last one.
template <typename T>
inline T horizontal_sum(Vec<T> v) {
  T part[lanes<T>];
  __builtin_memcpy(part, &v, sizeof(v));
#pragma GCC unroll 4
  for (int64_t half = lanes<T> / 2; half; half /= 2)
    for (int64_t k = 0; k < half; ++k) part[k] += part[k + half];
  return part[0];
}

template <typename T>
inline T horizontal_max(Vec<T> v) {
  T part[lanes<T>];
  __builtin_memcpy(part, &v, sizeof(v));
#pragma GCC unroll 4
  for (int64_t half = lanes<T> / 2; half; half /= 2)
    for (int64_t k = 0; k < half; ++k) part[k] = part[k] > part[k + half] ? part[k] : part[k + half];
  return part[0];
}

// exp's constants. ln 2 is split so that n * ln2_high is exact for every n that occurs. The polynomials are minimax in
// relative error over |r| <= ln 2 / 2, with the first two coefficients fixed at 1 so that exp(0) is exactly 1.
template <typename T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float lowest = -87.33f;  // ln of the smallest normal number, 1.18e-38
  static constexpr float log2e = 1.44269504f, log2e_rest = 1.92596303e-8f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // 1.5 * 2^23 + 127: adding it to a number rounds that to an integer, and leaves it, biased, in the low bits.
  static constexpr float round = 12583039.f;
  static constexpr int mantissa = 23, bias = 127, degree = 6;
  static constexpr float coefficients[] = {  // 3.1e-9
      1.f, 1.f, 0.499999934476f, 0.166665206294f, 0.0416683880925f, 0.0083687170912f, 0.00138145963918f};
};
template <>
struct Exp<double> {
  static constexpr double lowest = -708.39;
  static constexpr double log2e = 1.4426950408889634, log2e_rest = 2.0355273740931033e-17, ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723e-6;
  static constexpr double round = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr int mantissa = 52, bias = 1023, degree = 11;
  static constexpr double coefficients[] = {  // 3.6e-18
      1., 1., 0.5000000000000010628, 0.1666666666666641251, 0.041666666666530151985, 0.0083333333334944648964,
      0.0013888888943631740957, 0.00019841269506578636444, 0.000024801493097324563504, 2.7557586369775690259e-6,
      2.7630248910078385018e-7, 2.5000063798615127256e-8};
};

// exp(x) for x <= 0 (all that a difference from a maximum can be; right up to 88, fp64: 709), to one unit in the last
// place (tests/test_cpp.py): x = n ln 2 + r, exp(x) = 2^n exp(r). NaN stays NaN, and what would be below the smallest
// normal number is 0: arithmetic on subnormal numbers is a hundred times slower, and no sum that holds exp(0) sees them.
// Of R vectors in place, step by step for all: a processor's scheduler holds some hundred operations, which are five of
// these chains one after another, too few to hide each other's latency.
template <typename T, int R>
inline void exp(Vec<T> (&x)[R]) {
  using C = Exp<T>;
  const Vec<T> lowest = splat<T>(C::lowest);
  Bits<T> vanishes[R];
  Vec<T> shifted[R], r[R];
  for (int i = 0; i < R; ++i) {
    vanishes[i] = x[i] < lowest;
    x[i] = max(lowest, x[i]);
    shifted[i] = x[i] * C::log2e + C::round;
  }
  for (int i = 0; i < R; ++i) {
    const Vec<T> n = shifted[i] - C::round;
    r[i] = (x[i] - n * C::ln2_high) - n * C::ln2_low;
  }
  for (int i = 0; i < R; ++i) x[i] = splat<T>(C::coefficients[C::degree]);
#pragma GCC unroll 16
  for (int k = C::degree - 1; k >= 0; --k)
    for (int i = 0; i < R; ++i) x[i] = x[i] * r[i] + C::coefficients[k];
  for (int i = 0; i < R; ++i) {
    Bits<T> bits;
    __builtin_memcpy(&bits, &shifted[i], sizeof(bits));
    bits <<= C::mantissa;
    Vec<T> power;
    __builtin_memcpy(&power, &bits, sizeof(power));
    x[i] = vanishes[i] ? Vec<T>{} : x[i] * power;
  }
}
template <typename T>
inline Vec<T> exp(Vec<T> x) {
  Vec<T> one[] = {x};
  exp<T>(one);
  return one[0];
}

// log1p's constants: minimax polynomials of log1p(u) / u in u - 1/2, relative error over 0 <= u <= 1.
template <typename T>
struct Log1p;
template <>
struct Log1p<float> {
  static constexpr int degree = 9;
  static constexpr float coefficients[] = {  // 5.4e-9
      0.810930219913f, -0.288527101372f, 0.132609015777f, -0.067688189654f, 0.0366352341663f, -0.0205631824322f,
      0.0115776851824f, -0.00678801695194f, 0.00525027067807f, -0.00317605701843f};
};
template <>
struct Log1p<double> {
  static constexpr int degree = 20;
  static constexpr double coefficients[] = {  // 1.1e-17
      0.81093021621632876396, -0.28852709909932389665, 0.1326097537542037542, -0.067688643310964295617,
      0.036611854523044425134, -0.020548811919120714228, 0.01183379211549827359, -0.0069453949749855129362,
      0.0041361789694925788747, -0.0024918411947988624697, 0.0015153851053375096103, -0.00092885742792773235461,
      0.00057304460846778672227, -0.0003548204878310238112, 0.00022119170895766565693, -0.00014210002289999029629,
      0.000089333034068192713812, -0.000044828443252232563419, 0.000028278083585626543757, -0.000038362374451601245332,
      0.000024437973948580947113};
};

// log1p(u) for 0 <= u <= 1, to two units in the last place (tests/test_cpp.py), however small u is. Of R vectors in place.
template <typename T, int R>
inline void log1p(Vec<T> (&u)[R]) {
  using C = Log1p<T>;
  Vec<T> x[R], p[R];
  for (int i = 0; i < R; ++i) {
    x[i] = u[i] - T(0.5);
    p[i] = splat<T>(C::coefficients[C::degree]);
  }
#pragma GCC unroll 32
  for (int k = C::degree - 1; k >= 0; --k)
    for (int i = 0; i < R; ++i) p[i] = p[i] * x[i] + C::coefficients[k];
  for (int i = 0; i < R; ++i) u[i] *= p[i];
}
template <typename T>
inline Vec<T> log1p(Vec<T> u) {
  Vec<T> one[] = {u};
  log1p<T>(one);
  return one[0];
}
