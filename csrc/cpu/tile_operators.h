// What every tile operator needs: its arguments checked and unpacked, its kernels, its threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "tile_kernels.h"

namespace replearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const TileKernels<T>& kernels_of();
template <>
inline const TileKernels<float>& kernels_of<float>() {
  return instruction_set().f32;
}
template <>
inline const TileKernels<double>& kernels_of<double>() {
  return instruction_set().f64;
}

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// Whether `s` is fp64; anything but fp32 and fp64 is refused.
inline bool is_double(const Tensor& s) {
  const ScalarType type = s.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "a tile must be float32 or float64");
  return type == ScalarType::Double;
}

// [rows, columns], of type T, with adjacent columns; any number of either where -1 is given.
template <typename T>
void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == kScalarType<T>, name, " must have the tile's dtype");
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(rows < 0 || t.size(0) == rows, name, " must have ", rows, " rows, got ", t.size(0));
  STD_TORCH_CHECK(columns < 0 || t.size(1) == columns, name, " must have ", columns, " columns, got ", t.size(1));
  STD_TORCH_CHECK(t.size(1) <= 1 || t.size(0) == 0 || t.stride(1) == 1, name, " must have adjacent columns");
}

// A contiguous vector of `count` integers, one per row or column of the tile; null if there is none.
template <typename I>
const I* vector_of(const std::optional<Tensor>& t, const char* name, const char* of, int64_t count) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == (sizeof(I) == 4 ? ScalarType::Int : ScalarType::Long) &&
                      t->dim() == 1 && t->size(0) == count && (count <= 1 || t->stride(0) == 1),
                  name, " must be a contiguous int", 8 * sizeof(I), " CPU tensor with one entry per ", of, " of s");
  return static_cast<const I*>(t->const_data_ptr());
}

// What the operators know of a tile's pairs besides the products (engine/backends/base.py: Pairs).
struct Pairs {
  double scale, bias;
  std::optional<Tensor> target, row_group, column_group;
  int64_t first_column;
  bool diagonal;
};

template <typename T>
Tile<T> tile_of(const Tensor& s, const Pairs& pairs) {
  check_matrix<T>(s, "s", -1, -1);
  const int64_t rows = s.size(0), columns = s.size(1);
  STD_TORCH_CHECK(!pairs.diagonal || rows == columns, "a tile on the diagonal must be square");
  STD_TORCH_CHECK(pairs.row_group.has_value() == pairs.column_group.has_value(), "groups of rows and columns go together");
  const T scale = static_cast<T>(pairs.scale), sign = scale < 0 ? -1 : 1;
  return {static_cast<T*>(s.mutable_data_ptr()), s.stride(0), rows, columns,
          scale, static_cast<T>(pairs.bias), sign, scale == 0 ? T(1) : scale * sign,
          vector_of<int64_t>(pairs.target, "target", "row", rows), pairs.first_column,
          vector_of<Group<T>>(pairs.row_group, "row_group", "row", rows),
          vector_of<Group<T>>(pairs.column_group, "column_group", "column", columns), pairs.diagonal, 0, 0};
}

// Rows [first, first + count) of a tile.
template <typename T>
Tile<T> rows_of(Tile<T> tile, int64_t first, int64_t count) {
  tile.s += first * tile.stride;
  tile.rows_after += tile.rows - (first + count);
  tile.rows = count;
  tile.first_row += first;
  if (tile.target) tile.target += first;
  if (tile.row_group) tile.row_group += first;
  return tile;
}

// A table of quantities [quantities, count]: table[q] points to quantity q.
template <typename T>
class Table {
 public:
  Table(const Tensor& t, const char* name, int64_t quantities, int64_t count) {
    check_matrix<T>(t, name, quantities, count);
    data_ = static_cast<T*>(t.mutable_data_ptr());
    stride_ = t.stride(0);
  }
  T* operator[](int64_t quantity) const { return data_ + quantity * stride_; }

 private:
  T* data_;
  int64_t stride_;
};

inline int64_t slabs_of(int64_t rows) { return (rows + kSlabRows - 1) / kSlabRows; }

// Calls body(begin, end) over [0, count) on torch's threads; `cost` elements per item. Below 32,768 elements, some
// 10 us, waking another thread costs more than it saves.
template <typename F>
void parallel(int64_t count, int64_t cost, const F& body) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(cost, 1));
  if (count <= grain)
    body(0, count);
  else
    torch::stable::parallel_for(0, count, grain, body);
}

// Calls body(slab, first row, rows of the tile) for every slab, on torch's threads.
template <typename T, typename F>
void for_slabs(const Tile<T>& tile, const F& body) {
  parallel(slabs_of(tile.rows), kSlabRows * tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kSlabRows;
      body(k, first, rows_of(tile, first, std::min(kSlabRows, tile.rows - first)));
    }
  });
}

}  // namespace replearn
