// The tile passes, vectorised. Compiled once per instruction set: the including file sets REPLEARN_VECTOR_BYTES,
// switches the compiler to that set, and finds `kernels<T>()` here. Everything is in an anonymous namespace and
// nothing of the standard library is called, so that no wide instruction leaks into code that others link.

namespace {

#include "vector.h"

using replearn::Coefficients;
using replearn::SumExp;
using replearn::Tile;

constexpr int64_t kRows = 4;  // rows in flight: they share the loads of their columns' quantities

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.402823466e+38) : T(-1.7976931348623157e+308);

// Calls body(j, count) for the vectors of [begin, end): with a compile-time count for whole ones, so that their loads
// are single instructions, and with a run-time count for a last part.
template <typename T, typename F>
inline void for_vectors(int64_t begin, int64_t end, const F& body) {
  int64_t j = begin;
  for (; j + lanes<T> <= end; j += lanes<T>) body(j, Whole<T>{});
  if (j < end) body(j, Part{end - j});
}

// `v` with the lanes that are no columns set to `fill`.
template <typename T>
inline Vec<T> only(Vec<T> v, Whole<T>, T) {
  return v;
}
template <typename T>
inline Vec<T> only(Vec<T> v, Part part, T fill) {
  for (int64_t k = part.count; k < lanes<T>; ++k) v[k] = fill;
  return v;
}

// Rows [first, first + R): their largest similarities, and the columns' raised by them.
template <int R, typename T>
inline void fold_max(const Tile<T>& tile, int64_t first, T* tile_max, T* column_max) {
  Vec<T> largest[R];
  for (int r = 0; r < R; ++r) largest[r] = splat<T>(kLowest<T>);
  const T* s = tile.s + first * tile.stride;
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    Vec<T> of_columns = column_max ? load(column_max + j) : Vec<T>{};
    for (int r = 0; r < R; ++r) {
      const Vec<T> v = only<T>(load(s + r * tile.stride + j, count) * tile.sign, count, kLowest<T>);
      largest[r] = max(v, largest[r]);
      of_columns = max(v, of_columns);
    }
    if (column_max) store(column_max + j, of_columns);
  });
  for (int r = 0; r < R; ++r) tile_max[r] = horizontal_max<T>(largest[r]);
}

// Rows [first, first + R): the sums of exp(steepness (v - max)) over each row, added to each column.
template <int R, typename T>
inline void fold_sum(const Tile<T>& tile, int64_t first, const T* row_max, T* row_sum, SumExp<T> columns) {
  Vec<T> sum[R] = {};
  const T* s = tile.s + first * tile.stride;
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Vec<T> of_columns = columns.max ? load(columns.max + j) : Vec<T>{};
    Vec<T> column_sum = columns.max ? load(columns.sum + j) : Vec<T>{};
    for (int r = 0; r < R; ++r) {
      const Vec<T> v = load(s + r * tile.stride + j, count) * tile.sign;
      sum[r] += only<T>(exp<T>((v - row_max[r]) * tile.steepness), count, 0);
      if (columns.max) column_sum += exp<T>((v - of_columns) * tile.steepness);
    }
    if (columns.max) store(columns.sum + j, column_sum);
  });
  for (int r = 0; r < R; ++r) row_sum[r] += horizontal_sum<T>(sum[r]);
}

template <typename T>
inline T exp_of(T x) {
  return exp<T>(splat<T>(x))[0];
}

template <int R, typename T>
inline void raise_rows(const Tile<T>& tile, int64_t first, SumExp<T> rows, T* positive, T* column_max) {
  T tile_max[R];
  fold_max<R>(tile, first, tile_max, column_max);
  for (int r = 0; r < R; ++r) {
    const int64_t i = first + r;
    const T raised = tile_max[r] > rows.max[i] ? tile_max[r] : rows.max[i];
    rows.sum[i] *= exp_of<T>((rows.max[i] - raised) * tile.steepness);
    rows.max[i] = raised;
    if (!tile.target) continue;
    const int64_t column = tile.target[i] - tile.first_column;
    if (column >= 0 && column < tile.columns) positive[i] = tile.s[i * tile.stride + column] * tile.sign;
  }
}

