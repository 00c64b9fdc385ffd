// What both walks of retrieval are made of: a pair's score, and a tile of the filter, checked.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>

#include "retrieval.h"
#include "tile_operators.h"

namespace replearn {

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
inline bool better(const Scored& a, const Scored& b) { return a.score != b.score ? a.score > b.score : a.index < b.index; }

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

}  // namespace replearn
