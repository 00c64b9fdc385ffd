// How passes walk over rows and vectors of columns; included after vector.h, inside an anonymous namespace.

constexpr int64_t kRows = 4;  // rows in flight: they share the loads of their columns' quantities

// Calls body(j, count) for the vectors of [begin, end): with a compile-time count for whole ones, so that their loads
// are single instructions, and with a run-time count for a last part.
template <typename T, typename F>
inline void for_vectors(int64_t begin, int64_t end, const F& body) {
  int64_t j = begin;
  for (; j + lanes<T> <= end; j += lanes<T>) body(j, Whole<T>{});
  if (j < end) body(j, Part{end - j});
}

template <int R>
struct Rows {
  static constexpr int count = R;
};

// Calls body(i, at_once) for the rows [0, end): for kRows of them at a time, and one by one for those that are left.
template <typename F>
inline void for_rows(int64_t end, const F& body) {
  int64_t i = 0;
  for (; i + kRows <= end; i += kRows) body(i, Rows<kRows>{});
  for (; i < end; ++i) body(i, Rows<1>{});
}

// `v` with the lanes that are no columns set to `fill`.
template <typename T>
inline Vec<T> only(Vec<T> v, Whole<T>, T) {
  return v;
}
template <typename T>
inline Vec<T> only(Vec<T> v, Part part, T fill) {
  for (int64_t k = part.count; k < lanes<T>; ++k) v[k] = fill;
  return v;
}

template <typename T>
inline T exp_of(T x) {
  return exp<T>(splat<T>(x))[0];
}

// The pairs of a row and a vector of columns that share a group, as a mask of lanes; loads past the end match nothing
// that is stored or summed.
template <typename T, typename Count>
inline Bits<T> same_group(Group<T> group, const Group<T>* column_group, int64_t j, Count count) {
  return load_groups<T>(column_group + j, count) == (Bits<T>{} + group);
}
