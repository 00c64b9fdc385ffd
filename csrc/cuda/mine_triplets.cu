// mine_triplets for CUDA tensors: arguments checked, memory and sorting from torch, launches on the current stream.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/mine_triplets_launches.h"

namespace replearn {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The GPU of a tensor, as mine_triplets_launches.h wants it. What a call leaves goes back to torch's allocator, which
// hands it out again only to later work on the same stream.
class Gpu {
 public:
  struct Numbers {
    Tensor tensor;
    int64_t* data() const { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }
  };

  explicit Gpu(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename T>
  T* scratch(int64_t count) {
    const auto bytes = count * static_cast<int64_t>(sizeof(T));
    scratch_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return static_cast<T*>(scratch_.back().mutable_data_ptr());
  }

  Numbers numbers(int64_t count) { return {torch::stable::new_empty(like_, {count}, ScalarType::Long)}; }

  int64_t last(const Numbers& x) {
    int64_t value = 0;
    const int64_t* address = x.data() + x.tensor.numel() - 1;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, address, sizeof(value), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return value;
  }

  Numbers running_sum(const Numbers& x) {
    // cumsum(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor
    StableIValue stack[] = {value(x.tensor), value(int64_t{0}), value(std::optional<ScalarType>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack, TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0])};
  }

  std::pair<Numbers, Numbers> sort(const Numbers& x) {
    // sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False) -> (Tensor values, Tensor indices)
    StableIValue stack[] = {value(x.tensor), value(std::optional<bool>(true)), value(int64_t{0}), value(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
    return {{torch::stable::detail::to<Tensor>(stack[0])}, {torch::stable::detail::to<Tensor>(stack[1])}};
  }

  int processors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like_.get_device_index()));
    return count;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), mining::Blocks blocks, const Arguments&... arguments) {
    const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
    kernel<<<grid, mining::kThreads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  template <typename T>
  static StableIValue value(const T& x) {
    return torch::stable::detail::from(x);
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<Tensor> scratch_;
};

using Triplets = std::tuple<Tensor, Tensor, Tensor>;

template <typename In>
Triplets mine(const Tensor& x, const Tensor& labels, mining::Mining mining, double margin, mining::Distance distance) {
  Gpu gpu(x);
  auto [anchor, positive, negative] =
      mining::mine_triplets(gpu, static_cast<const In*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0),
                            x.stride(1), Gpu::Numbers{labels}, mining, margin, distance);
  return {anchor.tensor, positive.tensor, negative.tensor};
}

Triplets mine_triplets(Tensor embeddings, Tensor labels, std::string mining, double margin, std::string distance) {
  STD_TORCH_CHECK(embeddings.is_cuda() && embeddings.dim() == 2, "embeddings must be a CUDA tensor [N, d]");
  STD_TORCH_CHECK(labels.is_cuda() && labels.get_device_index() == embeddings.get_device_index() &&
                      labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == embeddings.size(0),
                  "labels must be an int64 tensor on the embeddings' device with one entry per row of embeddings");
  const mining::Mining which = mining::mining_of(mining);
  const mining::Distance of = mining::distance_of(distance);
  labels = torch::stable::contiguous(labels);
  switch (embeddings.scalar_type()) {
    case ScalarType::Float: return mine<float>(embeddings, labels, which, margin, of);
    case ScalarType::Double: return mine<double>(embeddings, labels, which, margin, of);
    case ScalarType::Half: return mine<mining::Half>(embeddings, labels, which, margin, of);
    case ScalarType::BFloat16: return mine<mining::BFloat16>(embeddings, labels, which, margin, of);
    default: STD_TORCH_CHECK(false, "embeddings must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

}  // namespace replearn

STABLE_TORCH_LIBRARY_IMPL(replearn_kernels, CUDA, m) { m.impl("mine_triplets", TORCH_BOX(&replearn::mine_triplets)); }
