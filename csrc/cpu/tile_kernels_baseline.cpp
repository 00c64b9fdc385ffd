// The tile passes for what every processor of the architecture runs: SSE2 on x86-64, NEON on 64-bit Arm.
#include "tile_kernels.h"

#define REPLEARN_VECTOR_BYTES 16
#include "tile_kernels.inl"

namespace replearn {
extern const InstructionSet kernels_baseline;
const InstructionSet kernels_baseline = {"baseline", kernels<float>(), kernels<double>(), retrieval_kernels()};
}  // namespace replearn
