// The softmax family's tile passes as operators: checks, threads, and the choice of kernels.
#include "softmax_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "tile_operators.h"

namespace replearn {

namespace {

// Rows whose column statistics are one partial. Fixed, so that the order of every sum, and with it the bits of the
// result, does not depend on the number of threads. 64 rows of 2,048 columns are 512 KiB: both readings of the slab
// find it in the L2 cache.
constexpr int64_t kSlabRows = 64;

template <typename T>
void fold_statistics(const Tile<T>& tile, SumExp<T> rows, T* positive, SumExp<T> columns) {
  const auto& kernels = kernels_of<T>();
  const int64_t slabs = (tile.rows + kSlabRows - 1) / kSlabRows, padded = padded_columns(tile.columns);
  std::unique_ptr<T[]> partials;
  if (columns.max) partials.reset(new T[2 * slabs * padded]);

  parallel(slabs, kSlabRows * tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kSlabRows;
      T* partial = partials ? partials.get() + 2 * k * padded : nullptr;
      kernels.softmax_statistics(
          rows_of(tile, first, std::min(kSlabRows, tile.rows - first)), {rows.max + first, rows.sum + first},
          positive + first, {partial, partial ? partial + padded : nullptr});
    }
  });
  if (!columns.max) return;
  parallel(padded / kPadding, slabs * kPadding, [&](int64_t begin, int64_t end) {
    kernels.softmax_merge(partials.get(), slabs, padded, begin * kPadding, std::min(end * kPadding, tile.columns),
                          tile.steepness, columns);
  });
}

template <typename T>
void form_weights(const Tile<T>& tile, T* out, int64_t out_stride, Coefficients<T> rows, const T* positive_weight,
                  Coefficients<T> columns) {
  const int64_t slabs = (tile.rows + kSlabRows - 1) / kSlabRows;
  parallel(slabs, kSlabRows * tile.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kSlabRows;
      kernels_of<T>().softmax_weights(
          rows_of(tile, first, std::min(kSlabRows, tile.rows - first)), out + first * out_stride, out_stride,
          {rows.max + first, rows.log_sum + first, rows.weight + first, rows.offset + first}, positive_weight + first,
          columns);
    }
  });
}

template <typename T>
void statistics(const Tensor& s, double scale, const std::optional<Tensor>& target, int64_t first_column,
                const Tensor& row_table, const std::optional<Tensor>& column_table) {
  const Tile<T> tile = tile_of<T>(s, scale, target, first_column);
  const Table<T> rows(row_table, "row_table", 3, tile.rows);
  SumExp<T> columns{};
  if (column_table) {
    const Table<T> table(*column_table, "column_table", 2, tile.columns);
    columns = {table[0], table[1]};
  }
  fold_statistics(tile, {rows[0], rows[1]}, rows[2], columns);
}

template <typename T>
void weights(const Tensor& s, const Tensor& out, double scale, const std::optional<Tensor>& target, int64_t first_column,
             const Tensor& row_table, const std::optional<Tensor>& column_table) {
  const Tile<T> tile = tile_of<T>(s, scale, target, first_column);
  check_matrix<T>(out, "out", tile.rows, tile.columns);
  const Table<T> rows(row_table, "row_coefficients", 5, tile.rows);
  Coefficients<T> columns{};
  if (column_table) {
    const Table<T> table(*column_table, "column_coefficients", 4, tile.columns);
    columns = {table[0], table[1], table[2], table[3]};
  }
  form_weights(tile, static_cast<T*>(out.mutable_data_ptr()), out.stride(0), {rows[0], rows[1], rows[2], rows[4]},
               rows[3], columns);
}

// The sum of the losses and, in place, W of the products s: the passes above with the O(N) combination between them.
template <typename T>
double whole(Tensor& s, const std::optional<Tensor>& target, double scale, bool symmetric) {
  Tile<T> tile = tile_of<T>(s, scale, target, 0);
  const int64_t n = tile.rows, m = tile.columns;
  std::vector<int64_t> diagonal(target ? 0 : n);
  if (!target) {
    std::iota(diagonal.begin(), diagonal.end(), 0);
    tile.target = diagonal.data();
  }
  std::vector<T> row(5 * n, 0), column(symmetric ? 4 * m : 0, 0);
  T *max = row.data(), *sum = max + n, *positive = sum + n, *weight = positive + n, *zero = weight + n;
  T *column_max = column.data(), *column_sum = column_max + m, *column_weight = column_sum + m;
  std::fill_n(max, n, std::numeric_limits<T>::lowest());
  if (symmetric) std::fill_n(column_max, m, std::numeric_limits<T>::lowest());
  fold_statistics(tile, {max, sum}, positive, symmetric ? SumExp<T>{column_max, column_sum} : SumExp<T>{});

  const T share = symmetric ? T(0.5) : T(1);  // of each direction in a row's loss
  double total = 0;
  for (int64_t j = 0; symmetric && j < m; ++j) column_sum[j] = std::log(column_sum[j]);
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = std::log(sum[i]);
    weight[i] = share;
    T loss = tile.steepness * (max[i] - positive[i]) + sum[i];
    if (symmetric) {
      const int64_t j = tile.target[i];
      loss += tile.steepness * (column_max[j] - positive[i]) + column_sum[j];
      column_weight[j] += share;
    }
    total += share * loss;
  }
  std::fill_n(positive, n, T(1));  // from here on the positive's weight
  form_weights(tile, static_cast<T*>(s.mutable_data_ptr()), tile.stride, {max, sum, weight, zero}, positive,
               symmetric ? Coefficients<T>{column_max, column_sum, column_weight, column_weight + m} : Coefficients<T>{});
  return total;
}

