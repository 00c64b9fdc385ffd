// The vectorised parts of mine_triplets (mining_kernels.h). Part of tile_kernels.inl.

using replearn::Chosen;
using replearn::Distance;
using replearn::Hardest;

template <typename T>
constexpr T kInfinity = __builtin_huge_val();

// -- distances --------------------------------------------------------------------------------------------------------

// Anchors in flight, each against two vectors of columns: as many sums as the registers hold beside their operands.
constexpr int64_t kGroup = REPLEARN_VECTOR_BYTES == 64 ? 8 : 4;
template <typename T>
constexpr int64_t kPanel = 2 * lanes<T>;

// Every pair's sum follows the features in order, with one rounding of the difference and one of the multiply-add: the
// same bits for (i, j) and (j, i), and on every device.
template <typename T>
void distances(const T* anchors, const T* columns, int64_t d, Distance distance, T* out, int64_t stride) {
  Vec<T> sum[kGroup][2] = {};
  for (int64_t k = 0; k < d; ++k, anchors += kPanel<T>, columns += kPanel<T>) {
    const Vec<T> left = load(columns), right = load(columns + lanes<T>);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kGroup; ++r) {
      const Vec<T> t = left - anchors[r], u = right - anchors[r];
      sum[r][0] = multiply_add(t, t, sum[r][0]);
      sum[r][1] = multiply_add(u, u, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
    for (int64_t side = 0; side < 2; ++side) {
      Vec<T> v = sum[r][side];
      if (distance == Distance::euclidean) v = square_root(v);
      if (distance == Distance::cosine) v *= T(0.5);
      store(out + r * stride + side * lanes<T>, v);
    }
}

template <typename T>
void to_unit_rows(T* panel, int64_t d) {
  for (int64_t lane = 0; lane < kPanel<T>; lane += lanes<T>) {
    T* rows = panel + lane;
    Vec<T> largest{}, sum{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> v = load(rows + k * kPanel<T>);
      largest = max(max(v, -v), largest);
    }
    const auto zero = largest == 0;
    largest = zero ? splat<T>(1) : largest;
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> v = load(rows + k * kPanel<T>) / largest;
      sum = multiply_add(v, v, sum);
      store(rows + k * kPanel<T>, v);
    }
    const Vec<T> length = zero ? splat<T>(1) : square_root(sum);
    for (int64_t k = 0; k < d; ++k) store(rows + k * kPanel<T>, load(rows + k * kPanel<T>) / length);
  }
}

// -- batch_hard -------------------------------------------------------------------------------------------------------

// A running extreme of each lane and where it was seen first: -1 for nowhere.
template <typename T>
struct Extremes {
  Vec<T> value;
  Bits<T> index;

  void raise(Vec<T> v, Bits<T> at) {
    const auto wins = v > value;
    value = wins ? v : value;
    index = wins ? at : index;
  }
  void lower(Vec<T> v, Bits<T> at) {
    const auto wins = v < value;
    value = wins ? v : value;
    index = wins ? at : index;
  }
};

// Folds the lanes that saw any into one value and index; sign: 1 for the largest, -1 for the smallest.
template <typename T>
inline void fold_lanes(Extremes<T> lane, T sign, T& value, Group<T>& index) {
  for (int64_t k = 0; k < lanes<T>; ++k) {
    const T v = sign * lane.value[k], best = sign * value;
    if (lane.index[k] < 0 || v < best || (v == best && lane.index[k] > index)) continue;
    value = lane.value[k];
    index = lane.index[k];
  }
}

template <typename T>
void fold_hardest(const T* tile, int64_t stride, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
                  const Group<T>* row_group, const Group<T>* column_group, Hardest<T> of_rows, Hardest<T> of_columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* d = tile + i * stride;
    const Bits<T> group = Bits<T>{} + row_group[i], here = Bits<T>{} + static_cast<Group<T>>(first_row + i);
    Extremes<T> positive{splat<T>(-1), Bits<T>{} - 1}, negative{splat<T>(kInfinity<T>), Bits<T>{} - 1};
    Bits<T> at = lane_index<T>(first_column);
    for (int64_t j = 0; j < columns; j += lanes<T>, at += static_cast<Group<T>>(lanes<T>)) {
      const Vec<T> v = load(d + j);
      const Bits<T> same = load_groups<T>(column_group + j) == group;
      const Vec<T> if_negative = same ? splat<T>(kInfinity<T>) : v;
      negative.lower(if_negative, at);
      Extremes<T> column{load(of_columns.negative + j), load_groups<T>(of_columns.negative_index + j)};
      column.lower(if_negative, here);
      store(of_columns.negative + j, column.value);
      store_groups<T>(of_columns.negative_index + j, column.index);
      if (!any<T>(same)) continue;
      const Vec<T> if_positive = same ? v : splat<T>(-1);
      positive.raise(if_positive, at);
      column = {load(of_columns.positive + j), load_groups<T>(of_columns.positive_index + j)};
      column.raise(if_positive, here);
      store(of_columns.positive + j, column.value);
      store_groups<T>(of_columns.positive_index + j, column.index);
    }
    fold_lanes<T>(positive, 1, of_rows.positive[i], of_rows.positive_index[i]);
    fold_lanes<T>(negative, -1, of_rows.negative[i], of_rows.negative_index[i]);
  }
}

// -- semi_hard --------------------------------------------------------------------------------------------------------

