// The catalogue: every native operator's schema. Shapes and meaning stand beside each implementation.
// The losses themselves (replearn_kernels::pair_loss) are operators too, written in Python:
// replearn_kernels/engine/operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cpu/batch_all_tile.h"
#include "cpu/declared_tile.h"
#include "cpu/hardest_tile.h"
#include "cpu/listed_pairs.h"
#include "cpu/margin_contrastive_tile.h"
#include "cpu/memory.h"
#include "cpu/mine_triplets.h"
#include "cpu/mirror.h"
#include "cpu/retrieval.h"
#include "cpu/semi_hard_tile.h"
#include "cpu/sigmoid_tile.h"
#include "cpu/softmax_tile.h"
#include "cpu/tile_operators.h"

namespace {

using torch::stable::Tensor;

template <typename T>
Tensor map(const Tensor& x, void (*function)(const T*, T*, int64_t)) {
  Tensor out = torch::stable::empty_like(x);
  function(static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), x.numel());
  return out;
}

// exp and log1p as the tile passes compute them, for the tests of their error.
Tensor vector_exp(Tensor x) {
  x = torch::stable::contiguous(x);
  const auto& set = replearn::instruction_set();
  return replearn::is_double(x) ? map<double>(x, set.f64.exp) : map<float>(x, set.f32.exp);
}

Tensor vector_log1p(Tensor x) {
  x = torch::stable::contiguous(x);
  const auto& set = replearn::instruction_set();
  return replearn::is_double(x) ? map<double>(x, set.f64.log1p) : map<float>(x, set.f32.log1p);
}

