// The catalogue: every native operator's schema. Shapes and meaning stand beside each implementation.
// The losses themselves (replearn_kernels::pair_loss) are operators too, written in Python:
// replearn_kernels/engine/operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cpu/memory.h"
#include "cpu/softmax_tile.h"
#include "cpu/tile_operators.h"

namespace {

using torch::stable::Tensor;

// exp as the tile passes compute it, for the test of its error.
Tensor vector_exp(Tensor x) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  if (replearn::is_double(x))
    replearn::instruction_set().f64.exp(
        static_cast<const double*>(x.const_data_ptr()), static_cast<double*>(out.mutable_data_ptr()), x.numel());
  else
    replearn::instruction_set().f32.exp(
        static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), x.numel());
  return out;
}

std::string instruction_set_name() { return replearn::instruction_set().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(replearn_kernels, m) {
  m.def(
      "softmax_statistics_(Tensor s, float scale, Tensor? target, int first_column, "
      "Tensor(a!) row_table, Tensor(b!)? column_table) -> ()");
  m.def(
      "softmax_weights_(Tensor s, Tensor(a!) out, float scale, Tensor? target, int first_column, "
      "Tensor row_coefficients, Tensor? column_coefficients) -> ()");
  m.def(
      "softmax_one_tile(Tensor query, Tensor key, Tensor? target, float scale, float share, bool symmetric, "
      "bool needs_query, bool needs_key) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("advise_huge_pages_(Tensor(a!) buffer) -> ()");
  m.def("vector_exp(Tensor x) -> Tensor");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(replearn_kernels, CPU, m) {
  m.impl("softmax_statistics_", TORCH_BOX(&replearn::softmax_statistics_));
  m.impl("softmax_weights_", TORCH_BOX(&replearn::softmax_weights_));
  m.impl("softmax_one_tile", TORCH_BOX(&replearn::softmax_one_tile));
  m.impl("advise_huge_pages_", TORCH_BOX(&replearn::advise_huge_pages_));
  m.impl("vector_exp", TORCH_BOX(&vector_exp));
}

STABLE_TORCH_LIBRARY_IMPL(replearn_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_name));
}
