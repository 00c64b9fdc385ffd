// All triplets of a batch; included by tile_kernels.inl. What is computed: replearn_kernels/objectives/batch_all.py.

using replearn::Thresholds;

// Up to so many thresholds comparing a vector of negatives with each of them is faster than a search for each negative.
constexpr int64_t kFewThresholds = 48;

// What a vector of negatives violates of a few thresholds.
template <typename T>
struct Violations {
  Vec<T> loss{}, count[kFewThresholds] = {};

  // How many of them, for every lane.
  template <typename Threshold>
  inline Vec<T> add(Vec<T> distance, int64_t most, const Threshold& threshold) {
    Vec<T> active{};
    for (int64_t k = 0; k < most; ++k) {
      const Vec<T> violation = threshold(k) - distance;
      const auto violated = violation > Vec<T>{};
      const Vec<T> one = violated ? splat<T>(1) : Vec<T>{};
      loss += violated ? violation : Vec<T>{};
      count[k] += one;
      active += one;
    }
    return active;
  }
};

// The same for one anchor of many thresholds, by a search for each negative.
template <typename T>
struct Search {
  int64_t most;
  T *thresholds, *sums, *histogram;  // sums[k]: of the thresholds from k on; histogram[k]: negatives just below k
  T loss = 0;

  // `scratch` has room for 3 most + 2.
  Search(const Thresholds<T>& of, int64_t anchor, T* scratch)
      : most(of.most), thresholds(scratch), sums(scratch + most), histogram(sums + most + 1) {
    sums[most] = histogram[most] = 0;
    for (int64_t k = most - 1; k >= 0; --k) {
      thresholds[k] = of.threshold[k * of.stride + anchor];
      sums[k] = sums[k + 1] + thresholds[k];
      histogram[k] = 0;
    }
  }

  // How many thresholds the negative violates.
  T add(T distance) {
    int64_t first = 0, count = most;  // the first threshold above the distance
    while (count > 0) {
      const int64_t half = count / 2;
      const bool below = thresholds[first + half] <= distance;
      first = below ? first + half + 1 : first;
      count = below ? count - half - 1 : half;
    }
    histogram[first] += 1;
    const T active = static_cast<T>(most - first);
    if (active > 0) loss += sums[first] - active * distance;
    return active;
  }

  void store(const Thresholds<T>& of, int64_t anchor) const {
    of.loss[anchor] += loss;
    T count = 0;
    for (int64_t k = 0; k < most; ++k) of.count[k * of.stride + anchor] += count += histogram[k];
  }
};

// Rows as anchors: adds their losses and counts, and writes weight * active * factor to W unless `w` is null.
template <typename T>
void batch_all_rows(const Tile<T>& tile, T factor, T* w, int64_t w_stride, Thresholds<T> rows, T* scratch) {
  constexpr T far = T(__builtin_inf());  // violates nothing
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* s = tile.s + i * tile.stride;
    const T share = rows.weight[i] * factor;
    T* out = w ? w + i * w_stride : nullptr;
    if (rows.most > kFewThresholds) {
      Search<T> search(rows, i, scratch);
      for (int64_t j = 0; j < tile.columns; ++j) {
        const bool negative = tile.row_group[i] != tile.column_group[j];
        const T active = negative ? search.add(s[j] * -factor) : T(0);
        if (out) out[j] = active * share;
      }
      search.store(rows, i);
      continue;
    }
    Violations<T> violations;
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto n) {
      const Bits<T> same = same_group<T>(tile.row_group[i], tile.column_group, j, n);
      const Vec<T> distance = only<T>(same ? splat<T>(far) : load(s + j, n) * -factor, n, far);
      const Vec<T> active =
          violations.add(distance, rows.most, [&](int64_t k) { return splat<T>(rows.threshold[k * rows.stride + i]); });
      if (out) store(out + j, active * share, n);
    });
    rows.loss[i] += horizontal_sum<T>(violations.loss);
    for (int64_t k = 0; k < rows.most; ++k) rows.count[k * rows.stride + i] += horizontal_sum<T>(violations.count[k]);
  }
}

// Columns [begin, end) as anchors: adds their share to W unless `w` is null, and their losses and counts, unless the
// tile is on the diagonal, where they are the rows'.
template <typename T>
void batch_all_columns(const Tile<T>& tile, T factor, T* w, int64_t w_stride, int64_t begin, int64_t end,
                       Thresholds<T> columns, T* scratch) {
  constexpr T far = T(__builtin_inf());
  for (int64_t j = begin; columns.most > kFewThresholds && j < end; ++j) {
    Search<T> search(columns, j, scratch);
    for (int64_t i = 0; i < tile.rows; ++i) {
      if (tile.row_group[i] == tile.column_group[j]) continue;
      const T active = search.add(tile.s[i * tile.stride + j] * -factor);
      if (w) w[i * w_stride + j] += active * columns.weight[j] * factor;
    }
    if (!tile.diagonal) search.store(columns, j);
  }
  if (columns.most > kFewThresholds) return;
  for_vectors<T>(begin, end, [&](int64_t j, auto n) {
    Violations<T> violations;
    Vec<T> thresholds[kFewThresholds];
    for (int64_t k = 0; k < columns.most; ++k) thresholds[k] = load(columns.threshold + k * columns.stride + j, n);
    const Vec<T> share = load(columns.weight + j, n) * factor;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Bits<T> same = same_group<T>(tile.row_group[i], tile.column_group, j, n);
      const Vec<T> distance = same ? splat<T>(far) : load(tile.s + i * tile.stride + j, n) * -factor;
      const Vec<T> active = violations.add(distance, columns.most, [&](int64_t k) { return thresholds[k]; });
      if (w) store(w + i * w_stride + j, load(w + i * w_stride + j, n) + active * share, n);
    }
    if (tile.diagonal) return;
    store(columns.loss + j, load(columns.loss + j, n) + violations.loss, n);
    for (int64_t k = 0; k < columns.most; ++k) {
      T* count = columns.count + k * columns.stride + j;
      store(count, load(count, n) + violations.count[k], n);
    }
  });
}
