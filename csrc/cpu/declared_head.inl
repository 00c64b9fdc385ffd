// What a printed loss is written in: vectors of similarities and masks of pairs.

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "declared.h"

namespace {

using replearn::DeclaredGiven;
using replearn::DeclaredNumbers;
using replearn::DeclaredTable;
using replearn::Group;
using replearn::kSlabRows;
using replearn::Tile;

#include "vector.h"
#include "vector_loops.inl"

// What is taken of a term's pairs.
enum Kind { kTotal, kLogSumExp, kLargest };

// A vector of similarities, those of the guide, which lanes are pairs, and of which kind, and the values of their rows
// and columns.
template <typename T, int RowValues, int ColumnValues>
struct Pairs {
  Vec<T> s, guide;
  Bits<T> every, target, same, other;
  Vec<T> row[RowValues + 1], column[ColumnValues + 1];
};

template <typename T>
inline Vec<T> select(Bits<T> condition, Vec<T> a, Vec<T> b) {
  return condition ? a : b;
}
template <typename T>
inline Vec<T> select(bool condition, Vec<T> a, Vec<T> b) {
  return condition ? a : b;
}

// -- functions of an author's, of vectors and of numbers that all pairs share; NaN of NaN --

template <typename T>
inline Vec<T> relu(Vec<T> x) {
  return x < Vec<T>{} ? Vec<T>{} : x;
}
inline double relu(double x) { return x < 0 ? 0 : x; }

template <typename T>
inline Vec<T> absolute(Vec<T> x) {
  return x < Vec<T>{} ? -x : x;
}
inline double absolute(double x) { return __builtin_fabs(x); }

// The smaller one, and the larger one; NaN if either is.
template <typename T>
inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return (a < b) | (a != a) ? a : b;
}
template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return (a > b) | (a != a) ? a : b;
}
inline double minimum(double a, double b) { return a < b || a != a ? a : b; }
inline double maximum(double a, double b) { return a > b || a != a ? a : b; }

// exp of any number: vector.h's is right up to `largest`.
template <typename T>
inline Vec<T> any_exp(Vec<T> x) {
  const Vec<T> largest = splat<T>(sizeof(T) == 4 ? T(88) : T(709)), rest = (x - largest) * T(0.5);
  const Vec<T> e = exp<T>(x > largest ? largest : x), half = exp<T>(rest > largest ? largest : rest);
  return x > largest ? e * half * half : e;
}
inline double any_exp(double x) { return __builtin_exp(x); }

template <typename T>
inline Vec<T> any_log(Vec<T> x) {
  for (int64_t k = 0; k < lanes<T>; ++k) x[k] = sizeof(T) == 4 ? T(__builtin_logf(float(x[k]))) : T(__builtin_log(x[k]));
  return x;
}
inline double any_log(double x) { return __builtin_log(x); }

template <typename T>
inline Vec<T> any_sqrt(Vec<T> x) {
  return square_root(x);
}
inline double any_sqrt(double x) { return __builtin_sqrt(x); }

template <typename T>
inline Vec<T> softplus(Vec<T> x) {
  return relu<T>(x) + log1p<T>(exp<T>(-absolute<T>(x)));
}
inline double softplus(double x) { return relu(x) + __builtin_log1p(__builtin_exp(-__builtin_fabs(x))); }

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> u = exp<T>(-absolute<T>(x));
  return (x > Vec<T>{} ? splat<T>(1) : u) / (u + T(1));
}
inline double sigmoid(double x) { return 1 / (1 + __builtin_exp(-x)); }

// |factor| as a log-sum-exp takes it, within what T holds: 0 of a factor that is 0 beside a normal number.
template <typename T>
inline T steepness_of(double factor) {
  const double least = sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308;
  const double most = sizeof(T) == 4 ? 3.4028234e+38 : 1.7976931348623157e+308;
  const double steepness = absolute(factor);
  return T(steepness < least ? 0 : steepness > most ? most : steepness);
}

inline double divide(double a, double b) { return a / b; }

}  // namespace
