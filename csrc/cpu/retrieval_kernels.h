// The vectorised parts of retrieval on raw pointers: what the operators call, and each instruction set provides.
#pragma once

#include <cstdint>

namespace replearn {

// A similarity s of a tile, in fp32 or bf16, as bounds of what is searched for (replearn_kernels/retrieval/bounds.py):
//     v = row.factor * factor[j] * s
//     upper = v + above[j] + error, lower = v + below[j] - error, error = relative * |v| + row.factor * slack[j]
// Pairs of which one of the ids is equal are left out; of each row and column there are kIds, or fewer and then null.
constexpr int64_t kIds = 2;
struct FilterColumns {
  const float *factor, *slack, *above, *below;
  const int32_t* ids[kIds];
};
struct FilterRow {
  float factor, relative;
  int32_t ids[kIds];
};

// Columns that may be among a row's k nearest, `count` of at most `room`.
struct Candidates {
  float *lower, *upper;
  int64_t* index;
  int64_t count, room;
};

// A row's positives, at least one, the best first: bounds of the v of each.
struct Positives {
  const float *low, *high;
  int64_t count;
};

// Where a row's pairs are counted: in bin scale * (v + above) + shift, cut off to [0, bins).
struct BinnedRow {
  float scale, shift;
  int32_t label;
  int64_t bins;
};

using Bfloat16 = uint16_t;

template <typename S>
struct FilterKernels {
  // Appends the columns from `from` on whose upper bound reaches `least`, until fewer places are left than a vector
  // has lanes. Returns the column to go on with.
  int64_t (*collect)(const S* s, FilterColumns, FilterRow, float least, int64_t from, int64_t columns,
                     int64_t first_column, Candidates&);
  // Adds 1 to better[p] for each column that beats positive p and not p - 1; writes the columns of which the bounds do
  // not tell where they belong, and returns how many these are.
  int64_t (*place)(const S* s, FilterColumns, FilterRow, Positives, int64_t columns, int64_t* better, int32_t* unsure);
  // where[j] of columns [from, columns): 2 bin + (1 where labels[j] is the row's), 2 bins where the pair is left out.
  // What follows in `where`, up to a vector less one, may be overwritten.
  void (*bins)(const S* s, FilterColumns, FilterRow, BinnedRow, const int32_t* labels, int64_t from, int64_t columns,
               int32_t* where);
};

// Sums in fp64 over 16 lanes whatever the instruction set: the same bits on all, of fp32 rows.
template <typename T>
struct ExactKernels {
  double (*dot)(const T* x, const T* y, int64_t d);
  double (*square)(const T* x, const T* y, int64_t d);  // |x - y|^2
};

struct RetrievalKernels {
  // The k-th largest of `count` >= k values, none of them NaN.
  float (*kth_largest)(const float* values, int64_t count, int64_t k);
  FilterKernels<float> of_fp32;
  FilterKernels<Bfloat16> of_bf16;
  ExactKernels<float> exact_fp32;
  ExactKernels<double> exact_fp64;
};

}  // namespace replearn
