// Triplet mining: strips of distances, one row after the other, each anchor's triplets on their own.
#include "mine_triplets.h"

#include <mutex>
#include <numeric>

#include "memory.h"
#include "panels.h"

namespace replearn {

namespace {

using Triplets = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
using Index = typename MiningKernels<T>::Index;

// The rows by class.
struct Classes {
  std::vector<int64_t> of;      // [N]: the class of a row, counted from 0
  std::vector<int64_t> first;   // [classes + 1]: where a class starts in `member`
  std::vector<int64_t> member;  // [N]: rows by class, ascending
  int64_t other = 0;            // the lowest row that is not of row 0's class

  explicit Classes(const Tensor& labels) : of(labels.size(0)), member(labels.size(0)) {
    const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
    const int64_t n = labels.size(0), stride = labels.stride(0);
    std::iota(member.begin(), member.end(), 0);
    std::sort(member.begin(), member.end(), [&](int64_t i, int64_t j) {
      return label[i * stride] != label[j * stride] ? label[i * stride] < label[j * stride] : i < j;
    });
    for (int64_t k = 0; k < n; ++k) {
      if (k == 0 || label[member[k] * stride] != label[member[k - 1] * stride]) first.push_back(k);
      of[member[k]] = static_cast<int64_t>(first.size()) - 1;
    }
    first.push_back(n);
    while (other < n && of[other] == of[0]) ++other;
  }

  int64_t rows() const { return static_cast<int64_t>(of.size()); }
  int64_t size(int64_t a) const { return first[of[a] + 1] - first[of[a]]; }
  bool has_triplets(int64_t a) const { return size(a) > 1 && size(a) < rows(); }
  bool have_triplets(int64_t begin, int64_t end) const {
    while (begin < end && !has_triplets(begin)) ++begin;
    return begin < end;
  }
  int64_t lowest_negative(int64_t a) const { return of[a] == of[0] ? other : 0; }

  // Calls body(p) for the positives of a, ascending.
  template <typename F>
  void for_positives(int64_t a, const F& body) const {
    for (int64_t k = first[of[a]]; k < first[of[a] + 1]; ++k)
      if (member[k] != a) body(member[k]);
  }
};

// Room for `count` triplets, and the places of those from `first` on.
struct Result {
  Tensor anchor, positive, negative;

  Result(const Tensor& like, int64_t count)
      : anchor(row(like, count)), positive(row(like, count)), negative(row(like, count)) {}

  static Tensor row(const Tensor& like, int64_t count) {
    Tensor t = torch::stable::new_empty(like, {count}, ScalarType::Long);
    advise_huge_pages_(t);
    return t;
  }
  Triplets triplets() const { return {anchor, positive, negative}; }
};

struct Places {
  int64_t *anchor, *positive, *negative;

  explicit Places(const Result& result)
      : anchor(static_cast<int64_t*>(result.anchor.mutable_data_ptr())),
        positive(static_cast<int64_t*>(result.positive.mutable_data_ptr())),
        negative(static_cast<int64_t*>(result.negative.mutable_data_ptr())) {}
};

// What comes before each of `counts`, and in the end the sum of all.
std::vector<int64_t> offsets_of(const std::vector<int64_t>& counts) {
  std::vector<int64_t> offsets(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), offsets.begin() + 1);
  return offsets;
}

// Calls body(a, row) for every anchor that has triplets, with its distances from all columns, [padded]; the body may
// write to them. An anchor's distance from itself and from padding is NaN.
template <typename T, typename F>
void for_rows(const Panels<T>& panels, const Classes& classes, const F& body) {
  // Of all threads' strips; the least is one group of anchors each. More anchors share a panel fetched from far.
  constexpr int64_t kMost = 128, kStripBytes = 32 << 20;
  const int64_t n = panels.rows, columns = panels.padded(), group = kernels_of<T>().mining.group;
  const int64_t stride = columns + 64 / sizeof(T);  // rows a power of two apart would share few sets of a cache
  const int64_t row_bytes = stride * sizeof(T) * torch::stable::get_num_threads();
  const int64_t height = std::clamp(kStripBytes / row_bytes / group * group, group, kMost);
  parallel((n + height - 1) / height, height * n * (1 + panels.d / 16), [&](int64_t begin, int64_t end) {
    Anchors<T> anchors(panels, height);
    const Buffer<T> strip(height * stride);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * height, last = std::min(first + height, n);
      if (!classes.have_triplets(first, last)) continue;
      anchors.take(first, last);
      anchors.distances(0, columns, strip.get(), stride);
      for (int64_t a = first; a < last; ++a)
        if (classes.has_triplets(a)) body(a, strip.get() + (a - first) * stride);
    }
  });
}

