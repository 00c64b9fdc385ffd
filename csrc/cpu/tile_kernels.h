// The tile passes on raw pointers: what the operators (tile_operators.cpp) call, and each instruction set provides.
#pragma once

#include <cstdint>

namespace replearn {

// One tile of products s[rows, columns], row-major with leading dimension `stride`.
template <typename T>
struct Tile {
  const T* s;
  int64_t stride, rows, columns;
  T sign, steepness;      // of the logit scale: v = sign * s, logit = steepness * v
  const int64_t* target;  // [rows] or null: the column of each row's positive, counted from the source's first
  int64_t first_column;   // the tile's, counted the same way
};

// The quantities of the softmax family, each a contiguous array over the tile's rows or columns; what they mean
// stands in replearn_kernels/objectives/softmax.py.
template <typename T>
struct SumExp {
  T *max, *sum;
};
template <typename T>
struct Coefficients {
  const T *max, *log_sum, *weight, *offset;
};

template <typename T>
struct TileKernels {
  // Folds the tile into its rows' (max, sum, positive), and sets `partial` to its columns' (max, sum) if not null.
  // The arrays of `partial` have room for a whole last vector (padded_columns).
  void (*softmax_statistics)(const Tile<T>&, SumExp<T> rows, T* positive, SumExp<T> partial);
  // Folds `count` partials of columns [begin, end), `padded` apart, into the columns' (max, sum), in order.
  void (*softmax_merge)(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, T steepness,
                        SumExp<T> columns);
  // out = dL/dl of the tile; `columns.max` null: no column direction. `out` may be the tile itself.
  void (*softmax_weights)(
      const Tile<T>&, T* out, int64_t out_stride, Coefficients<T> rows, const T* positive_weight, Coefficients<T> columns);
  void (*exp)(const T* x, T* out, int64_t count);
};

// All arrays that a kernel may write whole vectors to are padded to this many elements.
constexpr int64_t kPadding = 16;
inline int64_t padded_columns(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

struct InstructionSet {
  const char* name;
  TileKernels<float> f32;
  TileKernels<double> f64;
};

// The widest instruction set that this processor runs, or the one named by REPLEARN_KERNELS_INSTRUCTION_SET.
const InstructionSet& instruction_set();

}  // namespace replearn
