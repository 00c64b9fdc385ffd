// What module.cpp offers to Python and mine_triplets.cpp does. Apart, so that sanitizers see the kernels alone.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_shim {

struct Embeddings {
  const void* data;
  std::string dtype;  // numpy's word; bfloat16 as uint16
  int64_t rows, features;
  int64_t row_stride, feature_stride;  // in bytes
};

using Indices = std::vector<int64_t>;

// Anchors, positives and negatives; `processors`: of the GPU that is played.
std::array<Indices, 3> mine(const Embeddings& x, const Indices& labels, const std::string& mining, double margin,
                            const std::string& distance, int processors);

// What the kernels read from all 2^16 patterns of bits.
std::vector<float> values_of_float16();
std::vector<float> values_of_bfloat16();

void set_options(const std::string& order, unsigned seed, const std::string& barrier_left_out);

// Runs a kernel of wrong_kernels.h; returns what it wrote, one number a thread.
std::vector<int> run_wrong_kernel(const std::string& name);

}  // namespace cuda_shim
