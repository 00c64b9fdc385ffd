// Given triplets: gathers row by row, never [T, d].
#include "triplet_loss.h"

#include <atomic>
#include <numeric>
#include <vector>

#include "tile_operators.h"

namespace replearn {

namespace {

const int64_t* indices(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous() && t.size(0) == count,
                  name, " must be a contiguous int64 CPU tensor, as long as anchor");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

template <typename T>
const T* matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == kScalarType<T> && t.dim() == 2 && t.is_contiguous() &&
                      t.size(0) == rows && t.size(1) == columns,
                  name, " must be a contiguous CPU tensor [", rows, ", ", columns, "] of x's dtype");
  return static_cast<const T*>(t.const_data_ptr());
}

// The arguments, checked but for the range of the indices.
template <typename T>
struct Triplets {
  Triplets(const Tensor& x, const Tensor& anchor, const Tensor& positive, const Tensor& negative)
      : rows(x.size(0)), d(x.size(1)), data(matrix<T>(x, "x", rows, d)), count(anchor.dim() == 1 ? anchor.size(0) : -1), anchor(indices(anchor, "anchor", count)),
        positive(indices(positive, "positive", count)), negative(indices(negative, "negative", count)) {}
  bool inside(int64_t t) const { return inside_rows(anchor[t]) && inside_rows(positive[t]) && inside_rows(negative[t]); }
  bool inside_rows(int64_t i) const { return i >= 0 && i < rows; }
  void check(bool all_inside) const { STD_TORCH_CHECK(all_inside, "indices of triplets must be in [0, ", rows, ")"); }
  const T* row(int64_t i) const { return data + i * d; }

  const int64_t rows, d;
  const T* const data;
  const int64_t count;
  const int64_t *anchor, *positive, *negative;
};

template <typename T>
Tensor distances(const Tensor& x, const Tensor& anchor, const Tensor& positive, const Tensor& negative) {
  const Triplets<T> triplets(x, anchor, positive, negative);
  Tensor result = torch::stable::new_empty(x, {2, triplets.count});
  T* to = static_cast<T*>(result.mutable_data_ptr());
  std::atomic<bool> inside{true};
  const auto squared_distance = kernels_of<T>().squared_distance;
  parallel(triplets.count, triplets.d / 4 + 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (!triplets.inside(t)) {
        inside = false;
        return;
      }
      const T* of_anchor = triplets.row(triplets.anchor[t]);
      to[t] = squared_distance(of_anchor, triplets.row(triplets.positive[t]), triplets.d);
      to[triplets.count + t] = squared_distance(of_anchor, triplets.row(triplets.negative[t]), triplets.d);
    }
  });
  triplets.check(inside);
  return result;
}

// Calls body(row, other, weight) for both ends of every pair with a weight, in order.
template <typename T, typename F>
void for_ends(const Triplets<T>& triplets, const T* weight, const F& body) {
  for (int64_t t = 0; t < triplets.count; ++t) {
    const int64_t a = triplets.anchor[t], p = triplets.positive[t], n = triplets.negative[t];
    if (const T w = weight[t]; w != 0) {
      body(a, p, w);
      body(p, a, w);
    }
    if (const T w = weight[triplets.count + t]; w != 0) {
      body(a, n, w);
      body(n, a, w);
    }
  }
}

template <typename T>
Tensor gradient(const Tensor& x, const Tensor& anchor, const Tensor& positive, const Tensor& negative, const Tensor& weight) {
  const Triplets<T> triplets(x, anchor, positive, negative);
  const T* weights = matrix<T>(weight, "weight", 2, triplets.count);
  bool inside = true;
  for (int64_t t = 0; t < triplets.count; ++t) inside = inside && triplets.inside(t);
  triplets.check(inside);

  struct End {
    int64_t other;
    T weight;
  };
  std::vector<int64_t> next(triplets.rows + 1, 0);  // where a row's ends start, then where they end
  for_ends(triplets, weights, [&](int64_t row, int64_t, T) { ++next[row + 1]; });
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<End> ends(next.back());
  for_ends(triplets, weights, [&](int64_t row, int64_t other, T w) { ends[next[row]++] = {other, w}; });

  Tensor result = torch::stable::new_empty(x, {triplets.rows, triplets.d});
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const int64_t each = static_cast<int64_t>(ends.size()) / std::max<int64_t>(triplets.rows, 1) + 1;
  parallel(triplets.rows, each * (triplets.d / 4 + 8), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(triplets.d);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t k = i ? next[i - 1] : 0; k < next[i]; ++k)
        kernels_of<T>().add_difference(sum.data(), ends[k].weight, triplets.row(i), triplets.row(ends[k].other), triplets.d);
      std::copy(sum.begin(), sum.end(), out + i * triplets.d);
    }
  });
  return result;
}

}  // namespace

Tensor triplet_distances(Tensor x, Tensor anchor, Tensor positive, Tensor negative) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  return (is_double(x) ? distances<double> : distances<float>)(x, anchor, positive, negative);
}

Tensor triplet_gradient(Tensor x, Tensor anchor, Tensor positive, Tensor negative, Tensor weight) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  return (is_double(x) ? gradient<double> : gradient<float>)(x, anchor, positive, negative, weight);
}

}  // namespace replearn
