// The passes of a declared loss around what is printed of it: Loss<T> (declare/cpp_source.py), whose terms are totals,
// log-sum-exps and largest values over pairs. What they compute: declare/objective.py.

namespace {

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.40282346638528859812e+38) : T(-1.79769313486231570815e+308);
template <typename T>
constexpr T kNothing = -__builtin_inf();

using Terms = Loss<float>;  // of which terms there are, not of what type
constexpr int kTerms = Terms::kTerms;

constexpr bool is_total(int term) { return Terms::kKind[term] == kTotal; }
constexpr bool is_largest(int term) { return Terms::kKind[term] == kLargest; }
// What a log-sum-exp averages over its pairs, weighted by its exponentials, and what is read of the largest pair.
constexpr int means_of(int term) { return Terms::kFirstMean[term + 1] - Terms::kFirstMean[term]; }
constexpr int kMeans = Terms::kFirstMean[kTerms];
constexpr int statistics_of(int term) { return is_total(term) ? 1 : 2 + means_of(term); }
constexpr int coefficients_of(int term) {
  return !Terms::kHasSlope[term] ? 0 : is_total(term) ? 1 : is_largest(term) ? 2 : 3;
}
// The place of a term's first quantity in a table; of kTerms, how many there are.
constexpr int statistics_before(int term) { return term ? statistics_before(term - 1) + statistics_of(term - 1) : 0; }
constexpr int coefficients_before(int term) {
  return term ? coefficients_before(term - 1) + coefficients_of(term - 1) : 0;
}
constexpr bool has_largest(int term = 0) { return term < kTerms && (is_largest(term) || has_largest(term + 1)); }
constexpr bool kHasLargest = has_largest();
constexpr bool has_exponentials(int term = 0) {
  return term < kTerms && (Terms::kKind[term] == kLogSumExp || has_exponentials(term + 1));
}

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

// The terms of R vectors of pairs. Of a log-sum-exp or largest v, of which pairs that are not in it are at -inf; what it
// averages or reads is 0 there.
template <typename T, int R>
struct Values {
  Vec<T> value[kTerms][R], slope[kTerms][R], mean[kMeans + 1][R];
  Bits<T> over[kTerms][R];
};

