// The margin contrastive loss; included by tile_kernels.inl. What it computes: objectives/margin_contrastive.py.

using replearn::ContrastiveMargin;

// Every row's losses are added to loss[rows]; W = weight dl/dv is written unless `out` is null.
template <bool Squared, typename T>
inline void margin_contrastive_row(const Tile<T>& tile, T margin, int64_t i, T* w, T row_weight, const T* column_weight, T* loss) {
  const T* s = tile.s + i * tile.stride;
  Vec<T> losses{};
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    const Bits<T> positive = same_group<T>(tile.row_group[i], tile.column_group, j, count);
    const Vec<T> v = load(s + j, count), rest = v + margin;
    const Vec<T> hinge = rest < Vec<T>{} ? Vec<T>{} : rest;
    const Vec<T> base = positive ? -v : hinge;
    losses += only<T>(Squared ? base * base : base, count, 0);
    if (!w) return;
    const Vec<T> one = splat<T>(1);
    const Vec<T> slope = Squared ? (positive ? v : hinge) * T(2) : positive ? -one : hinge > Vec<T>{} ? one : hinge;
    store(w + j, slope * ((load(column_weight + j, count) + row_weight) * T(0.5)), count);
  });
  *loss = horizontal_sum<T>(losses);
  if (!tile.diagonal) return;
  // A row with itself, at v = 0: its group's loss is 0 already, and W is no pair's.
  if (w) w[tile.first_row + i] = 0;
}

template <typename T>
void margin_contrastive(const Tile<T>& tile, ContrastiveMargin<T> margin, T* out, int64_t out_stride,
                        const T* row_weight, const T* column_weight, T* loss) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* w = out ? out + i * out_stride : nullptr;
    const T weight = out ? row_weight[i] : T(0);
    T of_row;
    if (margin.squared)
      margin_contrastive_row<true>(tile, margin.margin, i, w, weight, column_weight, &of_row);
    else
      margin_contrastive_row<false>(tile, margin.margin, i, w, weight, column_weight, &of_row);
    loss[i] += of_row * margin.share;
  }
}

// The losses of columns [begin, end), times the share, added to loss[columns].
template <typename T>
void margin_contrastive_columns(const Tile<T>& tile, ContrastiveMargin<T> margin, int64_t begin, int64_t end, T* loss) {
  for_vectors<T>(begin, end, [&](int64_t j, auto count) {
    Vec<T> losses{};
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Bits<T> positive = same_group<T>(tile.row_group[i], tile.column_group, j, count);
      const Vec<T> v = load(tile.s + i * tile.stride + j, count), rest = v + margin.margin;
      const Vec<T> base = positive ? -v : rest < Vec<T>{} ? Vec<T>{} : rest;
      losses += margin.squared ? base * base : base;
    }
    store(loss + j, load(loss + j, count) + losses * margin.share, count);
  });
}
