#include "distance_tile.h"

#include <algorithm>

namespace replearn {

namespace {

template <typename T>
const T* numbers_of(const std::optional<Tensor>& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t && t->is_cpu() && t->scalar_type() == kScalarType<T> && t->dim() == 1 && t->size(0) == count &&
                      (count <= 1 || t->stride(0) == 1),
                  name, " must be a contiguous CPU tensor of the tile's dtype with ", count, " entries");
  return static_cast<const T*>(t->const_data_ptr());
}

}  // namespace

template <typename T>
Distances<T>::Distances(const GivenPoints& given, const Tile<T>& tile) {
  if (!given.rows) return;
  STD_TORCH_CHECK(given.columns, "rows and columns go together");
  check_matrix<T>(*given.rows, "rows", tile.rows, -1);
  check_matrix<T>(*given.columns, "columns", tile.columns, given.rows->size(1));
  points_ = {static_cast<const T*>(given.rows->const_data_ptr()),
             static_cast<const T*>(given.columns->const_data_ptr()),
             given.rows->stride(0),
             given.columns->stride(0),
             given.rows->size(1),
             numbers_of<T>(given.row_squares, "row_squares", tile.rows),
             numbers_of<T>(given.column_squares, "column_squares", tile.columns),
             given.squared};
}

template <typename T>
Points<T> Distances<T>::of_rows(int64_t first) const {
  Points<T> points = points_;
  points.rows += first * points.row_stride;
  points.row_squares += first;
  return points;
}

template <typename T>
DistanceChain<T>::DistanceChain(const Distances<T>& distances, const GivenGradients& given, const Tile<T>& tile, T* w,
                                int64_t stride)
    : distances_(distances), diagonal_(tile.diagonal), columns_(tile.columns), padded_(padded_columns(tile.columns)),
      stride_(stride), w_(w) {
  if (!distances) return;
  STD_TORCH_CHECK(tile.rows * tile.columns == 0 || w != tile.s, "out must not be v");
  row_points_ = rows_of(given.row_points, "row_points", tile.rows);
  d_rows_ = rows_of(given.d_rows, "d_rows", tile.rows);
  if (!diagonal_) {
    column_points_ = rows_of(given.column_points, "column_points", tile.columns);
    d_columns_ = rows_of(given.d_columns, "d_columns", tile.columns);
  }
  column_sums_.reset(new T[slabs_of(tile.rows) * padded_]);
  near_.resize(slabs_of(tile.rows));
}

template <typename T>
auto DistanceChain<T>::rows_of(const std::optional<Tensor>& t, const char* name, int64_t count) const -> Rows {
  STD_TORCH_CHECK(t, name, " is needed");
  check_matrix<T>(*t, name, count, distances_.d());
  return {static_cast<T*>(t->mutable_data_ptr()), t->stride(0)};
}

template <typename T>
void DistanceChain<T>::apply(int64_t k, int64_t first, const Tile<T>& slab) {
  if (!distances_) return;
  T sums[kSlabRows];
  const Points<T> points = distances_.of_rows(first);
  std::vector<NearPair>& near = near_[k];
  kernels_of<T>().distance_chain(slab, points, w_ + first * stride_, stride_, sums, column_sums_.get() + k * padded_, take,
                                 &near);
  for (int64_t i = 0; i < slab.rows; ++i) {
    T* to = d_rows_[first + i];
    const T* x = row_points_[first + i];
    for (int64_t f = 0; f < points.d; ++f) to[f] -= sums[i] * x[f];
  }
  for (const auto& [i, j, w] : near) {  // counted in the whole tile
    T* to = d_rows_[i];
    const T *x = points.rows + (i - first) * points.row_stride, *y = points.columns + j * points.column_stride;
    for (int64_t f = 0; f < points.d; ++f) to[f] += w * (y[f] - x[f]);
  }
}

template <typename T>
void DistanceChain<T>::finish() const {
  if (!distances_ || diagonal_) return;  // the diagonal's rows are its columns, and both images of a pair are there
  const int64_t slabs = static_cast<int64_t>(near_.size());
  parallel(columns_, slabs + distances_.d(), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T sum = 0;
      for (int64_t k = 0; k < slabs; ++k) sum += column_sums_[k * padded_ + j];
      T* to = d_columns_[j];
      const T* y = column_points_[j];
      for (int64_t f = 0; f < distances_.d(); ++f) to[f] -= sum * y[f];
    }
  });
  int64_t count = 0;
  for (const auto& near : near_) count += static_cast<int64_t>(near.size());
  const Points<T> points = distances_.of_rows(0);
  parallel(count ? points.d : 0, count, [&](int64_t begin, int64_t end) {
    for (const auto& near : near_)
      for (const auto& [i, j, w] : near) {
        T* to = d_columns_[j];
        const T *x = points.rows + i * points.row_stride, *y = points.columns + j * points.column_stride;
        for (int64_t f = begin; f < end; ++f) to[f] += w * (x[f] - y[f]);
      }
  });
}

template class Distances<float>;
template class Distances<double>;
template class DistanceChain<float>;
template class DistanceChain<double>;

}  // namespace replearn