// The positives' distances, which become NaN in the row: what is left are negatives.
template <typename T>
std::vector<T> take_positives(const Classes& classes, int64_t a, T* row) {
  std::vector<T> distances;
  distances.reserve(classes.size(a) - 1);
  classes.for_positives(a, [&](int64_t p) {
    distances.push_back(row[p]);
    row[p] = std::numeric_limits<T>::quiet_NaN();
  });
  return distances;
}

// -- batch_hard -------------------------------------------------------------------------------------------------------

// The hardest so far of rows [0, count): by (distance, index), so that the order in which pairs are seen does not matter.
template <typename T>
class HardestRows {
 public:
  explicit HardestRows(int64_t count) : count_(count), values_(2 * count), indices_(2 * count) { reset(); }

  void reset() {
    std::fill_n(values_.get(), count_, T(-1));
    std::fill_n(values_.get() + count_, count_, std::numeric_limits<T>::infinity());
    std::fill_n(indices_.get(), 2 * count_, kNone);
  }
  Hardest<T> from(int64_t i) const {
    T* value = values_.get() + i;
    Index<T>* index = indices_.get() + i;
    return {value, value + count_, index, index + count_};
  }
  // Folds rows [0, count) of the other into those from `first` on.
  void merge(const HardestRows& other, int64_t first, int64_t count) {
    const Hardest<T> mine = from(first), theirs = other.from(0);
    for (int64_t i = 0; i < count; ++i) {
      const T p = theirs.positive[i], n = theirs.negative[i];
      if (p > mine.positive[i] || (p == mine.positive[i] && theirs.positive_index[i] < mine.positive_index[i])) {
        mine.positive[i] = p;
        mine.positive_index[i] = theirs.positive_index[i];
      }
      if (n < mine.negative[i] || (n == mine.negative[i] && theirs.negative_index[i] < mine.negative_index[i])) {
        mine.negative[i] = n;
        mine.negative_index[i] = theirs.negative_index[i];
      }
    }
  }
  static constexpr Index<T> kNone = std::numeric_limits<Index<T>>::max();

 private:
  const int64_t count_;
  const Buffer<T> values_;
  const Buffer<Index<T>> indices_;
};

// Distances are symmetric: rows [first, first + kHeight) meet only the columns from `first` on, and each tile serves its
// columns as it serves its rows.
template <typename T>
class BatchHard {
 public:
  static constexpr int64_t kHeight = 128, kWidth = 512;

  BatchHard(const Panels<T>& panels, const Classes& classes)
      : panels_(panels), group_(panels.padded()), hardest_(panels.padded()) {
    std::fill_n(group_.get(), panels.padded(), Index<T>(-1));
    std::copy(classes.of.begin(), classes.of.end(), group_.get());
    const int64_t blocks = (panels.rows + kHeight - 1) / kHeight;
    std::mutex mutex;
    // A block's work falls with its number: the first and the last together are as much as any two.
    parallel((blocks + 1) / 2, kHeight * panels.rows * (1 + panels.d / 16), [&](int64_t begin, int64_t end) {
      Workspace workspace(panels);
      for (int64_t q = begin; q < end; ++q) {
        fold_block(q, workspace);
        if (blocks - 1 - q != q) fold_block(blocks - 1 - q, workspace);
      }
      const std::lock_guard<std::mutex> lock(mutex);
      hardest_.merge(workspace.hardest, 0, panels.rows);
    });
  }

