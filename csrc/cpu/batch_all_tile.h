// All triplets of a tile's rows and columns; what is computed stands in replearn_kernels/objectives/batch_all.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace replearn {

using torch::stable::Tensor;

// Points, and where the rest of the gradient goes: softmax_tile.h.

// Adds losses and counts of v[R, C] to row_table[2 + 2 p, R] and, unless the tile is on the diagonal, column_table; the
// distance of a pair is factor * -v.
void batch_all_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                           std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                           bool diagonal, double factor, Tensor row_table, std::optional<Tensor> column_table,
                           std::optional<Tensor> rows, std::optional<Tensor> columns,
                           std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                           bool squared_distances);

// The same, and out[R, C] = W; out is not v.
void batch_all_weights_(Tensor v, Tensor out, double scale, double bias, std::optional<Tensor> target,
                        std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                        bool diagonal, double factor, Tensor row_table, Tensor column_table,
                        std::optional<Tensor> rows, std::optional<Tensor> columns,
                        std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                        bool squared_distances, bool formed, std::optional<Tensor> row_points,
                        std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                        std::optional<Tensor> d_columns);

}  // namespace replearn
