// Large buffers.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace replearn {

// Asks the system to back a fresh buffer with huge pages. First touches of 256 MiB in 4 KiB pages are 65,536 page
// faults, which took 80 ms of a 600 ms CLIP step (N = 8,192, d = 128). A hint: nothing depends on it.
void advise_huge_pages_(torch::stable::Tensor buffer);

}  // namespace replearn