template <bool Slopes, int R, bool SeenFromColumns = false, typename T, typename Count>
inline Values<T, R> values_of(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                              int64_t j, Count count) {
  Values<T, R> values;
  for (int r = 0; r < R; ++r) {
    Vec<T> rest[kTerms], slope[kTerms], mean[kMeans + 1];
    Bits<T> over[kTerms];
    loss.template of<Slopes>(pairs_of<SeenFromColumns>(tile, given, first + r, j, count), rest, over, slope, mean);
    for (int k = 0; k < kTerms; ++k) {
      values.value[k][r] = is_total(k) ? select<T>(over[k], rest[k], Vec<T>{})
                                       : select<T>(over[k], rest[k] * loss.sign[k], splat<T>(kNothing<T>));
      values.over[k][r] = over[k];
      if (Slopes && Terms::kHasSlope[k]) values.slope[k][r] = slope[k];
      for (int m = Terms::kFirstMean[k]; !Slopes && m < Terms::kFirstMean[k + 1]; ++m)
        values.mean[m][r] = select<T>(over[k], mean[m], Vec<T>{});
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

// The numbers by which a largest knows the columns j, ... of a tile, and its row i; in a batch both are rows'. They are
// the last values that are given.
template <typename T, typename Count>
inline Vec<T> numbers_of_columns(DeclaredGiven<T> given, int64_t j, Count count) {
  return load(given.columns[Terms::kColumnValues - 1] + j, count);
}
template <typename T>
inline Vec<T> number_of_row(DeclaredGiven<T> given, int64_t i) {
  return splat<T>(given.rows[Terms::kRowValues - 1][i]);
}

// Whether (v, number) takes the place of (top, known): it is larger, NaN above all, or of two equal ones the lower number.
template <typename T>
inline Bits<T> is_larger(Vec<T> v, Vec<T> number, Vec<T> top, Vec<T> known) {
  const Bits<T> is_nan = v != v, was_nan = top != top;
  return (v > top) | (is_nan & ~was_nan) | (((v == top) | (is_nan & was_nan)) & (number < known));
}

// The largest of lanes into a row's statistics (max, number, what is read of the pair).
template <typename T, int R>
inline void keep_largest(DeclaredTable<T> rows, int64_t i, int term, Vec<T> top, Vec<T> number,
                         const Vec<T> (&read)[kMeans + 1][R], int r) {
  for (int64_t lane = 0; lane < lanes<T>; ++lane) {
    if (number[lane] < 0) continue;  // of no pair
    if (!is_larger<T>(top, number, splat<T>(rows[0][i]), splat<T>(rows[1][i]))[lane]) continue;
    rows[0][i] = top[lane], rows[1][i] = number[lane];
    for (int m = 0; m < means_of(term); ++m) rows[2 + m][i] = read[Terms::kFirstMean[term] + m][r][lane];
  }
}

// A row's pairs into statistics of the columns, (max, number, what is read of the pair).
template <typename T, int R>
inline void keep_larger(T* column, int64_t stride, const Values<T, R>& values, int term, int r, Vec<T> number) {
  const Vec<T> v = values.value[term][r], top = load(column), known = load(column + stride);
  const Bits<T> larger = is_larger<T>(v, number, top, known);
  store(column, select<T>(larger, v, top));
  store(column + stride, select<T>(larger, number, known));
  for (int m = 0; m < means_of(term); ++m) {
    T* const read = column + (2 + m) * stride;
    store(read, select<T>(larger, values.mean[Terms::kFirstMean[term] + m][r], load(read)));
  }
}

// -- statistics -------------------------------------------------------------------------------------------------------

// Totals and maxima, added to what the rows had; a row's sums of exponentials are brought to its new maximum.
template <bool Columns, int R, typename T>
inline void first_reading(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                          DeclaredTable<T> rows, DeclaredTable<T> partial) {
  Vec<T> folded[kTerms][R], number[kTerms][R], read[kMeans + 1][R] = {};
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r) folded[k][r] = splat<T>(is_total(k) ? T(0) : kLowest<T>), number[k][r] = splat<T>(-1);
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Values<T, R> values = values_of<false, R>(loss, tile, given, first, j, count);
    const Values<T, R>& seen = seen_from_columns<false, Columns>(values, loss, tile, given, first, j, count);
    for (int k = 0; k < kTerms; ++k) {
      T* column = Columns ? partial[statistics_before(k)] + j : nullptr;
      if constexpr (kHasLargest) {
        if (is_largest(k)) {
          const Vec<T> of_columns = numbers_of_columns(given, j, count);
          for (int r = 0; r < R; ++r) {
            const Bits<T> larger = is_larger<T>(values.value[k][r], of_columns, folded[k][r], number[k][r]);
            folded[k][r] = select<T>(larger, values.value[k][r], folded[k][r]);
            number[k][r] = select<T>(larger, of_columns, number[k][r]);
            for (int m = Terms::kFirstMean[k]; m < Terms::kFirstMean[k + 1]; ++m)
              read[m][r] = select<T>(larger, values.mean[m][r], read[m][r]);
            if (Columns) keep_larger<T>(column, partial.stride, seen, k, r, number_of_row(given, first + r));
          }
          continue;
        }
      }
      Vec<T> of_column = Columns ? load(column) : Vec<T>{};
      for (int r = 0; r < R; ++r) {
        const Vec<T> v = values.value[k][r], of_pair = seen.value[k][r];
        folded[k][r] = is_total(k) ? folded[k][r] + v : max(v, folded[k][r]);
        if (Columns) of_column = is_total(k) ? of_column + of_pair : max(of_pair, of_column);
      }
      if (Columns) store(column, of_column);
    }
  });
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R; ++r) {
      const int place = statistics_before(k);
      T* const of_row = rows[place] + first + r;
      if (is_total(k)) {
        *of_row += horizontal_sum<T>(folded[k][r]);
      } else if (is_largest(k)) {
        keep_largest<T>({rows[place], rows.stride}, first + r, k, folded[k][r], number[k][r], read, r);
      } else {
        const T before = *of_row, largest = horizontal_max<T>(folded[k][r]);
        *of_row = before > largest ? before : largest;
        const T factor = exp_of<T>((before - *of_row) * loss.steepness[k]);
        for (int q = 1; q < statistics_of(k); ++q) rows[place + q][first + r] *= factor;
      }
    }
}

// Sums of exponentials, against the maxima, and of what they weight.
template <bool Columns, int R, typename T>
inline void second_reading(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, int64_t first,
                           DeclaredTable<T> rows, DeclaredTable<T> partial) {
  Vec<T> sums[kTerms][R] = {}, weighted[kMeans + 1][R] = {};
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Values<T, R> values = values_of<false, R>(loss, tile, given, first, j, count);
    const Values<T, R>& seen = seen_from_columns<false, Columns>(values, loss, tile, given, first, j, count);
    for (int k = 0; k < kTerms; ++k) {
      if (Terms::kKind[k] != kLogSumExp) continue;
      const int place = statistics_before(k), first_mean = Terms::kFirstMean[k];
      Vec<T> e[R];
      for (int r = 0; r < R; ++r) e[r] = (values.value[k][r] - rows[place][first + r]) * loss.steepness[k];
      exp<T>(e);
      for (int r = 0; r < R; ++r) sums[k][r] += e[r];
      for (int m = first_mean; m < first_mean + means_of(k); ++m)
        for (int r = 0; r < R; ++r) weighted[m][r] += e[r] * values.mean[m][r];
      if (!Columns) continue;
      const Vec<T> top = load(partial[place] + j);
      for (int r = 0; r < R; ++r) e[r] = (seen.value[k][r] - top) * loss.steepness[k];
      exp<T>(e);
      Vec<T> sum = e[0];
      for (int r = 1; r < R; ++r) sum += e[r];
      add(partial[place + 1] + j, sum);
      for (int m = 0; m < means_of(k); ++m) {
        Vec<T> of_column = e[0] * seen.mean[first_mean + m][0];
        for (int r = 1; r < R; ++r) of_column += e[r] * seen.mean[first_mean + m][r];
        add(partial[place + 2 + m] + j, of_column);
      }
    }
  });
  for (int k = 0; k < kTerms; ++k)
    for (int r = 0; r < R && Terms::kKind[k] == kLogSumExp; ++r) {
      const int place = statistics_before(k);
      rows[place + 1][first + r] += horizontal_sum<T>(sums[k][r]);
      for (int m = 0; m < means_of(k); ++m)
        rows[place + 2 + m][first + r] += horizontal_sum<T>(weighted[Terms::kFirstMean[k] + m][r]);
    }
}

