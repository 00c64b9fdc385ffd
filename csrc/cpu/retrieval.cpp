// Retrieval as operators.
#include "retrieval.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "tile_operators.h"

namespace replearn {

namespace {

template <typename T>
const T* array(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.numel() == count, name,
                  " must be a contiguous CPU tensor of ", count, " entries and its dtype, got ", t.numel());
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* array_to_write(const Tensor& t, const char* name, ScalarType type, int64_t count) {
  return const_cast<T*>(array<T>(t, name, type, count));
}

// A column and its score. The better of two has the higher score, of equal ones the lower index.
struct Scored {
  double score;
  int64_t index;
};
bool better(const Scored& a, const Scored& b) { return a.score != b.score ? a.score > b.score : a.index < b.index; }

constexpr int64_t kAhead = 4;  // columns that are fetched before they are scored

// The arguments REPLEARN_SCORES, checked.
template <typename T>
class Scores {
 public:
  Scores(const Tensor& query, const Tensor& gallery, bool distance, const Tensor& query_factor,
         const Tensor& gallery_factor, const Tensor& to_filter, const Tensor& shift)
      : rows(query.size(0)), columns(gallery.size(0)), d_(query.size(1)), distance_(distance) {
    check_matrix<T>(query, "query", -1, -1);
    check_matrix<T>(gallery, "gallery", -1, d_);
    query_ = static_cast<const T*>(query.const_data_ptr());
    gallery_ = static_cast<const T*>(gallery.const_data_ptr());
    query_stride_ = query.stride(0);
    gallery_stride_ = gallery.stride(0);
    query_factor_ = array<double>(query_factor, "query_factor", ScalarType::Double, rows);
    gallery_factor_ = array<double>(gallery_factor, "gallery_factor", ScalarType::Double, columns);
    to_filter_ = array<double>(to_filter, "to_filter", ScalarType::Double, rows);
    shift_ = array<double>(shift, "shift", ScalarType::Double, rows);
    const auto& set = instruction_set().retrieval;
    if constexpr (sizeof(T) == 4)
      kernels_ = set.exact_fp32;
    else
      kernels_ = set.exact_fp64;
  }

  Scored operator()(int64_t i, int64_t j) const {
    const T *x = query_ + i * query_stride_, *y = gallery_ + j * gallery_stride_;
    // Zeros of either sign are one score.
    return {distance_ ? 0.0 - kernels_.square(x, y, d_) : kernels_.dot(x, y, d_) * query_factor_[i] * gallery_factor_[j] + 0.0, j};
  }

  // Column j from memory, to be scored soon.
  void fetch(int64_t j) const {
    const char* y = reinterpret_cast<const char*>(gallery_ + j * gallery_stride_);
    for (int64_t byte = 0; byte < static_cast<int64_t>(d_ * sizeof(T)); byte += 64) __builtin_prefetch(y + byte);
  }

  // fp32 numbers that the score, as the filter counts it, lies between.
  std::tuple<float, float> bounds(int64_t i, double score) const {
    const double v = score * to_filter_[i];
    const double error = (std::abs(v) + std::abs(shift_[i])) * (d_ + 8) * std::numeric_limits<double>::epsilon();
    return {below(v + shift_[i] - error), -below(-(v + shift_[i] + error))};
  }

  const int64_t rows, columns;

 private:
  static float below(double v) {
    const float f = static_cast<float>(v);
    return f > v ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f;
  }

  const int64_t d_;
  const bool distance_;
  const T *query_, *gallery_;
  int64_t query_stride_, gallery_stride_;
  const double *query_factor_, *gallery_factor_, *to_filter_, *shift_;
  ExactKernels<T> kernels_;
};

// A tile of similarities of element type S with its filter, checked.
template <typename S>
struct FilterTile {
  FilterTile(const Tensor& s, const Tensor& filter, const Tensor& factor, double relative,
             const Tensor& row_ids, const Tensor& column_ids)
      : rows(s.size(0)), columns(s.size(1)), stride(s.stride(0)), s(static_cast<const S*>(s.const_data_ptr())),
        relative(static_cast<float>(relative)) {
    const Table<float> table(filter, "filter", 4, columns);
    of_columns = {table[0], table[1], table[2], table[3], {}};
    row_factor = array<float>(factor, "row_factor", ScalarType::Float, rows);
    const int64_t count = row_ids.size(0);
    STD_TORCH_CHECK(count <= kIds && column_ids.size(0) == count, "there are at most ", kIds, " ids, of rows and columns");
    for (int64_t n = 0; n < count; ++n) {
      ids[n] = row_of_ids(row_ids, "row_ids", n, rows);
      of_columns.ids[n] = row_of_ids(column_ids, "column_ids", n, columns);
    }
  }
  const S* row(int64_t i) const { return s + i * stride; }
  FilterRow of_row(int64_t i) const {
    FilterRow row{row_factor[i], relative, {}};
    for (int64_t n = 0; n < kIds; ++n) row.ids[n] = ids[n] ? ids[n][i] : 0;
    return row;
  }

