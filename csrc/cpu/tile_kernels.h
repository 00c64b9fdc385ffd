// The tile passes on raw pointers: what the operators (*_tile.cpp) call, and each instruction set provides.
#pragma once

#include <cstdint>
#include <type_traits>

#include "mining_kernels.h"
#include "retrieval_kernels.h"

namespace replearn {

// Group ids, as wide as the tile's entries, so that a vector of them matches a vector of similarities.
template <typename T>
using Group = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Rows that are one task, and the most that a kernel is given. Fixed, so that the order of every sum, and with it the
// bits of the result, does not depend on the number of threads. 64 rows of 2,048 columns are 512 KiB: both readings of
// the slab find it in the L2 cache.
constexpr int64_t kSlabRows = 64;

// One tile of products s[rows, columns], row-major with leading dimension `stride`, and what is known of its pairs.
template <typename T>
struct Tile {
  T* s;
  int64_t stride, rows, columns;
  T scale, bias;          // logit = scale * s + bias
  T sign, steepness;      // of the scale: v = sign * s, scaled by steepness > 0 (1 where the scale is 0, and v too)
  const int64_t* target;  // [rows] or null: the column of each row's positive, counted from the source's first
  int64_t first_column;   // the tile's, counted the same way
  const Group<T>*row_group, *column_group;  // [rows] and [columns], or null
  bool diagonal;                            // rows and columns are the same: the pairs (i, i) do not count
  int64_t first_row, rows_after;            // of these rows in the whole tile, and how many come after them
};

// The quantities of the softmax family, each a contiguous array over the tile's rows or columns; what they mean
// stands in replearn_kernels/objectives/softmax.py. Null where there are none.
template <typename T>
struct Statistics {
  T *max, *sum, *positive;
};
template <typename T>
struct Coefficients {
  const T *max, *log_sum, *weight, *positive, *offset;
};

// What the softmax family makes of positives beyond the usual.
struct SoftmaxRoles {
  bool target_apart;    // the target's entry is no part of the sums, and its W is 0
  bool groups_ignored;  // pairs of a group are left out, but for the target; otherwise they are the positives
};

// The rows and columns of a tile as points (engine/distances.py: Points).
template <typename T>
struct Points {
  const T *rows, *columns;
  int64_t row_stride, column_stride, d;
  const T *row_squares, *column_squares;
  bool squared;
};

// The hardest pairs (objectives/hardest.py), each a contiguous array over the tile's rows or columns.
template <typename T>
struct HardestPairs {
  T *negative, *negative_number, *positive, *positive_number;
  const T* number;
};

template <typename T>
struct ContrastiveMargin {
  T margin;
  bool squared;
  T share;  // of a pair's loss that a row takes
};

// Sorted thresholds of anchors, `most` each, threshold k of anchor i at [k * stride + i] (objectives/batch_all.py).
template <typename T>
struct Thresholds {
  T* loss;
  const T *weight, *threshold;
  T* count;
  int64_t most, stride;
};

// What is kept of anchors with `most` positives each (objectives/semi_hard.py), laid out as Thresholds are.
template <typename T>
struct BeyondPositives {
  T *farthest, *farthest_number;
  const T *number, *threshold;
  T *nearest, *nearest_number;
  int64_t most, stride;
};

template <typename T>
struct TileKernels {
  // Folds the tile into its rows' statistics, and sets `partial` to its columns' if not null. Masks the tile.
  // The arrays of `partial` have room for a whole last vector (padded_columns).
  void (*softmax_statistics)(const Tile<T>&, SoftmaxRoles, Statistics<T> rows, Statistics<T> partial);
  // Folds `count` partials of columns [begin, end), each `quantities` arrays of `padded`, into the columns', in order.
  void (*softmax_merge)(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, T steepness,
                        Statistics<T> columns);
  // out = dL/dl of the tile; `columns.max` null: no column direction. `out` may be the tile itself.
  void (*softmax_weights)(
      const Tile<T>&, SoftmaxRoles, T* out, int64_t out_stride, Coefficients<T> rows, Coefficients<T> columns);
  // Adds every row's loss to loss[rows] and its sum of W to weight_sum[rows]; writes weight[i] W unless `out` is null.
  void (*sigmoid)(const Tile<T>&, T* out, int64_t out_stride, const T* weight, T* loss, T* weight_sum);
  // Products to negative distances, and W to dL/d products with its sums: distance_kernels.inl.
  void (*negative_distances)(const Tile<T>&, const Points<T>&);
  void (*distance_chain)(const Tile<T>&, const Points<T>&, T* out, int64_t out_stride, T* row_sums, T* column_sums,
                         void (*take)(void*, int64_t, int64_t, T), void* list);
  // Folds the tile into its rows' hardest pairs, and sets `partial` to its columns' if not null.
  void (*hardest_statistics)(const Tile<T>&, const T* numbers, HardestPairs<T> rows, HardestPairs<T> partial);
  void (*hardest_merge)(
      const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, HardestPairs<T> columns);
  // Adds every row's share of losses to loss[rows]; writes W unless `out` is null. And of columns [begin, end).
  void (*margin_contrastive)(const Tile<T>&, ContrastiveMargin<T>, T* out, int64_t out_stride, const T* row_weight,
                             const T* column_weight, T* loss);
  void (*margin_contrastive_columns)(const Tile<T>&, ContrastiveMargin<T>, int64_t begin, int64_t end, T* loss);
  // Adds the anchors' losses and counts; W = the rows' share, then += the columns' [begin, end), unless `w` is null.
  void (*batch_all_rows)(const Tile<T>&, T factor, T* w, int64_t w_stride, Thresholds<T> rows, T* scratch);
  void (*batch_all_columns)(const Tile<T>&, T factor, T* w, int64_t w_stride, int64_t begin, int64_t end,
                            Thresholds<T> columns, T* scratch);
  // Folds the tile into what is kept of its rows, and of columns [begin, end); `numbers` are the other side's.
  void (*semi_hard_rows)(const Tile<T>&, const T* numbers, BeyondPositives<T> rows, T* scratch);
  void (*semi_hard_columns)(
      const Tile<T>&, const T* numbers, int64_t begin, int64_t end, BeyondPositives<T> columns, T* scratch);
  void (*exp)(const T* x, T* out, int64_t count);
  void (*log1p)(const T* x, T* out, int64_t count);
  T (*squared_distance)(const T* x, const T* y, int64_t d);
  void (*add_difference)(double* sum, T weight, const T* x, const T* y, int64_t d);  // sum += weight (x - y)
  MiningKernels<T> mining;
};

// All arrays that a kernel may write whole vectors to are padded to this many elements.
constexpr int64_t kPadding = 16;
inline int64_t padded_columns(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

struct InstructionSet {
  const char* name;
  TileKernels<float> f32;
  TileKernels<double> f64;
  RetrievalKernels retrieval;
};

// The widest instruction set that this processor runs, or the one named by REPLEARN_KERNELS_INSTRUCTION_SET.
const InstructionSet& instruction_set();

}  // namespace replearn