// The least distance above than[r], for R of them in one reading of the row.
template <int R, typename T>
inline void nearest_beyond(const T* row, int64_t columns, const T* than, Group<T>* index) {
  Extremes<T> nearest[R];
  for (auto& one : nearest) one = {splat<T>(__builtin_nan("")), Bits<T>{} - 1};
  Bits<T> at = lane_index<T>(0);
  for (int64_t j = 0; j < columns; j += lanes<T>, at += static_cast<Group<T>>(lanes<T>)) {
    const Vec<T> v = load(row + j);
    for (int r = 0; r < R; ++r) {
      // Not `v < value`: the first one wins against NaN, also if it is infinite.
      const auto wins = (v > than[r]) & ~(v >= nearest[r].value);
      nearest[r].value = wins ? v : nearest[r].value;
      nearest[r].index = wins ? at : nearest[r].index;
    }
  }
  for (int r = 0; r < R; ++r) {
    T value = 0;
    index[r] = -1;
    for (int64_t k = 0; k < lanes<T>; ++k) {
      const T v = nearest[r].value[k];
      const Group<T> column = nearest[r].index[k];
      if (column < 0 || (index[r] >= 0 && (v > value || (v == value && column > index[r])))) continue;
      value = v;
      index[r] = column;
    }
  }
}

template <typename T>
void nearest_beyond(const T* row, int64_t columns, const T* than, int64_t count, Group<T>* index) {
  for_rows(count, [&](int64_t i, auto at_once) {
    nearest_beyond<at_once.count>(row, columns, than + i, index + i);
  });
}

// A binary search for all columns of a block at once, one level after the other: the loop over columns is vectorised.
template <typename T>
void count_below(const T* row, int64_t columns, const T* sorted, int64_t levels, Group<T>* below) {
  constexpr int64_t kBlock = 16 * kPanel<T>;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = columns - begin < kBlock ? columns - begin : kBlock;
    const T* __restrict v = row + begin;
    Group<T>* __restrict found = below + begin;
    for (int64_t j = 0; j < count; ++j) found[j] = 0;
    for (int64_t level = levels - 1; level >= 0; --level) {
      const auto half = static_cast<Group<T>>(int64_t{1} << level);
      const T* __restrict middle = sorted + half - 1;
      for (int64_t j = 0; j < count; ++j) found[j] += middle[found[j]] < v[j] ? half : 0;
    }
  }
}

template <typename T>
Group<T> farthest(const T* row, int64_t columns) {
  Extremes<T> lane{splat<T>(-1), Bits<T>{} - 1};
  Bits<T> at = lane_index<T>(0);
  for (int64_t j = 0; j < columns; j += lanes<T>, at += static_cast<Group<T>>(lanes<T>)) lane.raise(load(row + j), at);
  T value = -1;  // below any
  Group<T> index = -1;
  fold_lanes<T>(lane, 1, value, index);
  return index;
}

// -- batch_all --------------------------------------------------------------------------------------------------------

template <Chosen C, typename T>
inline Bits<T> chosen(Vec<T> v, T positive, T margin) {
  const Vec<T> difference = v - positive;
  if (C == Chosen::all) return difference < margin;
  if (C == Chosen::hard) return difference <= 0;
  return (difference > 0) & (difference < margin);
}

template <Chosen C, typename T>
int64_t count_chosen(const T* row, int64_t columns, T positive, T margin) {
  Bits<T> counts{};
  for (int64_t j = 0; j < columns; j += lanes<T>) counts -= chosen<C>(load(row + j), positive, margin);
  int64_t count = 0;
  for (int64_t k = 0; k < lanes<T>; ++k) count += counts[k];
  return count;
}

// Writes first + k for every bit k, and returns what comes after.
inline int64_t* write_columns(int64_t* to, int64_t first, uint32_t bits) {
#if defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 64
  const __m512i eight = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (; bits; bits >>= 8, first += 8) {
    const __m512i columns = _mm512_add_epi64(eight, _mm512_set1_epi64(first));
    const int count = __builtin_popcount(bits & 255);
    // A store of no more than is chosen: what follows may be another thread's.
    _mm512_mask_storeu_epi64(to, (1 << count) - 1, _mm512_maskz_compress_epi64(bits, columns));
    to += count;
  }
#else
  for (; bits; bits &= bits - 1) *to++ = first + __builtin_ctz(bits);
#endif
  return to;
}

template <Chosen C, typename T>
int64_t write_chosen(const T* row, int64_t columns, T positive, T margin, int64_t* negatives) {
  int64_t* next = negatives;
  for (int64_t j = 0; j < columns; j += lanes<T>)
    next = write_columns(next, j, lane_bits(chosen<C>(load(row + j), positive, margin)));
  return next - negatives;
}

template <typename T>
int64_t count_chosen(const T* row, int64_t columns, T positive, T margin, Chosen which) {
  if (which == Chosen::all) return count_chosen<Chosen::all>(row, columns, positive, margin);
  if (which == Chosen::hard) return count_chosen<Chosen::hard>(row, columns, positive, margin);
  return count_chosen<Chosen::semi_hard>(row, columns, positive, margin);
}

template <typename T>
int64_t write_chosen(const T* row, int64_t columns, T positive, T margin, Chosen which, int64_t* negatives) {
  if (which == Chosen::all) return write_chosen<Chosen::all>(row, columns, positive, margin, negatives);
  if (which == Chosen::hard) return write_chosen<Chosen::hard>(row, columns, positive, margin, negatives);
  return write_chosen<Chosen::semi_hard>(row, columns, positive, margin, negatives);
}

template <typename T>
constexpr replearn::MiningKernels<T> mining_kernels() {
  return {kPanel<T>,      kGroup,         distances<T>, to_unit_rows<T>, fold_hardest<T>,
          nearest_beyond<T>, count_below<T>, farthest<T>,  count_chosen<T>, write_chosen<T>};
}
