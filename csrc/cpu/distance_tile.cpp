// A tile of products as distances, and back, as operators.
#include "distance_tile.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "tile_operators.h"

namespace replearn {

namespace {

struct GivenPoints {
  const Tensor &rows, &columns, &row_squares, &column_squares;
  bool squared;
};

template <typename T>
const T* numbers_of(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == kScalarType<T> && t.dim() == 1 && t.size(0) == count &&
                      (count <= 1 || t.stride(0) == 1),
                  name, " must be a contiguous CPU tensor of the tile's dtype with ", count, " entries");
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
Points<T> points_of(const GivenPoints& given, const Tile<T>& tile) {
  check_matrix<T>(given.rows, "rows", tile.rows, -1);
  check_matrix<T>(given.columns, "columns", tile.columns, given.rows.size(1));
  return {static_cast<const T*>(given.rows.const_data_ptr()),
          static_cast<const T*>(given.columns.const_data_ptr()),
          given.rows.stride(0),
          given.columns.stride(0),
          given.rows.size(1),
          numbers_of<T>(given.row_squares, "row_squares", tile.rows),
          numbers_of<T>(given.column_squares, "column_squares", tile.columns),
          given.squared};
}

template <typename T>
Points<T> rows_of(Points<T> points, int64_t first) {
  points.rows += first * points.row_stride;
  points.row_squares += first;
  return points;
}

template <typename T>
Tile<T> plain_tile(const Tensor& s, bool diagonal) {
  return tile_of<T>(s, {1, 0, {}, {}, {}, 0, diagonal});
}

template <typename T>
void negative_distances(const Tensor& s, const GivenPoints& given, bool diagonal) {
  const Tile<T> tile = plain_tile<T>(s, diagonal);
  const Points<T> points = points_of(given, tile);
  for_slabs(tile, [&](int64_t, int64_t first, const Tile<T>& slab) {
    kernels_of<T>().negative_distances(slab, rows_of(points, first));
  });
}

template <typename T>
struct NearPair {
  int64_t i, j;
  T w;
};

template <typename T>
void take(void* list, int64_t i, int64_t j, T w) {
  static_cast<std::vector<NearPair<T>>*>(list)->push_back({i, j, w});
}

// The slabs' pairs, in order, as tensors.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> joined(const std::vector<std::vector<NearPair<T>>>& slabs, const Tensor& like) {
  int64_t count = 0;
  for (const auto& slab : slabs) count += static_cast<int64_t>(slab.size());
  Tensor i = torch::stable::new_empty(like, {count}, ScalarType::Long);
  Tensor j = torch::stable::new_empty(like, {count}, ScalarType::Long);
  Tensor w = torch::stable::new_empty(like, {count});
  auto *rows = static_cast<int64_t*>(i.mutable_data_ptr()), *columns = static_cast<int64_t*>(j.mutable_data_ptr());
  auto* weights = static_cast<T*>(w.mutable_data_ptr());
  for (const auto& slab : slabs)
    for (const auto& pair : slab) *rows++ = pair.i, *columns++ = pair.j, *weights++ = pair.w;
  return {i, j, w};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> distance_chain(const Tensor& w, const Tensor& v,
                                                                  const GivenPoints& given, bool diagonal) {
  const Tile<T> tile = plain_tile<T>(v, diagonal);
  const Points<T> points = points_of(given, tile);
  check_matrix<T>(w, "w", tile.rows, tile.columns);
  Tensor of_rows = torch::stable::new_empty(w, {tile.rows}), of_columns = torch::stable::new_empty(w, {tile.columns});
  T *row_sums = static_cast<T*>(of_rows.mutable_data_ptr()), *column_sums = static_cast<T*>(of_columns.mutable_data_ptr());
  T* out = static_cast<T*>(w.mutable_data_ptr());
  const int64_t out_stride = w.stride(0), slabs = slabs_of(tile.rows), padded = padded_columns(tile.columns);
  const std::unique_ptr<T[]> partials(new T[slabs * padded]);
  std::vector<std::vector<NearPair<T>>> near(slabs);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    kernels_of<T>().distance_chain(slab, rows_of(points, first), out + first * out_stride, out_stride, row_sums + first,
                                   partials.get() + k * padded, take<T>, &near[k]);
  });
  parallel(tile.columns, slabs, [&](int64_t begin, int64_t end) {
    std::fill(column_sums + begin, column_sums + end, T(0));
    for (int64_t k = 0; k < slabs; ++k)
      for (int64_t j = begin; j < end; ++j) column_sums[j] += partials[k * padded + j];
  });
  auto [i, j, weights] = joined(near, w);
  return {of_rows, of_columns, i, j, weights};
}

}  // namespace

void negative_distances_(Tensor s, Tensor rows, Tensor columns, Tensor row_squares, Tensor column_squares, bool squared,
                         bool diagonal) {
  const GivenPoints given{rows, columns, row_squares, column_squares, squared};
  is_double(s) ? negative_distances<double>(s, given, diagonal) : negative_distances<float>(s, given, diagonal);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> distance_chain_(Tensor w, Tensor v, Tensor rows, Tensor columns,
                                                                   Tensor row_squares, Tensor column_squares,
                                                                   bool squared, bool diagonal) {
  const GivenPoints given{rows, columns, row_squares, column_squares, squared};
  return is_double(w) ? distance_chain<double>(w, v, given, diagonal) : distance_chain<float>(w, v, given, diagonal);
}

}  // namespace replearn
