// The softmax family's passes; included by tile_kernels.inl. What they compute: replearn_kernels/objectives/softmax.py.

using replearn::Coefficients;
using replearn::SoftmaxRoles;
using replearn::Statistics;

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.402823466e+38) : T(-1.7976931348623157e+308);

// How far, in logits, maxima may lie apart for one exp to serve a row and its columns: exp(l - column max) is then
// exp(l - row max) exp(row max - column max), whose arguments carry a rounding of at most 8 * 2^-24 each.
template <typename T>
constexpr T kSharedRange = T(8);

// Whether, and how, a pass serves the columns: with an exp of their own, or with the row's.
enum class ColumnExp { none, own, shared };

// The smallest and the largest of some maxima. Of a NaN or an infinity, nothing that passes for near.
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

// The column of row i's target within the tile, or -1.
template <typename T>
inline int64_t target_column(const Tile<T>& tile, int64_t i) {
  const int64_t column = tile.target ? tile.target[i] - tile.first_column : -1;
  return column < tile.columns ? column : -1;
}

// -- sweep 1 ----------------------------------------------------------------------------------------------------------

// Writes the lowest similarity, whose exp is 0, over the entries that count in no sum.
template <typename T>
void mask(const Tile<T>& tile, SoftmaxRoles roles) {
  const T lowest = -tile.sign * T(__builtin_inf());
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* s = tile.s + i * tile.stride;
    const int64_t target = target_column(tile, i);
    if (roles.groups_ignored && tile.row_group) {
      const T kept = target >= 0 ? s[target] : T(0);
      for_same_group(tile, i, [&](int64_t j, auto count, Bits<T> ignored) {
        store(s + j, ignored ? splat<T>(lowest) : load(s + j, count), count);
      });
      if (target >= 0) s[target] = kept;
    }
    if (tile.diagonal) s[tile.first_row + i] = lowest;
    if (roles.target_apart && target >= 0) s[target] = lowest;
  }
}

// The similarity of every row's target; where groups make the positives, the sums of theirs, for columns too.
template <typename T>
void pick_positives(const Tile<T>& tile, SoftmaxRoles roles, T* of_rows, T* of_columns) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* s = tile.s + i * tile.stride;
    const int64_t target = target_column(tile, i);
    if (target >= 0) of_rows[i] = s[target] * tile.sign;
    if (roles.groups_ignored || !tile.row_group) continue;
    Vec<T> sum{};
    for_same_group(tile, i, [&](int64_t j, auto count, Bits<T> positive) {
      if (tile.diagonal) positive &= lane_index<T>(j) != Bits<T>{} + static_cast<Group<T>>(tile.first_row + i);
      const Vec<T> v = only<T>(positive ? load(s + j, count) * tile.sign : Vec<T>{}, count, 0);
      sum += v;
      if (of_columns) store(of_columns + j, load(of_columns + j) + v);
    });
    of_rows[i] += horizontal_sum<T>(sum);
  }
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

template <int R, typename T>
inline void raise_rows(const Tile<T>& tile, int64_t first, Statistics<T> rows, T* column_max) {
  T tile_max[R];
  fold_max<R>(tile, first, tile_max, column_max);
  for (int r = 0; r < R; ++r) {
    const int64_t i = first + r;
    const T raised = tile_max[r] > rows.max[i] ? tile_max[r] : rows.max[i];
    rows.sum[i] *= exp_of<T>((rows.max[i] - raised) * tile.steepness);
    rows.max[i] = raised;
  }
}

