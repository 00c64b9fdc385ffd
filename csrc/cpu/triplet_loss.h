// Distances of given triplets, and the gradient through them; what they are for stands in
// replearn_kernels/engine/triplets.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace replearn {

using torch::stable::Tensor;

// [2, T]: the squared distances |x_a - x_p|^2 and |x_a - x_n|^2 of rows x[N, d] (fp32 or fp64, contiguous), int64 [T]
// each. Sums of squared differences: near rows lose nothing to cancellation.
Tensor triplet_distances(Tensor x, Tensor anchor, Tensor positive, Tensor negative);

// [N, d]: half the gradient of sum_t weight[0, t] |x_a - x_p|^2 + weight[1, t] |x_a - x_n|^2. Each row is one thread's sum
// over its triplets in order, in fp64. Weights of 0 cost nothing.
Tensor triplet_gradient(Tensor x, Tensor anchor, Tensor positive, Tensor negative, Tensor weight);

}  // namespace replearn
