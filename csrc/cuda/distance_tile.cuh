// Tiles of distances, which a block of threads forms: each thread 4 x 4 of them, from panels of features in shared
// memory. One rounding per difference and one per fma, feature after feature: the bits are the CPU's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace replearn::mining {

constexpr int kTile = 64, kMicro = 4, kSide = kTile / kMicro, kThreads = kSide * kSide;
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

enum class Distance : int32_t { squared_euclidean, euclidean, cosine };

// -- numbers ----------------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename In>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <typename In>
using Arithmetic = typename ArithmeticOf<In>::type;

__device__ inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value itself: every conversion is exact.
__device__ inline double load(double x) { return x; }
__device__ inline float load(float x) { return x; }
__device__ inline float load(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
__device__ inline float load(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  // fp32's exponent is larger by 112; that of infinity and NaN is all ones in both.
  const float value = magnitude >= 0x0f800000u ? float_of_bits(magnitude | 0x7f800000u)
                                               : float_of_bits(magnitude) * 0x1p112f;
  return sign ? -value : value;
}

// -- the batch --------------------------------------------------------------------------------------------------------

template <typename In>
struct Batch {
  using T = Arithmetic<In>;
  const In* x;
  int64_t row_stride, feature_stride, features;
  int32_t rows;
  Distance distance;
  const T* largest = nullptr;  // [rows], cosine only: the largest magnitude of a row; the norm of the row divided by it
  const T* norm = nullptr;
  const int64_t* members = nullptr;      // [rows]: the rows, sorted by label, then by index
  const int32_t* class_start = nullptr;  // [rows]: where the row's class begins in `members`, which also names it
  const int64_t* end = nullptr;  // [rows]: how many pairs (batch_hard: triplets) this row and those before it have

  __device__ int64_t first_pair(int32_t row) const { return row == 0 ? 0 : end[row - 1]; }
  __device__ int64_t last_pair(int32_t first_row) const {  // of the tile that begins there
    return end[(first_row + kTile < rows ? first_row + kTile : rows) - 1];
  }
  __device__ int32_t class_of(int32_t row) const { return row < rows ? class_start[row] : -1; }
  __device__ T scaled(int32_t row, int64_t feature) const {
    const T value = load(x[row * row_stride + feature * feature_stride]);
    return distance == Distance::cosine ? value / largest[row] : value;
  }
  // What distances are formed of: the feature, for cosine of the unit row.
  __device__ T feature(int32_t row, int64_t feature) const {
    const T value = scaled(row, feature);
    return distance == Distance::cosine ? value / norm[row] : value;
  }
  __device__ T from_squared(T squared, int32_t row, int32_t column) const {
    if (distance == Distance::squared_euclidean) return squared;
    if (distance == Distance::euclidean) return std::sqrt(squared);
    return largest[row] == 0 || largest[column] == 0 ? T(1) : T(0.5) * squared;
  }
};

// -- a tile of distances ----------------------------------------------------------------------------------------------

// A block's shared memory.
template <typename Memory>
__device__ Memory& block_memory() {
#ifdef __CUDACC__
  __shared__ Memory memory;
  return memory;
#else
  return cuda_shim::block_memory<Memory>();
#endif
}

template <typename T>
struct alignas(kMicro * sizeof(T)) Quad {  // one wide load
  T v[kMicro];
};

// kDepth features of a tile's anchors and columns.
template <typename T>
struct Panels {
  static constexpr int kDepth = 64 / sizeof(T);
  Quad<T> anchors[kDepth][kSide + 1], columns[kDepth][kSide + 1];
};

template <typename In>
__device__ void stage(const Batch<In>& batch, int32_t first_row, int64_t first_feature,
                      Quad<Arithmetic<In>> (*panel)[kSide + 1]) {
  constexpr int kDepth = Panels<Arithmetic<In>>::kDepth;
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int row = i / kDepth, k = i % kDepth;
    const bool inside = first_row + row < batch.rows && first_feature + k < batch.features;
    panel[k][row / kMicro].v[row % kMicro] = inside ? batch.feature(first_row + row, first_feature + k) : 0;
  }
}

// A thread's 4 x 4 pairs of a tile.
template <typename In>
struct MicroTile {
  using T = Arithmetic<In>;
  int32_t row, column;  // the first, in the tile
  int32_t anchor, first_column;
  int32_t anchor_class[kMicro], column_class[kMicro];
  T distance[kMicro][kMicro];

  __device__ bool positive(int r, int c) const {
    return column_class[c] == anchor_class[r] && first_column + c != anchor + r;
  }
  __device__ bool negative(int r, int c) const { return column_class[c] >= 0 && column_class[c] != anchor_class[r]; }
};

// Distances of the tile's pairs: one rounding per difference and one per fma, feature after feature. All threads of the
// block come here, and all have left the tile before when the first of them returns.
template <typename In>
__device__ MicroTile<In> form_tile(const Batch<In>& batch, int32_t first_anchor, int32_t first_column,
                                   Panels<Arithmetic<In>>& panels) {
  using T = Arithmetic<In>;
  MicroTile<In> tile;
  const int quad_row = threadIdx.x / kSide, quad_column = threadIdx.x % kSide;
  tile.row = quad_row * kMicro;
  tile.column = quad_column * kMicro;
  tile.anchor = first_anchor + tile.row;
  tile.first_column = first_column + tile.column;
  T squared[kMicro][kMicro] = {};
  int64_t first_feature = 0;
  do {
    __syncthreads();
    stage(batch, first_anchor, first_feature, panels.anchors);
    stage(batch, first_column, first_feature, panels.columns);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Panels<T>::kDepth; ++k) {
      const Quad<T> a = panels.anchors[k][quad_row], b = panels.columns[k][quad_column];
#pragma unroll
      for (int r = 0; r < kMicro; ++r)
#pragma unroll
        for (int c = 0; c < kMicro; ++c) {
          const T difference = a.v[r] - b.v[c];
          squared[r][c] = std::fma(difference, difference, squared[r][c]);
        }
    }
    first_feature += Panels<T>::kDepth;
  } while (first_feature < batch.features);
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    tile.anchor_class[i] = batch.class_of(tile.anchor + i);
    tile.column_class[i] = batch.class_of(tile.first_column + i);
  }
#pragma unroll
  for (int r = 0; r < kMicro; ++r)
#pragma unroll
    for (int c = 0; c < kMicro; ++c) {
      const bool inside = tile.anchor + r < batch.rows && tile.column_class[c] >= 0;
      tile.distance[r][c] = inside ? batch.from_squared(squared[r][c], tile.anchor + r, tile.first_column + c) : 0;
    }
  return tile;
}

}  // namespace replearn::mining
