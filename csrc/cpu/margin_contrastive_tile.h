// The margin contrastive loss of a tile; what it computes stands in replearn_kernels/objectives/margin_contrastive.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace replearn {

using torch::stable::Tensor;

// Points, and where the rest of the gradient goes: softmax_tile.h.

// Adds half of the losses of v[R, C] to row_table[2, R] (loss, weight), and unless the tile is on the diagonal to
// column_table[2, C].
void margin_contrastive_statistics_(Tensor v, double scale, double bias, std::optional<Tensor> target,
                                    std::optional<Tensor> row_group, std::optional<Tensor> column_group,
                                    int64_t first_column, bool diagonal, double margin, bool squared, Tensor row_table,
                                    std::optional<Tensor> column_table,
                                    std::optional<Tensor> rows, std::optional<Tensor> columns,
                                    std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                                    bool squared_distances);

// out[R, C] = W; a pair's whole loss is added to its row, half where the tile on the diagonal holds it twice. out may be v.
void margin_contrastive_weights_(Tensor v, Tensor out, double scale, double bias, std::optional<Tensor> target,
                                 std::optional<Tensor> row_group, std::optional<Tensor> column_group,
                                 int64_t first_column, bool diagonal, double margin, bool squared, Tensor row_table,
                                 Tensor column_table,
                                 std::optional<Tensor> rows, std::optional<Tensor> columns,
                                 std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                                 bool squared_distances, bool formed, std::optional<Tensor> row_points,
                                 std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                                 std::optional<Tensor> d_columns);

}  // namespace replearn
