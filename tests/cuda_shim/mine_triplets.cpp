// mine_triplets as the GPU runs it, on the CPU; and kernels that are wrong on purpose.
#include "mine_triplets.h"

#include "cuda_shim.h"

#include "cuda/mine_triplets_launches.h"
#include "wrong_kernels.h"

namespace cuda_shim {

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
std::array<Indices, 3> mine_of(const Embeddings& x, const Indices& labels, Mining mining, double margin,
                               Distance distance, int processors) {
  Cpu cpu(processors);
  const auto rows = static_cast<int64_t>(labels.size()), size = static_cast<int64_t>(sizeof(In));
  const Cpu::Numbers its_labels{const_cast<int64_t*>(labels.data()), rows};
  const auto result = mine_triplets(cpu, static_cast<const In*>(x.data), rows, x.features, x.row_stride / size,
                                    x.feature_stride / size, its_labels, mining, margin, distance);
  const auto copy = [](Cpu::Numbers n) { return Indices(n.at, n.at + n.count); };
  return {copy(result[0]), copy(result[1]), copy(result[2])};
}

template <typename In>
std::vector<float> values_of() {
  std::vector<float> values;
  for (int bits = 0; bits < 1 << 16; ++bits) values.push_back(load(In{static_cast<uint16_t>(bits)}));
  return values;
}

}  // namespace

std::array<Indices, 3> mine(const Embeddings& x, const Indices& labels, const std::string& mining, double margin,
                            const std::string& distance, int processors) {
  const auto run = x.dtype == "float32"   ? mine_of<float>
                   : x.dtype == "float64" ? mine_of<double>
                   : x.dtype == "float16" ? mine_of<Half>
                   : x.dtype == "uint16"  ? mine_of<BFloat16>
                                          : throw std::invalid_argument("no such dtype: " + x.dtype);
  return run(x, labels, mining_of(mining), margin, distance_of(distance), processors);
}

std::vector<float> values_of_float16() { return values_of<Half>(); }
std::vector<float> values_of_bfloat16() { return values_of<BFloat16>(); }

void set_options(const std::string& order, unsigned seed, const std::string& barrier_left_out) {
  options.order = order == "random" ? Order::random : order == "descending" ? Order::descending : Order::ascending;
  options.seed = seed;
  options.barrier_left_out = barrier_left_out;
}

std::vector<int> run_wrong_kernel(const std::string& name) { return wrong_kernels::run(name); }

}  // namespace cuda_shim
