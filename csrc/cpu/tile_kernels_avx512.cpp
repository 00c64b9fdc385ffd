// The tile passes for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "tile_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header: _mm512_undefined_ps
#endif
#define REPLEARN_VECTOR_BYTES 64
#include "tile_kernels.inl"

namespace replearn {
extern const InstructionSet kernels_avx512;
const InstructionSet kernels_avx512 = {"avx512", kernels<float>(), kernels<double>(), retrieval_kernels()};
}  // namespace replearn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