  Triplets triplets(const Tensor& like, const Classes& classes) const {
    int64_t count = 0;
    for (int64_t a = 0; a < panels_.rows; ++a) count += classes.has_triplets(a);
    const Result result(like, count);
    const Places to(result);
    const Hardest<T> hardest = hardest_.from(0);
    int64_t t = 0;
    for (int64_t a = 0; a < panels_.rows; ++a) {
      if (!classes.has_triplets(a)) continue;
      const int64_t* lowest = &classes.member[classes.first[classes.of[a]]];
      const Index<T> p = hardest.positive_index[a], n = hardest.negative_index[a], none = HardestRows<T>::kNone;
      to.anchor[t] = a;
      to.positive[t] = p != none ? p : lowest[0] != a ? lowest[0] : lowest[1];
      to.negative[t++] = n != none ? n : classes.lowest_negative(a);
    }
    return result.triplets();
  }

 private:
  struct Workspace {
    explicit Workspace(const Panels<T>& panels)
        : anchors(panels, kHeight), hardest(panels.padded()), of_columns(kWidth), tile(kHeight * kWidth) {}
    Anchors<T> anchors;
    HardestRows<T> hardest, of_columns;
    const Buffer<T> tile;
  };

  void fold_block(int64_t block, Workspace& workspace) const {
    auto& [anchors, hardest, of_columns, tile] = workspace;
    const int64_t first = block * kHeight, rows = std::min(kHeight, panels_.rows - first);
    anchors.take(first, first + rows);
    for (int64_t begin = first; begin < panels_.padded(); begin += kWidth) {
      const int64_t end = std::min(begin + kWidth, panels_.padded());
      anchors.distances(begin, end, tile.get(), kWidth);
      of_columns.reset();
      kernels_of<T>().mining.fold_hardest(tile.get(), kWidth, rows, end - begin, first, begin, group_.get() + first,
                                          group_.get() + begin, hardest.from(first), of_columns.from(0));
      hardest.merge(of_columns, begin, end - begin);
    }
  }

  const Panels<T>& panels_;
  const Buffer<Index<T>> group_;
  HardestRows<T> hardest_;
};

// -- semi_hard --------------------------------------------------------------------------------------------------------

// For each distance in `than`: the column of the least distance above it, or -1. Up to 64 are compared with every
// column. More are sorted: a column is a candidate for all below it, and only the best candidate of each gap counts.
template <typename T>
std::vector<Index<T>> nearest_beyond(const T* row, int64_t columns, const std::vector<T>& than, std::vector<Index<T>>& below) {
  constexpr size_t kFew = 64;
  const auto& kernels = kernels_of<T>().mining;
  std::vector<Index<T>> found(than.size());
  if (than.size() <= kFew) {
    kernels.nearest_beyond(row, columns, than.data(), than.size(), found.data());
    return found;
  }
  int64_t levels = 0;
  while ((size_t{1} << levels) <= than.size()) ++levels;
  std::vector<T> sorted((size_t{1} << levels) - 1, std::numeric_limits<T>::infinity());
  // Nothing is above NaN, as nothing is above infinity.
  std::transform(than.begin(), than.end(), sorted.begin(), [](T v) { return std::isnan(v) ? std::numeric_limits<T>::infinity() : v; });
  std::sort(sorted.begin(), sorted.begin() + than.size());
  below.resize(columns);
  kernels.count_below(row, columns, sorted.data(), levels, below.data());
  std::vector<Index<T>> best(than.size() + 2, -1);  // of the columns with so many below
  for (int64_t j = 0; j < columns; ++j)
    if (Index<T>& one = best[below[j]]; below[j] > 0 && (one < 0 || row[j] < row[one])) one = static_cast<Index<T>>(j);
  for (int64_t k = than.size(); k > 0; --k)
    if (best[k] < 0) best[k] = best[k + 1];
  for (size_t i = 0; i < than.size(); ++i)
    found[i] = std::isnan(than[i]) ? -1 : best[std::upper_bound(sorted.begin(), sorted.begin() + than.size(), than[i]) - sorted.begin()];
  return found;
}

template <typename T>
Triplets semi_hard(const Tensor& like, const Panels<T>& panels, const Classes& classes) {
  std::vector<int64_t> counts(panels.rows);
  for (int64_t a = 0; a < panels.rows; ++a) counts[a] = classes.has_triplets(a) ? classes.size(a) - 1 : 0;
  const auto offsets = offsets_of(counts);
  const Result result(like, offsets.back());
  const Places to(result);
  for_rows(panels, classes, [&](int64_t a, T* row) {
    std::vector<Index<T>> below;
    const auto distances = take_positives(classes, a, row);
    const auto nearest = nearest_beyond(row, panels.padded(), distances, below);
    const Index<T> farthest = kernels_of<T>().mining.farthest(row, panels.padded());
    const int64_t otherwise = farthest >= 0 ? farthest : classes.lowest_negative(a);
    int64_t t = offsets[a];
    classes.for_positives(a, [&](int64_t p) {
      const Index<T> n = nearest[t - offsets[a]];
      to.anchor[t] = a;
      to.positive[t] = p;
      to.negative[t++] = n >= 0 ? n : otherwise;
    });
  });
  return result.triplets();
}

