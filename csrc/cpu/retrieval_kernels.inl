// The vectorised parts of retrieval; included by tile_kernels.inl. What they do: retrieval_kernels.h.

using replearn::Bfloat16;
using replearn::BinnedRow;
using replearn::Candidates;
using replearn::FilterColumns;
using replearn::FilterRow;
using replearn::Positives;

inline Vec<float> load_similarities(const float* s, Whole<float> all) { return load(s, all); }
inline Vec<float> load_similarities(const float* s, Part part) { return load(s, part); }

// A bf16 number is the upper half of an fp32 one. Widening is one instruction on x86, of which compilers make three.
inline Vec<float> load_similarities(const Bfloat16* s, Whole<float>) {
#if defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 64
  const Bits<float> bits = (Bits<float>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)s)) << 16;
#elif defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 32
  const Bits<float> bits = (Bits<float>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)s)) << 16;
#else
  typedef uint16_t Halves __attribute__((vector_size(REPLEARN_VECTOR_BYTES / 2)));
  Halves halves;
  __builtin_memcpy(&halves, s, sizeof(halves));
  const Bits<float> bits = __builtin_convertvector(halves, Bits<float>) << 16;
#endif
  Vec<float> v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}
inline Vec<float> load_similarities(const Bfloat16* s, Part part) {
  Bfloat16 padded[lanes<float>] = {};
  __builtin_memcpy(padded, s, part.count * sizeof(Bfloat16));
  return load_similarities(padded, Whole<float>{});
}

// A tile's row, and the bounds of vectors of its columns.
template <typename S>
struct FilteredRow {
  const S* s;
  FilterColumns columns;
  FilterRow row;

  template <typename Count>
  Vec<float> v(int64_t j, Count count) const {
    return load_similarities(s + j, count) * load(columns.factor + j, count) * row.factor;
  }
  // v + relative |v| + row.factor slack + above
  template <typename Count>
  Vec<float> upper(int64_t j, Count count) const {
    const Vec<float> of_v = v(j, count);
    const Vec<float> fixed = multiply_add(load(columns.slack + j, count), splat<float>(row.factor), load(columns.above + j, count));
    return max(of_v * (1 + row.relative), of_v * (1 - row.relative)) + fixed;
  }
  // v - relative |v| - row.factor slack + below
  template <typename Count>
  Vec<float> lower(int64_t j, Count count) const {
    const Vec<float> of_v = v(j, count);
    const Vec<float> fixed = multiply_add(load(columns.slack + j, count), splat<float>(-row.factor), load(columns.below + j, count));
    return fixed - max(-of_v * (1 + row.relative), -of_v * (1 - row.relative));
  }
  // The lanes whose upper bound reaches `threshold`, and that are not left out.
  template <typename Count>
  uint32_t reaching(Vec<float> upper, Vec<float> threshold, int64_t j, Count count) const {
    uint32_t lanes_of = lane_bits(upper >= threshold);
    if constexpr (std::is_same_v<Count, Part>) lanes_of &= (uint32_t{1} << count.count) - 1;
    for (int64_t n = 0; lanes_of && n < replearn::kIds; ++n)
      if (columns.ids[n]) lanes_of &= ~lane_bits(same_group<float>(row.ids[n], columns.ids[n], j, count));
    return lanes_of;
  }
  // Whether any of the next four whole vectors may have such a lane: most have none.
  bool some_of_four(Vec<float> threshold, int64_t j) const {
    Bits<float> reaches{};
    for (int64_t n = 0; n < 4; ++n) reaches |= upper(j + n * lanes<float>, Whole<float>{}) >= threshold;
    return any<float>(reaches);
  }
};

