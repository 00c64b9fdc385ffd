// Features as panels (mining_kernels.h), and strips of the distances between them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "tile_operators.h"

namespace replearn {

// Uninitialised memory that starts at a cache line: a vector that crosses one costs two loads.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kLine))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t k) const { return data_.get()[k]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls body(source pointer) with the tensor's data as what it is.
template <typename F>
void with_data(const Tensor& t, const F& body) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Half: return body(static_cast<const c10::Half*>(data));
    case ScalarType::BFloat16: return body(static_cast<const c10::BFloat16*>(data));
    case ScalarType::Float: return body(static_cast<const float*>(data));
    case ScalarType::Double: return body(static_cast<const double*>(data));
    default: STD_TORCH_CHECK(false, "embeddings must be fp16, bf16, fp32 or fp64");
  }
}

// The rows of x[N, d] as panels, converted to T and, for cosines, scaled to length 1. As many as 24 MB hold are packed once;
// the others whenever they are asked for, so that memory does not grow with N d.
template <typename T>
class Panels {
 public:
  Panels(const Tensor& x, Distance distance)
      : rows(x.size(0)), d(x.size(1)), distance(distance), x_(x), kept_count_(std::min(count(), kKeptBytes / bytes())),
        kept_(kept_count_ * size()) {
    if (distance == Distance::cosine) find_zeros();
    parallel(kept_count_, size(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack(p, kept_.get() + p * size());
    });
  }

  const int64_t rows, d;
  const Distance distance;

  static int64_t width() { return kernels_of<T>().mining.panel; }
  int64_t count() const { return (rows + width() - 1) / width(); }
  int64_t padded() const { return count() * width(); }  // rows, with those that fill the last panel
  int64_t size() const { return width() * d; }

  // Panel p, which may lie in `scratch`, of size().
  const T* get(int64_t p, T* scratch) const {
    if (p < kept_count_) return kept_.get() + p * size();
    pack(p, scratch);
    return scratch;
  }

  // Strikes from a tile of distances, rows and columns [first, first + count), what is no pair: a row with itself, and
  // columns that are no rows. A row of zeros has the cosine distance 1 from every other.
  void correct(T* tile, int64_t stride, int64_t first_row, int64_t row_count, int64_t first_column, int64_t column_count) const {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    auto zero = std::lower_bound(zeros_.begin(), zeros_.end(), first_column);
    for (; zero != zeros_.end() && *zero < first_column + column_count; ++zero)
      for (int64_t i = 0; i < row_count; ++i) tile[i * stride + *zero - first_column] = 1;
    for (int64_t i = 0; i < row_count; ++i) {
      T* d = tile + i * stride;
      const int64_t self = first_row + i - first_column, real = std::max<int64_t>(rows - first_column, 0);
      if (std::binary_search(zeros_.begin(), zeros_.end(), first_row + i)) std::fill_n(d, column_count, T(1));
      if (self >= 0 && self < column_count) d[self] = nan;
      if (real < column_count) std::fill(d + real, d + column_count, nan);
    }
  }

 private:
  static constexpr int64_t kKeptBytes = 24 << 20;
  int64_t bytes() const { return std::max<int64_t>(size() * sizeof(T), 1); }

  void pack(int64_t p, T* panel) const {
    const int64_t w = width(), first = p * w, count = std::min(w, rows - first);
    const int64_t row_stride = x_.stride(0), stride = x_.stride(1);
    if (count < w) std::fill_n(panel, size(), T(0));
    with_data(x_, [&](const auto* x) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < d; ++k) panel[k * w + i] = static_cast<T>(x[(first + i) * row_stride + k * stride]);
    });
    if (distance == Distance::cosine) kernels_of<T>().mining.to_unit_rows(panel, d);
  }

  void find_zeros() {
    with_data(x_, [&](const auto* x) {
      for (int64_t i = 0; i < rows; ++i) {
        int64_t k = 0;
        while (k < d && static_cast<T>(x[i * x_.stride(0) + k * x_.stride(1)]) == 0) ++k;
        if (k == d) zeros_.push_back(i);
      }
    });
  }

  const Tensor& x_;
  const int64_t kept_count_;
  const Buffer<T> kept_;
  std::vector<int64_t> zeros_;  // ascending
};

// Some rows in flight, and their distances from columns.
template <typename T>
class Anchors {
 public:
  Anchors(const Panels<T>& panels, int64_t height)
      : panels_(panels), own_((height / panels.width() + 2) * panels.size()), scratch_(panels.size()) {}

  // From here on rows [first, last), where `first` starts a group.
  void take(int64_t first, int64_t last) {
    const int64_t width = panels_.width(), group = kernels_of<T>().mining.group;
    first_ = first;
    rows_ = last - first;
    groups_.clear();
    for (int64_t p = first / width; p * width < last; ++p) {
      const T* panel = panels_.get(p, own_.get() + (p - first / width) * panels_.size());
      for (int64_t i = std::max(first, p * width); i < std::min(last, (p + 1) * width); i += group)
        groups_.push_back(panel + i % width);
    }
  }

  // tile[i * stride + j]: the distance of row first + i from column begin + j, for whole panels of columns [begin, end)
  // and, past the last row, as many rows as make a group.
  void distances(int64_t begin, int64_t end, T* tile, int64_t stride) const {
    const auto& kernels = kernels_of<T>().mining;
    for (int64_t j = begin; j < end; j += panels_.width()) {
      const T* columns = panels_.get(j / panels_.width(), scratch_.get());
      T* out = tile + j - begin;
      for (const T* group : groups_) {
        kernels.distances(group, columns, panels_.d, panels_.distance, out, stride);
        out += kernels.group * stride;
      }
    }
    panels_.correct(tile, stride, first_, rows_, begin, end - begin);
  }

 private:
  const Panels<T>& panels_;
  const Buffer<T> own_, scratch_;
  std::vector<const T*> groups_;
  int64_t first_ = 0, rows_ = 0;
};

}  // namespace replearn
