// The softmax family's tile passes as operators: checks, threads, and the choice of kernels.
#include "softmax_tile.h"

#include <algorithm>
#include <memory>

#include "tile_operators.h"

namespace replearn {

namespace {

// Rows whose column statistics are one partial. Fixed, so that the order of every sum, and with it the bits of the
// result, does not depend on the number of threads. 64 rows of 2,048 columns are 512 KiB: both readings of the slab
// find it in the L2 cache.
constexpr int64_t kSlabRows = 64;

template <typename T>
void statistics(const Tensor& s, double scale, const std::optional<Tensor>& target, int64_t first_column,
                const Tensor& row_table, const std::optional<Tensor>& column_table) {
  const auto& kernels = kernels_of<T>();
  const Tile<T> tile = tile_of<T>(s, scale, target, first_column);
  const Table<T> rows(row_table, "row_table", 3, tile.rows);
  const int64_t slabs = (tile.rows + kSlabRows - 1) / kSlabRows, padded = padded_columns(tile.columns);
  std::unique_ptr<T[]> partials;
  if (column_table) partials.reset(new T[2 * slabs * padded]);

  parallel(slabs, kSlabRows * tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kSlabRows;
      T* partial = partials ? partials.get() + 2 * k * padded : nullptr;
      kernels.softmax_statistics(
          rows_of(tile, first, std::min(kSlabRows, tile.rows - first)),
          {rows[0] + first, rows[1] + first}, rows[2] + first, {partial, partial ? partial + padded : nullptr});
    }
  });
  if (!column_table) return;
  const Table<T> columns(*column_table, "column_table", 2, tile.columns);
  const int64_t chunks = padded / kPadding;
  parallel(chunks, slabs * kPadding, [&](int64_t begin, int64_t end) {
    kernels.softmax_merge(partials.get(), slabs, padded, begin * kPadding, std::min(end * kPadding, tile.columns),
                          tile.steepness, {columns[0], columns[1]});
  });
}

template <typename T>
void weights(const Tensor& s, const Tensor& out, double scale, const std::optional<Tensor>& target, int64_t first_column,
             const Tensor& row_table, const std::optional<Tensor>& column_table) {
  const auto& kernels = kernels_of<T>();
  const Tile<T> tile = tile_of<T>(s, scale, target, first_column);
  check_matrix<T>(out, "out", tile.rows, tile.columns);
  T* const w = static_cast<T*>(out.mutable_data_ptr());
  const int64_t w_stride = out.stride(0);
  const Table<T> rows(row_table, "row_coefficients", 5, tile.rows);
  Coefficients<T> columns{};
  if (column_table) {
    const Table<T> table(*column_table, "column_coefficients", 4, tile.columns);
    columns = {table[0], table[1], table[2], table[3]};
  }
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    kernels.softmax_weights(
        rows_of(tile, begin, end - begin), w + begin * w_stride, w_stride,
        {rows[0] + begin, rows[1] + begin, rows[2] + begin, rows[4] + begin}, rows[3] + begin, columns);
  });
}

}  // namespace

void softmax_statistics_(Tensor s, double scale, std::optional<Tensor> target, int64_t first_column,
                         Tensor row_table, std::optional<Tensor> column_table) {
  if (is_double(s))
    statistics<double>(s, scale, target, first_column, row_table, column_table);
  else
    statistics<float>(s, scale, target, first_column, row_table, column_table);
}

void softmax_weights_(Tensor s, Tensor out, double scale, std::optional<Tensor> target, int64_t first_column,
                      Tensor row_coefficients, std::optional<Tensor> column_coefficients) {
  if (is_double(s))
    weights<double>(s, out, scale, target, first_column, row_coefficients, column_coefficients);
  else
    weights<float>(s, out, scale, target, first_column, row_coefficients, column_coefficients);
}

}  // namespace replearn