template <typename T>
void softmax_statistics(const Tile<T>& tile, SumExp<T> rows, T* positive, SumExp<T> partial) {
  if (partial.max) {
    for (int64_t j = 0; j < replearn::padded_columns(tile.columns); ++j) {
      partial.max[j] = kLowest<T>;
      partial.sum[j] = 0;
    }
  }
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows) raise_rows<kRows>(tile, i, rows, positive, partial.max);
  for (; i < tile.rows; ++i) raise_rows<1>(tile, i, rows, positive, partial.max);
  i = 0;
  for (; i + kRows <= tile.rows; i += kRows) fold_sum<kRows>(tile, i, rows.max + i, rows.sum + i, partial);
  for (; i < tile.rows; ++i) fold_sum<1>(tile, i, rows.max + i, rows.sum + i, partial);
}

template <typename T>
void softmax_merge(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, T steepness,
                   SumExp<T> columns) {
  for_vectors<T>(begin, end, [&](int64_t j, auto n) {
    const Vec<T> old_max = load(columns.max + j, n);
    Vec<T> largest = old_max;
    for (int64_t k = 0; k < count; ++k) largest = max(load(partials + 2 * k * padded + j), largest);
    Vec<T> sum = load(columns.sum + j, n) * exp<T>((old_max - largest) * steepness);
    for (int64_t k = 0; k < count; ++k) {
      const T* partial = partials + 2 * k * padded + j;
      sum += load(partial + padded) * exp<T>((load(partial) - largest) * steepness);
    }
    store(columns.max + j, largest, n);
    store(columns.sum + j, sum, n);
  });
}

// Rows [first, first + R) of W; `Columns` compiles the column direction in.
template <int R, bool Columns, typename T>
inline void form_weights(const Tile<T>& tile, int64_t first, T* out, int64_t out_stride, Coefficients<T> rows, Coefficients<T> columns) {
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    Vec<T> max_j{}, log_sum_j{}, weight_j{}, offset_j{};
    if (Columns) {
      max_j = load(columns.max + j, count);
      log_sum_j = load(columns.log_sum + j, count);
      weight_j = load(columns.weight + j, count);
      offset_j = load(columns.offset + j, count);
    }
    for (int64_t i = first; i < first + R; ++i) {
      const Vec<T> v = load(tile.s + i * tile.stride + j, count) * tile.sign;
      Vec<T> w = exp<T>((v - rows.max[i]) * tile.steepness - rows.log_sum[i]) * rows.weight[i] - rows.offset[i];
      if (Columns) w += exp<T>((v - max_j) * tile.steepness - log_sum_j) * weight_j - offset_j;
      store(out + i * out_stride + j, w, count);
    }
  });
}

template <bool Columns, typename T>
void all_weights(const Tile<T>& tile, T* out, int64_t out_stride, Coefficients<T> rows, Coefficients<T> columns) {
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows) form_weights<kRows, Columns>(tile, i, out, out_stride, rows, columns);
  for (; i < tile.rows; ++i) form_weights<1, Columns>(tile, i, out, out_stride, rows, columns);
}

template <typename T>
void softmax_weights(const Tile<T>& tile, T* out, int64_t out_stride, Coefficients<T> rows, const T* positive_weight, Coefficients<T> columns) {
  if (columns.max)
    all_weights<true>(tile, out, out_stride, rows, columns);
  else
    all_weights<false>(tile, out, out_stride, rows, columns);
  if (!tile.target) return;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t column = tile.target[i] - tile.first_column;
    if (column >= 0 && column < tile.columns) out[i * out_stride + column] -= positive_weight[i];
  }
}

template <typename T>
void exp_array(const T* x, T* out, int64_t count) {
  for_vectors<T>(0, count, [&](int64_t k, auto n) { store(out + k, exp<T>(load(x + k, n)), n); });
}

template <typename T>
constexpr replearn::TileKernels<T> kernels() {
  return {softmax_statistics<T>, softmax_merge<T>, softmax_weights<T>, exp_array<T>};
}

}  // namespace
