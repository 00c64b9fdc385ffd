// The vectorised parts of retrieval; included by tile_kernels.inl. What they do: retrieval_kernels.h.

using replearn::Bfloat16;
using replearn::Candidates;
using replearn::FilterColumns;
using replearn::FilterRow;
using replearn::Positives;

inline Vec<float> load_similarities(const float* s, Whole<float> all) { return load(s, all); }
inline Vec<float> load_similarities(const float* s, Part part) { return load(s, part); }

// A bf16 number is the upper half of an fp32 one.
template <typename Count>
inline Vec<float> load_similarities(const Bfloat16* s, Count count) {
  typedef uint16_t Halves __attribute__((vector_size(REPLEARN_VECTOR_BYTES / 2)));
  Halves halves{};
  if constexpr (std::is_same_v<Count, Part>)
    __builtin_memcpy(&halves, s, count.count * sizeof(Bfloat16));
  else
    __builtin_memcpy(&halves, s, sizeof(halves));
  const Bits<float> bits = __builtin_convertvector(halves, Bits<float>) << 16;
  Vec<float> v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// The bounds of a vector of columns.
struct Bounds {
  Vec<float> v, error;
  Vec<float> upper;
  Bits<float> counts;  // lanes that are columns, and not left out
};

template <typename S, typename Count>
inline Bounds bounds_of(const S* s, const FilterColumns& columns, const FilterRow& row, int64_t j, Count count) {
  Bounds b;
  b.v = load_similarities(s + j, count) * load(columns.factor + j, count) * row.factor;
  b.error = max(b.v, -b.v) * row.relative + load(columns.slack + j, count) * row.factor;
  b.upper = b.v + load(columns.above + j, count) + b.error;
  b.counts = ~Bits<float>{};
  for (int64_t n = 0; n < replearn::kIds; ++n)
    if (columns.ids[n]) b.counts &= ~same_group<float>(row.ids[n], columns.ids[n], j, count);
  if constexpr (std::is_same_v<Count, Part>)
    for (int64_t k = count.count; k < lanes<float>; ++k) b.counts[k] = 0;
  return b;
}

template <typename Count>
inline Vec<float> lower_of(const Bounds& b, const FilterColumns& columns, int64_t j, Count count) {
  return b.v + load(columns.below + j, count) - b.error;
}

template <typename S>
int64_t collect(const S* s, FilterColumns columns, FilterRow row, float threshold, int64_t from, int64_t end,
                int64_t first_column, Candidates& found) {
  const auto step = [&](int64_t j, auto count) {
    const Bounds b = bounds_of(s, columns, row, j, count);
    uint32_t reaches = lane_bits((b.upper >= splat<float>(threshold)) & b.counts);
    if (!reaches) return;
    float lower[lanes<float>], upper[lanes<float>];
    store(lower, lower_of(b, columns, j, count));
    store(upper, b.upper);
    for (; reaches; reaches &= reaches - 1) {
      const int64_t k = __builtin_ctz(reaches);
      found.lower[found.count] = lower[k];
      found.upper[found.count] = upper[k];
      found.index[found.count++] = first_column + j + k;
    }
  };
  int64_t j = from;
  for (; j + lanes<float> <= end; j += lanes<float>) {
    if (found.count + lanes<float> > found.room) return j;
    step(j, Whole<float>{});
  }
  if (j < end) {
    if (found.count + lanes<float> > found.room) return j;
    step(j, Part{end - j});
  }
  return end;
}

inline int64_t count_reaching(const float* values, int64_t count, float bound) {
  Bits<float> reaching{};
  for_vectors<float>(0, count, [&](int64_t j, auto n) {
    reaching -= only<float>(load(values + j, n), n, -__builtin_inff()) >= splat<float>(bound);  // a true lane is -1
  });
  int64_t total = 0;
  for (int64_t k = 0; k < lanes<float>; ++k) total += reaching[k];
  return total;
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
  float least = values[0], most = values[0];
  for (int64_t j = 1; j < count; ++j) {
    least = values[j] < least ? values[j] : least;
    most = values[j] > most ? values[j] : most;
  }
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
  const Vec<float> least = splat<float>(positives.low[positives.count - 1]);
  int64_t doubts = 0;
  const auto doubt = [&](int64_t j, uint32_t of) {
    for (; of; of &= of - 1) unsure[doubts++] = static_cast<int32_t>(j + __builtin_ctz(of));
  };
  for_vectors<float>(0, end, [&](int64_t j, auto count) {
    const Bounds b = bounds_of(s, columns, row, j, count);
    uint32_t reaches = lane_bits((b.upper >= least) & b.counts);
    if (!reaches) return;
    const Vec<float> lowers = lower_of(b, columns, j, count);
    if (positives.count <= kMostInTurn) {
      for (int64_t p = 0; reaches; ++p) {
        const uint32_t here = reaches & lane_bits(b.upper >= splat<float>(positives.low[p]));
        const uint32_t sure = here & lane_bits(lowers > splat<float>(positives.high[p]));
        better[p] += __builtin_popcount(sure);
        doubt(j, here & ~sure);
        reaches &= ~here;
      }
      return;
    }
    float lower[lanes<float>], upper[lanes<float>];
    store(lower, lowers);
    store(upper, b.upper);
    for (; reaches; reaches &= reaches - 1) {
      const int64_t k = __builtin_ctz(reaches);
      const int64_t p = count_above(positives.low, positives.count, upper[k]);
      if (lower[k] > positives.high[p])
        ++better[p];
      else
        doubt(j, uint32_t{1} << k);
    }
  });
  return doubts;
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
          {collect<float>, place<float>},
          {collect<Bfloat16>, place<Bfloat16>},
          {exact_dot<float>, exact_square<float>},
          {exact_dot<double>, exact_square<double>}};
}
