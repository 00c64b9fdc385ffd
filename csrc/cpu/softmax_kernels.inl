// The softmax family's passes; included by tile_kernels.inl. What they compute: replearn_kernels/objectives/softmax.py.

using replearn::Coefficients;
using replearn::SoftmaxRoles;
using replearn::Statistics;

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.402823466e+38) : T(-1.7976931348623157e+308);

// Whether, and how, a pass serves the columns: with an exp of their own, or with the row's.
enum class ColumnExp { none, own, shared };

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

// Rows [first, first + R): the sums of exp(steepness (v - max)) over each row, added to each column's: of an exp of its
// own, or of the row's, which `shared` forms and whose factor 1 / shared(column's max) comes later.
template <int R, ColumnExp Mode, typename T>
inline void fold_sum(
    const Tile<T>& tile, int64_t first, Statistics<T> rows, const SharedExp<T>* shared, Statistics<T> columns) {
  Vec<T> sum[R] = {};
  const T *s = tile.s + first * tile.stride, *row_max = rows.max + first;
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Vec<T> column_max = Mode == ColumnExp::own ? load(columns.max + j) : Vec<T>{};
    Vec<T> column_sum = Mode == ColumnExp::none ? Vec<T>{} : load(columns.sum + j);
    for (int r = 0; r < R; ++r) {
      const Vec<T> v = load(s + r * tile.stride + j, count) * tile.sign;
      const Vec<T> e = Mode == ColumnExp::shared ? (*shared)(v) : exp<T>((v - row_max[r]) * tile.steepness);
      sum[r] += only<T>(e, count, 0);
      if (Mode == ColumnExp::shared) column_sum += e;
      if (Mode == ColumnExp::own) column_sum += exp<T>((v - column_max) * tile.steepness);
    }
    if (Mode != ColumnExp::none) store(columns.sum + j, column_sum);
  });
  for (int r = 0; r < R; ++r) {
    const T total = horizontal_sum<T>(sum[r]);
    rows.sum[first + r] += Mode == ColumnExp::shared ? total / shared->of(row_max[r]) : total;
  }
}

template <ColumnExp Mode, typename T>
inline void fold_sums(const Tile<T>& tile, Statistics<T> rows, const SharedExp<T>* shared, Statistics<T> columns) {
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows) fold_sum<kRows, Mode>(tile, i, rows, shared, columns);
  for (; i < tile.rows; ++i) fold_sum<1, Mode>(tile, i, rows, shared, columns);
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
  if (!partial.max || tile.columns == 0) return fold_sums<ColumnExp::none, T>(tile, rows, nullptr, partial);
  const Range<T> range = range_of(rows.max, tile.rows, range_of(partial.max, tile.columns, {rows.max[0], rows.max[0]}));
  if (!SharedExp<T>::serves(tile, range)) return fold_sums<ColumnExp::own, T>(tile, rows, nullptr, partial);
  const SharedExp<T> shared(range, tile.steepness);
  fold_sums<ColumnExp::shared>(tile, rows, &shared, partial);
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    store(partial.sum + j, load(partial.sum + j) / shared(load(partial.max + j)), count);
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
                         Coefficients<T> rows, const SharedExp<T>* shared, Coefficients<T> columns,
                         const T* column_share) {
  T share[R];
  for (int r = 0; r < R; ++r) {
    const T part = rows.weight[first + r] * exp_of<T>(-rows.log_sum[first + r]);
    share[r] = Mode == ColumnExp::shared ? part / shared->of(rows.max[first + r]) : part;
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
      Vec<T> w;
      if (Mode == ColumnExp::shared)
        w = (*shared)(v) * (share_j + share[r]);
      else
        w = exp<T>((v - rows.max[i]) * tile.steepness) * share[r];
      if (Mode == ColumnExp::own) w += exp<T>((v - max_j) * tile.steepness) * share_j;
      store(out + i * out_stride + j, w - (offset_j + rows.offset[i]), count);
    }
  });
}

// All rows of columns [begin, end), at most kWide of them.
template <ColumnExp Mode, typename T>
inline void all_weights(const Tile<T>& tile, int64_t begin, int64_t end, T* out, int64_t out_stride,
                        Coefficients<T> rows, const SharedExp<T>* shared, Coefficients<T> columns) {
  T column_share[kWide + lanes<T>];
  if (Mode != ColumnExp::none)
    for_vectors<T>(begin, end, [&](int64_t j, auto count) {
      Vec<T> share = exp<T>(-load(columns.log_sum + j, count)) * load(columns.weight + j, count);
      if (Mode == ColumnExp::shared) share /= (*shared)(load(columns.max + j, count));
      store(column_share + (j - begin), share);
    });
  int64_t i = 0;
  for (; i + kRows <= tile.rows; i += kRows)
    form_weights<kRows, Mode>(tile, i, begin, end, out, out_stride, rows, shared, columns, column_share);
  for (; i < tile.rows; ++i)
    form_weights<1, Mode>(tile, i, begin, end, out, out_stride, rows, shared, columns, column_share);
}

// W of the rows' targets, each with exps of its own: a target that takes all of the softmax leaves exactly 0.
template <typename T>
void weigh_targets(const Tile<T>& tile, SoftmaxRoles roles, Coefficients<T> rows, Coefficients<T> columns, T* weights) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t j = target_column(tile, i);
    if (j < 0) continue;
    weights[i] = rows.positive[i];
    if (roles.target_apart) continue;
    const T v = tile.s[i * tile.stride + j] * tile.sign;
    const auto part = [&](Coefficients<T> of, int64_t k) {
      return exp_of<T>((v - of.max[k]) * tile.steepness) * (exp_of<T>(-of.log_sum[k]) * of.weight[k]) - of.offset[k];
    };
    weights[i] = part(rows, i) + (columns.max ? part(columns, j) : T(0)) - rows.positive[i];
  }
}

// The positives' part of W, after the rest.
template <typename T>
void finish_positives(const Tile<T>& tile, SoftmaxRoles roles, T* out, int64_t out_stride, const T* of_targets,
                      const T* of_rows, const T* of_columns) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* w = out + i * out_stride;
    const int64_t target = target_column(tile, i);
    if (target >= 0) w[target] = of_targets[i];
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
  T of_targets[replearn::kSlabRows];
  weigh_targets(tile, roles, rows, columns, of_targets);
  for (int64_t begin = 0; tile.rows && begin < tile.columns; begin += kWide) {
    const int64_t end = begin + kWide < tile.columns ? begin + kWide : tile.columns;
    if (!columns.max) {
      all_weights<ColumnExp::none, T>(tile, begin, end, out, out_stride, rows, nullptr, columns);
      continue;
    }
    const Range<T> of_columns = range_of(columns.max + begin, end - begin, {rows.max[0], rows.max[0]});
    const Range<T> range = range_of(rows.max, tile.rows, of_columns);
    if (!SharedExp<T>::serves(tile, range)) {
      all_weights<ColumnExp::own, T>(tile, begin, end, out, out_stride, rows, nullptr, columns);
      continue;
    }
    const SharedExp<T> shared(range, tile.steepness);
    all_weights<ColumnExp::shared>(tile, begin, end, out, out_stride, rows, &shared, columns);
  }
  finish_positives(tile, roles, out, out_stride, of_targets, rows.positive, columns.positive);
}
