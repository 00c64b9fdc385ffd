// The Python module `cuda_shim`.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "mine_triplets.h"

namespace py = pybind11;

namespace {

using Labels = py::array_t<int64_t, py::array::c_style>;

py::tuple mine_triplets(const py::array& x, const Labels& labels, const std::string& mining, double margin,
                        const std::string& distance, int processors) {
  const cuda_shim::Embeddings embeddings{x.data(),   py::str(x.dtype()), x.shape(0),
                                         x.shape(1), x.strides(0),       x.strides(1)};
  const cuda_shim::Indices its_labels(labels.data(), labels.data() + labels.size());
  const auto result = cuda_shim::mine(embeddings, its_labels, mining, margin, distance, processors);
  const auto array = [](const cuda_shim::Indices& x) { return py::array_t<int64_t>(x.size(), x.data()); };
  return py::make_tuple(array(result[0]), array(result[1]), array(result[2]));
}

}  // namespace

PYBIND11_MODULE(cuda_shim, m) {
  m.def("mine_triplets", &mine_triplets, py::arg("x"), py::arg("labels"), py::arg("mining"), py::arg("margin"),
        py::arg("distance"), py::arg("processors") = 1);
  m.def("set_options", &cuda_shim::set_options, py::arg("order") = "ascending", py::arg("seed") = 0,
        py::arg("barrier_left_out") = "");
  m.def("values_of_float16", &cuda_shim::values_of_float16);
  m.def("values_of_bfloat16", &cuda_shim::values_of_bfloat16);
  m.def("run_wrong_kernel", &cuda_shim::run_wrong_kernel);
}
