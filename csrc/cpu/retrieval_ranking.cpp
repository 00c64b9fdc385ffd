// Scores, and ranks of positives, as operators.
#include <algorithm>
#include <atomic>
#include <vector>

#include "retrieval_scores.h"

namespace replearn {

namespace {

// A row's positives with their scores: [offsets[i], offsets[i + 1]).
struct PositiveTable {
  PositiveTable(const Tensor& offsets, const Tensor& scores, const Tensor& index, const Tensor& low, const Tensor& high)
      : rows(offsets.numel() - 1), total(scores.numel()),
        offsets(array<int64_t>(offsets, "offsets", ScalarType::Long, rows + 1)),
        scores(array_to_write<double>(scores, "scores", ScalarType::Double, total)),
        index(array_to_write<int64_t>(index, "index", ScalarType::Long, total)),
        low(array_to_write<float>(low, "low", ScalarType::Float, total)),
        high(array_to_write<float>(high, "high", ScalarType::Float, total)) {
    for (int64_t i = 0; i < rows; ++i)
      STD_TORCH_CHECK(this->offsets[i] >= 0 && this->offsets[i] <= this->offsets[i + 1] && this->offsets[i + 1] <= total,
                      "offsets must ascend from 0 to the number of positives");
  }
  // The first positive of row i that `column` beats, or the end of the row's.
  int64_t beaten_by(int64_t i, const Scored& column) const {
    int64_t begin = offsets[i], end = offsets[i + 1];
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (better({scores[middle], index[middle]}, column))
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }

  const int64_t rows, total;
  const int64_t* offsets;
  double* scores;
  int64_t* index;
  float *low, *high;
};

// How many of the first `active` positives have fewer than `cutoff` columns before them, positives too, or `least`.
int64_t still_active(const int64_t* better_than, int64_t active, int64_t cutoff, int64_t least) {
  int64_t before = 0;
  for (int64_t p = 0; p < active; ++p) {
    before += better_than[p];
    if (before + p >= cutoff) return std::max(p, least);
  }
  return active;
}

template <typename T, typename S>
int64_t place(const Scores<T>& scores, const FilterTile<S>& tile, int64_t first_column, const PositiveTable& positives,
              const int64_t* cutoff, bool first_always, int64_t* active, int64_t* better_than) {
  STD_TORCH_CHECK(positives.rows == tile.rows && scores.rows == tile.rows, "rows of s, query and offsets must be as many");
  STD_TORCH_CHECK(first_column >= 0 && first_column <= scores.columns - tile.columns, "columns beyond the gallery");
  for (int64_t i = 0; i < tile.rows; ++i)
    STD_TORCH_CHECK(active[i] >= 0 && active[i] <= positives.offsets[i + 1] - positives.offsets[i],
                    "active must be in [0, a row's positives]");
  std::atomic<int64_t> total{0};
  const auto kernel = filter_kernels<S>().place;
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> unsure(tile.columns);
    int64_t scored = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (active[i] == 0) continue;
      const int64_t first = positives.offsets[i], last = first + active[i];
      const int64_t doubts =
          kernel(tile.row(i), tile.of_columns, tile.of_row(i), {positives.low + first, positives.high + first, last - first},
                 tile.columns, better_than + first, unsure.data());
      for (int64_t c = 0; c < doubts; ++c) {
        if (c + kAhead < doubts) scores.fetch(first_column + unsure[c + kAhead]);
        const int64_t column = first_column + unsure[c], beaten = positives.beaten_by(i, scores(i, column));
        if (beaten < last && positives.index[beaten] != column) ++better_than[beaten];
      }
      scored += doubts;
      active[i] = still_active(better_than + first, active[i], cutoff[i], first_always);
    }
    total += scored;
  });
  return total;
}

}  // namespace

void listed_scores_(REPLEARN_SCORES, Tensor row, Tensor column, Tensor scores) {
  const int64_t count = row.numel();
  const int64_t *i = array<int64_t>(row, "row", ScalarType::Long, count),
                *j = array<int64_t>(column, "column", ScalarType::Long, count);
  double* out = array_to_write<double>(scores, "scores", ScalarType::Double, count);
  with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    for (int64_t p = 0; p < count; ++p)
      STD_TORCH_CHECK(i[p] >= 0 && i[p] < score.rows && j[p] >= 0 && j[p] < score.columns, "a pair is outside of query and gallery");
    parallel(count, 128, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (p + kAhead < end) score.fetch(j[p + kAhead]);
        out[p] = score(i[p], j[p]).score;
      }
    });
  });
}

void sort_positives_(REPLEARN_SCORES, Tensor offsets, Tensor scores, Tensor index, Tensor low, Tensor high) {
  const PositiveTable table(offsets, scores, index, low, high);
  with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    STD_TORCH_CHECK(score.rows == table.rows, "rows of query and offsets must be as many");
    parallel(table.rows, 16 * (table.total / std::max<int64_t>(table.rows, 1) + 1), [&](int64_t begin, int64_t end) {
      std::vector<Scored> sorted;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = table.offsets[i];
        sorted.clear();
        for (int64_t p = first; p < table.offsets[i + 1]; ++p) sorted.push_back({table.scores[p], table.index[p]});
        std::sort(sorted.begin(), sorted.end(), better);
        for (size_t p = 0; p < sorted.size(); ++p) {
          table.scores[first + p] = sorted[p].score;
          table.index[first + p] = sorted[p].index;
          std::tie(table.low[first + p], table.high[first + p]) = score.bounds(i, sorted[p].score);
        }
      }
    });
  });
}

int64_t place_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative, Tensor row_ids,
               Tensor column_ids, int64_t first_column, Tensor offsets, Tensor scores, Tensor index, Tensor low,
               Tensor high, Tensor cutoff, bool first_always, Tensor active, Tensor better) {
  const PositiveTable table(offsets, scores, index, low, high);
  const int64_t* depth = array<int64_t>(cutoff, "cutoff", ScalarType::Long, table.rows);
  int64_t* looked_at = array_to_write<int64_t>(active, "active", ScalarType::Long, table.rows);
  int64_t* counts = array_to_write<int64_t>(better, "better", ScalarType::Long, table.total);
  return with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    return with_tile(s, filter, row_factor, relative, row_ids, column_ids, [&](const auto& tile) {
      return place(score, tile, first_column, table, depth, first_always, looked_at, counts);
    });
  });
}

}  // namespace replearn
