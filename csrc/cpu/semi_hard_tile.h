// The nearest negatives beyond every positive of a tile; what is found stands in replearn_kernels/objectives/semi_hard.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace replearn {

using torch::stable::Tensor;

// Folds v[R, C] into row_table[3 + 3 p, R] and, unless the tile is on the diagonal, column_table[3 + 3 p, C]: (farthest,
// its number, own number, p thresholds, p nearest, p numbers).
void semi_hard_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                           std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                           bool diagonal, Tensor row_table, std::optional<Tensor> column_table,
                           std::optional<Tensor> rows, std::optional<Tensor> columns,
                           std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                           bool squared_distances);

}  // namespace replearn
