// The hardest pairs of a tile as an operator.
#include "hardest_tile.h"

#include <algorithm>
#include <memory>

#include "distance_tile.h"

namespace replearn {

namespace {

template <typename T>
HardestPairs<T> hardest_of(const Tensor& t, const char* name, int64_t count) {
  const Table<T> table(t, name, 5, count);
  return {table[0], table[1], table[2], table[3], table[4]};
}

template <typename T>
HardestPairs<T> at(HardestPairs<T> of, int64_t first) {
  return {of.negative + first, of.negative_number + first, of.positive + first, of.positive_number + first,
          of.number + first};
}

template <typename T>
void statistics(const Tensor& v, const Pairs& pairs, const Tensor& row_table, const std::optional<Tensor>& column_table,
                const GivenPoints& points) {
  const Tile<T> tile = tile_of<T>(v, pairs);
  const Distances<T> distances(points, tile);
  STD_TORCH_CHECK(tile.row_group, "groups are needed");
  STD_TORCH_CHECK(tile.diagonal || column_table, "a tile off the diagonal needs a column_table");
  const HardestPairs<T> rows = hardest_of<T>(row_table, "row_table", tile.rows);
  const HardestPairs<T> columns = column_table ? hardest_of<T>(*column_table, "column_table", tile.columns) : rows;
  const int64_t slabs = slabs_of(tile.rows), padded = padded_columns(tile.columns);
  std::unique_ptr<T[]> partials;
  if (column_table) partials.reset(new T[slabs * 4 * padded]);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    distances.form(slab, first);
    HardestPairs<T> partial{};
    if (partials) {
      T* of_slab = partials.get() + k * 4 * padded;
      partial = {of_slab, of_slab + padded, of_slab + 2 * padded, of_slab + 3 * padded, nullptr};
    }
    kernels_of<T>().hardest_statistics(slab, columns.number, at(rows, first), partial);
  });
  if (!partials) return;
  parallel(tile.columns, slabs, [&](int64_t begin, int64_t end) {
    kernels_of<T>().hardest_merge(partials.get(), slabs, padded, begin, end, columns);
  });
}

}  // namespace

void hardest_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
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
