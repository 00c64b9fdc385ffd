// mine_triplets on the GPU: the kernels. No torch here, and nothing that a C++ compiler with the stand-ins of
// tests/cuda_shim does not know, so that the tests run this very source on the CPU.
//
// A block takes a tile of anchors and walks all columns, a tile at a time. Of every tile it forms the distances, and
// folds them into what its anchors (or their positive pairs) have found so far. What meets across threads meets by
// (distance, index): no order of threads or blocks is seen in a result.
#pragma once

#include "cuda/distance_tile.cuh"

namespace replearn::mining {

constexpr int kPairs = 8, kChunk = kThreads * kPairs;  // positive pairs that a thread, a block has in flight
constexpr int kWarp = 32;
constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

enum class Mining : int32_t { batch_hard, semi_hard, batch_all, batch_all_hard, batch_all_semi_hard };

// -- before the search ------------------------------------------------------------------------------------------------

// The class of every row, and how many pairs (batch_hard: triplets) it is the anchor of: a row alone in its class, or
// in the only class, has none.
__global__ void __launch_bounds__(kThreads, 1)
    mine_classes_kernel(int32_t rows, const int64_t* labels, const int64_t* sorted_labels, bool one_for_each,
                        int32_t* class_start, int64_t* count) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= rows) return;
  const int64_t label = labels[row];
  int32_t bound[2];  // the first sorted label that is not below, that is above
  for (int above = 0; above < 2; ++above) {
    int32_t low = 0, high = rows;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (sorted_labels[middle] < label || (above && sorted_labels[middle] == label))
        low = middle + 1;
      else
        high = middle;
    }
    bound[above] = low;
  }
  const int32_t size = bound[1] - bound[0];
  class_start[row] = bound[0];
  count[row] = size < 2 || size == rows ? 0 : one_for_each ? 1 : size - 1;
}

// What makes unit rows. The magnitudes of x / largest are at most 1, so that no square overflows.
template <typename In>
__global__ void __launch_bounds__(kThreads, 1)
    mine_norms_kernel(Batch<In> batch, Arithmetic<In>* largest, Arithmetic<In>* norm) {
  using T = Arithmetic<In>;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= batch.rows) return;
  T maximum = 0, sum = 0;
  for (int64_t k = 0; k < batch.features; ++k)
    maximum = std::fmax(maximum, std::fabs(load(batch.x[row * batch.row_stride + k * batch.feature_stride])));
  largest[row] = maximum;
  for (int64_t k = 0; k < batch.features; ++k) {
    const T y = batch.scaled(row, k);  // reads what was just written
    sum = std::fma(y, y, sum);
  }
  norm[row] = std::sqrt(sum);
}

// -- the best of candidates -------------------------------------------------------------------------------------------

// The candidate of the largest key, of the lowest index among equals. A key of NaN counts as the smallest.
template <typename T>
struct Best {
  T key;
  int32_t index;

  __device__ static Best none() { return {-kInfinity<T>, kNone}; }
  __device__ void offer(T other_key, int32_t other_index) {
    other_key = std::fmax(other_key, -kInfinity<T>);
    if (other_key > key || (other_key == key && other_index < index)) {
      key = other_key;
      index = other_index;
    }
  }
  // The best of the kSide threads that have the same anchors.
  __device__ void merge_across_columns() {
#pragma unroll
    for (int step = kSide / 2; step > 0; step /= 2) {
      const T other_key = __shfl_xor_sync(0xffffffffu, key, step);
      offer(other_key, __shfl_xor_sync(0xffffffffu, index, step));
    }
  }
};

// -- batch_hard -------------------------------------------------------------------------------------------------------

