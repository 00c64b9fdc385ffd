// Nearest columns as operators.
#include <algorithm>
#include <atomic>
#include <vector>

#include "retrieval_scores.h"

namespace replearn {

namespace {

// The candidates of rows, [R, room] each but the last two, [R].
struct CandidateTable {
  CandidateTable(const Tensor& lower, const Tensor& upper, const Tensor& index, const Tensor& held)
      : rows(lower.size(0)), room(lower.size(1)),
        lower(array_to_write<float>(lower, "lower", ScalarType::Float, rows * room)),
        upper(array_to_write<float>(upper, "upper", ScalarType::Float, rows * room)),
        index(array_to_write<int64_t>(index, "index", ScalarType::Long, rows * room)),
        held(array_to_write<int64_t>(held, "held", ScalarType::Long, rows)) {
    for (int64_t i = 0; i < rows; ++i)
      STD_TORCH_CHECK(this->held[i] >= 0 && this->held[i] <= room, "held must be in [0, ", room, "]");
  }
  Candidates operator[](int64_t i) const {
    return {lower + i * room, upper + i * room, index + i * room, held[i], room};
  }

  const int64_t rows, room;
  float *lower, *upper;
  int64_t *index, *held;
};

// Drops the candidates that k others are better than; returns the bound below which there is none.
float drop_worse(int64_t k, Candidates& row) {
  if (row.count <= k) return -std::numeric_limits<float>::infinity();
  const float threshold = instruction_set().retrieval.kth_largest(row.lower, row.count, k);
  int64_t kept = 0;
  for (int64_t c = 0; c < row.count; ++c) {
    const bool may_be = row.upper[c] >= threshold;  // no branch, which would often be guessed wrong
    row.lower[kept] = row.lower[c];
    row.upper[kept] = row.upper[c];
    row.index[kept] = row.index[c];
    kept += may_be;
  }
  row.count = kept;
  return threshold;
}

void check_inside(bool inside) { STD_TORCH_CHECK(inside, "a candidate is outside of the gallery"); }

// What a thread works with.
struct Scratch {
  std::vector<Scored> best;
  int64_t scored = 0;
  bool outside = false;  // whether a candidate is no column: an error cannot leave a thread
};

// best: the k best candidates, in order, or as many as there are.
template <typename T>
void select(const Scores<T>& scores, int64_t i, int64_t k, const Candidates& row, Scratch& scratch) {
  auto& best = scratch.best;
  best.clear();
  for (int64_t c = 0; c < row.count; ++c) {
    if (row.index[c] < 0 || row.index[c] >= scores.columns) {
      scratch.outside = true;
      return;
    }
    if (c + kAhead < row.count) scores.fetch(row.index[c + kAhead]);
    best.push_back(scores(i, row.index[c]));
  }
  if (row.count > k) {
    std::nth_element(best.begin(), best.begin() + k - 1, best.end(), better);
    best.resize(k);
  }
  std::sort(best.begin(), best.end(), better);
}

// Makes room among more than k candidates; returns the bound below which none is among the k best. Where too many lie
// within the filter's error of the k-th best, scores tell which k stay.
template <typename T>
float shrink(const Scores<T>& scores, int64_t i, int64_t k, Candidates& row, Scratch& scratch) {
  const float threshold = drop_worse(k, row);
  if (row.count <= k + (row.room - k) / 2) return threshold;
  scratch.scored += row.count;
  select(scores, i, k, row, scratch);
  row.count = k;
  for (int64_t c = 0; c < k && !scratch.outside; ++c) {
    std::tie(row.lower[c], row.upper[c]) = scores.bounds(i, scratch.best[c].score);
    row.index[c] = scratch.best[c].index;
  }
  return row.lower[k - 1];
}

template <typename T, typename S>
int64_t nearest(const Scores<T>& scores, const FilterTile<S>& tile, int64_t first_column, int64_t k,
                const CandidateTable& table, float* threshold) {
  STD_TORCH_CHECK(table.rows == tile.rows && scores.rows == tile.rows, "rows of s, query and lower must be as many");
  STD_TORCH_CHECK(k >= 1 && k <= table.room - 32, "room must be at least k + 32, got ", table.room);
  STD_TORCH_CHECK(first_column >= 0 && first_column <= scores.columns - tile.columns, "columns beyond the gallery");
  std::atomic<int64_t> total{0};
  std::atomic<bool> outside{false};
  const auto collect = filter_kernels<S>().collect;
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end && !scratch.outside; ++i) {
      Candidates row = table[i];
      for (int64_t from = 0; from < tile.columns;) {
        from = collect(tile.row(i), tile.of_columns, tile.of_row(i), threshold[i], from, tile.columns, first_column, row);
        if (from < tile.columns) threshold[i] = shrink(scores, i, k, row, scratch);
      }
      table.held[i] = row.count;
    }
    total += scratch.scored;
    if (scratch.outside) outside = true;
  });
  check_inside(!outside);
  return total;
}

}  // namespace

int64_t nearest_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative, Tensor row_ids,
                 Tensor column_ids, int64_t first_column, int64_t k, Tensor lower, Tensor upper, Tensor index,
                 Tensor held, Tensor threshold) {
  const CandidateTable table(lower, upper, index, held);
  float* bounds = array_to_write<float>(threshold, "threshold", ScalarType::Float, table.rows);
  return with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    return with_tile(s, filter, row_factor, relative, row_ids, column_ids, [&](const auto& tile) {
      return nearest(score, tile, first_column, k, table, bounds);
    });
  });
}

void nearest_result_(REPLEARN_SCORES, Tensor lower, Tensor upper, Tensor index, Tensor held, Tensor scores,
                     Tensor neighbours) {
  const CandidateTable table(lower, upper, index, held);
  const int64_t k = scores.size(1);
  STD_TORCH_CHECK(k >= 1, "scores must have at least one column");
  double* best_scores = array_to_write<double>(scores, "scores", ScalarType::Double, table.rows * k);
  int64_t* best_columns = array_to_write<int64_t>(neighbours, "neighbours", ScalarType::Long, table.rows * k);
  with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    STD_TORCH_CHECK(score.rows == table.rows, "rows of query and lower must be as many");
    std::atomic<bool> outside{false};
    parallel(table.rows, 128 * k, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end && !scratch.outside; ++i) {
        Candidates row = table[i];
        drop_worse(k, row);
        select(score, i, k, row, scratch);
        scratch.best.resize(k, {-std::numeric_limits<double>::infinity(), -1});
        for (int64_t c = 0; c < k; ++c) {
          best_scores[i * k + c] = scratch.best[c].score;
          best_columns[i * k + c] = scratch.best[c].index;
        }
      }
      if (scratch.outside) outside = true;
    });
    check_inside(!outside);
  });
}

}  // namespace replearn
