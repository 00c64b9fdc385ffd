// Kernels that are wrong, each in one way that the shim must see.
#pragma once

#include "cuda_shim.h"

namespace wrong_kernels {

struct Memory {
  int value[64];
};

inline void one_thread_skips_the_barrier(int*) {
  if (threadIdx.x != 5) __syncthreads();
}

inline void a_barrier_in_each_branch(int*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

inline void half_a_warp_shuffles(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

inline void a_part_of_the_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

inline void reads_what_nobody_wrote(int* out) {
  out[threadIdx.x] = cuda_shim::block_memory<Memory>().value[threadIdx.x];
}

inline void reads_its_neighbour_without_a_barrier(int* out) {
  auto& memory = cuda_shim::block_memory<Memory>();
  memory.value[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = memory.value[threadIdx.x ^ 1];
}

inline void writes_past_shared_memory(int*) { (cuda_shim::block_memory<Memory>().value + 1)[threadIdx.x] = 0; }

// Returns what the kernel wrote, one number a thread.
inline std::vector<int> run(const std::string& name) {
  std::vector<int> out(64, 0);
  const auto run = [&](const char* its_name, void (*kernel)(int*)) {
    if (name == its_name) cuda_shim::run_grid(kernel, {1}, 64, out.data());
  };
#define RUN(kernel) run(#kernel, kernel)
  RUN(one_thread_skips_the_barrier);
  RUN(a_barrier_in_each_branch);
  RUN(half_a_warp_shuffles);
  RUN(a_part_of_the_mask);
  RUN(reads_what_nobody_wrote);
  RUN(reads_its_neighbour_without_a_barrier);
  RUN(writes_past_shared_memory);
#undef RUN
  return out;
}

}  // namespace wrong_kernels
