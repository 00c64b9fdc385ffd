// Products into distances, and back; included by tile_kernels.inl. What is computed: replearn_kernels/engine/distances.py.

using replearn::Points;

template <typename T>
inline Vec<T> sqrt(Vec<T> v) {
  for (int64_t k = 0; k < lanes<T>; ++k) v[k] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[k]))) : T(__builtin_sqrt(v[k]));
  return v;
}

// Pairs nearer than this, as a share of their squared lengths, are formed from differences (NEAR in distances.py).
template <typename T>
constexpr T kNear = T(1) / 256;

// Rows of products -> -|x_i - x_j|, or its square, in place.
template <typename T>
void negative_distances(const Tile<T>& tile, const Points<T>& points) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* s = tile.s + i * tile.stride;
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
      const Vec<T> norms = load(points.column_squares + j, count) + points.row_squares[i];
      Vec<T> square = norms - load(s + j, count) * T(2);
      const Bits<T> near = square < norms * kNear<T>;
      if (__builtin_expect(any<T>(near), 0))
        for (int64_t k = 0; k < lanes<T> && j + k < tile.columns; ++k)
          if (near[k])
            square[k] = squared_distance(points.rows + i * points.row_stride, points.columns + (j + k) * points.column_stride, points.d);
      store(s + j, points.squared ? -square : -sqrt<T>(square), count);
    });
    if (tile.diagonal) s[tile.first_row + i] = 0;
  }
}

// Rows of W = dL/dv -> W dv/d<x_i, x_j> in place, their sums over rows and, in `column_sums`, over columns. Near pairs
// are taken out: take(list, i, j, w).
template <typename T>
void distance_chain(const Tile<T>& tile, const Points<T>& points, T* out, int64_t out_stride, T* row_sums, T* column_sums,
                    void (*take)(void*, int64_t, int64_t, T), void* list) {
  for_vectors<T>(0, tile.columns, [&](int64_t j, auto) { store(column_sums + j, Vec<T>{}); });
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* w = out + i * out_stride;
    if (tile.diagonal) w[tile.first_row + i] = 0;
    Vec<T> sum{};
    for_vectors<T>(0, tile.columns, [&](int64_t j, auto count) {
      const Vec<T> v = load(tile.s + i * tile.stride + j, count);
      const Vec<T> norms = load(points.column_squares + j, count) + points.row_squares[i];
      Vec<T> value = load(w + j, count);
      if (points.squared)
        value = value * T(2);
      else
        value = v < Vec<T>{} ? value / (v < Vec<T>{} ? -v : splat<T>(1)) : v == v ? Vec<T>{} : v;
      const Vec<T> square = points.squared ? -v : v * v;
      const Bits<T> near = (square < norms * kNear<T>) & (value != Vec<T>{});
      if (__builtin_expect(any<T>(near), 0))
        for (int64_t k = 0; k < lanes<T> && j + k < tile.columns; ++k)
          if (near[k]) {
            take(list, tile.first_row + i, j + k, value[k]);
            value[k] = 0;
          }
      value = only<T>(value, count, 0);
      store(w + j, value, count);
      sum += value;
      store(column_sums + j, load(column_sums + j) + value);
    });
    row_sums[i] = horizontal_sum<T>(sum);
  }
}