template <typename S>
int64_t collect(const S* s, FilterColumns columns, FilterRow row, float least, int64_t from, int64_t end,
                int64_t first_column, Candidates& found) {
  const FilteredRow<S> filtered{s, columns, row};
  const Vec<float> threshold = splat<float>(least);
  const auto step = [&](int64_t j, auto count) {
    const Vec<float> uppers = filtered.upper(j, count);
    uint32_t reaches = filtered.reaching(uppers, threshold, j, count);
    if (!reaches) return;
    float lower[lanes<float>], upper[lanes<float>];
    store(lower, filtered.lower(j, count));
    store(upper, uppers);
    for (; reaches; reaches &= reaches - 1) {
      const int64_t k = __builtin_ctz(reaches);
      found.lower[found.count] = lower[k];
      found.upper[found.count] = upper[k];
      found.index[found.count++] = first_column + j + k;
    }
  };
  int64_t j = from;
  while (j + lanes<float> <= end) {
    if (j + 4 * lanes<float> <= end && !filtered.some_of_four(threshold, j)) {
      j += 4 * lanes<float>;
      continue;
    }
    if (found.count + lanes<float> > found.room) return j;
    step(j, Whole<float>{});
    j += lanes<float>;
  }
  if (j < end) {
    if (found.count + lanes<float> > found.room) return j;
    step(j, Part{end - j});
  }
  return end;
}

inline int64_t count_reaching(const float* values, int64_t count, float bound) {
  int64_t reaching = 0, j = 0;
  for (; j + lanes<float> <= count; j += lanes<float>)
    reaching += __builtin_popcount(lane_bits(load(values + j) >= splat<float>(bound)));
  for (; j < count; ++j) reaching += values[j] >= bound;
  return reaching;
}

