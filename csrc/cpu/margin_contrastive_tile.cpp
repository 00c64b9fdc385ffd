// The margin contrastive loss's tile passes as operators.
#include "margin_contrastive_tile.h"

#include "distance_tile.h"

namespace replearn {

namespace {

template <typename T>
Tile<T> grouped_tile(const Tensor& v, const Pairs& pairs) {
  const Tile<T> tile = tile_of<T>(v, pairs);
  STD_TORCH_CHECK(tile.row_group, "groups are needed");
  return tile;
}

template <typename T>
void statistics(const Tensor& v, const Pairs& pairs, double margin, bool squared, const Tensor& row_table,
                const std::optional<Tensor>& column_table, const GivenPoints& points) {
  const Tile<T> tile = grouped_tile<T>(v, pairs);
  const Distances<T> distances(points, tile);
  const Table<T> rows(row_table, "row_table", 2, tile.rows);
  const ContrastiveMargin<T> half{static_cast<T>(margin), squared, T(0.5)};
  for_slabs(tile, [&](int64_t, int64_t first, const Tile<T>& slab) {
    distances.form(slab, first);
    kernels_of<T>().margin_contrastive(slab, half, nullptr, 0, nullptr, nullptr, rows[0] + first);
  });
  if (!column_table) return;
  const Table<T> columns(*column_table, "column_table", 2, tile.columns);
  parallel(padded_columns(tile.columns) / kPadding, tile.rows * kPadding, [&](int64_t begin, int64_t end) {
    kernels_of<T>().margin_contrastive_columns(tile, half, begin * kPadding, std::min(end * kPadding, tile.columns),
                                               columns[0]);
  });
}

template <typename T>
void weights(const Tensor& v, const Tensor& out, const Pairs& pairs, double margin, bool squared, const Tensor& row_table,
             const Tensor& column_table, const GivenPoints& points, const GivenGradients& gradients) {
  const Tile<T> tile = grouped_tile<T>(v, pairs);
  check_matrix<T>(out, "out", tile.rows, tile.columns);
  const Table<T> rows(row_table, "row_table", 2, tile.rows), columns(column_table, "column_table", 2, tile.columns);
  const ContrastiveMargin<T> whole{static_cast<T>(margin), squared, tile.diagonal ? T(0.5) : T(1)};
  T* w = static_cast<T*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0);
  const Distances<T> distances(points, tile);
  DistanceChain<T> chain(distances, gradients, tile, w, stride);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    if (!gradients.formed) distances.form(slab, first);
    kernels_of<T>().margin_contrastive(slab, whole, w + first * stride, stride, rows[1] + first, columns[1],
                                       rows[0] + first);
    chain.apply(k, first, slab);
  });
  chain.finish();
}

}  // namespace

void margin_contrastive_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                                    std::optional<Tensor> row_group, std::optional<Tensor> column_group,
                                    int64_t first_column, bool diagonal, double margin, bool squared, Tensor row_table,
                                    std::optional<Tensor> column_table,
                                    std::optional<Tensor> rows, std::optional<Tensor> columns,
                                    std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                                    bool squared_distances) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const auto run = is_double(v) ? statistics<double> : statistics<float>;
  run(v, pairs, margin, squared, row_table, column_table, points);
}

void margin_contrastive_weights_(Tensor v, Tensor out, double scale, double bias, std::optional<Tensor> target,
                                 std::optional<Tensor> row_group, std::optional<Tensor> column_group,
                                 int64_t first_column, bool diagonal, double margin, bool squared, Tensor row_table,
                                 Tensor column_table,
                                 std::optional<Tensor> rows, std::optional<Tensor> columns,
                                 std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                                 bool squared_distances, bool formed, std::optional<Tensor> row_points,
                                 std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                                 std::optional<Tensor> d_columns) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const GivenGradients gradients{formed, row_points, d_rows, column_points, d_columns};
  const auto run = is_double(v) ? weights<double> : weights<float>;
  run(v, out, pairs, margin, squared, row_table, column_table, points, gradients);
}

}  // namespace replearn
