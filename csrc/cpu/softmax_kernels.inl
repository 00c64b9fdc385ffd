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

// Similarities of 0 under a scale of 0, which cannot be the steepness: a masked similarity, -inf, would become NaN. One
// that is not finite becomes NaN, as in their product.
template <typename T>
void flatten(const Tile<T>& tile) {
  if (tile.scale != 0) return;
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* s = tile.s + i * tile.stride;
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) { store(s + j, load(s + j, count) * T(0), count); });
  }
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

// The similarity of every row's target, unless it is known; where groups make the positives, the sums of theirs, for
// columns too.
template <typename T>
void pick_positives(const Tile<T>& tile, SoftmaxRoles roles, T* of_rows, T* of_columns) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* s = tile.s + i * tile.stride;
    const int64_t target = target_column(tile, i);
    if (target >= 0 && !roles.target_apart) of_rows[i] = s[target] * tile.sign;
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
  for (int r = 0; r < R; ++r) tile_max[first + r] = horizontal_max<T>(largest[r]);
}

// The maxima of all rows, raised by the tile's, and their sums scaled down to match.
template <typename T>
inline void raise_rows(const Tile<T>& tile, Statistics<T> rows, T* column_max) {
  T tile_max[replearn::kSlabRows];
  for_rows(tile.rows, [&](int64_t i, auto at_once) { fold_max<at_once.count>(tile, i, tile_max, column_max); });
  for_vectors<T>(0, tile.rows, [&](int64_t k, auto count) {
    const Vec<T> old = load(rows.max + k, count), raised = max(load(tile_max + k, count), old);
    store(rows.sum + k, load(rows.sum + k, count) * exp<T>((old - raised) * tile.steepness), count);
    store(rows.max + k, raised, count);
  });
}

// Rows [first, first + R): the sums of exp(steepness (v - max)) over each row, added to each column's: of an exp of its
// own, or of the row's, which `shared` forms and whose factors 1 / shared(max) come later. Meanwhile the next slab, which
// the product has left in the last cache, is fetched into the second.
template <int R, ColumnExp Mode, typename T>
inline void fold_sum(const Tile<T>& tile, int64_t first, const T* row_max, T* total, const SharedExp<T>* shared,
                     Statistics<T> columns) {
  Vec<T> sum[R] = {};
  const T *s = tile.s + first * tile.stride, *next = rows_ahead<R>(tile, first, replearn::kSlabRows);
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Vec<T> column_max = Mode == ColumnExp::own ? load(columns.max + j) : Vec<T>{};
    Vec<T> column_sum = Mode == ColumnExp::none ? Vec<T>{} : load(columns.sum + j);
    Vec<T> e[R], of_columns[R];
    for (int r = 0; r < R; ++r) {
      if (next) __builtin_prefetch(next + r * tile.stride + j, 0, 2);
      e[r] = load(s + r * tile.stride + j, count) * tile.sign;
    }
    if constexpr (Mode == ColumnExp::own) {
      for (int r = 0; r < R; ++r) of_columns[r] = (e[r] - column_max) * tile.steepness;
      exp<T>(of_columns);
    }
    if constexpr (Mode == ColumnExp::shared) {
      (*shared)(e);
    } else {
      for (int r = 0; r < R; ++r) e[r] = (e[r] - row_max[first + r]) * tile.steepness;
      exp<T>(e);
    }
    for (int r = 0; r < R; ++r) {
      sum[r] += only<T>(e[r], count, 0);
      if (Mode != ColumnExp::none) column_sum += Mode == ColumnExp::shared ? e[r] : of_columns[r];
    }
    if (Mode != ColumnExp::none) store(columns.sum + j, column_sum);
  });
  for (int r = 0; r < R; ++r) total[first + r] = horizontal_sum<T>(sum[r]);
}

template <ColumnExp Mode, typename T>
inline void fold_sums(const Tile<T>& tile, Statistics<T> rows, const SharedExp<T>* shared, Statistics<T> columns) {
  T total[replearn::kSlabRows];
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    fold_sum<at_once.count, Mode>(tile, i, rows.max, total, shared, columns);
  });
  for_vectors<T>(0, tile.rows, [&](int64_t k, auto count) {
    Vec<T> of_tile = load(total + k, count);
    if (Mode == ColumnExp::shared) of_tile /= (*shared)(load(rows.max + k, count));
    store(rows.sum + k, load(rows.sum + k, count) + of_tile, count);
  });
}

