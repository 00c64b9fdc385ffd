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

// How far, in logits, maxima may lie apart for one exp to serve a row and its columns: exp(l - column max) is then
// exp(l - row max) exp(row max - column max), whose arguments carry a rounding of at most 8 * 2^-24 each.
template <typename T>
constexpr T kSharedRange = T(8);

// The smallest and the largest of some maxima. Of none, or of a NaN, nothing that passes for near.
template <typename T>
struct Range {
  T low, high;
  bool near(T steepness) const { return (high - low) * steepness <= kSharedRange<T>; }
};

template <typename T>
inline Range<T> range_of(const T* values, int64_t count, Range<T> range) {
  for (int64_t k = 0; k < count; ++k) {
    range.low = values[k] < range.low ? values[k] : range.low;
    range.high = values[k] > range.high ? values[k] : range.high;
  }
  return range;
}

enum class ColumnExp { none, own, shared };

// Rows [first, first + R): the sums of exp(steepness (v - max)) over each row, added to each column: there as an exp of
// its own, or as the row's times `factor`.
template <int R, ColumnExp Mode, typename T>
inline void fold_sum(const Tile<T>& tile, int64_t first, const T* row_max, T* row_sum, const T* factor, SumExp<T> columns) {
  Vec<T> sum[R] = {};
  const T* s = tile.s + first * tile.stride;
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Vec<T> column_max = Mode == ColumnExp::own ? load(columns.max + j) : Vec<T>{};
    Vec<T> column_sum = Mode == ColumnExp::none ? Vec<T>{} : load(columns.sum + j);
    for (int r = 0; r < R; ++r) {
      const Vec<T> v = load(s + r * tile.stride + j, count) * tile.sign;
      const Vec<T> e = only<T>(exp<T>((v - row_max[r]) * tile.steepness), count, 0);
      sum[r] += e;
      if (Mode == ColumnExp::shared) column_sum += e * factor[r];
      if (Mode == ColumnExp::own) column_sum += exp<T>((v - column_max) * tile.steepness);
    }
    if (Mode != ColumnExp::none) store(columns.sum + j, column_sum);
  });
  for (int r = 0; r < R; ++r) row_sum[r] += horizontal_sum<T>(sum[r]);
}

template <ColumnExp Mode, typename T>
inline void fold_sums(const Tile<T>& tile, SumExp<T> rows, T reference, SumExp<T> columns) {
  T factor[kRows] = {};
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows) {
    if (Mode == ColumnExp::shared)
      for (int r = 0; r < kRows; ++r) factor[r] = exp_of<T>((rows.max[i + r] - reference) * tile.steepness);
    fold_sum<kRows, Mode>(tile, i, rows.max + i, rows.sum + i, factor, columns);
  }
  for (; i < tile.rows; ++i) {
    if (Mode == ColumnExp::shared) factor[0] = exp_of<T>((rows.max[i] - reference) * tile.steepness);
    fold_sum<1, Mode>(tile, i, rows.max + i, rows.sum + i, factor, columns);
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
  if (!partial.max || tile.columns == 0) return fold_sums<ColumnExp::none>(tile, rows, T(0), partial);
  const T start = rows.max[0];
  const Range<T> range = range_of(rows.max, tile.rows, range_of(partial.max, tile.columns, {start, start}));
  if (!range.near(tile.steepness)) return fold_sums<ColumnExp::own>(tile, rows, T(0), partial);
  fold_sums<ColumnExp::shared>(tile, rows, range.high, partial);
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Vec<T> shift = exp<T>((range.high - load(partial.max + j)) * tile.steepness);
    store(partial.sum + j, load(partial.sum + j) * shift, count);
  });
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

// Columns [begin, begin + kWide) of W, a block whose shares of the columns fit the first cache beside the tile.
constexpr int64_t kWide = 256;

// Rows [first, first + R) of columns [begin, end) of W = e share_i + (column's e) share_j - offsets.
template <int R, ColumnExp Mode, typename T>
inline void form_weights(const Tile<T>& tile, int64_t first, int64_t begin, int64_t end, T* out, int64_t out_stride,
                         Coefficients<T> rows, T reference, Coefficients<T> columns, const T* column_share) {
  T share[R], factor[R];
  for (int r = 0; r < R; ++r) {
    share[r] = rows.weight[first + r] * exp_of<T>(-rows.log_sum[first + r]);
    factor[r] = Mode == ColumnExp::shared ? exp_of<T>((rows.max[first + r] - reference) * tile.steepness) : T(0);
  }
  for_vectors<T>(begin, end, [&](int64_t j, auto count) {
    Vec<T> max_j{}, share_j{}, offset_j{};
    if (Mode == ColumnExp::own) max_j = load(columns.max + j, count);
    if (Mode != ColumnExp::none) {
      share_j = load(column_share + (j - begin));
      offset_j = load(columns.offset + j, count);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t i = first + r;
      const Vec<T> v = load(tile.s + i * tile.stride + j, count) * tile.sign;
      const Vec<T> e = exp<T>((v - rows.max[i]) * tile.steepness);
      Vec<T> w = Mode == ColumnExp::shared ? e * (share_j * factor[r] + share[r]) : e * share[r];
      if (Mode == ColumnExp::own) w += exp<T>((v - max_j) * tile.steepness) * share_j;
      store(out + i * out_stride + j, w - (offset_j + rows.offset[i]), count);
    }
  });
}

// All rows of columns [begin, end), at most kWide of them.
template <ColumnExp Mode, typename T>
inline void all_weights(const Tile<T>& tile, int64_t begin, int64_t end, T* out, int64_t out_stride, Coefficients<T> rows,
                        T reference, Coefficients<T> columns) {
  T column_share[kWide + lanes<T>];
  if (Mode != ColumnExp::none)
    for_vectors<T>(begin, end, [&](int64_t j, auto count) {
      Vec<T> share = exp<T>(-load(columns.log_sum + j, count)) * load(columns.weight + j, count);
      if (Mode == ColumnExp::shared) share *= exp<T>((reference - load(columns.max + j, count)) * tile.steepness);
      store(column_share + (j - begin), share);
    });
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows)
    form_weights<kRows, Mode>(tile, i, begin, end, out, out_stride, rows, reference, columns, column_share);
  for (; i < tile.rows; ++i)
    form_weights<1, Mode>(tile, i, begin, end, out, out_stride, rows, reference, columns, column_share);
}

template <typename T>
void softmax_weights(const Tile<T>& tile, T* out, int64_t out_stride, Coefficients<T> rows, const T* positive_weight, Coefficients<T> columns) {
  for (int64_t begin = 0; tile.rows && begin < tile.columns; begin += kWide) {
    const int64_t end = begin + kWide < tile.columns ? begin + kWide : tile.columns;
    const T start = rows.max[0];
    if (!columns.max) {
      all_weights<ColumnExp::none>(tile, begin, end, out, out_stride, rows, start, columns);
      continue;
    }
    const Range<T> range =
        range_of(rows.max, tile.rows, range_of(columns.max + begin, end - begin, {start, start}));
    if (range.near(tile.steepness))
      all_weights<ColumnExp::shared>(tile, begin, end, out, out_stride, rows, range.high, columns);
    else
      all_weights<ColumnExp::own>(tile, begin, end, out, out_stride, rows, start, columns);
  }
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
