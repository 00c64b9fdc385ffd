// The nearest negative beyond every positive; included by tile_kernels.inl. What is found:
// replearn_kernels/objectives/semi_hard.py.

using replearn::BeyondPositives;

// Thresholds that are compared with a vector of negatives in one reading. Up to kFewThresholds in all, that is faster
// than a search for each negative.
constexpr int64_t kBeyond = 8;

// What is not below any threshold, nor farther than anything.
template <typename T>
constexpr T kNoNegative = T(__builtin_inf());

// A running largest value of each lane, and its number; of equals the first.
template <typename T>
struct Largest {
  Vec<T> value, number;

  void take(Vec<T> v, Vec<T> of) {
    const auto wins = v > value;
    value = wins ? v : value;
    number = wins ? of : number;
  }
};

// The same against kBeyond thresholds of an anchor in every lane.
template <typename T>
struct NearestBeyond {
  Vec<T> threshold[kBeyond];
  Largest<T> nearest[kBeyond];

  void take(Vec<T> v, Vec<T> of) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < kBeyond; ++k) nearest[k].take(v < threshold[k] ? v : splat<T>(kLowest<T>), of);
  }
};

// v of row i's negatives, kNoNegative for others.
template <typename T, typename Count>
inline Vec<T> negatives(const Tile<T>& tile, int64_t i, int64_t j, Count n) {
  const Bits<T> same = same_group<T>(tile.row_group[i], tile.column_group, j, n);
  return only<T>(same ? splat<T>(kNoNegative<T>) : load(tile.s + i * tile.stride + j, n), n, kNoNegative<T>);
}

// The same for one anchor of many thresholds: a negative counts for all above it, which follow each other, and only the
// nearest of each gap between two thresholds is kept.
template <typename T>
struct BeyondSearch {
  int64_t first = 0, most;  // thresholds from `first` on descend; those before it are none
  T *thresholds, *value, *number;

  // `scratch` has room for 3 most + 2.
  BeyondSearch(const BeyondPositives<T>& of, int64_t anchor, T* scratch)
      : most(of.most), thresholds(scratch), value(scratch + most), number(value + most + 1) {
    for (int64_t k = 0; k < most; ++k) {
      thresholds[k] = of.threshold[k * of.stride + anchor];
      if (thresholds[k] == -kNoNegative<T>) first = k + 1;
    }
    for (int64_t k = 0; k <= most; ++k) value[k] = kLowest<T>, number[k] = -1;
  }

  void take(T v, T of) {
    int64_t end = first, count = most - first;  // `end`: behind the last threshold above v
    while (count > 0) {
      const int64_t half = count / 2;
      const bool above = thresholds[end + half] > v;
      end = above ? end + half + 1 : end;
      count = above ? count - half - 1 : half;
    }
    if (end > first) keep_larger(v, of, value[end], number[end]);
  }

  void store(const BeyondPositives<T>& of, int64_t anchor) {
    for (int64_t k = most - 1; k >= first; --k) {
      if (k + 2 <= most) keep_larger(value[k + 2], number[k + 2], value[k + 1], number[k + 1]);
      keep_larger(value[k + 1], number[k + 1], of.nearest[k * of.stride + anchor], of.nearest_number[k * of.stride + anchor]);
    }
  }
};

// Rows as anchors; `numbers` are the columns'.
template <typename T>
void semi_hard_rows(const Tile<T>& tile, const T* numbers, BeyondPositives<T> rows, T* scratch) {
  const Largest<T> none{splat<T>(kLowest<T>), splat<T>(T(-1))};
  for (int64_t i = 0; i < tile.rows; ++i) {
    Largest<T> farthest = none;
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto n) {
      farthest.take(-negatives(tile, i, j, n), load(numbers + j, n));
    });
    T far = -rows.farthest[i];
    keep_largest_lane(farthest.value, farthest.number, far, rows.farthest_number[i]);
    rows.farthest[i] = -far;
    if (rows.most > kFewThresholds) {
      BeyondSearch<T> search(rows, i, scratch);
      for (int64_t j = 0; j < tile.columns; ++j)
        if (tile.row_group[i] != tile.column_group[j]) search.take(tile.s[i * tile.stride + j], numbers[j]);
      search.store(rows, i);
      continue;
    }
    for (int64_t first = 0; first < rows.most; first += kBeyond) {
      NearestBeyond<T> beyond;
      for (int64_t k = 0; k < kBeyond; ++k) {
        const T threshold = first + k < rows.most ? rows.threshold[(first + k) * rows.stride + i] : -kNoNegative<T>;
        beyond.threshold[k] = splat<T>(threshold);
        beyond.nearest[k] = none;
      }
      for_vectors<T>(0, tile.columns, [&](int64_t j, auto n) {
        beyond.take(negatives(tile, i, j, n), load(numbers + j, n));
      });
      for (int64_t k = 0; k < kBeyond && first + k < rows.most; ++k) {
        const int64_t place = (first + k) * rows.stride + i;
        keep_largest_lane(beyond.nearest[k].value, beyond.nearest[k].number, rows.nearest[place], rows.nearest_number[place]);
      }
    }
  }
}

// Columns [begin, end) as anchors; `numbers` are the rows'.
template <typename T>
void semi_hard_columns(const Tile<T>& tile, const T* numbers, int64_t begin, int64_t end, BeyondPositives<T> columns,
                       T* scratch) {
  for_vectors<T>(begin, end, [&](int64_t j, auto n) {
    Largest<T> farthest{-load(columns.farthest + j, n), load(columns.farthest_number + j, n)};
    for (int64_t i = 0; i < tile.rows; ++i) farthest.take(-negatives(tile, i, j, n), splat<T>(numbers[i]));
    store(columns.farthest + j, -farthest.value, n);
    store(columns.farthest_number + j, farthest.number, n);
  });
  for (int64_t j = begin; columns.most > kFewThresholds && j < end; ++j) {
    BeyondSearch<T> search(columns, j, scratch);
    for (int64_t i = 0; i < tile.rows; ++i)
      if (tile.row_group[i] != tile.column_group[j]) search.take(tile.s[i * tile.stride + j], numbers[i]);
    search.store(columns, j);
  }
  if (columns.most > kFewThresholds) return;
  for (int64_t first = 0; first < columns.most; first += kBeyond)
    for_vectors<T>(begin, end, [&](int64_t j, auto n) {
      NearestBeyond<T> beyond;
      for (int64_t k = 0; k < kBeyond; ++k) {
        const int64_t place = (first + k) * columns.stride + j;
        const bool is_one = first + k < columns.most;
        beyond.threshold[k] = is_one ? load(columns.threshold + place, n) : splat<T>(-kNoNegative<T>);
        beyond.nearest[k] = {splat<T>(kLowest<T>), splat<T>(T(-1))};
        if (is_one) beyond.nearest[k] = {load(columns.nearest + place, n), load(columns.nearest_number + place, n)};
      }
      for (int64_t i = 0; i < tile.rows; ++i) beyond.take(negatives(tile, i, j, n), splat<T>(numbers[i]));
      for (int64_t k = 0; k < kBeyond && first + k < columns.most; ++k) {
        const int64_t place = (first + k) * columns.stride + j;
        store(columns.nearest + place, beyond.nearest[k].value, n);
        store(columns.nearest_number + place, beyond.nearest[k].number, n);
      }
    });
}
