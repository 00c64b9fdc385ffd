#include "memory.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace replearn {

void advise_huge_pages_(torch::stable::Tensor buffer) {
  STD_TORCH_CHECK(buffer.is_contiguous(), "buffer must be contiguous");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;  // of the system; huge pages are 2 MiB
  const auto start = reinterpret_cast<uintptr_t>(buffer.mutable_data_ptr());
  const uintptr_t end = start + buffer.numel() * buffer.element_size();
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace replearn
