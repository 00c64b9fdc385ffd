// The sigmoid family's pass; included by tile_kernels.inl. What it computes: replearn_kernels/objectives/sigmoid.py.

// Rows [first, first + R): losses softplus(-z l), their W = -z sigmoid(-z l), and the rows' sums of both.
template <int R, bool Write, typename T>
inline void sigmoid_rows(
    const Tile<T>& tile, int64_t first, T* out, int64_t out_stride, const T* weight, T* loss, T* weight_sum) {
  Vec<T> losses[R] = {}, weights[R] = {};
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
    Bits<T> positive[R];
    Vec<T> wrong[R], u[R], log1p_u[R];  // how far the logit is on the wrong side; exp(-|wrong|)
    for (int r = 0; r < R; ++r) {
      const int64_t i = first + r;
      positive[r] = tile.row_group ? same_group<T>(tile.row_group[i], tile.column_group, j, count)
                    : tile.target
                        ? lane_index<T>(j) == Bits<T>{} + static_cast<Group<T>>(tile.target[i] - tile.first_column)
                        : Bits<T>{};
      const Vec<T> l = load(tile.s + i * tile.stride + j, count) * tile.scale + tile.bias;
      wrong[r] = positive[r] ? -l : l;
      u[r] = wrong[r] > Vec<T>{} ? -wrong[r] : wrong[r];
    }
    exp<T>(u);
    for (int r = 0; r < R; ++r) log1p_u[r] = u[r];
    log1p<T>(log1p_u);
    for (int r = 0; r < R; ++r) {
      const Vec<T> w = (wrong[r] > Vec<T>{} ? splat<T>(1) : u[r]) / (u[r] + T(1));
      losses[r] += only<T>((wrong[r] > Vec<T>{} ? wrong[r] : Vec<T>{}) + log1p_u[r], count, 0);
      const Vec<T> signed_w = only<T>(positive[r] ? -w : w, count, 0);
      weights[r] += signed_w;
      if (Write) store(out + (first + r) * out_stride + j, signed_w * weight[first + r], count);
    }
  });
  for (int r = 0; r < R; ++r) {
    loss[first + r] += horizontal_sum<T>(losses[r]);
    weight_sum[first + r] += horizontal_sum<T>(weights[r]);
  }
}

template <bool Write, typename T>
inline void sigmoid_tile(const Tile<T>& tile, T* out, int64_t out_stride, const T* weight, T* loss, T* weight_sum) {
  for_rows(tile.rows, [&](int64_t i, auto at_once) {
    sigmoid_rows<at_once.count, Write>(tile, i, out, out_stride, weight, loss, weight_sum);
  });
}

template <typename T>
void sigmoid(const Tile<T>& tile, T* out, int64_t out_stride, const T* weight, T* loss, T* weight_sum) {
  if (out)
    sigmoid_tile<true>(tile, out, out_stride, weight, loss, weight_sum);
  else
    sigmoid_tile<false>(tile, out, out_stride, weight, loss, weight_sum);
}
