// Triplet mining; the definition stands in replearn_kernels/mining.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace replearn {

using torch::stable::Tensor;

// (anchor, positive, negative), int64 [T] each, of embeddings [N, d] (fp16, bf16, fp32 or fp64, any strides) and labels
// int64 [N]. Distances are never more than a strip: beside the result the memory is O(N), 24 MB and 32 MB of strips. NaN
// distances win nothing; an anchor without any finite distance takes its lowest candidates.
std::tuple<Tensor, Tensor, Tensor> mine_triplets(Tensor embeddings, Tensor labels, std::string mining, double margin,
                                                 std::string distance);

}  // namespace replearn
