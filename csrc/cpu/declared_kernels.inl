// The passes of a declared loss around what is printed of it: Loss<T> (declare/cpp_source.py), whose terms are totals and
// log-sum-exps over pairs. What they compute: declare/objective.py.

namespace {

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.40282346638528859812e+38) : T(-1.79769313486231570815e+308);
template <typename T>
constexpr T kNothing = -__builtin_inf();

using Terms = Loss<float>;  // of which terms there are, not of what type
constexpr int kTerms = Terms::kTerms;

constexpr int statistics_of(int term) { return Terms::kIsTotal[term] ? 1 : 2; }
constexpr int coefficients_of(int term) { return Terms::kHasSlope[term] ? (Terms::kIsTotal[term] ? 1 : 3) : 0; }
// The place of a term's first quantity in a table; of kTerms, how many there are.
constexpr int statistics_before(int term) { return term ? statistics_before(term - 1) + statistics_of(term - 1) : 0; }
constexpr int coefficients_before(int term) {
  return term ? coefficients_before(term - 1) + coefficients_of(term - 1) : 0;
}
constexpr bool all_totals(int term = 0) { return term == kTerms || (Terms::kIsTotal[term] && all_totals(term + 1)); }

// Which lanes are columns.
template <typename T>
inline Bits<T> columns_of(Whole<T>) {
  return ~Bits<T>{};
}
template <typename T>
inline Bits<T> columns_of(Part part) {
  return lane_index<T>(0) < Bits<T>{} + static_cast<Group<T>>(part.count);
}

// One row and a vector of columns; SeenFromColumns: with the values of row and columns exchanged.
template <bool SeenFromColumns, typename T, typename Count>
inline auto pairs_of(const Tile<T>& tile, DeclaredGiven<T> given, int64_t i, int64_t j, Count count) {
  Pairs<T, Terms::kRowValues, Terms::kColumnValues> pairs;
  pairs.s = load(tile.s + i * tile.stride + j, count);
  const Bits<T> lane = lane_index<T>(0);
  pairs.every = columns_of<T>(count);
  if (tile.diagonal) pairs.every &= lane != Bits<T>{} + static_cast<Group<T>>(tile.first_row + i - j);
  pairs.target = Bits<T>{};
  if (tile.target) {
    const int64_t column = tile.target[i] - tile.first_column - j;
    if (column >= 0 && column < lanes<T>) pairs.target = pairs.every & (lane == Bits<T>{} + static_cast<Group<T>>(column));
  }
  pairs.same = tile.row_group ? pairs.every & same_group<T>(tile.row_group[i], tile.column_group, j, count) : pairs.target;
  pairs.other = pairs.every & ~pairs.same;
  for (int k = 0; k < Terms::kRowValues; ++k)
    pairs.row[k] = SeenFromColumns ? load(given.columns[k] + j, count) : splat<T>(given.rows[k][i]);
  for (int k = 0; k < Terms::kColumnValues; ++k)
    pairs.column[k] = SeenFromColumns ? splat<T>(given.rows[k][i]) : load(given.columns[k] + j, count);
  if (Terms::kReadsGuide) pairs.guide = load(given.guide[i] + j, count);
  return pairs;
}

// The terms of R vectors of pairs. Of a log-sum-exp v, of which pairs that are not in it are at -inf.
template <typename T, int R>
struct Values {
  Vec<T> value[kTerms][R], slope[kTerms][R];
  Bits<T> over[kTerms][R];
};

template <bool Slopes, int R, bool SeenFromColumns = false, typename T, typename Count>
inline Values<T, R> values_of(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                              int64_t j, Count count) {
  Values<T, R> values;
  for (int r = 0; r < R; ++r) {
    Vec<T> rest[kTerms], slope[kTerms];
    Bits<T> over[kTerms];
    loss.template of<Slopes>(pairs_of<SeenFromColumns>(tile, given, first + r, j, count), rest, over, slope);
    for (int k = 0; k < kTerms; ++k) {
      values.value[k][r] = Terms::kIsTotal[k] ? select<T>(over[k], rest[k], Vec<T>{})
                                              : select<T>(over[k], rest[k] * loss.sign[k], splat<T>(kNothing<T>));
      values.over[k][r] = over[k];
      if (Slopes && Terms::kHasSlope[k]) values.slope[k][r] = slope[k];
    }
  }
  return values;
}

