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

// What mine_triplets.cu takes from torch. Every array is an allocation of its own, of exactly its size, full of 0xff.
class Cpu {
 public:
  struct Numbers {
    int64_t* at;
    int64_t count;
    int64_t* data() const { return at; }
  };

  explicit Cpu(int processors) : processors_(processors) {}

  template <typename T>
  T* scratch(int64_t count) {
    memory_.emplace_back(new char[count * sizeof(T)]);
    std::memset(memory_.back().get(), 0xff, count * sizeof(T));
    return reinterpret_cast<T*>(memory_.back().get());
  }

  Numbers numbers(int64_t count) { return {scratch<int64_t>(count), count}; }
  int64_t last(Numbers x) const { return x.at[x.count - 1]; }
  int processors() const { return processors_; }

  Numbers running_sum(Numbers x) {
    const Numbers sum = numbers(x.count);
    std::partial_sum(x.at, x.at + x.count, sum.at);
    return sum;
  }

  std::pair<Numbers, Numbers> sort(Numbers x) {
    const Numbers sorted = numbers(x.count), from = numbers(x.count);
    std::iota(from.at, from.at + x.count, 0);
    std::stable_sort(from.at, from.at + x.count, [&](int64_t a, int64_t b) { return x.at[a] < x.at[b]; });
    for (int64_t i = 0; i < x.count; ++i) sorted.at[i] = x.at[from.at[i]];
    return {sorted, from};
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), Blocks blocks, const Arguments&... arguments) {
    const Dim3 grid{static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y)};
    cuda_shim::run_grid(kernel, grid, kThreads, arguments...);
  }

 private:
  int processors_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

template <typename In>
py::tuple mine(const py::array& x, const py::array_t<int64_t>& labels, Mining mining, double margin, Distance distance,
               int processors) {
  Cpu cpu(processors);
  const Cpu::Numbers its_labels{const_cast<int64_t*>(labels.data()), labels.size()};
  const auto stride = [&](int axis) { return x.strides(axis) / static_cast<int64_t>(sizeof(In)); };
  const auto result = mine_triplets(cpu, static_cast<const In*>(x.data()), x.shape(0), x.shape(1), stride(0), stride(1),
                                    its_labels, mining, margin, distance);
  const auto array = [](Cpu::Numbers n) { return py::array_t<int64_t>(n.count, n.at); };
  return py::make_tuple(array(result[0]), array(result[1]), array(result[2]));
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

void set_options(const std::string& order, unsigned seed, const std::string& barrier_left_out) {
  using cuda_shim::Order;
  cuda_shim::options.order = order == "random"       ? Order::random
                             : order == "descending" ? Order::descending
                                                     : Order::ascending;
  cuda_shim::options.seed = seed;
  cuda_shim::options.barrier_left_out = barrier_left_out;
}

}  // namespace

PYBIND11_MODULE(cuda_shim, m) {
  m.def("mine_triplets", &mine_triplets_of, py::arg("x"), py::arg("labels"), py::arg("mining"), py::arg("margin"),
        py::arg("distance"), py::arg("processors") = 1);
  m.def("set_options", &set_options, py::arg("order") = "ascending", py::arg("seed") = 0,
        py::arg("barrier_left_out") = "");
  m.def("float16_values", &loaded<Half>);
  m.def("bfloat16_values", &loaded<BFloat16>);
  m.def("run_wrong_kernel", &wrong_kernels::run);
}
