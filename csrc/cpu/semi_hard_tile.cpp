// The nearest negatives beyond every positive of a tile as an operator.
#include "semi_hard_tile.h"

#include <algorithm>
#include <vector>

#include "distance_tile.h"

namespace replearn {

namespace {

template <typename T>
BeyondPositives<T> beyond_of(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= 3 && t.size(0) % 3 == 0, name, " must have 3 + 3 p rows");
  const int64_t quantities = t.size(0), most = quantities / 3 - 1;
  const Table<T> table(t, name, quantities, count);
  return {table[0], table[1], table[2], table[3], table[3 + most], table[3 + 2 * most], most, t.stride(0)};
}

template <typename T>
BeyondPositives<T> at(BeyondPositives<T> of, int64_t first) {
  return {of.farthest + first,  of.farthest_number + first, of.number + first, of.threshold + first,
          of.nearest + first, of.nearest_number + first,  of.most,           of.stride};
}

template <typename T>
void statistics(const Tensor& v, const Pairs& pairs, const Tensor& row_table, const std::optional<Tensor>& column_table,
                const GivenPoints& points) {
  const Tile<T> tile = tile_of<T>(v, pairs);
  const Distances<T> distances(points, tile);
  STD_TORCH_CHECK(tile.row_group, "groups are needed");
  STD_TORCH_CHECK(tile.diagonal || column_table, "a tile off the diagonal needs a column_table");
  const BeyondPositives<T> rows = beyond_of<T>(row_table, "row_table", tile.rows);
  const BeyondPositives<T> columns = column_table ? beyond_of<T>(*column_table, "column_table", tile.columns) : rows;
  for_slabs(tile, [&](int64_t, int64_t first, const Tile<T>& slab) {
    distances.form(slab, first);
    std::vector<T> scratch(3 * rows.most + 2);
    kernels_of<T>().semi_hard_rows(slab, columns.number, at(rows, first), scratch.data());
  });
  if (!column_table) return;
  parallel(padded_columns(tile.columns) / kPadding, tile.rows * kPadding, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(3 * columns.most + 2);
    kernels_of<T>().semi_hard_columns(tile, rows.number, begin * kPadding, std::min(end * kPadding, tile.columns), columns,
                                      scratch.data());
  });
}

}  // namespace

void semi_hard_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                           std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                           bool diagonal, Tensor row_table, std::optional<Tensor> column_table,
                           std::optional<Tensor> rows, std::optional<Tensor> columns,
                           std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                           bool squared_distances) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const auto run = is_double(v) ? statistics<double> : statistics<float>;
  run(v, pairs, row_table, column_table, points);
}

}  // namespace replearn
