// The sigmoid family's tile passes as operators.
#include "sigmoid_tile.h"

#include "tile_operators.h"

namespace replearn {

namespace {

template <typename T>
void fold(const Tensor& s, const Pairs& pairs, const Tensor& row_table, T* out, int64_t out_stride) {
  const Tile<T> tile = tile_of<T>(s, pairs);
  const Table<T> rows(row_table, "row_table", 3, tile.rows);
  for_slabs(tile, [&](int64_t, int64_t first, const Tile<T>& slab) {
    kernels_of<T>().sigmoid(slab, out ? out + first * out_stride : nullptr, out_stride, rows[2] + first, rows[0] + first,
                            rows[1] + first);
  });
}

template <typename T>
void weights(const Tensor& s, const Pairs& pairs, const Tensor& row_table, const Tensor& out) {
  check_matrix<T>(out, "out", s.size(0), s.size(1));
  fold<T>(s, pairs, row_table, static_cast<T*>(out.mutable_data_ptr()), out.stride(0));
}

}  // namespace

void sigmoid_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                         std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                         bool diagonal, Tensor row_table, std::optional<Tensor>) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  if (is_double(s))
    fold<double>(s, pairs, row_table, nullptr, 0);
  else
    fold<float>(s, pairs, row_table, nullptr, 0);
}

void sigmoid_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                      std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                      bool diagonal, Tensor row_table, std::optional<Tensor>) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  if (is_double(s))
    weights<double>(s, pairs, row_table, out);
  else
    weights<float>(s, pairs, row_table, out);
}

}  // namespace replearn
