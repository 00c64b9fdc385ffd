// mine_triplets on the GPU: which kernels run, over which blocks, on which memory. `Device` is torch's in
// mine_triplets.cu, and the CPU in tests/cuda_shim. It has int64 arrays and what torch does to them,
//   Numbers numbers(count)                not initialised; .data() points to them
//   int64_t last(Numbers)                 the last of them, read from the device
//   Numbers running_sum(Numbers)          inclusive
//   pair<Numbers, Numbers> sort(Numbers)  ascending, equal ones in their order; and where they were
// and otherwise
//   T* scratch<T>(count)                  memory until the call ends, not initialised
//   int processors()                      streaming multiprocessors
//   void launch(kernel, Blocks, arguments...)  kThreads threads a block
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "cuda/mine_triplets_kernels.cuh"

namespace replearn::mining {

template <typename Device>
using Numbers = typename Device::Numbers;

struct Blocks {
  int64_t x, y = 1;
};

inline Mining mining_of(const std::string& name) {
  if (name == "batch_hard") return Mining::batch_hard;
  if (name == "semi_hard") return Mining::semi_hard;
  if (name == "batch_all") return Mining::batch_all;
  if (name == "batch_all_hard") return Mining::batch_all_hard;
  if (name == "batch_all_semi_hard") return Mining::batch_all_semi_hard;
  throw std::invalid_argument(
      "mining must be batch_hard, semi_hard, batch_all, batch_all_hard or batch_all_semi_hard, got " + name);
}

inline Distance distance_of(const std::string& name) {
  if (name == "squared_euclidean") return Distance::squared_euclidean;
  if (name == "euclidean") return Distance::euclidean;
  if (name == "cosine") return Distance::cosine;
  throw std::invalid_argument("distance must be euclidean, squared_euclidean or cosine, got " + name);
}

// anchor, positive, negative
template <typename Device>
using Result = std::array<Numbers<Device>, 3>;

template <typename Device>
Result<Device> empty_result(Device& device, int64_t count) {
  return {device.numbers(count), device.numbers(count), device.numbers(count)};
}

template <typename Device>
Triplets places_of(const Result<Device>& result) {
  return {result[0].data(), result[1].data(), result[2].data()};
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many parts each tile's work is split, at most `most`: so that there are a few blocks for every processor.
template <typename Device>
int64_t parts_of(Device& device, int64_t tiles, int64_t most) {
  return std::clamp<int64_t>(divide_up(4 * device.processors(), tiles), 1, std::min<int64_t>(most, 65535));
}

template <typename In, typename Device>
Result<Device> mine_batch_hard(Device& device, const Batch<In>& batch, int64_t total) {
  using T = Arithmetic<In>;
  const Result<Device> result = empty_result(device, total);
  const int64_t tiles = divide_up(batch.rows, kTile), parts = parts_of(device, tiles, tiles);
  auto* positive = device.template scratch<Best<T>>(parts * batch.rows);
  auto* negative = device.template scratch<Best<T>>(parts * batch.rows);
  device.launch(mine_batch_hard_search_kernel<In>, Blocks{tiles, parts}, batch, positive, negative);
  device.launch(mine_batch_hard_write_kernel<In>, Blocks{divide_up(batch.rows, kThreads)}, batch,
                static_cast<int32_t>(parts), positive, negative, places_of<Device>(result));
  return result;
}

template <typename In, typename Device>
Result<Device> mine_semi_hard(Device& device, const Batch<In>& batch, int64_t pairs, Blocks blocks) {
  const Result<Device> result = empty_result(device, pairs);
  device.launch(mine_semi_hard_kernel<In>, blocks, batch, places_of<Device>(result));
  return result;
}

template <typename In, typename Device>
Result<Device> mine_batch_all(Device& device, const Batch<In>& batch, Criterion<Arithmetic<In>> criterion,
                              Blocks blocks) {
  const Numbers<Device> count = device.numbers(blocks.x * blocks.y);
  int64_t* const none = nullptr;
  device.launch(mine_batch_all_kernel<In>, blocks, batch, criterion, count.data(), none, Triplets{});
  const Numbers<Device> end = device.running_sum(count);
  const Result<Device> result = empty_result(device, device.last(end));
  device.launch(mine_batch_all_kernel<In>, blocks, batch, criterion, none, end.data(), places_of<Device>(result));
  return result;
}

// x [rows, features] of any strides, counted in elements; labels [rows].
template <typename In, typename Device>
Result<Device> mine_triplets(Device& device, const In* x, int64_t rows, int64_t features, int64_t row_stride,
                             int64_t feature_stride, const Numbers<Device>& labels, Mining mining, double margin,
                             Distance distance) {
  using T = Arithmetic<In>;
  if (rows > 1 << 30) throw std::invalid_argument("embeddings must have at most 2^30 rows");
  if (rows == 0) return empty_result(device, 0);
  Batch<In> batch{x, row_stride, feature_stride, features, static_cast<int32_t>(rows), distance};
  const Blocks by_rows{divide_up(rows, kThreads)};
  const auto [sorted_labels, members] = device.sort(labels);
  const Numbers<Device> count = device.numbers(rows);
  auto* class_start = device.template scratch<int32_t>(rows);
  device.launch(mine_classes_kernel, by_rows, batch.rows, labels.data(), sorted_labels.data(),
                mining == Mining::batch_hard, class_start, count.data());
  const Numbers<Device> end = device.running_sum(count);
  const int64_t total = device.last(end);
  if (total == 0) return empty_result(device, 0);
  batch.members = members.data();
  batch.class_start = class_start;
  batch.end = end.data();
  if (distance == Distance::cosine) {
    auto *largest = device.template scratch<T>(rows), *norm = device.template scratch<T>(rows);
    batch.largest = largest;
    batch.norm = norm;
    device.launch(mine_norms_kernel<In>, by_rows, batch, largest, norm);
  }
  if (mining == Mining::batch_hard) return mine_batch_hard(device, batch, total);
  const int64_t tiles = divide_up(rows, kTile), most_pairs = std::min(total, kTile * (rows - 1));
  const Blocks blocks{tiles, parts_of(device, tiles, divide_up(most_pairs, kChunk))};
  if (mining == Mining::semi_hard) return mine_semi_hard(device, batch, total, blocks);
  return mine_batch_all(device, batch, Criterion<T>{mining, static_cast<T>(margin)}, blocks);
}

}  // namespace replearn::mining