// Rows [first, first + R): the sums of exp(steepness (v - max)) over each row, added to each column: there as an exp of
// its own, or as the row's times `factor`.
template <int R, ColumnExp Mode, typename T>
inline void fold_sum(
    const Tile<T>& tile, int64_t first, const T* row_max, T* row_sum, const T* factor, Statistics<T> columns) {
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
inline void fold_sums(const Tile<T>& tile, Statistics<T> rows, T reference, Statistics<T> columns) {
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
void softmax_statistics(const Tile<T>& tile, SoftmaxRoles roles, Statistics<T> rows, Statistics<T> partial) {
  for (int64_t j = 0; partial.max && j < replearn::padded_columns(tile.columns); ++j) {
    partial.max[j] = kLowest<T>;
    partial.sum[j] = 0;
    if (partial.positive) partial.positive[j] = 0;
  }
  pick_positives(tile, roles, rows.positive, partial.positive);
  mask(tile, roles);
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows) raise_rows<kRows>(tile, i, rows, partial.max);
  for (; i < tile.rows; ++i) raise_rows<1>(tile, i, rows, partial.max);
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
                   Statistics<T> columns) {
  const int64_t step = (columns.positive ? 3 : 2) * padded;
  for_vectors<T>(begin, end, [&](int64_t j, auto n) {
    const Vec<T> old_max = load(columns.max + j, n);
    Vec<T> largest = old_max;
    for (int64_t k = 0; k < count; ++k) largest = max(load(partials + k * step + j), largest);
    Vec<T> sum = load(columns.sum + j, n) * exp<T>((old_max - largest) * steepness);
    Vec<T> positive = columns.positive ? load(columns.positive + j, n) : Vec<T>{};
    for (int64_t k = 0; k < count; ++k) {
      const T* partial = partials + k * step + j;
      sum += load(partial + padded) * exp<T>((load(partial) - largest) * steepness);
      if (columns.positive) positive += load(partial + 2 * padded);
    }
    store(columns.max + j, largest, n);
    store(columns.sum + j, sum, n);
    if (columns.positive) store(columns.positive + j, positive, n);
  });
}

// -- sweep 2 ----------------------------------------------------------------------------------------------------------

// Columns of W formed at a time: a block whose shares of the columns fit the first cache beside the tile.
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
inline void all_weights(const Tile<T>& tile, int64_t begin, int64_t end, T* out, int64_t out_stride,
                        Coefficients<T> rows, T reference, Coefficients<T> columns) {
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

// The positives' part of W, after the rest.
template <typename T>
void subtract_positives(const Tile<T>& tile, SoftmaxRoles roles, T* out, int64_t out_stride, const T* of_rows,
                        const T* of_columns) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* w = out + i * out_stride;
    const int64_t target = target_column(tile, i);
    if (target >= 0) w[target] = roles.target_apart ? of_rows[i] : w[target] - of_rows[i];
    if (roles.groups_ignored || !tile.row_group) continue;
    for_same_group(tile, i, [&](int64_t j, auto count, Bits<T> positive) {
      const Vec<T> share = of_columns ? load(of_columns + j, count) + of_rows[i] : splat<T>(of_rows[i]);
      store(w + j, load(w + j, count) - (positive ? share : Vec<T>{}), count);
    });
    if (tile.diagonal) w[tile.first_row + i] = 0;
  }
}

template <typename T>
void softmax_weights(
    const Tile<T>& tile, SoftmaxRoles roles, T* out, int64_t out_stride, Coefficients<T> rows, Coefficients<T> columns) {
  mask(tile, roles);
  for (int64_t begin = 0; tile.rows && begin < tile.columns; begin += kWide) {
    const int64_t end = begin + kWide < tile.columns ? begin + kWide : tile.columns;
    const T start = rows.max[0];
    if (!columns.max) {
      all_weights<ColumnExp::none>(tile, begin, end, out, out_stride, rows, start, columns);
      continue;
    }
    const Range<T> range = range_of(rows.max, tile.rows, range_of(columns.max + begin, end - begin, {start, start}));
    if (range.near(tile.steepness))
      all_weights<ColumnExp::shared>(tile, begin, end, out, out_stride, rows, range.high, columns);
    else
      all_weights<ColumnExp::own>(tile, begin, end, out, out_stride, rows, start, columns);
  }
  subtract_positives(tile, roles, out, out_stride, rows.positive, columns.positive);
}