// The terms of the same pairs as the columns' tables take them: the rows' own, unless those are seen otherwise.
template <bool Slopes, bool Columns, int R, typename T, typename Count>
inline decltype(auto) seen_from_columns(const Values<T, R>& values, const Loss<T>& loss, const Tile<T>& tile,
                                        DeclaredGiven<T> given, int64_t first, int64_t j, Count count) {
  if constexpr (Columns && Terms::kHasSides)
    return values_of<Slopes, R, true>(loss, tile, given, first, j, count);
  else
    return (values);
}

template <typename T>
inline void add(T* to, Vec<T> v) {
  store(to, load(to) + v);
}

// -- statistics -------------------------------------------------------------------------------------------------------

// Totals and maxima, added to what the rows had; a row's sum of exponentials is brought to its new maximum.
template <bool Columns, int R, typename T>
inline void first_reading(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                          DeclaredTable<T> rows, DeclaredTable<T> partial) {
  Vec<T> folded[kTerms][R];
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r) folded[k][r] = splat<T>(Terms::kIsTotal[k] ? T(0) : kLowest<T>);
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Values<T, R> values = values_of<false, R>(loss, tile, given, first, j, count);
    const Values<T, R>& seen = seen_from_columns<false, Columns>(values, loss, tile, given, first, j, count);
    for (int k = 0; k < kTerms; ++k) {
      T* column = Columns ? partial[statistics_before(k)] + j : nullptr;
      Vec<T> of_column = Columns ? load(column) : Vec<T>{};
      for (int r = 0; r < R; ++r) {
        const Vec<T> v = values.value[k][r], of_pair = seen.value[k][r];
        folded[k][r] = Terms::kIsTotal[k] ? folded[k][r] + v : max(v, folded[k][r]);
        if (Columns) of_column = Terms::kIsTotal[k] ? of_column + of_pair : max(of_pair, of_column);
      }
      if (Columns) store(column, of_column);
    }
  });
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r) {
      T* const of_row = rows[statistics_before(k)] + first + r;
      if (Terms::kIsTotal[k]) {
        *of_row += horizontal_sum<T>(folded[k][r]);
      } else {
        const T before = *of_row, largest = horizontal_max<T>(folded[k][r]);
        *of_row = before > largest ? before : largest;
        rows[statistics_before(k) + 1][first + r] *= exp_of<T>((before - *of_row) * loss.steepness[k]);
      }
    }
}

// Sums of exponentials, against the maxima.
template <bool Columns, int R, typename T>
inline void second_reading(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                           DeclaredTable<T> rows, DeclaredTable<T> partial) {
  Vec<T> sums[kTerms][R] = {};
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Values<T, R> values = values_of<false, R>(loss, tile, given, first, j, count);
    const Values<T, R>& seen = seen_from_columns<false, Columns>(values, loss, tile, given, first, j, count);
    for (int k = 0; k < kTerms; ++k) {
      if (Terms::kIsTotal[k]) continue;
      const int place = statistics_before(k);
      Vec<T> e[R];
      for (int r = 0; r < R; ++r) e[r] = (values.value[k][r] - rows[place][first + r]) * loss.steepness[k];
      exp<T>(e);
      for (int r = 0; r < R; ++r) sums[k][r] += e[r];
      if (!Columns) continue;
      const Vec<T> top = load(partial[place] + j);
      for (int r = 0; r < R; ++r) e[r] = (seen.value[k][r] - top) * loss.steepness[k];
      exp<T>(e);
      Vec<T> sum = e[0];
      for (int r = 1; r < R; ++r) sum += e[r];
      add(partial[place + 1] + j, sum);
    }
  });
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r)
      if (!Terms::kIsTotal[k]) rows[statistics_before(k) + 1][first + r] += horizontal_sum<T>(sums[k][r]);
}

