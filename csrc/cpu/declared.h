// The passes of a declared loss, which are printed (replearn_kernels/declare/cpp_source.py) and compiled where it is used.
#pragma once

#include "tile_kernels.h"

namespace replearn {

// What does not change from tile to tile: the scale, and the loss's parameters.
struct DeclaredNumbers {
  double scale;
  const double* parameters;
};

// A table of quantities, each an array over the tile's rows or columns; null if there is none.
template <typename T>
struct DeclaredTable {
  T* data;
  int64_t stride;
  T* operator[](int64_t quantity) const { return data + quantity * stride; }
};

// What a call gives for the tile: values of its rows and of its columns, [values, rows] and [values, columns], and the
// guide's similarities [rows, columns].
template <typename T>
struct DeclaredGiven {
  DeclaredTable<const T> rows, columns, guide;
};

// Of one loss, dtype and instruction set. A slab has kSlabRows rows at most; tables start with its rows.
template <typename T>
struct DeclaredPasses {
  int64_t layout;  // declared_layout<T>: whoever calls was compiled from the same headers
  int64_t parameters, row_values, column_values, statistics, coefficients;  // how many there are
  bool reads_guide;
  bool one_sweep;  // W needs no statistics: `weights` takes them as its coefficients, and adds to them
  // Folds a slab into its rows' statistics, and sets `partial` to its columns' if there is one.
  void (*fold)(const Tile<T>& slab, DeclaredNumbers, DeclaredGiven<T>, DeclaredTable<T> rows,
               DeclaredTable<T> partial);
  // Folds `count` partials, each [statistics, padded], into the statistics of columns [begin, end), in order.
  void (*merge)(const T* partials, int64_t count, int64_t padded, int64_t begin, int64_t end, DeclaredNumbers,
                DeclaredTable<T> columns);
  // Coefficients of columns [0, count) as `weights` takes them: arrays that can be read to the end of a vector.
  void (*prepare)(DeclaredTable<T> columns, int64_t count, DeclaredTable<T> prepared);
  // out = W of the slab; `prepared`: of its columns, if W has their share. In one sweep the statistics of the rows are
  // added to, and `partial` is set to the columns' if there is one.
  void (*weights)(const Tile<T>& slab, DeclaredNumbers, DeclaredGiven<T>, T* out, int64_t out_stride,
                  DeclaredTable<T> rows, DeclaredTable<T> prepared, DeclaredTable<T> partial);
};

template <typename T>
constexpr int64_t declared_layout = 1000 * sizeof(Tile<T>) + sizeof(DeclaredPasses<T>);

}  // namespace replearn
