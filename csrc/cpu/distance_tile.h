// A tile of products as distances, and back; what is computed stands in replearn_kernels/engine/distances.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace replearn {

using torch::stable::Tensor;

// Products s[R, C] to -|x_i - y_j|, or its square, in place. rows[R, d] and columns[C, d] are the points as given, the
// squares those of the points whose products s holds.
void negative_distances_(Tensor s, Tensor rows, Tensor columns, Tensor row_squares, Tensor column_squares, bool squared,
                         bool diagonal);

// w[R, C] = dL/dv to dL/d products, in place: returns its sums over rows [R] and columns [C], and the near pairs taken
// out of it: rows, columns (int64 [P]) and their w, in the order of rows and columns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> distance_chain_(Tensor w, Tensor v, Tensor rows, Tensor columns,
                                                                   Tensor row_squares, Tensor column_squares,
                                                                   bool squared, bool diagonal);

}  // namespace replearn