template <typename T>
inline void set_empty(DeclaredTable<T> partial, int64_t columns) {
  for (int k = 0; k < kTerms; ++k)
    for_vectors<T>(0, columns, [&](int64_t j, auto) {
      store(partial[statistics_before(k)] + j, splat<T>(Terms::kIsTotal[k] ? T(0) : kLowest<T>));
      if (!Terms::kIsTotal[k]) store(partial[statistics_before(k) + 1] + j, Vec<T>{});
    });
}

template <bool Columns, typename T>
inline void fold_tile(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, DeclaredTable<T> rows,
                      DeclaredTable<T> partial) {
  if (Columns) set_empty(partial, tile.columns);
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    first_reading<Columns, at_once.count>(loss, tile, given, i, rows, partial);
  });
  if (all_totals()) return;
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    second_reading<Columns, at_once.count>(loss, tile, given, i, rows, partial);
  });
}

template <typename T>
void fold(const Tile<T>& tile, DeclaredNumbers numbers, DeclaredGiven<T> given, DeclaredTable<T> rows,
          DeclaredTable<T> partial) {
  const Loss<T> loss(numbers);
  if (partial.data)
    fold_tile<true>(loss, tile, given, rows, partial);
  else
    fold_tile<false>(loss, tile, given, rows, partial);
}

template <typename T>
void merge(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, DeclaredNumbers numbers,
           DeclaredTable<T> columns) {
  const Loss<T> loss(numbers);
  const int64_t quantities = statistics_before(kTerms);
  for_vectors<T>(begin, end, [&](int64_t j, auto n) {
    for (int k = 0; k < kTerms; ++k) {
      const int place = statistics_before(k);
      Vec<T> value = load(columns[place] + j, n), sum = Terms::kIsTotal[k] ? Vec<T>{} : load(columns[place + 1] + j, n);
      for (int64_t p = 0; p < count; ++p) {
        const T* other = partials + (p * quantities + place) * padded + j;
        if (Terms::kIsTotal[k]) {
          value += load(other);
          continue;
        }
        const Vec<T> top = max(load(other), value);
        sum = sum * exp<T>((value - top) * loss.steepness[k]) +
              load(other + padded) * exp<T>((load(other) - top) * loss.steepness[k]);
        value = top;
      }
      store(columns[place] + j, value, n);
      if (!Terms::kIsTotal[k]) store(columns[place + 1] + j, sum, n);
    }
  });
}

// -- W ----------------------------------------------------------------------------------------------------------------

// What a slope is multiplied by: weight exp(v - max - log_sum), as (max, weight exp(-log_sum)); of totals the weight.
template <typename T>
void prepare(DeclaredTable<T> table, int64_t count, DeclaredTable<T> prepared) {
  for_vectors<T>(0, count, [&](int64_t j, auto n) {
    if (Terms::kOneSweep) return store(prepared[0] + j, load(table[statistics_before(kTerms)] + j, n));
    for (int k = 0; k < kTerms; ++k) {
      const int place = coefficients_before(k);
      if (!Terms::kHasSlope[k]) continue;
      store(prepared[place] + j, load(table[place] + j, n));
      if (!Terms::kIsTotal[k])
        store(prepared[place + 1] + j, load(table[place + 2] + j, n) * exp<T>(-load(table[place + 1] + j, n)));
    }
  });
}