// Block (tile of anchors, part of the columns); positive, negative [parts, rows].
template <typename In>
__global__ void __launch_bounds__(kThreads, 1)
    mine_batch_hard_search_kernel(Batch<In> batch, Best<Arithmetic<In>>* positive, Best<Arithmetic<In>>* negative) {
  using T = Arithmetic<In>;
  auto& panels = block_memory<Panels<T>>();
  const int32_t first_anchor = blockIdx.x * kTile, tiles = (batch.rows + kTile - 1) / kTile;
  if (batch.first_pair(first_anchor) == batch.last_pair(first_anchor)) return;
  const int32_t begin = int64_t{tiles} * blockIdx.y / gridDim.y, end = int64_t{tiles} * (blockIdx.y + 1) / gridDim.y;
  Best<T> farthest[kMicro], nearest[kMicro];
#pragma unroll
  for (int r = 0; r < kMicro; ++r) farthest[r] = nearest[r] = Best<T>::none();
  for (int32_t t = begin; t < end; ++t) {
    const MicroTile<In> tile = form_tile(batch, first_anchor, t * kTile, panels);
#pragma unroll
    for (int r = 0; r < kMicro; ++r)
#pragma unroll
      for (int c = 0; c < kMicro; ++c) {
        if (tile.positive(r, c)) farthest[r].offer(tile.distance[r][c], tile.first_column + c);
        if (tile.negative(r, c)) nearest[r].offer(-tile.distance[r][c], tile.first_column + c);
      }
  }
#pragma unroll
  for (int r = 0; r < kMicro; ++r) {
    farthest[r].merge_across_columns();
    nearest[r].merge_across_columns();
    const int32_t anchor = first_anchor + threadIdx.x / kSide * kMicro + r;
    if (threadIdx.x % kSide == 0 && anchor < batch.rows) {
      positive[int64_t{blockIdx.y} * batch.rows + anchor] = farthest[r];
      negative[int64_t{blockIdx.y} * batch.rows + anchor] = nearest[r];
    }
  }
}

struct Triplets {
  int64_t *anchor, *positive, *negative;
  __device__ void write(int64_t place, int32_t a, int32_t p, int32_t n) const {
    anchor[place] = a;
    positive[place] = p;
    negative[place] = n;
  }
};

template <typename In>
__global__ void __launch_bounds__(kThreads, 1)
    mine_batch_hard_write_kernel(Batch<In> batch, int32_t parts, const Best<Arithmetic<In>>* positive,
                                 const Best<Arithmetic<In>>* negative, Triplets out) {
  using T = Arithmetic<In>;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= batch.rows || batch.first_pair(row) == batch.end[row]) return;
  Best<T> farthest = Best<T>::none(), nearest = farthest;
  for (int32_t part = 0; part < parts; ++part) {
    const int64_t place = int64_t{part} * batch.rows + row;
    farthest.offer(positive[place].key, positive[place].index);
    nearest.offer(negative[place].key, negative[place].index);
  }
  out.write(batch.first_pair(row), row, farthest.index, nearest.index);
}

// -- positive pairs against all negatives -----------------------------------------------------------------------------

// A tile's negatives: NaN elsewhere, which no comparison holds for.
template <typename T>
using NegativeTile = T[kTile][kTile + 1];

template <typename In>
__device__ void share_negatives(const MicroTile<In>& tile, NegativeTile<Arithmetic<In>>& negatives) {
#pragma unroll
  for (int r = 0; r < kMicro; ++r)
#pragma unroll
    for (int c = 0; c < kMicro; ++c)
      negatives[tile.row + r][tile.column + c] =
          tile.negative(r, c) ? tile.distance[r][c] : kNaN<Arithmetic<In>>;
  __syncthreads();
}

// A positive pair of a tile of anchors; a distance of NaN for none.
template <typename T>
struct Pair {
  T distance;
  int32_t row, positive;  // the anchor's row in the tile; an index
};

// What a block needs to hold pairs against negatives. The pairs pass through shared memory only on their way to
// registers, because a loop over registers is unrolled, and forming a pair is too long for that.
template <typename T>
struct PairMemory {
  Panels<T> panels;
  union {
    NegativeTile<T> negatives;
    Pair<T> pairs[kPairs][kThreads];
  };
};