std::string instruction_set_name() { return replearn::instruction_set().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(replearn_kernels, m) {
  // A tile's passes: what is known of its pairs, what the family wants to know beyond that, its tables; and where
  // similarities are distances, its points, and where the rest of the gradient goes (distance_tile.h).
#define PAIRS                                                                                      \
  "float scale, float bias, Tensor? target, Tensor? row_group, Tensor? column_group, int first_column, " \
  "bool diagonal, "
#define POINTS                                                                                           \
  ", Tensor? rows=None, Tensor? columns=None, Tensor? row_squares=None, Tensor? column_squares=None, " \
  "bool squared_distances=False"
#define GRADIENTS                                                                                        \
  ", bool formed=False, Tensor? row_points=None, Tensor(x!)? d_rows=None, Tensor? column_points=None, " \
  "Tensor(y!)? d_columns=None"
  m.def("softmax_statistics_(Tensor(a!) s, " PAIRS
        "bool target_apart, bool groups_ignored, Tensor(b!) row_table, Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("softmax_weights_(Tensor(a!) s, Tensor(b!) out, " PAIRS
        "bool target_apart, bool groups_ignored, Tensor row_coefficients, Tensor? column_coefficients" POINTS GRADIENTS
        ") -> ()");
  m.def("sigmoid_statistics_(Tensor s, " PAIRS "Tensor(a!) row_table, Tensor? column_table) -> ()");
  m.def("sigmoid_weights_(Tensor s, Tensor(a!) out, " PAIRS "Tensor(b!) row_table, Tensor? column_table) -> ()");
  m.def("hardest_statistics_(Tensor(a!) v, " PAIRS "Tensor(b!) row_table, Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("margin_contrastive_statistics_(Tensor(a!) v, " PAIRS
        "float margin, bool squared, Tensor(b!) row_table, Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("margin_contrastive_weights_(Tensor(a!) v, Tensor(b!) out, " PAIRS
        "float margin, bool squared, Tensor(c!) row_table, Tensor column_table" POINTS GRADIENTS ") -> ()");
  m.def("batch_all_statistics_(Tensor(a!) v, " PAIRS
        "float factor, Tensor(b!) row_table, Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("batch_all_weights_(Tensor(a!) v, Tensor(b!) out, " PAIRS
        "float factor, Tensor(c!) row_table, Tensor(d!) column_table" POINTS GRADIENTS ") -> ()");
  m.def("semi_hard_statistics_(Tensor(a!) v, " PAIRS "Tensor(b!) row_table, Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("declared_statistics_(Tensor(a!) s, " PAIRS
        "int passes, Tensor parameters, Tensor? row_values, Tensor? column_values, Tensor? guide, Tensor(b!) row_table, "
        "Tensor(c!)? column_table" POINTS ") -> ()");
  m.def("declared_weights_(Tensor(a!) s, Tensor(b!) out, " PAIRS
        "int passes, Tensor parameters, Tensor? row_values, Tensor? column_values, Tensor? guide, Tensor(c!) row_table, "
        "Tensor(d!)? column_table" POINTS GRADIENTS ") -> ()");
  m.def("load_declared_passes(str path, bool is_double) -> int");
#undef PAIRS
#undef POINTS
#undef GRADIENTS
  m.def(
      "softmax_one_tile(Tensor query, Tensor key, Tensor? target, float scale, float share, bool symmetric, "
      "bool needs_query, bool needs_key) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mine_triplets(Tensor embeddings, Tensor labels, str mining, float margin, str distance) "
      "-> (Tensor anchor, Tensor positive, Tensor negative)");
  m.def("pair_squares(Tensor x, Tensor i, Tensor j) -> Tensor");
  m.def("add_differences_(Tensor(a!) gradient, Tensor x, Tensor i, Tensor j, Tensor weight) -> ()");
#define SCORES                                                                                          \
  "Tensor query, Tensor gallery, bool distance, Tensor query_factor, Tensor gallery_factor, " \
  "Tensor to_filter, Tensor shift, "
#define FILTER                                                                                       \
  "Tensor filter, Tensor row_factor, float relative, Tensor row_ids, Tensor column_ids, int first_column, "
  m.def("listed_scores_(" SCORES "Tensor row, Tensor column, Tensor(a!) scores) -> ()");
  m.def("nearest_(Tensor s, " SCORES FILTER
        "int k, Tensor(a!) lower, Tensor(b!) upper, Tensor(c!) index, Tensor(d!) held, Tensor(e!) threshold) -> int");
  m.def("nearest_result_(" SCORES
        "Tensor lower, Tensor upper, Tensor index, Tensor held, Tensor(a!) scores, Tensor(b!) neighbours) -> ()");
  m.def("sort_positives_(" SCORES
        "Tensor offsets, Tensor(a!) scores, Tensor(b!) index, Tensor(c!) low, Tensor(d!) high) -> ()");
  m.def("place_(Tensor s, " SCORES FILTER
        "Tensor offsets, Tensor scores, Tensor index, Tensor low, Tensor high, Tensor cutoff, bool first_always, "
        "Tensor(a!) active, Tensor(b!) better) -> int");
  m.def("count_pairs_(Tensor s, " SCORES FILTER
        "Tensor row_labels, Tensor column_labels, Tensor scale, float per_score, int first_cell, Tensor slots, bool half, "
        "int first_row, Tensor(a!) histogram, Tensor(b!) cells) -> int");
#undef SCORES
#undef FILTER
  m.def("mirror_(Tensor(a!) square) -> ()");
  m.def("advise_huge_pages_(Tensor(a!) buffer) -> ()");
  m.def("vector_exp(Tensor x) -> Tensor");
  m.def("vector_log1p(Tensor x) -> Tensor");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(replearn_kernels, CPU, m) {
  m.impl("softmax_statistics_", TORCH_BOX(&replearn::softmax_statistics_));
  m.impl("softmax_weights_", TORCH_BOX(&replearn::softmax_weights_));
  m.impl("sigmoid_statistics_", TORCH_BOX(&replearn::sigmoid_statistics_));
  m.impl("sigmoid_weights_", TORCH_BOX(&replearn::sigmoid_weights_));
  m.impl("hardest_statistics_", TORCH_BOX(&replearn::hardest_statistics_));
  m.impl("margin_contrastive_statistics_", TORCH_BOX(&replearn::margin_contrastive_statistics_));
  m.impl("margin_contrastive_weights_", TORCH_BOX(&replearn::margin_contrastive_weights_));
  m.impl("batch_all_statistics_", TORCH_BOX(&replearn::batch_all_statistics_));
  m.impl("batch_all_weights_", TORCH_BOX(&replearn::batch_all_weights_));
  m.impl("semi_hard_statistics_", TORCH_BOX(&replearn::semi_hard_statistics_));
  m.impl("declared_statistics_", TORCH_BOX(&replearn::declared_statistics_));
  m.impl("declared_weights_", TORCH_BOX(&replearn::declared_weights_));
  m.impl("softmax_one_tile", TORCH_BOX(&replearn::softmax_one_tile));
  m.impl("mine_triplets", TORCH_BOX(&replearn::mine_triplets));
  m.impl("pair_squares", TORCH_BOX(&replearn::pair_squares));
  m.impl("add_differences_", TORCH_BOX(&replearn::add_differences_));
  m.impl("listed_scores_", TORCH_BOX(&replearn::listed_scores_));
  m.impl("nearest_", TORCH_BOX(&replearn::nearest_));
  m.impl("nearest_result_", TORCH_BOX(&replearn::nearest_result_));
  m.impl("sort_positives_", TORCH_BOX(&replearn::sort_positives_));
  m.impl("place_", TORCH_BOX(&replearn::place_));
  m.impl("count_pairs_", TORCH_BOX(&replearn::count_pairs_));
  m.impl("mirror_", TORCH_BOX(&replearn::mirror_));
  m.impl("advise_huge_pages_", TORCH_BOX(&replearn::advise_huge_pages_));
  m.impl("vector_exp", TORCH_BOX(&vector_exp));
  m.impl("vector_log1p", TORCH_BOX(&vector_log1p));
}

STABLE_TORCH_LIBRARY_IMPL(replearn_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_name));
  m.impl("load_declared_passes", TORCH_BOX(&replearn::load_declared_passes));
}