template <bool Columns, bool Partial, int R, typename T>
inline void weights_rows(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first, T* out,
                         int64_t out_stride, DeclaredTable<T> rows, DeclaredTable<T> own, DeclaredTable<T> prepared,
                         DeclaredTable<T> partial) {
  Vec<T> sums[kTerms][R] = {};  // of totals, in one sweep
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Values<T, R> values = values_of<true, R>(loss, tile, given, first, j, count);
    const Values<T, R>& seen = seen_from_columns<true, Columns>(values, loss, tile, given, first, j, count);
    Vec<T> w[R] = {};
    for (int k = 0; k < kTerms; ++k) {
      const int place = Terms::kOneSweep ? 0 : coefficients_before(k);
      if (Terms::kOneSweep) {
        for (int r = 0; r < R; ++r) sums[k][r] += values.value[k][r];
        if (Partial)
          for (int r = 0; r < R; ++r) add(partial[k] + j, seen.value[k][r]);
      }
      if (!Terms::kHasSlope[k]) continue;
      Vec<T> share[R], of_column[R] = {};
      if (Terms::kIsTotal[k]) {
        for (int r = 0; r < R; ++r) share[r] = splat<T>(own[place][first + r]);
        if (Columns)
          for (int r = 0; r < R; ++r) of_column[r] = load(prepared[place] + j);
      } else {
        for (int r = 0; r < R; ++r) share[r] = (values.value[k][r] - own[place][first + r]) * loss.steepness[k];
        exp<T>(share);
        for (int r = 0; r < R; ++r) share[r] *= own[place + 1][first + r];
        if (Columns) {
          const Vec<T> top = load(prepared[place] + j), weight = load(prepared[place + 1] + j);
          for (int r = 0; r < R; ++r) of_column[r] = (seen.value[k][r] - top) * loss.steepness[k];
          exp<T>(of_column);
          for (int r = 0; r < R; ++r) of_column[r] *= weight;
        }
      }
      for (int r = 0; r < R; ++r) {
        if (Columns && !Terms::kHasSides) share[r] += of_column[r];
        w[r] += select<T>(values.over[k][r], share[r] * values.slope[k][r], Vec<T>{});
        if (Columns && Terms::kHasSides)
          w[r] += select<T>(seen.over[k][r], of_column[r] * seen.slope[k][r], Vec<T>{});
      }
    }
    for (int r = 0; r < R; ++r) store(out + (first + r) * out_stride + j, w[r], count);
  });
  if (!Terms::kOneSweep) return;
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r) rows[k][first + r] += horizontal_sum<T>(sums[k][r]);
}

template <bool Columns, bool Partial, typename T>
inline void weights_tile(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, T* out,
                         int64_t out_stride, DeclaredTable<T> rows, DeclaredTable<T> own, DeclaredTable<T> prepared,
                         DeclaredTable<T> partial) {
  if (Partial) set_empty(partial, tile.columns);
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    weights_rows<Columns, Partial, at_once.count>(loss, tile, given, i, out, out_stride, rows, own, prepared, partial);
  });
}

template <typename T>
void weights(const Tile<T>& tile, DeclaredNumbers numbers, DeclaredGiven<T> given, T* out, int64_t out_stride,
             DeclaredTable<T> rows, DeclaredTable<T> prepared, DeclaredTable<T> partial) {
  const Loss<T> loss(numbers);
  constexpr int kQuantities = Terms::kOneSweep ? 1 : coefficients_before(kTerms);
  T memory[(kQuantities ? kQuantities : 1) * kSlabRows];
  const DeclaredTable<T> own{memory, kSlabRows};
  prepare(rows, tile.rows, own);
  if (Terms::kOneSweep && partial.data)
    weights_tile<true, Terms::kOneSweep>(loss, tile, given, out, out_stride, rows, own, prepared, partial);
  else if (prepared.data)
    weights_tile<true, false>(loss, tile, given, out, out_stride, rows, own, prepared, partial);
  else
    weights_tile<false, false>(loss, tile, given, out, out_stride, rows, own, prepared, partial);
}

template <typename T>
constexpr replearn::DeclaredPasses<T> kPasses = {
    replearn::declared_layout<T>,
    Terms::kParameters,
    Terms::kRowValues,
    Terms::kColumnValues,
    statistics_before(kTerms) + Terms::kOneSweep,
    Terms::kOneSweep ? kTerms + 1 : coefficients_before(kTerms),
    Terms::kReadsGuide,
    Terms::kOneSweep,
    fold<T>,
    merge<T>,
    prepare<T>,
    weights<T>,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const void* replearn_declared_passes() {
  return &kPasses<REPLEARN_TYPE>;
}
