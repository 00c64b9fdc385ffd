// A tile of products as distances, and back, slab by slab around a pass, while the slab is in the L2 cache; what is
// computed stands in replearn_kernels/engine/distances.py.
#pragma once

#include <memory>
#include <vector>

#include "tile_operators.h"

namespace replearn {

// What an operator is given of a tile's points: rows[R, d] and columns[C, d] as given, the squares of those whose products
// the tile holds. No rows: the tile's similarities are products.
struct GivenPoints {
  std::optional<Tensor> rows, columns, row_squares, column_squares;
  bool squared;
};

// Where the part of the gradient goes that the products with W leave: -sum_j w_ij x_i, of the points whose products the
// tile holds, and the near pairs. `formed`: the tile holds distances already. On the diagonal the columns are the rows.
struct GivenGradients {
  bool formed;
  std::optional<Tensor> row_points, d_rows, column_points, d_columns;
};

// Products to -|x_i - y_j|, or its square, in place.
template <typename T>
class Distances {
 public:
  Distances(const GivenPoints& given, const Tile<T>& tile);
  explicit operator bool() const { return points_.column_squares != nullptr; }  // points without features have no rows
  Points<T> of_rows(int64_t first) const;
  void form(const Tile<T>& slab, int64_t first) const {
    if (*this) kernels_of<T>().negative_distances(slab, of_rows(first));
  }
  int64_t d() const { return points_.d; }

 private:
  Points<T> points_{};
};

// W = dL/dv to dL/d products, in place, and the rest of the gradient. Near pairs are taken out of W. Row i is one task's,
// and so is a feature of the columns: the order of every sum is fixed.
template <typename T>
class DistanceChain {
 public:
  DistanceChain(const Distances<T>& distances, const GivenGradients& given, const Tile<T>& tile, T* w, int64_t stride);
  // Slab k, from row `first` on, whose W has been formed.
  void apply(int64_t k, int64_t first, const Tile<T>& slab);
  // After all slabs.
  void finish() const;

 private:
  struct NearPair {
    int64_t i, j;
    T w;
  };
  static void take(void* list, int64_t i, int64_t j, T w) {
    static_cast<std::vector<NearPair>*>(list)->push_back({i, j, w});
  }
  struct Rows {  // a matrix with one row per row, or column, of the tile
    T* data = nullptr;
    int64_t stride = 0;
    T* operator[](int64_t k) const { return data + k * stride; }
  };
  Rows rows_of(const std::optional<Tensor>& t, const char* name, int64_t count) const;

  const Distances<T>& distances_;
  const bool diagonal_;
  const int64_t columns_, padded_, stride_;
  T* const w_;
  Rows row_points_, column_points_, d_rows_, d_columns_;
  std::unique_ptr<T[]> column_sums_;
  std::vector<std::vector<NearPair>> near_;
};

}  // namespace replearn