  const int64_t rows, columns, stride;
  const S* s;
  const float relative;
  const float* row_factor;
  const int32_t* ids[kIds] = {};
  FilterColumns of_columns;

 private:
  static const int32_t* row_of_ids(const Tensor& t, const char* name, int64_t n, int64_t count) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.dim() == 2 && t.size(1) == count &&
                        (count <= 1 || t.stride(1) == 1),
                    name, " must be an int32 CPU matrix of adjacent columns, ", count, " of them");
    return static_cast<const int32_t*>(t.const_data_ptr()) + n * t.stride(0);
  }
};

template <typename S>
const FilterKernels<S>& filter_kernels() {
  if constexpr (sizeof(S) == 4)
    return instruction_set().retrieval.of_fp32;
  else
    return instruction_set().retrieval.of_bf16;
}

// The candidates of rows, [R, room] each but the last two, [R].
struct CandidateTable {
  CandidateTable(const Tensor& lower, const Tensor& upper, const Tensor& index, const Tensor& held)
      : rows(lower.size(0)), room(lower.size(1)),
        lower(array_to_write<float>(lower, "lower", ScalarType::Float, rows * room)),
        upper(array_to_write<float>(upper, "upper", ScalarType::Float, rows * room)),
        index(array_to_write<int64_t>(index, "index", ScalarType::Long, rows * room)),
        held(array_to_write<int64_t>(held, "held", ScalarType::Long, rows)) {}
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

// The k best candidates, in order, or as many as there are.
template <typename T>
void select(const Scores<T>& scores, int64_t i, int64_t k, const Candidates& row, std::vector<Scored>& best) {
  best.clear();
  for (int64_t c = 0; c < row.count; ++c) {
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
float shrink(const Scores<T>& scores, int64_t i, int64_t k, Candidates& row, std::vector<Scored>& best, int64_t& scored) {
  const float threshold = drop_worse(k, row);
  if (row.count <= k + (row.room - k) / 2) return threshold;
  scored += row.count;
  select(scores, i, k, row, best);
  row.count = k;
  for (int64_t c = 0; c < k; ++c) {
    std::tie(row.lower[c], row.upper[c]) = scores.bounds(i, best[c].score);
    row.index[c] = best[c].index;
  }
  return row.lower[k - 1];
}

template <typename T, typename S>
int64_t nearest(const Scores<T>& scores, const FilterTile<S>& tile, int64_t first_column, int64_t k,
                const CandidateTable& table, float* threshold) {
  STD_TORCH_CHECK(table.rows == tile.rows && scores.rows == tile.rows, "rows of s, query and lower must be as many");
  STD_TORCH_CHECK(k >= 1 && table.room >= k + 32, "room must be at least k + 32, got ", table.room);
  STD_TORCH_CHECK(first_column >= 0 && first_column + tile.columns <= scores.columns, "columns beyond the gallery");
  std::atomic<int64_t> total{0};
  const auto collect = filter_kernels<S>().collect;
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    std::vector<Scored> best;
    int64_t scored = 0;
    for (int64_t i = begin; i < end; ++i) {
      Candidates row = table[i];
      for (int64_t from = 0; from < tile.columns;) {
        from = collect(tile.row(i), tile.of_columns, tile.of_row(i), threshold[i], from, tile.columns, first_column, row);
        if (from < tile.columns) threshold[i] = shrink(scores, i, k, row, best, scored);
      }
      table.held[i] = row.count;
    }
    total += scored;
  });
  return total;
}

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

// How many of the first `active` positives have fewer than `cutoff` columns before them, positives too; at least one.
int64_t still_active(const int64_t* better_than, int64_t active, int64_t cutoff) {
  int64_t before = 0;
  for (int64_t p = 0; p < active; ++p) {
    before += better_than[p];
    if (before + p >= cutoff) return std::max<int64_t>(p, 1);
  }
  return active;
}

template <typename T, typename S>
int64_t place(const Scores<T>& scores, const FilterTile<S>& tile, int64_t first_column, const PositiveTable& positives,
              const int64_t* cutoff, int64_t* active, int64_t* better_than) {
  STD_TORCH_CHECK(positives.rows == tile.rows && scores.rows == tile.rows, "rows of s, query and offsets must be as many");
  STD_TORCH_CHECK(first_column >= 0 && first_column + tile.columns <= scores.columns, "columns beyond the gallery");
  std::atomic<int64_t> total{0};
  const auto kernel = filter_kernels<S>().place;
  parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> unsure(tile.columns);
    int64_t count_scored = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (active[i] == 0) continue;
      const int64_t first = positives.offsets[i], last = first + active[i];
      STD_TORCH_CHECK(active[i] > 0 && last <= positives.offsets[i + 1], "active must be in [0, a row's positives]");
      const int64_t doubts =
          kernel(tile.row(i), tile.of_columns, tile.of_row(i), {positives.low + first, positives.high + first, last - first},
                 tile.columns, better_than + first, unsure.data());
      for (int64_t c = 0; c < doubts; ++c) {
        if (c + kAhead < doubts) scores.fetch(first_column + unsure[c + kAhead]);
        const int64_t column = first_column + unsure[c], beaten = positives.beaten_by(i, scores(i, column));
        if (beaten < last && positives.index[beaten] != column) ++better_than[beaten];
      }
      count_scored += doubts;
      active[i] = still_active(better_than + first, active[i], cutoff[i]);
    }
    total += count_scored;
  });
  return total;
}

