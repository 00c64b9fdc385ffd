// The sigmoid family's tile passes; what they compute stands in replearn_kernels/objectives/sigmoid.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace replearn {

using torch::stable::Tensor;

// Adds the losses of products s[R, C], and the sums of their W, to row_table[3, R] (loss, weight_sum, weight).
void sigmoid_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                         std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                         bool diagonal, Tensor row_table, std::optional<Tensor> column_table);

// The same, and out[R, C] = weight dL/dl; out may be s.
void sigmoid_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                      std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                      bool diagonal, Tensor row_table, std::optional<Tensor> column_table);

}  // namespace replearn
