// All triplets' tile passes as operators.
#include "batch_all_tile.h"

#include <algorithm>
#include <vector>

#include "distance_tile.h"

namespace replearn {

namespace {

template <typename T>
Thresholds<T> thresholds_of(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= 2 && t.size(0) % 2 == 0, name, " must have 2 + 2 p rows");
  const int64_t quantities = t.size(0), most = (quantities - 2) / 2;
  const Table<T> table(t, name, quantities, count);
  return {table[0], table[1], table[2], table[2 + most], most, t.stride(0)};
}

template <typename T>
Thresholds<T> at(Thresholds<T> of, int64_t first) {
  return {of.loss + first, of.weight + first, of.threshold + first, of.count + first, of.most, of.stride};
}

template <typename T>
void fold_columns(const Tile<T>& tile, T factor, T* w, int64_t stride, Thresholds<T> columns) {
  parallel(padded_columns(tile.columns) / kPadding, tile.rows * kPadding, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(3 * columns.most + 2);
    kernels_of<T>().batch_all_columns(tile, factor, w, stride, begin * kPadding, std::min(end * kPadding, tile.columns),
                                      columns, scratch.data());
  });
}

template <typename T>
void fold(const Tensor& v, const Pairs& pairs, double factor, const Tensor& row_table,
          const std::optional<Tensor>& column_table, const GivenPoints& points, const Tensor* out,
          const GivenGradients& gradients) {
  const Tile<T> tile = tile_of<T>(v, pairs);
  STD_TORCH_CHECK(tile.row_group, "groups are needed");
  T* w = nullptr;
  int64_t stride = 0;
  if (out) {
    check_matrix<T>(*out, "out", tile.rows, tile.columns);
    w = static_cast<T*>(out->mutable_data_ptr());
    stride = out->stride(0);
    STD_TORCH_CHECK(tile.rows * tile.columns == 0 || w != tile.s, "out must not be v");
  }
  const Thresholds<T> rows = thresholds_of<T>(row_table, "row_table", tile.rows);
  const T times = static_cast<T>(factor);
  const Distances<T> distances(points, tile);
  for_slabs(tile, [&](int64_t, int64_t first, const Tile<T>& slab) {
    if (!gradients.formed) distances.form(slab, first);
    std::vector<T> scratch(3 * rows.most + 2);
    kernels_of<T>().batch_all_rows(slab, times, w ? w + first * stride : nullptr, stride, at(rows, first), scratch.data());
  });
  if (column_table) fold_columns(tile, times, w, stride, thresholds_of<T>(*column_table, "column_table", tile.columns));
  if (!w) return;
  DistanceChain<T> chain(distances, gradients, tile, w, stride);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) { chain.apply(k, first, slab); });
  chain.finish();
}

}  // namespace

void batch_all_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                           std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                           bool diagonal, double factor, Tensor row_table, std::optional<Tensor> column_table,
                           std::optional<Tensor> rows, std::optional<Tensor> columns,
                           std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                           bool squared_distances) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const auto run = is_double(v) ? fold<double> : fold<float>;
  run(v, pairs, factor, row_table, column_table, points, nullptr, {});
}

void batch_all_weights_(Tensor v, Tensor out, double scale, double bias, std::optional<Tensor> target,
                        std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                        bool diagonal, double factor, Tensor row_table, Tensor column_table,
                        std::optional<Tensor> rows, std::optional<Tensor> columns,
                        std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                        bool squared_distances, bool formed, std::optional<Tensor> row_points,
                        std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                        std::optional<Tensor> d_columns) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const GivenGradients gradients{formed, row_points, d_rows, column_points, d_columns};
  const auto run = is_double(v) ? fold<double> : fold<float>;
  run(v, pairs, factor, row_table, column_table, points, &out, gradients);
}

}  // namespace replearn