template <typename T>
inline void set_empty(DeclaredTable<T> partial, int64_t columns) {
  for (int k = 0; k < kTerms; ++k)
    for_vectors<T>(0, columns, [&](int64_t j, auto) {
      store(partial[statistics_before(k)] + j, splat<T>(is_total(k) ? T(0) : kLowest<T>));
      for (int q = 1; q < statistics_of(k); ++q)
        store(partial[statistics_before(k) + q] + j, splat<T>(q == 1 && is_largest(k) ? T(-1) : T(0)));
    });
}

template <bool Columns, typename T>
inline void fold_tile(const Loss<T>& loss, const Tile<T>& tile, DeclaredGiven<T> given, DeclaredTable<T> rows,
                      DeclaredTable<T> partial) {
  if (Columns) set_empty(partial, tile.columns);
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    first_reading<Columns, at_once.count>(loss, tile, given, i, rows, partial);
  });
  if (!has_exponentials()) return;
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
      Vec<T> value = load(columns[place] + j, n), sums[kMeans + 1];
      for (int q = 1; q < statistics_of(k); ++q) sums[q - 1] = load(columns[place + q] + j, n);
      for (int64_t p = 0; p < count; ++p) {
        const T* other = partials + (p * quantities + place) * padded + j;
        if (is_total(k)) {
          value += load(other);
          continue;
        }
        if (is_largest(k)) {
          const Bits<T> larger = is_larger<T>(load(other), load(other + padded), value, sums[0]);
          value = select<T>(larger, load(other), value);
          for (int q = 1; q < statistics_of(k); ++q) sums[q - 1] = select<T>(larger, load(other + q * padded), sums[q - 1]);
          continue;
        }
        const Vec<T> top = max(load(other), value);
        const Vec<T> own = exp<T>((value - top) * loss.steepness[k]);
        const Vec<T> theirs = exp<T>((load(other) - top) * loss.steepness[k]);
        for (int q = 1; q < statistics_of(k); ++q) sums[q - 1] = sums[q - 1] * own + load(other + q * padded) * theirs;
        value = top;
      }
      store(columns[place] + j, value, n);
      for (int q = 1; q < statistics_of(k); ++q) store(columns[place + q] + j, sums[q - 1], n);
    }
  });
}

// -- W ----------------------------------------------------------------------------------------------------------------

// What a slope is multiplied by: weight exp(v - max - log_sum), as (max, weight exp(-log_sum)); of totals the weight, of
// a largest (number, weight).
template <typename T>
void prepare(DeclaredTable<T> table, int64_t count, DeclaredTable<T> prepared) {
  for_vectors<T>(0, count, [&](int64_t j, auto n) {
    if (Terms::kOneSweep) return store(prepared[0] + j, load(table[statistics_before(kTerms)] + j, n));
    for (int k = 0; k < kTerms; ++k) {
      const int place = coefficients_before(k);
      if (!Terms::kHasSlope[k]) continue;
      store(prepared[place] + j, load(table[place] + j, n));
      if (is_largest(k))
        store(prepared[place + 1] + j, load(table[place + 1] + j, n));
      else if (!is_total(k))
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
      if (is_total(k)) {
        for (int r = 0; r < R; ++r) share[r] = splat<T>(own[place][first + r]);
        if (Columns)
          for (int r = 0; r < R; ++r) of_column[r] = load(prepared[place] + j);
      } else if (is_largest(k)) {
        if constexpr (kHasLargest) {
          const Vec<T> of_columns = numbers_of_columns(given, j, count);
          for (int r = 0; r < R; ++r) {
            share[r] = select<T>(of_columns == own[place][first + r], splat<T>(own[place + 1][first + r]), Vec<T>{});
            if constexpr (Columns)
              of_column[r] = select<T>(number_of_row(given, first + r) == load(prepared[place] + j),
                                       load(prepared[place + 1] + j), Vec<T>{});
          }
        }
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