template <typename T>
void softmax_statistics(const Tile<T>& tile, SoftmaxRoles roles, Statistics<T> rows, Statistics<T> partial) {
  for (int64_t j = 0; partial.max && j < replearn::padded_columns(tile.columns); ++j) {
    partial.max[j] = kLowest<T>;
    partial.sum[j] = 0;
    if (partial.positive) partial.positive[j] = 0;
  }
  flatten(tile);
  pick_positives(tile, roles, rows.positive, partial.positive);
  mask(tile, roles);
  raise_rows(tile, rows, partial.max);
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
                         Coefficients<T> rows, const T* row_share, const SharedExp<T>* shared, Coefficients<T> columns,
                         const T* column_share) {
  const T *s = tile.s + first * tile.stride, *next = rows_ahead<R>(tile, first, R);
  for_vectors<T>(begin, end, [&](int64_t j, auto count) {
    Vec<T> max_j{}, share_j{}, offset_j{};
    if (Mode == ColumnExp::own) max_j = load(columns.max + j, count);
    if (Mode != ColumnExp::none) {
      share_j = load(column_share + (j - begin));
      offset_j = load(columns.offset + j, count);
    }
    Vec<T> e[R], of_columns[R];
    for (int r = 0; r < R; ++r) {
      if (next) __builtin_prefetch(next + r * tile.stride + j);
      e[r] = load(s + r * tile.stride + j, count) * tile.sign;
    }
    if constexpr (Mode == ColumnExp::own) {
      for (int r = 0; r < R; ++r) of_columns[r] = (e[r] - max_j) * tile.steepness;
      exp<T>(of_columns);
    }
    if constexpr (Mode == ColumnExp::shared) {
      (*shared)(e);
    } else {
      for (int r = 0; r < R; ++r) e[r] = (e[r] - rows.max[first + r]) * tile.steepness;
      exp<T>(e);
    }
    for (int r = 0; r < R; ++r) {
      Vec<T> w = e[r] * (Mode == ColumnExp::shared ? share_j + row_share[first + r] : splat<T>(row_share[first + r]));
      if (Mode == ColumnExp::own) w += of_columns[r] * share_j;
      store(out + (first + r) * out_stride + j, w - (offset_j + rows.offset[first + r]), count);
    }
  });
}

// The share of rows or columns [0, count): their weight over their sum, and over shared(max) where that is the exp.
template <ColumnExp Mode, typename T>
inline void shares(int64_t count, Coefficients<T> of, const SharedExp<T>* shared, T* share) {
  for_vectors<T>(0, count, [&](int64_t k, auto n) {
    Vec<T> part = exp<T>(-load(of.log_sum + k, n)) * load(of.weight + k, n);
    if (Mode == ColumnExp::shared) part /= (*shared)(load(of.max + k, n));
    store(share + k, part);
  });
}

// All rows of columns [begin, end), at most kWide of them.
template <ColumnExp Mode, typename T>
inline void all_weights(const Tile<T>& tile, int64_t begin, int64_t end, T* out, int64_t out_stride,
                        Coefficients<T> rows, const SharedExp<T>* shared, Coefficients<T> columns) {
  T row_share[replearn::kSlabRows + lanes<T>], column_share[kWide + lanes<T>];
  shares<Mode>(tile.rows, rows, shared, row_share);
  if (Mode != ColumnExp::none) {
    const Coefficients<T> block{columns.max + begin, columns.log_sum + begin, columns.weight + begin, nullptr, nullptr};
    shares<Mode>(end - begin, block, shared, column_share);
  }
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    form_weights<at_once.count, Mode>(
        tile, i, begin, end, out, out_stride, rows, row_share, shared, columns, column_share);
  });
}

// W of the rows' targets, each with exps of its own: a target that takes all of the softmax leaves exactly 0.
template <typename T>
void weigh_targets(const Tile<T>& tile, SoftmaxRoles roles, Coefficients<T> rows, Coefficients<T> columns, T* weights) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t j = target_column(tile, i);
    if (j < 0) continue;
    weights[i] = 0;
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
  flatten(tile);
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