// <a, b> of matrices with adjacent columns: products of a row in T, their sum over rows in fp64.
template <typename T>
double inner_product(const Tensor& a, const Tensor& b) {
  const T *x = static_cast<const T*>(a.const_data_ptr()), *y = static_cast<const T*>(b.const_data_ptr());
  const int64_t rows = b.size(0), d = b.size(1), x_stride = a.stride(0), y_stride = b.stride(0);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    T sums[8] = {};  // eight sums side by side: a compiler may not reorder one
    int64_t k = 0;
    for (; k + 8 <= d; k += 8)
      for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += x[i * x_stride + k + lane] * y[i * y_stride + k + lane];
    for (; k < d; ++k) sums[0] += x[i * x_stride + k] * y[i * y_stride + k];
    for (const T sum : sums) total += sum;
  }
  return total;
}

template <typename T>
void multiply(Tensor& t, double factor) {
  T* x = static_cast<T*>(t.mutable_data_ptr());
  const int64_t count = t.numel();
  for (int64_t k = 0; k < count; ++k) x[k] *= static_cast<T>(factor);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> one_tile(const Tensor& query, const Tensor& key,
                                                    const std::optional<Tensor>& target, double scale, double share,
                                                    bool symmetric, bool needs_query, bool needs_key) {
  Tensor s = torch::stable::matmul(query, torch::stable::transpose(key, 0, 1));
  Tensor loss = torch::stable::new_empty(s, {});
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(whole<T>(s, target, scale, symmetric) * share);
  Tensor d_query = needs_query ? torch::stable::matmul(s, key) : torch::stable::new_empty(s, {0});
  Tensor d_key = needs_key ? torch::stable::matmul(torch::stable::transpose(s, 0, 1), query)
                           : torch::stable::new_empty(s, {0});
  Tensor d_scale = torch::stable::new_empty(s, {}, ScalarType::Double);
  *static_cast<double*>(d_scale.mutable_data_ptr()) =
      share * (needs_query ? inner_product<T>(query, d_query) : inner_product<T>(key, d_key));
  multiply<T>(d_query, scale * share);
  multiply<T>(d_key, scale * share);
  return {loss, d_query, d_key, d_scale};
}

}  // namespace

void softmax_statistics_(Tensor s, double scale, std::optional<Tensor> target, int64_t first_column,
                         Tensor row_table, std::optional<Tensor> column_table) {
  if (is_double(s))
    statistics<double>(s, scale, target, first_column, row_table, column_table);
  else
    statistics<float>(s, scale, target, first_column, row_table, column_table);
}

void softmax_weights_(Tensor s, Tensor out, double scale, std::optional<Tensor> target, int64_t first_column,
                      Tensor row_coefficients, std::optional<Tensor> column_coefficients) {
  if (is_double(s))
    weights<double>(s, out, scale, target, first_column, row_coefficients, column_coefficients);
  else
    weights<float>(s, out, scale, target, first_column, row_coefficients, column_coefficients);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_one_tile(
    Tensor query, Tensor key, std::optional<Tensor> target, double scale, double share, bool symmetric,
    bool needs_query, bool needs_key) {
  STD_TORCH_CHECK(query.dim() == 2 && key.dim() == 2 && query.size(1) == key.size(1),
                  "query and key must be [N, d] and [M, d]");
  STD_TORCH_CHECK(needs_query || needs_key, "one of the sums must be needed");
  query = torch::stable::contiguous(query);
  key = torch::stable::contiguous(key);
  const int64_t n = query.size(0), m = key.size(0);
  if (target) {
    STD_TORCH_CHECK(target->is_cpu() && target->scalar_type() == ScalarType::Long && target->dim() == 1 && target->size(0) == n,
                    "target must be an int64 CPU tensor with one entry per row of query");
    target = torch::stable::contiguous(*target);
    const auto* columns = static_cast<const int64_t*>(target->const_data_ptr());
    STD_TORCH_CHECK(std::all_of(columns, columns + n, [m](int64_t j) { return j >= 0 && j < m; }),
                    "target must be in [0, ", m, ")");
  } else {
    STD_TORCH_CHECK(n <= m, "target is needed when there are more queries than keys");
  }
  return is_double(query)
             ? one_tile<double>(query, key, target, scale, share, symmetric, needs_query, needs_key)
             : one_tile<float>(query, key, target, scale, share, symmetric, needs_query, needs_key);
}

}  // namespace replearn