// Calls body(scores) with the dtype of `query`.
template <typename F>
auto with_scores(REPLEARN_SCORES, const F& body) {
  if (is_double(query))
    return body(Scores<double>(query, gallery, distance, query_factor, gallery_factor, to_filter, shift));
  return body(Scores<float>(query, gallery, distance, query_factor, gallery_factor, to_filter, shift));
}

// Calls body(tile) with the dtype of `s`.
template <typename F>
auto with_tile(const Tensor& s, const Tensor& filter, const Tensor& row_factor, double relative,
               const Tensor& row_ids, const Tensor& column_ids, const F& body) {
  const ScalarType type = s.scalar_type();
  STD_TORCH_CHECK(s.is_cpu() && s.dim() == 2 && (s.size(1) <= 1 || s.stride(1) == 1), "s must be a CPU matrix of adjacent columns");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "s must be float32 or bfloat16");
  if (type == ScalarType::Float) return body(FilterTile<float>(s, filter, row_factor, relative, row_ids, column_ids));
  return body(FilterTile<Bfloat16>(s, filter, row_factor, relative, row_ids, column_ids));
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
  double* best_scores = array_to_write<double>(scores, "scores", ScalarType::Double, table.rows * k);
  int64_t* best_columns = array_to_write<int64_t>(neighbours, "neighbours", ScalarType::Long, table.rows * k);
  with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    parallel(table.rows, 128 * k, [&](int64_t begin, int64_t end) {
      std::vector<Scored> best;
      for (int64_t i = begin; i < end; ++i) {
        Candidates row = table[i];
        drop_worse(k, row);
        select(score, i, k, row, best);
        best.resize(k, {-std::numeric_limits<double>::infinity(), -1});
        for (int64_t c = 0; c < k; ++c) {
          best_scores[i * k + c] = best[c].score;
          best_columns[i * k + c] = best[c].index;
        }
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
               Tensor high, Tensor cutoff, Tensor active, Tensor better) {
  const PositiveTable table(offsets, scores, index, low, high);
  const int64_t* depth = array<int64_t>(cutoff, "cutoff", ScalarType::Long, table.rows);
  int64_t* looked_at = array_to_write<int64_t>(active, "active", ScalarType::Long, table.rows);
  int64_t* counts = array_to_write<int64_t>(better, "better", ScalarType::Long, table.total);
  return with_scores(query, gallery, distance, query_factor, gallery_factor, to_filter, shift, [&](const auto& score) {
    return with_tile(s, filter, row_factor, relative, row_ids, column_ids, [&](const auto& tile) {
      return place(score, tile, first_column, table, depth, looked_at, counts);
    });
  });
}

}  // namespace replearn
