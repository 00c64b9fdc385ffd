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

// scale * s of the first `count` columns at `s`; beyond them `fill`.
template <typename T>
inline Vec<T> logits(const T* s, int64_t count, T scale, T fill) {
  Vec<T> l = load(s, count) * scale;
  for (int64_t k = count; k < lanes<T>; ++k) l[k] = fill;
  return l;
}

template <typename T>
inline int64_t at_most_lanes(int64_t left) {
  return left < lanes<T> ? left : lanes<T>;
}

// Rows [first, first + R): their largest logits, and the columns' raised by them.
template <int R, typename T>
inline void fold_max(const Tile<T>& tile, int64_t first, T* tile_max, T* column_max) {
  Vec<T> largest[R];
  for (int r = 0; r < R; ++r) largest[r] = splat<T>(kLowest<T>);
  const T* s = tile.s + first * tile.stride;
  for (int64_t j = 0; j < tile.columns; j += lanes<T>) {
    const int64_t count = at_most_lanes<T>(tile.columns - j);
    Vec<T> of_columns = column_max ? load(column_max + j) : Vec<T>{};
    for (int r = 0; r < R; ++r) {
      const Vec<T> l = logits(s + r * tile.stride + j, count, tile.scale, kLowest<T>);
      largest[r] = max(l, largest[r]);
      of_columns = max(l, of_columns);
    }
    if (column_max) store(column_max + j, of_columns);
  }
  for (int r = 0; r < R; ++r) tile_max[r] = horizontal_max<T>(largest[r]);
}

// Rows [first, first + R): the sums of exp(l - max) over each row, added to each column.
template <int R, typename T>
inline void fold_sum(const Tile<T>& tile, int64_t first, const T* row_max, T* row_sum, SumExp<T> columns) {
  Vec<T> sum[R] = {};
  const T* s = tile.s + first * tile.stride;
  for (int64_t j = 0; j < tile.columns; j += lanes<T>) {
    const int64_t count = at_most_lanes<T>(tile.columns - j);
    const Vec<T> of_columns = columns.max ? load(columns.max + j) : Vec<T>{};
    Vec<T> column_sum = columns.max ? load(columns.sum + j) : Vec<T>{};
    for (int r = 0; r < R; ++r) {
      const Vec<T> l = logits(s + r * tile.stride + j, count, tile.scale, T(-__builtin_inf()));
      sum[r] += exp<T>(l - row_max[r]);
      if (columns.max) column_sum += exp<T>(l - of_columns);
    }
    if (columns.max) store(columns.sum + j, column_sum);
  }
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
    rows.sum[i] *= exp_of<T>(rows.max[i] - raised);
    rows.max[i] = raised;
    if (!tile.target) continue;
    const int64_t column = tile.target[i] - tile.first_column;
    if (column >= 0 && column < tile.columns) positive[i] = tile.s[i * tile.stride + column] * tile.scale;
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
void softmax_merge(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, SumExp<T> columns) {
  for (int64_t j = begin; j < end; j += lanes<T>) {
    const int64_t n = at_most_lanes<T>(end - j);
    const Vec<T> old_max = load(columns.max + j, n);
    Vec<T> largest = old_max;
    for (int64_t k = 0; k < count; ++k) largest = max(load(partials + 2 * k * padded + j), largest);
    Vec<T> sum = load(columns.sum + j, n) * exp<T>(old_max - largest);
    for (int64_t k = 0; k < count; ++k) {
      const T* partial = partials + 2 * k * padded + j;
      sum += load(partial + padded) * exp<T>(load(partial) - largest);
    }
    store(columns.max + j, largest, n);
    store(columns.sum + j, sum, n);
  }
}

// Rows [first, first + R) of W; `Columns` compiles the column direction in.
template <int R, bool Columns, typename T>
inline void form_weights(const Tile<T>& tile, int64_t first, T* out, int64_t out_stride, Coefficients<T> rows, Coefficients<T> columns) {
  for (int64_t j = 0; j < tile.columns; j += lanes<T>) {
    const int64_t count = at_most_lanes<T>(tile.columns - j);
    Vec<T> max_j{}, log_sum_j{}, weight_j{}, offset_j{};
    if (Columns) {
      max_j = load(columns.max + j, count);
      log_sum_j = load(columns.log_sum + j, count);
      weight_j = load(columns.weight + j, count);
      offset_j = load(columns.offset + j, count);
    }
    for (int64_t i = first; i < first + R; ++i) {
      const Vec<T> l = load(tile.s + i * tile.stride + j, count) * tile.scale;
      Vec<T> w = exp<T>((l - rows.max[i]) - rows.log_sum[i]) * rows.weight[i] - rows.offset[i];
      if (Columns) w += exp<T>((l - max_j) - log_sum_j) * weight_j - offset_j;
      store(out + i * out_stride + j, w, count);
    }
  }
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
  for (int64_t k = 0; k < count; k += lanes<T>) {
    const int64_t n = at_most_lanes<T>(count - k);
    store(out + k, exp<T>(load(x + k, n)), n);
  }
}

template <typename T>
constexpr replearn::TileKernels<T> kernels() {
  return {softmax_statistics<T>, softmax_merge<T>, softmax_weights<T>, exp_array<T>};
}

}  // namespace
