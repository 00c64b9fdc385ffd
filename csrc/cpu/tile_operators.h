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
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have adjacent columns");
}

template <typename T>
Tile<T> tile_of(const Tensor& s, double scale, const std::optional<Tensor>& target, int64_t first_column) {
  check_matrix<T>(s, "s", -1, -1);
  const int64_t* columns = nullptr;
  if (target) {
    STD_TORCH_CHECK(target->is_cpu() && target->scalar_type() == ScalarType::Long && target->dim() == 1 &&
                        target->size(0) == s.size(0) && (target->size(0) <= 1 || target->stride(0) == 1),
                    "target must be a contiguous int64 CPU tensor with one entry per row of s");
    columns = static_cast<const int64_t*>(target->const_data_ptr());
  }
  return {static_cast<const T*>(s.const_data_ptr()), s.stride(0), s.size(0), s.size(1), static_cast<T>(scale < 0 ? -1 : 1),
          static_cast<T>(scale < 0 ? -scale : scale), columns, first_column};
}

// Rows [first, first + count) of a tile.
template <typename T>
Tile<T> rows_of(Tile<T> tile, int64_t first, int64_t count) {
  tile.s += first * tile.stride;
  tile.rows = count;
  if (tile.target) tile.target += first;
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

}  // namespace replearn
