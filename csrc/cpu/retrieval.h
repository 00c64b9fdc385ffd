// Retrieval as operators: which columns are a row's nearest, how many are nearer than its positives, and how many pairs
// have which score. A tile of similarities in fp32 or bf16 tells which columns cannot matter; the others are scored in
// fp64 (retrieval/bounds.py).
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

// Adds the pairs of the tile to `histogram`, int64 [bins, 2], by the bin of their score, and by whether row and column
// have one label. A bin has C cells, and
//     cell = floor(score * per_score) + first_cell,   bin = cell / C, the first or last one of scores beyond
// The tile tells a pair's bin but for the filter's error: scale[0][i] * (v + above[j]) + scale[1][i], `scale` [2, R]. Where
// slots[bin], int16, is kSure, that will do. Else the score is formed: the pair is of the bin that this is in, and where
// that one's slot is 0 or more, it is added to cells[slot][cell of the bin], int64 [., C, 2], too. With `half` only columns
// beyond the row, first_row + i of them, count. Returns how many pairs were scored.
int64_t count_pairs_(Tensor s, REPLEARN_SCORES, Tensor filter, Tensor row_factor, double relative, Tensor row_ids,
                     Tensor column_ids, int64_t first_column, Tensor row_labels, Tensor column_labels, Tensor scale,
                     double per_score, int64_t first_cell, Tensor slots, bool half, int64_t first_row,
                     Tensor histogram, Tensor cells);

}  // namespace replearn
