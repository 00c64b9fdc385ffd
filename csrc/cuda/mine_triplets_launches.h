// mine_triplets on the GPU: which kernels run, over which blocks, on which memory. `Device` is torch's in
// mine_triplets.cu, and the CPU in tests/cuda_shim. It has:
//   T* empty<T>(count)                    memory until the call ends, not initialised
//   Triplets empty_triplets(count)        memory of the result
//   int64_t read(const int64_t*)          a number from the device
//   Sorted sort(labels, count)            ascending, equal labels in their order
//   const int64_t* running_sum(x, count)  inclusive
//   int processors()                      streaming multiprocessors
//   void launch(kernel, Blocks, arguments...)  kThreads threads a block
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/mine_triplets_kernels.cuh"

namespace replearn::mining {

struct Sorted {
  const int64_t *labels, *members;
};

struct Blocks {
  int64_t x, y = 1;
};

inline Mining mining_of(const std::string& name) {
  if (name == "batch_hard") return Mining::batch_hard;
  if (name == "semi_hard") return Mining::semi_hard;
  if (name == "batch_all") return Mining::batch_all;
  if (name == "batch_all_hard") return Mining::batch_all_hard;
  if (name == "batch_all_semi_hard") return Mining::batch_all_semi_hard;
  throw std::invalid_argument("unknown mining: " + name);
}

inline Distance distance_of(const std::string& name) {
  if (name == "squared_euclidean") return Distance::squared_euclidean;
  if (name == "euclidean") return Distance::euclidean;
  if (name == "cosine") return Distance::cosine;
  throw std::invalid_argument("unknown distance: " + name);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of each tile's work, so that there are a few blocks per processor and none has less than one of `most`.
template <typename Device>
int64_t parts_of(Device& device, int64_t tiles, int64_t most) {
  return std::clamp<int64_t>(divide_up(4 * device.processors(), tiles), 1, std::min<int64_t>(most, 65535));
}

template <typename In, typename Device>
void mine_batch_hard(Device& device, const Batch<In>& batch, Triplets out) {
  using T = Arithmetic<In>;
  const int64_t tiles = divide_up(batch.rows, kTile), parts = parts_of(device, tiles, tiles);
  auto* positive = device.template empty<Best<T>>(parts * batch.rows);
  auto* negative = device.template empty<Best<T>>(parts * batch.rows);
  device.launch(mine_batch_hard_search_kernel<In>, Blocks{tiles, parts}, batch, positive, negative);
  device.launch(mine_batch_hard_write_kernel<In>, Blocks{divide_up(batch.rows, kThreads)}, batch,
                static_cast<int32_t>(parts), positive, negative, out);
}

template <typename In, typename Device>
Triplets mine_batch_all(Device& device, const Batch<In>& batch, Criterion<Arithmetic<In>> criterion, Blocks blocks) {
  const int64_t counts = blocks.x * blocks.y;
  auto* count = device.template empty<int64_t>(counts);
  device.launch(mine_batch_all_count_kernel<In>, blocks, batch, criterion, count);
  const int64_t* end = device.running_sum(count, counts);
  const Triplets out = device.empty_triplets(device.read(end + counts - 1));
  device.launch(mine_batch_all_fill_kernel<In>, blocks, batch, criterion, end, out);
  return out;
}

// x [rows, features] of any strides, counted in elements; labels [rows], contiguous.
template <typename In, typename Device>
Triplets mine_triplets(Device& device, const In* x, int64_t rows, int64_t features, int64_t row_stride,
                       int64_t feature_stride, const int64_t* labels, Mining mining, double margin, Distance distance) {
  using T = Arithmetic<In>;
  if (rows > 1 << 30) throw std::invalid_argument("embeddings must have at most 2^30 rows");
  if (rows == 0) return device.empty_triplets(0);
  const Sorted sorted = device.sort(labels, rows);
  Batch<In> batch{x, row_stride, feature_stride, features, static_cast<int32_t>(rows), distance};
  auto* class_start = device.template empty<int32_t>(rows);
  auto* count = device.template empty<int64_t>(rows);
  const Blocks by_rows{divide_up(rows, kThreads)};
  device.launch(mine_classes_kernel, by_rows, batch.rows, labels, sorted.labels, mining == Mining::batch_hard,
                class_start, count);
  batch.members = sorted.members;
  batch.class_start = class_start;
  batch.end = device.running_sum(count, rows);
  const int64_t total = device.read(batch.end + rows - 1);
  if (total == 0) return device.empty_triplets(0);
  if (distance == Distance::cosine) {
    auto* largest = device.template empty<T>(rows);
    auto* norm = device.template empty<T>(rows);
    batch.largest = largest;
    device.launch(mine_norms_kernel<In>, by_rows, batch, largest, norm);
    batch.norm = norm;
  }
  if (mining == Mining::batch_hard) {
    const Triplets out = device.empty_triplets(total);
    mine_batch_hard(device, batch, out);
    return out;
  }
  const int64_t tiles = divide_up(rows, kTile), most_pairs = std::min(total, kTile * (rows - 1));
  const Blocks blocks{tiles, parts_of(device, tiles, divide_up(most_pairs, kChunk))};
  if (mining != Mining::semi_hard)
    return mine_batch_all(device, batch, Criterion<T>{mining, static_cast<T>(margin)}, blocks);
  const Triplets out = device.empty_triplets(total);
  device.launch(mine_semi_hard_kernel<In>, blocks, batch, out);
  return out;
}

}  // namespace replearn::mining
