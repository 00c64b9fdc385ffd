// Retrieval as operators: which columns are a row's nearest, and how many are nearer than its positives. A tile of
// similarities in fp32 or bf16 tells which columns cannot matter; the others are scored in fp64 (retrieval/bounds.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace replearn {

using torch::stable::Tensor;

// What a score is, of rows of `query` [R, d] against `gallery` [M, d], both fp32 or both fp64, in fp64:
//     -|x - y|^2                                        if `distance`
//     x . y * query_factor[i] * gallery_factor[j]       otherwise
// and in the units of the filter: score * to_filter[i] + shift[i].
#define REPLEARN_SCORES                                                                                    \
  Tensor query, Tensor gallery, bool distance, Tensor query_factor, Tensor gallery_factor, Tensor to_filter, \
      Tensor shift

// scores[p] of row row[p] and column column[p].
void listed_scores_(REPLEARN_SCORES, Tensor row, Tensor column, Tensor scores);

// Folds the tile `s` [R, C], columns [first_column, first_column + C) of the gallery, into the rows' candidates [R, room];
// `held` of each row count. `filter`: [4, C], FilterColumns. Returns how many pairs were scored.
int64_t nearest_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative,
                 Tensor row_ids, Tensor column_ids, int64_t first_column, int64_t k, Tensor lower, Tensor upper, Tensor index, Tensor held, Tensor threshold);

// The k best candidates of every row, by score, of equal ones the lower index first; -inf and -1 where there are fewer.
void nearest_result_(REPLEARN_SCORES, Tensor lower, Tensor upper, Tensor index, Tensor held, Tensor scores,
                     Tensor neighbours);

// Sorts each row's positives, [offsets[i], offsets[i + 1]) of `scores` and `index`, the best first; and sets `low` and
// `high`, fp32 bounds of each as the filter counts it.
void sort_positives_(REPLEARN_SCORES, Tensor offsets, Tensor scores, Tensor index, Tensor low, Tensor high);

// Adds to better[p], p a positive of row i, the columns of the tile, but for positives, that are better than it and not
// than the one before it; of equal scores the lower index is the better one. Of row i the first active[i] positives are
// looked at, until cutoff[i] columns are better than one: it and those after it are active no more, but for the first
// positive with `first_always`. Returns how many pairs were scored.
int64_t place_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative, Tensor row_ids,
               Tensor column_ids, int64_t first_column, Tensor offsets, Tensor scores, Tensor index, Tensor low,
               Tensor high, Tensor cutoff, bool first_always, Tensor active, Tensor better);

}  // namespace replearn
