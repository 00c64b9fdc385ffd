// The softmax family's tile passes; what they compute stands in replearn_kernels/objectives/softmax.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace replearn {

using torch::stable::Tensor;

// Where points are given, every pass forms distances of the products that s, or v, holds, before all else, in place; and
// after it W becomes dL/d products, in `out`, and the rest of the gradient is added: distance_tile.h.

// Folds products s[R, C] into row_table[3, R] (max, sum, positive) and column_table (the same, [3, C], or without
// positives, [2, C]). Masks, in s, what counts in no sum.
void softmax_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                         std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                         bool diagonal, bool target_apart, bool groups_ignored, Tensor row_table,
                         std::optional<Tensor> column_table,
                         std::optional<Tensor> rows, std::optional<Tensor> columns,
                         std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                         bool squared_distances);

// out[R, C] = dL/dl of products s[R, C], from row_coefficients[5, R] and column_coefficients[5, C]; out may be s.
void softmax_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                      std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                      bool diagonal, bool target_apart, bool groups_ignored, Tensor row_coefficients,
                      std::optional<Tensor> column_coefficients,
                      std::optional<Tensor> rows, std::optional<Tensor> columns,
                      std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                      bool squared_distances, bool formed, std::optional<Tensor> row_points,
                      std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                      std::optional<Tensor> d_columns);

// A whole problem of one tile: `share` times the sum of the rows' losses, and its gradients for query [N, d], key [M, d]
// (empty where not needed, at least one is) and scale (0-d fp64). Without a target, row i's positive is column i. The
// passes above and what stands between them in one call: at 16 x 16 the calls themselves are what takes time.
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_one_tile(
    Tensor query, Tensor key, std::optional<Tensor> target, double scale, double share, bool symmetric,
    bool needs_query, bool needs_key);

}  // namespace replearn
