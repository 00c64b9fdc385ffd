// Listed pairs: gathers row by row, never [P, d].
#include "listed_pairs.h"

#include <atomic>
#include <numeric>
#include <vector>

#include "tile_operators.h"

namespace replearn {

namespace {

const int64_t* indices(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous() && t.size(0) == count,
                  name, " must be a contiguous int64 CPU tensor, as long as i");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// The arguments, checked but for the range of the indices.
template <typename T>
struct ListedPairs {
  ListedPairs(const Tensor& x, const Tensor& i, const Tensor& j)
      : rows(x.size(0)), d(x.size(1)), stride(x.stride(0)), count(i.dim() == 1 ? i.size(0) : -1), i(indices(i, "i", count)),
        j(indices(j, "j", count)) {
    check_matrix<T>(x, "x", -1, -1);
    data = static_cast<const T*>(x.const_data_ptr());
  }
  bool inside(int64_t p) const { return i[p] >= 0 && i[p] < rows && j[p] >= 0 && j[p] < rows; }
  void check(bool all_inside) const { STD_TORCH_CHECK(all_inside, "indices of pairs must be in [0, ", rows, ")"); }
  const T* row(int64_t number) const { return data + number * stride; }
  int64_t cost() const { return d / 4 + 8; }  // of a pair, in elements of a tile

  const int64_t rows, d, stride, count;
  const int64_t *const i, *const j;
  const T* data;
};

template <typename T>
Tensor squares(const Tensor& x, const Tensor& i, const Tensor& j) {
  const ListedPairs<T> pairs(x, i, j);
  Tensor result = torch::stable::new_empty(x, {pairs.count});
  T* to = static_cast<T*>(result.mutable_data_ptr());
  std::atomic<bool> inside{true};
  const auto squared_distance = kernels_of<T>().squared_distance;
  parallel(pairs.count, pairs.cost(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (!pairs.inside(p)) {
        inside = false;
        return;
      }
      to[p] = squared_distance(pairs.row(pairs.i[p]), pairs.row(pairs.j[p]), pairs.d);
    }
  });
  pairs.check(inside);
  return result;
}

// Calls body(row, other, weight) for both ends of every pair with a weight, in order.
template <typename T, typename F>
void for_ends(const ListedPairs<T>& pairs, const T* weight, const F& body) {
  for (int64_t p = 0; p < pairs.count; ++p)
    if (const T w = weight[p]; w != 0) {
      body(pairs.i[p], pairs.j[p], w);
      body(pairs.j[p], pairs.i[p], w);
    }
}

template <typename T>
void add_differences(const Tensor& gradient, const Tensor& x, const Tensor& i, const Tensor& j, const Tensor& weight) {
  const ListedPairs<T> pairs(x, i, j);
  check_matrix<T>(gradient, "gradient", pairs.rows, pairs.d);
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == kScalarType<T> && weight.dim() == 1 &&
                      weight.is_contiguous() && weight.size(0) == pairs.count,
                  "weight must be a contiguous CPU tensor [", pairs.count, "] of x's dtype");
  const T* weights = static_cast<const T*>(weight.const_data_ptr());
  bool inside = true;
  for (int64_t p = 0; p < pairs.count; ++p) inside = inside && pairs.inside(p);
  pairs.check(inside);

  struct End {
    int64_t other;
    T weight;
  };
  std::vector<int64_t> next(pairs.rows + 1, 0);  // where a row's ends start, then where they end
  for_ends(pairs, weights, [&](int64_t row, int64_t, T) { ++next[row + 1]; });
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<End> ends(next.back());
  for_ends(pairs, weights, [&](int64_t row, int64_t other, T w) { ends[next[row]++] = {other, w}; });

  T* to = static_cast<T*>(gradient.mutable_data_ptr());
  const int64_t each = static_cast<int64_t>(ends.size()) / std::max<int64_t>(pairs.rows, 1) + 1;
  const auto add_difference = kernels_of<T>().add_difference;
  parallel(pairs.rows, each * pairs.cost(), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(pairs.d);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row ? next[row - 1] : 0;
      if (first == next[row]) continue;
      T* out = to + row * gradient.stride(0);
      std::copy(out, out + pairs.d, sum.begin());
      for (int64_t k = first; k < next[row]; ++k)
        add_difference(sum.data(), ends[k].weight, pairs.row(row), pairs.row(ends[k].other), pairs.d);
      std::copy(sum.begin(), sum.end(), out);
    }
  });
}

void check_rank(const Tensor& x) { STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim()); }

}  // namespace

Tensor pair_squares(Tensor x, Tensor i, Tensor j) {
  check_rank(x);
  return (is_double(x) ? squares<double> : squares<float>)(x, i, j);
}

void add_differences_(Tensor gradient, Tensor x, Tensor i, Tensor j, Tensor weight) {
  check_rank(x);
  (is_double(x) ? add_differences<double> : add_differences<float>)(gradient, x, i, j, weight);
}

}  // namespace replearn
