// The hardest pairs; included by tile_kernels.inl. What is found: replearn_kernels/objectives/hardest.py.

using replearn::HardestPairs;

// Whether `value` beats the kept one; of equal ones the kept, earlier one stays.
template <typename T>
inline void keep_larger(T value, T number, T& kept, T& kept_number) {
  if (value > kept) kept = value, kept_number = number;
}

// The same of the largest lane, of equal ones that with the lowest number; a number below 0 is none's.
template <typename T>
inline void keep_largest_lane(Vec<T> value, Vec<T> number, T& kept, T& kept_number) {
  const T largest = horizontal_max<T>(value);
  T first = -1;
  for (int64_t k = 0; k < lanes<T>; ++k)
    if (value[k] == largest && number[k] >= 0 && (first < 0 || number[k] < first)) first = number[k];
  if (first >= 0) keep_larger(largest, first, kept, kept_number);
}

// Rows against columns of a tile of v: the largest v of another group, the smallest of the same, for rows and, in
// `partial`, for columns. `numbers` are the columns'.
template <typename T>
void hardest_statistics(const Tile<T>& tile, const T* numbers, HardestPairs<T> rows, HardestPairs<T> partial) {
  for (int64_t j = 0; partial.negative && j < replearn::padded_columns(tile.columns); ++j) {
    partial.negative[j] = kLowest<T>;
    partial.positive[j] = -kLowest<T>;
    partial.negative_number[j] = partial.positive_number[j] = -1;
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* s = tile.s + i * tile.stride;
    const T own = rows.number[i];
    Vec<T> best = splat<T>(kLowest<T>), best_number = splat<T>(T(-1));
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
      const Bits<T> same = same_group<T>(tile.row_group[i], tile.column_group, j, count);
      const Vec<T> v = only<T>(same ? splat<T>(kLowest<T>) : load(s + j, count), count, kLowest<T>);
      const auto better = v > best;
      best = better ? v : best;
      best_number = better ? load(numbers + j, count) : best_number;
      if (!partial.negative) return;
      const Vec<T> kept = load(partial.negative + j);
      const auto raised = v > kept;
      store(partial.negative + j, raised ? v : kept);
      store(partial.negative_number + j, raised ? splat<T>(own) : load(partial.negative_number + j));
    });
    keep_largest_lane(best, best_number, rows.negative[i], rows.negative_number[i]);
    for_same_group(tile, i, [&](int64_t j, auto count, Bits<T> same) {
      for (int64_t k = 0; k < lanes<T> && j + k < tile.columns; ++k) {
        if (!same[k] || (tile.diagonal && j + k == tile.first_row + i)) continue;
        if (s[j + k] < rows.positive[i]) rows.positive[i] = s[j + k], rows.positive_number[i] = numbers[j + k];
        if (partial.negative && s[j + k] < partial.positive[j + k])
          partial.positive[j + k] = s[j + k], partial.positive_number[j + k] = own;
      }
    });
  }
}

// Folds `count` partials of columns [begin, end), four arrays of `padded` each, into the columns', in order.
template <typename T>
void hardest_merge(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, HardestPairs<T> columns) {
  for (int64_t p = 0; p < count; ++p) {
    const T* partial = partials + p * 4 * padded;
    for (int64_t j = begin; j < end; ++j) {
      keep_larger(partial[j], partial[padded + j], columns.negative[j], columns.negative_number[j]);
      const T positive = partial[2 * padded + j];
      if (positive < columns.positive[j])
        columns.positive[j] = positive, columns.positive_number[j] = partial[3 * padded + j];
    }
  }
}