// Pair `number` of the batch, which must have its anchor in this tile.
template <typename In>
__device__ Pair<Arithmetic<In>> load_pair(const Batch<In>& batch, int32_t first_anchor, int64_t number) {
  using T = Arithmetic<In>;
  if (number >= batch.last_pair(first_anchor)) return {kNaN<T>, 0, 0};
  int32_t low = first_anchor, high = first_anchor + kTile - 1 < batch.rows ? first_anchor + kTile - 1 : batch.rows - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (batch.end[middle] > number)
      high = middle;
    else
      low = middle + 1;
  }
  // The members of a class are sorted: from the anchor's own place on, the m-th other is the next.
  const int64_t* member = batch.members + batch.class_start[low] + (number - batch.first_pair(low));
  const int32_t positive = member[0] < low ? member[0] : member[1];
  T squared = 0;
  for (int64_t k = 0; k < batch.features; ++k) {
    const T difference = batch.feature(low, k) - batch.feature(positive, k);
    squared = std::fma(difference, difference, squared);
  }
  return {batch.from_squared(squared, low, positive), low - first_anchor, positive};
}

// The thread's pairs of the chunk that begins with pair `first`: first + threadIdx.x, and every kThreads-th from there.
template <typename In>
__device__ void load_pairs(const Batch<In>& batch, int32_t first_anchor, int64_t first,
                           PairMemory<Arithmetic<In>>& memory, Pair<Arithmetic<In>> (&pair)[kPairs]) {
  __syncthreads();  // the negatives of the chunk before have been read
#pragma unroll 1
  for (int j = 0; j < kPairs; ++j)
    memory.pairs[j][threadIdx.x] = load_pair(batch, first_anchor, first + j * kThreads + threadIdx.x);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) pair[j] = memory.pairs[j][threadIdx.x];
}

// The chunks of the tile's pairs that belong to this block: blocks (tile, 0), (tile, 1) ... have them in this order.
struct Chunks {
  int64_t begin, end;  // numbers of pairs

  // How many of its kPairs a thread has in the chunk that begins with pair `first`, the last threads perhaps one less.
  __device__ int in_flight(int64_t first) const {
    return end - first < kChunk ? static_cast<int>((end - first + kThreads - 1) / kThreads) : kPairs;
  }
};

template <typename In>
__device__ Chunks chunks_of_block(const Batch<In>& batch, int32_t first_anchor) {
  const int64_t first = batch.first_pair(first_anchor), last = batch.last_pair(first_anchor);
  const int64_t chunks = (last - first + kChunk - 1) / kChunk;
  const int64_t end = first + chunks * (blockIdx.y + 1) / gridDim.y * kChunk;
  return {first + chunks * blockIdx.y / gridDim.y * kChunk, end < last ? end : last};
}

// -- semi_hard --------------------------------------------------------------------------------------------------------

template <typename T>
struct SemiHardMemory : PairMemory<T> {
  int32_t farthest[kTile];
};

// Block (tile of anchors, part of its pairs). Every pair makes one triplet, at the pair's own number.
template <typename In>
__global__ void __launch_bounds__(kThreads, 1) mine_semi_hard_kernel(Batch<In> batch, Triplets out) {
  using T = Arithmetic<In>;
  auto& memory = block_memory<SemiHardMemory<T>>();
  const int32_t first_anchor = blockIdx.x * kTile;
  const Chunks chunks = chunks_of_block(batch, first_anchor);
  for (int64_t first = chunks.begin; first < chunks.end; first += kChunk) {
    const int pairs = chunks.in_flight(first);
    Pair<T> pair[kPairs];
    Best<T> nearest[kPairs], farthest[kMicro];
    load_pairs(batch, first_anchor, first, memory, pair);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) nearest[j] = Best<T>::none();
#pragma unroll
    for (int r = 0; r < kMicro; ++r) farthest[r] = Best<T>::none();
    for (int32_t column = 0; column < batch.rows; column += kTile) {
      const MicroTile<In> tile = form_tile(batch, first_anchor, column, memory.panels);
      share_negatives(tile, memory.negatives);
#pragma unroll
      for (int r = 0; r < kMicro; ++r)
#pragma unroll
        for (int c = 0; c < kMicro; ++c)
          if (tile.negative(r, c)) farthest[r].offer(tile.distance[r][c], tile.first_column + c);
#pragma unroll 1
      for (int c = 0; c < kTile; ++c)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          if (j == pairs) break;
          const T distance = memory.negatives[pair[j].row][c];
          if (distance > pair[j].distance) nearest[j].offer(-distance, column + c);
        }
    }
