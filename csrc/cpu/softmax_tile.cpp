// The softmax family's tile passes as operators: checks, threads, and the choice of kernels.
#include "softmax_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "distance_tile.h"

namespace replearn {

namespace {

template <typename T>
Statistics<T> at(Statistics<T> of, int64_t first) {
  return {of.max + first, of.sum + first, of.positive + first};
}

template <typename T>
Coefficients<T> at(Coefficients<T> of, int64_t first) {
  return {of.max + first, of.log_sum + first, of.weight + first, of.positive + first, of.offset + first};
}

template <typename T>
void fold_statistics(const Tile<T>& tile, SoftmaxRoles roles, Statistics<T> rows, Statistics<T> columns,
                     const Distances<T>& distances) {
  const auto& kernels = kernels_of<T>();
  const int64_t slabs = slabs_of(tile.rows), padded = padded_columns(tile.columns), step = (columns.positive ? 3 : 2) * padded;
  std::unique_ptr<T[]> partials;
  if (columns.max) partials.reset(new T[slabs * step]);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    distances.form(slab, first);
    T* partial = partials ? partials.get() + k * step : nullptr;
    Statistics<T> of_columns{};
    if (partial) of_columns = {partial, partial + padded, columns.positive ? partial + 2 * padded : nullptr};
    kernels.softmax_statistics(slab, roles, at(rows, first), of_columns);
  });
  if (!columns.max) return;
  parallel(padded / kPadding, slabs * kPadding, [&](int64_t begin, int64_t end) {
    kernels.softmax_merge(partials.get(), slabs, padded, begin * kPadding, std::min(end * kPadding, tile.columns),
                          tile.steepness, columns);
  });
}

template <typename T>
void form_weights(const Tile<T>& tile, SoftmaxRoles roles, T* out, int64_t out_stride, Coefficients<T> rows,
                  Coefficients<T> columns, const GivenPoints& points, const GivenGradients& gradients) {
  const Distances<T> distances(points, tile);
  DistanceChain<T> chain(distances, gradients, tile, out, out_stride);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    if (!gradients.formed) distances.form(slab, first);
    kernels_of<T>().softmax_weights(slab, roles, out + first * out_stride, out_stride, at(rows, first), columns);
    chain.apply(k, first, slab);
  });
  chain.finish();
}

template <typename T>
void statistics(const Tensor& s, const Pairs& pairs, SoftmaxRoles roles, const Tensor& row_table,
                const std::optional<Tensor>& column_table, const GivenPoints& points) {
  const Tile<T> tile = tile_of<T>(s, pairs);
  const Table<T> rows(row_table, "row_table", 3, tile.rows);
  Statistics<T> columns{};
  if (column_table) {
    const bool positives = column_table->dim() == 2 && column_table->size(0) == 3;
    const Table<T> table(*column_table, "column_table", positives ? 3 : 2, tile.columns);
    columns = {table[0], table[1], positives ? table[2] : nullptr};
  }
  fold_statistics(tile, roles, {rows[0], rows[1], rows[2]}, columns, Distances<T>(points, tile));
}

template <typename T>
Coefficients<T> coefficients(const Tensor& t, const char* name, int64_t count) {
  const Table<T> table(t, name, 5, count);
  return {table[0], table[1], table[2], table[3], table[4]};
}

template <typename T>
void weights(const Tensor& s, const Tensor& out, const Pairs& pairs, SoftmaxRoles roles, const Tensor& row_table,
             const std::optional<Tensor>& column_table, const GivenPoints& points, const GivenGradients& gradients) {
  const Tile<T> tile = tile_of<T>(s, pairs);
  check_matrix<T>(out, "out", tile.rows, tile.columns);
  Coefficients<T> columns{};
  if (column_table) columns = coefficients<T>(*column_table, "column_coefficients", tile.columns);
  form_weights(tile, roles, static_cast<T*>(out.mutable_data_ptr()), out.stride(0),
               coefficients<T>(row_table, "row_coefficients", tile.rows), columns, points, gradients);
}

// The sum of the losses and, in place, W of the products s: the passes above with the O(N) combination between them.
template <typename T>
double whole(Tensor& s, const std::optional<Tensor>& target, double scale, bool symmetric) {
  Tile<T> tile = tile_of<T>(s, {scale, 0, target, {}, {}, 0, false});
  const int64_t n = tile.rows, m = tile.columns;
  std::vector<int64_t> diagonal(target ? 0 : n);
  if (!target) {
    std::iota(diagonal.begin(), diagonal.end(), 0);
    tile.target = diagonal.data();
  }
  std::vector<T> row(5 * n, 0), column(symmetric ? 4 * m : 0, 0);
  T *max = row.data(), *sum = max + n, *positive = sum + n, *weight = positive + n, *zero = weight + n;
  T *column_max = column.data(), *column_sum = column_max + m, *column_weight = column_sum + m, *column_zero = column_weight + m;
  std::fill_n(max, n, std::numeric_limits<T>::lowest());
  if (symmetric) std::fill_n(column_max, m, std::numeric_limits<T>::lowest());
  fold_statistics(tile, {}, {max, sum, positive},
                  symmetric ? Statistics<T>{column_max, column_sum, nullptr} : Statistics<T>{}, Distances<T>({}, tile));

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
  Coefficients<T> columns{};
  if (symmetric) columns = {column_max, column_sum, column_weight, column_zero, column_zero};
  form_weights(tile, {}, tile.s, tile.stride, {max, sum, weight, positive, zero}, columns, {}, {});
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

void softmax_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                         std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                         bool diagonal, bool target_apart, bool groups_ignored, Tensor row_table,
                         std::optional<Tensor> column_table,
                         std::optional<Tensor> rows, std::optional<Tensor> columns,
                         std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                         bool squared_distances) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const auto run = is_double(s) ? statistics<double> : statistics<float>;
  run(s, pairs, {target_apart, groups_ignored}, row_table, column_table, points);
}

void softmax_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                      std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                      bool diagonal, bool target_apart, bool groups_ignored, Tensor row_coefficients,
                      std::optional<Tensor> column_coefficients,
                      std::optional<Tensor> rows, std::optional<Tensor> columns,
                      std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                      bool squared_distances, bool formed, std::optional<Tensor> row_points,
                      std::optional<Tensor> d_rows, std::optional<Tensor> column_points,
                      std::optional<Tensor> d_columns) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const GivenGradients gradients{formed, row_points, d_rows, column_points, d_columns};
  const auto run = is_double(s) ? weights<double> : weights<float>;
  run(s, out, pairs, {target_apart, groups_ignored}, row_coefficients, column_coefficients, points, gradients);
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
