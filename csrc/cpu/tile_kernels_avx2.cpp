// The tile passes for AVX2 with fused multiply-add.
#if defined(__x86_64__)
#include "tile_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define REPLEARN_VECTOR_BYTES 32
#include "tile_kernels.inl"

namespace replearn {
extern const InstructionSet kernels_avx2;
const InstructionSet kernels_avx2 = {"avx2", kernels<float>(), kernels<double>(), retrieval_kernels()};
}  // namespace replearn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