// Floats in the order of integers, and back; -0 comes before 0.
inline int32_t order_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float of_order(int32_t bits) {
  bits ^= (bits >> 31) & 0x7fffffff;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// By halving the range that it is in: a pass over 2,000 values takes some 0.05 us, and sorting them a part 20.
float kth_largest(const float* values, int64_t count, int64_t k) {
  Vec<float> highest = splat<float>(values[0]), lowest = -highest;
  for_vectors<float>(0, count, [&](int64_t j, auto n) {
    const Vec<float> v = load(values + j, n);
    highest = max(highest, only<float>(v, n, values[0]));
    lowest = max(lowest, only<float>(-v, n, -values[0]));
  });
  const float least = -horizontal_max<float>(lowest), most = horizontal_max<float>(highest);
  int64_t low = order_of(least), end = int64_t{order_of(most)} + 1;  // at least k values reach `low`, fewer than k `end`
  while (low + 1 < end) {
    const int64_t middle = low + (end - low) / 2;
    const int64_t reaching = count_reaching(values, count, of_order(static_cast<int32_t>(middle)));
    (reaching >= k ? low : end) = middle;
  }
  return of_order(static_cast<int32_t>(low));
}

// How many of values[0, count), which descend, are above `bound`.
inline int64_t count_above(const float* values, int64_t count, float bound) {
  const float* at = values;
  while (count > 1) {
    const int64_t half = count / 2;
    at += at[half - 1] > bound ? half : 0;
    count -= half;
  }
  return at - values + (count && *at > bound);
}

// Up to so many positives are compared with a vector of columns one after the other, more with a column at a time.
constexpr int64_t kMostInTurn = 32;

template <typename S>
int64_t place(const S* s, FilterColumns columns, FilterRow row, Positives positives, int64_t end, int64_t* better,
              int32_t* unsure) {
  const FilteredRow<S> filtered{s, columns, row};
  const Vec<float> threshold = splat<float>(positives.low[positives.count - 1]);
  int64_t doubts = 0;
  const auto doubt = [&](int64_t j, uint32_t of) {
    for (; of; of &= of - 1) unsure[doubts++] = static_cast<int32_t>(j + __builtin_ctz(of));
  };
  const auto step = [&](int64_t j, auto count) {
    const Vec<float> uppers = filtered.upper(j, count);
    uint32_t reaches = filtered.reaching(uppers, threshold, j, count);
    if (!reaches) return;
    const Vec<float> lowers = filtered.lower(j, count);
    if (positives.count <= kMostInTurn) {
      for (int64_t p = 0; reaches; ++p) {
        const uint32_t here = reaches & lane_bits(uppers >= splat<float>(positives.low[p]));
        const uint32_t sure = here & lane_bits(lowers > splat<float>(positives.high[p]));
        better[p] += __builtin_popcount(sure);
        doubt(j, here & ~sure);
        reaches &= ~here;
      }
      return;
    }
    float lower[lanes<float>], upper[lanes<float>];
    store(lower, lowers);
    store(upper, uppers);
    for (; reaches; reaches &= reaches - 1) {
      const int64_t k = __builtin_ctz(reaches);
      const int64_t p = count_above(positives.low, positives.count, upper[k]);
      if (lower[k] > positives.high[p])
        ++better[p];
      else
        doubt(j, uint32_t{1} << k);
    }
  };
  int64_t j = 0;
  for (; j + 4 * lanes<float> <= end; j += 4 * lanes<float>) {
    if (!filtered.some_of_four(threshold, j)) continue;
    for (int64_t n = 0; n < 4; ++n) step(j + n * lanes<float>, Whole<float>{});
  }
  for_vectors<float>(j, end, step);
  return doubts;
}

template <typename S>
void bins(const S* s, FilterColumns columns, FilterRow row, BinnedRow binned, const int32_t* labels, int64_t from,
          int64_t end, int32_t* where) {
  const FilteredRow<S> filtered{s, columns, row};
  const Vec<float> scale = splat<float>(binned.scale), shift = splat<float>(binned.shift);
  const Vec<float> last = splat<float>(static_cast<float>(binned.bins - 1));
  const Bits<float> beyond = Bits<float>{} + static_cast<int32_t>(2 * binned.bins);
  for_vectors<float>(from, end, [&](int64_t j, auto count) {
    const Vec<float> v = filtered.v(j, count) + load(columns.above + j, count);
    const Vec<float> place = -max(-max(multiply_add(v, scale, shift), Vec<float>{}), -last);
    Bits<float> code = 2 * __builtin_convertvector(place, Bits<float>) - same_group<float>(binned.label, labels, j, count);
    for (int64_t n = 0; n < replearn::kIds; ++n)
      if (columns.ids[n]) code = same_group<float>(row.ids[n], columns.ids[n], j, count) ? beyond : code;
    store_groups<float>(where + j, code);
  });
}

inline Vec<double> to_double(const double* x, Whole<double> all) { return load(x, all); }
// One instruction on x86, of which compilers make three.
inline Vec<double> to_double(const float* x, Whole<double>) {
#if defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 64
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__x86_64__) && REPLEARN_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  typedef float Floats __attribute__((vector_size(REPLEARN_VECTOR_BYTES / 2)));
  Floats v;
  __builtin_memcpy(&v, x, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
#endif
}

// The sum of term(x[k], y[k], sum so far), in 16 lanes that are then folded in halves.
template <typename T, typename F>
inline double sum_of(const T* x, const T* y, int64_t d, const F& add) {
  constexpr int64_t kLanes = 16, kVectors = kLanes / lanes<double>;
  Vec<double> sum[kVectors] = {};
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes)
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = k + v * lanes<double>;
      sum[v] = add(to_double(x + at, Whole<double>{}), to_double(y + at, Whole<double>{}), sum[v]);
    }
  if (k < d) {
    T rest_x[kLanes] = {}, rest_y[kLanes] = {};
    __builtin_memcpy(rest_x, x + k, (d - k) * sizeof(T));
    __builtin_memcpy(rest_y, y + k, (d - k) * sizeof(T));
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = v * lanes<double>;
      sum[v] = add(to_double(rest_x + at, Whole<double>{}), to_double(rest_y + at, Whole<double>{}), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int64_t half = kVectors / 2; half; half /= 2)
    for (int64_t v = 0; v < half; ++v) sum[v] += sum[v + half];
  return horizontal_sum<double>(sum[0]);
}

template <typename T>
double exact_dot(const T* x, const T* y, int64_t d) {
  return sum_of(x, y, d, [](Vec<double> a, Vec<double> b, Vec<double> sum) { return multiply_add(a, b, sum); });
}

template <typename T>
double exact_square(const T* x, const T* y, int64_t d) {
  return sum_of(x, y, d, [](Vec<double> a, Vec<double> b, Vec<double> sum) { return multiply_add(a - b, a - b, sum); });
}

constexpr replearn::RetrievalKernels retrieval_kernels() {
  return {kth_largest,
          {collect<float>, place<float>, bins<float>},
          {collect<Bfloat16>, place<Bfloat16>, bins<Bfloat16>},
          {exact_dot<float>, exact_square<float>},
          {exact_dot<double>, exact_square<double>}};
}
