// The hardest pairs of a tile; what is found stands in replearn_kernels/objectives/hardest.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace replearn {

using torch::stable::Tensor;

// Points, and where the rest of the gradient goes: softmax_tile.h.

// Folds v[R, C] into row_table[5, R] and, unless the tile is on the diagonal, column_table[5, C]: (negative, its number,
// positive, its number, own number).
void hardest_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                         std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                         bool diagonal, Tensor row_table, std::optional<Tensor> column_table,
                         std::optional<Tensor> rows, std::optional<Tensor> columns,
                         std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                         bool squared_distances);

}  // namespace replearn
