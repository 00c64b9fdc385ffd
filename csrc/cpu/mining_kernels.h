// The vectorised parts of mine_triplets on raw pointers: what the operator calls, and each instruction set provides.
#pragma once

#include <cstdint>
#include <type_traits>

namespace replearn {

enum class Distance { euclidean, squared_euclidean, cosine };
enum class Chosen { all, hard, semi_hard };  // of D_an - D_ap: < margin; <= 0; between 0 and margin

// The farthest positive and the nearest negative so far of each row, with their indices: as wide as the distances, so that
// a vector of them matches. Of equal ones the lower index is kept.
template <typename T>
struct Hardest {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  T *positive, *negative;
  Index *positive_index, *negative_index;
};

// A panel is `panel` rows of features [d], one feature of all after the other: panel[k * width + row]. Its rows are
// anchors as they are columns. Distances that shall win nothing are NaN: every comparison with them is false.
template <typename T>
struct MiningKernels {
  using Index = typename Hardest<T>::Index;

  int64_t panel;  // rows of a panel
  int64_t group;  // anchors of one call: divides `panel`

  // out[r * stride + j]: the distance of anchor r, in a group that starts at anchors[0], from column j of a panel.
  void (*distances)(const T* anchors, const T* columns, int64_t d, Distance, T* out, int64_t stride);
  // Scales the panel's rows to length 1; rows of zeros stay.
  void (*to_unit_rows)(T* panel, int64_t d);

  // Folds a tile of distances, from rows [first_row, first_row + rows) to as many padded columns, into the rows' hardest,
  // and into the columns' (all arrays start at the tile's first row or column). Pairs of one group are positives.
  void (*fold_hardest)(const T* tile, int64_t stride, int64_t rows, int64_t columns, int64_t first_row,
                       int64_t first_column, const Index* row_group, const Index* column_group, Hardest<T> of_rows,
                       Hardest<T> of_columns);

  // index[i]: the column of the least distance above than[i], or -1. Rows are padded to whole panels with NaN.
  void (*nearest_beyond)(const T* row, int64_t columns, const T* than, int64_t count, Index* index);
  // below[j]: how many of sorted[0, 2^levels - 1) are less than row[j].
  void (*count_below)(const T* row, int64_t columns, const T* sorted, int64_t levels, Index* below);
  // The column of the largest distance, or -1.
  Index (*farthest)(const T* row, int64_t columns);

  // How many negatives of a row are chosen with a positive at distance `positive`; the second
  // writes which.
  int64_t (*count_chosen)(const T* row, int64_t columns, T positive, T margin, Chosen);
  int64_t (*write_chosen)(const T* row, int64_t columns, T positive, T margin, Chosen, int64_t* negatives);
};

}  // namespace replearn
