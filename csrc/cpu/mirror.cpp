#include "mirror.h"

#include "tile_operators.h"

namespace replearn {

namespace {

// Both images of a block lie in the first cache, whatever the stride: 16 + 16 lines of 64 bytes, or twice that in fp64.
constexpr int64_t kBlock = 16;

template <typename T>
void mirror(Tensor& square) {
  check_matrix<T>(square, "square", -1, -1);
  const int64_t n = square.size(0), stride = square.stride(0);
  STD_TORCH_CHECK(square.size(1) == n, "square must have as many columns as rows");
  T* s = static_cast<T*>(square.mutable_data_ptr());
  for (int64_t row = 0; row < n; row += kBlock)
    for (int64_t column = 0; column <= row; column += kBlock)
      for (int64_t i = row; i < std::min(row + kBlock, n); ++i)
        for (int64_t j = column; j < std::min(column + kBlock, i); ++j) s[i * stride + j] = s[j * stride + i];
}

}  // namespace

void mirror_(Tensor square) { is_double(square) ? mirror<double>(square) : mirror<float>(square); }

}  // namespace replearn
