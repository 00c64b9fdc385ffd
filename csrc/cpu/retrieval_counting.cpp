// How many pairs have which score, as an operator.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "retrieval_scores.h"

namespace replearn {

namespace {

constexpr int64_t kVectorRoom = 16;  // numbers of the longest vector
constexpr int16_t kSure = -2;        // of a bin that the filter need not be right about

// Cells of equal width, and the bins that they are parts of.
struct Cells {
  int64_t bin_of(double score, int64_t* cell) const {
    const double place = std::floor(score * per_score) + static_cast<double>(first);
    const int64_t at = place > 0 ? static_cast<int64_t>(std::min(place, static_cast<double>(bins * of_bin - 1))) : 0;  // NaN: 0
    *cell = at % of_bin;
    return at / of_bin;
  }

  const double per_score;
  const int64_t first, bins, of_bin;
};

struct Counts {
  // Of each entry of `histogram`, and of pairs that are left out, whether the filter may be wrong about it; empty if it
  // is right about all.
  std::vector<uint8_t> near(int64_t bins) const {
    if (std::all_of(slots, slots + bins, [](int16_t slot) { return slot == kSure; })) return {};
    std::vector<uint8_t> entries(2 * bins + 1);
    for (int64_t bin = 0; bin < bins; ++bin) entries[2 * bin] = entries[2 * bin + 1] = slots[bin] != kSure;
    return entries;
  }

  int64_t *histogram, *cells;
  const int16_t* slots;
};

template <typename T, typename S>
int64_t count_pairs(const Scores<T>& scores, const FilterTile<S>& tile, int64_t first_column, const int32_t* row_labels,
                    const int32_t* column_labels, const float* scale, const Cells& cells, bool half, int64_t first_row,
                    const Counts& counts) {
  STD_TORCH_CHECK(scores.rows == tile.rows, "rows of s and query must be as many");
  STD_TORCH_CHECK(first_column >= 0 && first_column <= scores.columns - tile.columns, "columns beyond the gallery");
  STD_TORCH_CHECK(tile.rows == 0 || tile.columns <= std::numeric_limits<uint32_t>::max() / tile.rows, "too large a tile");
  const std::vector<uint8_t> near = counts.near(cells.bins);
  std::atomic<int64_t> total{0};
  std::mutex adding;
  const auto kernel = filter_kernels<S>().bins;
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> where(tile.columns + kVectorRoom), unsure(tile.columns);
    std::vector<uint32_t> own(2 * cells.bins + 1);  // of this thread; the last for pairs that are left out
    std::vector<int64_t> in_cells;                  // entries of `cells` that count one more
    int64_t scored = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = half ? std::clamp<int64_t>(first_row + i + 1 - first_column, 0, tile.columns) : 0;
      kernel(tile.row(i), tile.of_columns, tile.of_row(i), {scale[i], scale[tile.rows + i], row_labels[i], cells.bins},
             column_labels, from, tile.columns, where.data());
      for (int64_t j = from; j < tile.columns; ++j) ++own[where[j]];
      if (near.empty()) continue;
      int64_t doubts = 0;
      for (int64_t j = from; j < tile.columns; ++j) {
        unsure[doubts] = static_cast<int32_t>(j);  // no branch, which would be guessed wrong about a threshold
        doubts += near[where[j]];
      }
      for (int64_t c = 0; c < doubts; ++c) {
        if (c + kAhead < doubts) scores.fetch(first_column + unsure[c + kAhead]);
        const int64_t seen = where[unsure[c]], same = seen % 2;
        int64_t cell;
        const int64_t bin = cells.bin_of(scores(i, first_column + unsure[c]).score, &cell);
        --own[seen];
        ++own[2 * bin + same];
        if (counts.slots[bin] >= 0) in_cells.push_back(2 * (counts.slots[bin] * cells.of_bin + cell) + same);
      }
      scored += doubts;
    }
    total += scored;
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t entry = 0; entry < 2 * cells.bins; ++entry) counts.histogram[entry] += own[entry];
    for (const int64_t entry : in_cells) ++counts.cells[entry];
  });
  return total;
}

}  // namespace

int64_t count_pairs_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative, Tensor row_ids,
                     Tensor column_ids, int64_t first_column, Tensor row_labels, Tensor column_labels, Tensor scale,
                     double per_score, int64_t first_cell, Tensor slots, bool half, int64_t first_row,
                     Tensor histogram, Tensor cells) {
  STD_TORCH_CHECK(cells.dim() == 3 && cells.size(1) > 0 && cells.size(2) == 2, "cells must have shape [slots, C, 2], C > 0");
  STD_TORCH_CHECK(s.dim() == 2, "s must have 2 dimensions");
  const int64_t bins = slots.numel(), rows = s.size(0), columns = s.size(1);
  STD_TORCH_CHECK(bins > 0 && bins <= 1 << 20, "there must be bins, and at most 2^20");
  STD_TORCH_CHECK(cells.size(1) <= 1 << 20, "a bin must have at most 2^20 cells");
  STD_TORCH_CHECK(std::isfinite(per_score) && std::abs(first_cell) <= int64_t{1} << 40, "per_score must be finite, first_cell at most 2^40");
  STD_TORCH_CHECK(first_row >= 0 && first_row <= int64_t{1} << 60, "first_row must be in [0, 2^60]");
  const Counts counts{array_to_write<int64_t>(histogram, "histogram", ScalarType::Long, 2 * bins),
                      array_to_write<int64_t>(cells, "cells", ScalarType::Long, cells.numel()),
                      array<int16_t>(slots, "slots", ScalarType::Short, bins)};
  const auto inside = [of_cells = cells.size(0)](int16_t slot) { return slot >= kSure && slot < of_cells; };
  STD_TORCH_CHECK(std::all_of(counts.slots, counts.slots + bins, inside), "a slot is outside of cells");
  const int32_t *of_rows = array<int32_t>(row_labels, "row_labels", ScalarType::Int, rows),
                *of_columns = array<int32_t>(column_labels, "column_labels", ScalarType::Int, columns);
  const float* to_bins = array<float>(scale, "scale", ScalarType::Float, 2 * rows);
  return with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    return with_tile(s, filter, row_factor, relative, row_ids, column_ids, [&](const auto& tile) {
      return count_pairs(score, tile, first_column, of_rows, of_columns, to_bins,
                         {per_score, first_cell, bins, cells.size(1)}, half, first_row, counts);
    });
  });
}

}  // namespace replearn
