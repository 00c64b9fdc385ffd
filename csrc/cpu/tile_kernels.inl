// The tile passes, vectorised. Compiled once per instruction set: the including file sets REPLEARN_VECTOR_BYTES,
// switches the compiler to that set, and finds `kernels<T>()` here. Everything is in an anonymous namespace and
// nothing of the standard library is called, so that no wide instruction leaks into code that others link.

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using replearn::Group;
using replearn::Tile;

#include "vector.h"

#include "vector_loops.inl"

// The R rows that come `ahead` rows after `first`, of this slab or a later one, for whoever fetches them ahead of time;
// null if there are not as many.
template <int R, typename T>
inline const T* rows_ahead(const Tile<T>& tile, int64_t first, int64_t ahead) {
  return first + ahead + R <= tile.rows + tile.rows_after ? tile.s + (first + ahead) * tile.stride : nullptr;
}

// Calls body(j, count, mask) for the vectors of row i that hold a pair of its group, and few others: most rows have few
// such pairs, and looking for them eight vectors at a time costs little.
template <typename T, typename F>
inline void for_same_group(const Tile<T>& tile, int64_t i, const F& body) {
  constexpr int64_t kVectors = 8;
  const Group<T> group = tile.row_group[i];
  int64_t first = 0;
  for (; first + kVectors * lanes<T> <= tile.columns; first += kVectors * lanes<T>) {
    Bits<T> some{};
    for (int64_t k = 0; k < kVectors; ++k)
      some |= same_group<T>(group, tile.column_group, first + k * lanes<T>, Whole<T>{});
    if (!any<T>(some)) continue;
    for (int64_t j = first; j < first + kVectors * lanes<T>; j += lanes<T>)
      body(j, Whole<T>{}, same_group<T>(group, tile.column_group, j, Whole<T>{}));
  }
  for_vectors<T>(first, tile.columns, [&](int64_t j, auto count) {
    body(j, count, same_group<T>(group, tile.column_group, j, count));
  });
}

template <typename T>
T squared_distance(const T* x, const T* y, int64_t d) {
  Vec<T> sum{};
  for_vectors<T>(0, d, [&](int64_t k, auto count) {
    const Vec<T> t = load(x + k, count) - load(y + k, count);
    sum += t * t;
  });
  return horizontal_sum<T>(sum);
}

// clang-format off: the softmax family's constants are others' too
#include "shared_exp.inl"
#include "softmax_kernels.inl"
#include "sigmoid_kernels.inl"
#include "distance_kernels.inl"
#include "hardest_kernels.inl"
#include "margin_contrastive_kernels.inl"
#include "batch_all_kernels.inl"
#include "semi_hard_kernels.inl"
#include "mine_triplets_kernels.inl"
#include "retrieval_kernels.inl"
// clang-format on

template <typename T>
void exp_array(const T* x, T* out, int64_t count) {
  for_vectors<T>(0, count, [&](int64_t k, auto n) { store(out + k, exp<T>(load(x + k, n)), n); });
}

template <typename T>
void log1p_array(const T* x, T* out, int64_t count) {
  for_vectors<T>(0, count, [&](int64_t k, auto n) { store(out + k, log1p<T>(load(x + k, n)), n); });
}

template <typename T>
void add_difference(double* __restrict sum, T weight, const T* __restrict x, const T* __restrict y, int64_t d) {
  for (int64_t k = 0; k < d; ++k) sum[k] += weight * (x[k] - y[k]);
}

template <typename T>
constexpr replearn::TileKernels<T> kernels() {
  return {softmax_statistics<T>,
          softmax_merge<T>,
          softmax_weights<T>,
          sigmoid<T>,
          negative_distances<T>,
          distance_chain<T>,
          hardest_statistics<T>,
          hardest_merge<T>,
          margin_contrastive<T>,
          margin_contrastive_columns<T>,
          batch_all_rows<T>,
          batch_all_columns<T>,
          semi_hard_rows<T>,
          semi_hard_columns<T>,
          exp_array<T>,
          log1p_array<T>,
          squared_distance<T>,
          add_difference<T>,
          mining_kernels<T>()};
}

}  // namespace