#pragma unroll
    for (int r = 0; r < kMicro; ++r) {
      farthest[r].merge_across_columns();
      if (threadIdx.x % kSide == 0) memory.farthest[threadIdx.x / kSide * kMicro + r] = farthest[r].index;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t number = first + j * kThreads + threadIdx.x;
      if (number >= chunks.end) continue;
      const int32_t negative = nearest[j].index == kNone ? memory.farthest[pair[j].row] : nearest[j].index;
      out.write(number, first_anchor + pair[j].row, pair[j].positive, negative);
    }
  }
}

// -- batch_all --------------------------------------------------------------------------------------------------------

template <typename T>
struct BatchAllMemory : PairMemory<T> {
  int64_t warp_sum[kThreads / kWarp];
};

// Which triplets are wanted, by D_an - D_ap.
template <typename T>
struct Criterion {
  Mining mining;
  T margin;
  __device__ bool holds(T difference) const {
    if (mining == Mining::batch_all) return difference < margin;
    if (mining == Mining::batch_all_hard) return difference <= 0;
    return 0 < difference && difference < margin;
  }
};

// The sum over the block's threads, and over those before this one.
struct BlockSum {
  int64_t before, all;
};

__device__ inline BlockSum sum_block(int64_t value, int64_t (&warp_sum)[kThreads / kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warp_sum[warp] = sum;
  __syncthreads();
  BlockSum result = {sum - value, 0};
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) result.before += warp_sum[w];
    result.all += warp_sum[w];
  }
  __syncthreads();
  return result;
}

// Block (tile of anchors, part of its pairs), launched twice. Without `end` it writes count [tiles, parts]. With it,
// the running sum of the counts, it counts every chunk again, because its pairs' counts are too many to keep, and
// then writes the chunk's triplets.
template <typename In>
__global__ void __launch_bounds__(kThreads, 1)
    mine_batch_all_kernel(Batch<In> batch, Criterion<Arithmetic<In>> criterion, int64_t* count, const int64_t* end,
                          Triplets out) {
  using T = Arithmetic<In>;
  auto& memory = block_memory<BatchAllMemory<T>>();
  const int32_t first_anchor = blockIdx.x * kTile;
  const int64_t block = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  const Chunks chunks = chunks_of_block(batch, first_anchor);
  int64_t begin = end == nullptr || block == 0 ? 0 : end[block - 1];
  for (int64_t first = chunks.begin; first < chunks.end; first += kChunk) {
    const int pairs = chunks.in_flight(first);
    Pair<T> pair[kPairs];
    int64_t place[kPairs] = {};  // of a pair's next triplet, first among its own
    load_pairs(batch, first_anchor, first, memory, pair);
#pragma unroll 1
    for (int writes = 0; writes <= (end != nullptr); ++writes) {
      for (int32_t column = 0; column < batch.rows; column += kTile) {
        share_negatives(form_tile(batch, first_anchor, column, memory.panels), memory.negatives);
#pragma unroll 1
        for (int c = 0; c < kTile; ++c)
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            if (j == pairs) break;
            if (!criterion.holds(memory.negatives[pair[j].row][c] - pair[j].distance)) continue;
            if (writes) out.write(place[j], first_anchor + pair[j].row, pair[j].positive, column + c);
            ++place[j];
          }
      }
      if (writes) break;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const BlockSum sum = sum_block(place[j], memory.warp_sum);
        place[j] = begin + sum.before;
        begin += sum.all;
      }
    }
  }
  if (end == nullptr && threadIdx.x == 0) count[block] = begin;
}

}  // namespace replearn::mining