// -- batch_all --------------------------------------------------------------------------------------------------------

template <typename T>
Triplets batch_all(const Tensor& like, const Panels<T>& panels, const Classes& classes, double margin, Chosen which) {
  const auto& kernels = kernels_of<T>().mining;
  const int64_t columns = panels.padded();
  const T limit = static_cast<T>(margin);
  std::vector<int64_t> counts(panels.rows, 0);
  for_rows(panels, classes, [&](int64_t a, T* row) {
    for (const T d : take_positives(classes, a, row)) counts[a] += kernels.count_chosen(row, columns, d, limit, which);
  });
  const auto offsets = offsets_of(counts);
  const Result result(like, offsets.back());
  const Places to(result);
  for_rows(panels, classes, [&](int64_t a, T* row) {
    const auto distances = take_positives(classes, a, row);
    std::fill(to.anchor + offsets[a], to.anchor + offsets[a + 1], a);
    int64_t t = offsets[a], i = 0;
    classes.for_positives(a, [&](int64_t p) {
      const int64_t count = kernels.write_chosen(row, columns, distances[i++], limit, which, to.negative + t);
      std::fill_n(to.positive + t, count, p);
      t += count;
    });
  });
  return result.triplets();
}

struct Mode {
  enum { batch_hard, semi_hard, batch_all } kind;
  Chosen chosen;
};

Mode mode_of(const std::string& mining) {
  if (mining == "batch_hard") return {Mode::batch_hard, {}};
  if (mining == "semi_hard") return {Mode::semi_hard, {}};
  if (mining == "batch_all") return {Mode::batch_all, Chosen::all};
  if (mining == "batch_all_hard") return {Mode::batch_all, Chosen::hard};
  STD_TORCH_CHECK(mining == "batch_all_semi_hard",
                  "mining must be batch_hard, semi_hard, batch_all, batch_all_hard or batch_all_semi_hard, got ", mining);
  return {Mode::batch_all, Chosen::semi_hard};
}

Distance distance_of(const std::string& distance) {
  if (distance == "euclidean") return Distance::euclidean;
  if (distance == "squared_euclidean") return Distance::squared_euclidean;
  STD_TORCH_CHECK(distance == "cosine", "distance must be euclidean, squared_euclidean or cosine, got ", distance);
  return Distance::cosine;
}

template <typename T>
Triplets mine(const Tensor& embeddings, const Tensor& labels, Mode mode, double margin, Distance distance) {
  STD_TORCH_CHECK(embeddings.size(0) < std::numeric_limits<Index<T>>::max() - 1024, "too many rows: ", embeddings.size(0));
  const Classes classes(labels);
  if (!classes.have_triplets(0, embeddings.size(0))) return Result(embeddings, 0).triplets();
  const Panels<T> panels(embeddings, distance);
  if (mode.kind == Mode::batch_hard) return BatchHard<T>(panels, classes).triplets(embeddings, classes);
  if (mode.kind == Mode::semi_hard) return semi_hard(embeddings, panels, classes);
  return batch_all(embeddings, panels, classes, margin, mode.chosen);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mine_triplets(Tensor embeddings, Tensor labels, std::string mining, double margin,
                                                 std::string distance) {
  STD_TORCH_CHECK(embeddings.is_cpu() && embeddings.dim() == 2, "embeddings must be a CPU tensor [N, d]");
  STD_TORCH_CHECK(labels.is_cpu() && labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == embeddings.size(0),
                  "labels must be an int64 CPU tensor with one entry per row of embeddings");
  const auto run = embeddings.scalar_type() == ScalarType::Double ? mine<double> : mine<float>;
  return run(embeddings, labels, mode_of(mining), margin, distance_of(distance));
}

}  // namespace replearn
