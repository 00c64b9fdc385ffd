// The Python module `cuda_shim`: mine_triplets as the GPU runs it, on the CPU; and kernels that are wrong on purpose.
#include "cuda_shim.h"

#include "cuda/mine_triplets_launches.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>

#include "wrong_kernels.h"

namespace py = pybind11;
using namespace replearn::mining;

namespace {

// What mine_triplets.cu takes from torch. Every array is an allocation of its own, of exactly its size.
class Cpu {
 public:
  explicit Cpu(int processors) : processors_(processors) {}

  template <typename T>
  T* empty(int64_t count) {
    memory_.emplace_back(new char[count * sizeof(T)]);
    std::memset(memory_.back().get(), 0xff, count * sizeof(T));
    return reinterpret_cast<T*>(memory_.back().get());
  }

  Triplets empty_triplets(int64_t count) {
    const auto column = [&](py::array_t<int64_t>& array) {
      array = py::array_t<int64_t>(count);
      std::fill_n(array.mutable_data(), count, -1);
      return array.mutable_data();
    };
    return {column(result[0]), column(result[1]), column(result[2])};
  }

  int64_t read(const int64_t* value) { return *value; }
  int processors() const { return processors_; }

  Sorted sort(const int64_t* labels, int64_t count) {
    auto *members = empty<int64_t>(count), *sorted = empty<int64_t>(count);
    std::iota(members, members + count, 0);
    std::stable_sort(members, members + count, [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (int64_t i = 0; i < count; ++i) sorted[i] = labels[members[i]];
    return {sorted, members};
  }

  const int64_t* running_sum(const int64_t* x, int64_t count) {
    auto* sum = empty<int64_t>(count);
    std::partial_sum(x, x + count, sum);
    return sum;
  }

  template <typename Kernel, typename... Arguments>
  void launch(Kernel kernel, Blocks blocks, const Arguments&... arguments) {
    const Dim3 grid{static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y)};
    cuda_shim::run_grid(kernel, grid, kThreads, arguments...);
  }

  py::array_t<int64_t> result[3];

 private:
  int processors_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

template <typename In>
py::tuple mine(const py::array& x, const py::array_t<int64_t>& labels, Mining mining, double margin, Distance distance,
               int processors) {
  Cpu cpu(processors);
  const auto stride = [&](int axis) { return x.strides(axis) / static_cast<int64_t>(sizeof(In)); };
  mine_triplets(cpu, static_cast<const In*>(x.data()), x.shape(0), x.shape(1), stride(0), stride(1), labels.data(),
                mining, margin, distance);
  return py::make_tuple(cpu.result[0], cpu.result[1], cpu.result[2]);
}

// x [rows, features] of any strides; bfloat16 as uint16.
py::tuple mine_triplets_of(const py::array& x, const py::array_t<int64_t, py::array::c_style>& labels,
                           const std::string& mining, double margin, const std::string& distance, int processors) {
  const Mining m = mining_of(mining);
  const Distance d = distance_of(distance);
  const std::string kind = py::str(x.dtype());
  if (kind == "float32") return mine<float>(x, labels, m, margin, d, processors);
#ifndef FLOAT32_ONLY
  if (kind == "float64") return mine<double>(x, labels, m, margin, d, processors);
  if (kind == "float16") return mine<Half>(x, labels, m, margin, d, processors);
  if (kind == "uint16") return mine<BFloat16>(x, labels, m, margin, d, processors);
#endif
  throw std::invalid_argument("no such dtype: " + kind);
}

template <typename In>
py::array_t<float> loaded() {
  py::array_t<float> values(1 << 16);
  for (int bits = 0; bits < 1 << 16; ++bits) values.mutable_at(bits) = load(In{static_cast<uint16_t>(bits)});
  return values;
}

void set_options(const std::string& order, unsigned seed, int barrier_left_out) {
  using cuda_shim::Order;
  cuda_shim::options.order = order == "random" ? Order::random : order == "descending" ? Order::descending : Order::ascending;
  cuda_shim::options.seed = seed;
  cuda_shim::options.barrier_left_out = barrier_left_out;
}

}  // namespace

PYBIND11_MODULE(cuda_shim, m) {
  m.def("mine_triplets", &mine_triplets_of, py::arg("x"), py::arg("labels"), py::arg("mining"), py::arg("margin"),
        py::arg("distance"), py::arg("processors") = 1);
  m.def("set_options", &set_options, py::arg("order") = "ascending", py::arg("seed") = 0,
        py::arg("barrier_left_out") = 0);
  m.def("float16_values", &loaded<Half>);
  m.def("bfloat16_values", &loaded<BFloat16>);
  m.def("run_wrong_kernel", &wrong_kernels::run);
}
