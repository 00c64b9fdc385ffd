// Pairs that are listed: what they are for stands in replearn_kernels/engine/listed_pairs.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace replearn {

using torch::stable::Tensor;

// [P]: the squared distances |x_i - x_j|^2 of rows x[N, d] (fp32 or fp64, adjacent columns); i, j: int64 [P]. Sums of
// squared differences: near rows lose nothing to cancellation.
Tensor pair_squares(Tensor x, Tensor i, Tensor j);

// gradient[N, d], of x's dtype: row i += weight (x_i - x_j), row j -= the same. Each row is one thread's sum over its
// pairs in order, in fp64. Weights of 0 cost nothing.
void add_differences_(Tensor gradient, Tensor x, Tensor i, Tensor j, Tensor weight);

}  // namespace replearn
