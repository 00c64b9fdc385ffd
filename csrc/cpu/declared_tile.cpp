#include "declared_tile.h"

#include <dlfcn.h>

#include <mutex>
#include <vector>

#include "declared.h"
#include "distance_tile.h"
#include "panels.h"

namespace replearn {

namespace {

// The libraries that were loaded. They stay: a call may be on its way through one.
struct Loaded {
  const void* passes;
  bool is_double;
};
std::mutex loading;
std::vector<Loaded>& loaded() {
  static std::vector<Loaded> all;
  return all;
}

// What a call gives for rows, columns and pairs, each a tensor or none.
struct Given {
  const std::optional<Tensor>&rows, &columns, &guide;
};

template <typename T>
const DeclaredPasses<T>& passes_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(loading);
  const auto& all = loaded();
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(all.size()), "there are no passes ", number);
  STD_TORCH_CHECK(all[number].is_double == (sizeof(T) == 8), "passes ", number, " are of another dtype");
  return *static_cast<const DeclaredPasses<T>*>(all[number].passes);
}

template <typename T>
DeclaredNumbers numbers_of(const DeclaredPasses<T>& passes, double scale, const Tensor& parameters) {
  STD_TORCH_CHECK(parameters.is_cpu() && parameters.scalar_type() == ScalarType::Double && parameters.dim() == 1 &&
                      parameters.size(0) == passes.parameters && (passes.parameters <= 1 || parameters.stride(0) == 1),
                  "parameters must be a contiguous float64 CPU tensor with ", passes.parameters, " entries");
  return {scale, static_cast<const double*>(parameters.const_data_ptr())};
}

template <typename T>
DeclaredTable<T> table_of(const Tensor& t, const char* name, int64_t quantities, int64_t count) {
  check_matrix<T>(t, name, quantities, count);
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0)};
}

template <typename T>
DeclaredTable<const T> given_of(const std::optional<Tensor>& t, const char* name, bool needed, int64_t rows,
                                int64_t columns) {
  STD_TORCH_CHECK(t.has_value() == needed, name, needed ? " must be a tensor" : " must be none: the loss reads none");
  if (!t) return {};
  check_matrix<T>(*t, name, rows, columns);
  return {static_cast<const T*>(t->const_data_ptr()), t->stride(0)};
}

template <typename T>
DeclaredGiven<T> given_of(const DeclaredPasses<T>& passes, const Tile<T>& tile, const Given& given) {
  return {given_of<T>(given.rows, "row_values", passes.row_values > 0, passes.row_values, tile.rows),
          given_of<T>(given.columns, "column_values", passes.column_values > 0, passes.column_values, tile.columns),
          given_of<T>(given.guide, "guide", passes.reads_guide, tile.rows, tile.columns)};
}

// Statistics of the columns from every slab, and their sum in the slabs' order.
template <typename T>
class Partials {
 public:
  Partials(const DeclaredPasses<T>& passes, const Tile<T>& tile, bool needed)
      : passes_(passes), slabs_(slabs_of(tile.rows)), columns_(tile.columns), padded_(padded_columns(tile.columns)),
        quantities_(passes.statistics - passes.one_sweep), needed_(needed), memory_(needed ? slabs_ * size() : 0) {}
  DeclaredTable<T> of_slab(int64_t k) const { return {needed_ ? memory_.get() + k * size() : nullptr, padded_}; }
  void merge(DeclaredNumbers numbers, DeclaredTable<T> columns) const {
    parallel(padded_ / kPadding, slabs_ * quantities_ * kPadding, [&](int64_t begin, int64_t end) {
      passes_.merge(memory_.get(), slabs_, padded_, begin * kPadding, std::min(end * kPadding, columns_), numbers, columns);
    });
  }

 private:
  int64_t size() const { return quantities_ * padded_; }
  const DeclaredPasses<T>& passes_;
  const int64_t slabs_, columns_, padded_, quantities_;
  const bool needed_;
  const Buffer<T> memory_;
};

template <typename T>
DeclaredTable<T> from_row(DeclaredTable<T> table, int64_t first) {
  return {table.data + first, table.stride};
}

template <typename T>
DeclaredGiven<T> from_row(DeclaredGiven<T> given, int64_t first) {
  if (given.rows.data) given.rows.data += first;
  if (given.guide.data) given.guide.data = given.guide[first];
  return given;
}

template <typename T>
void statistics(const Tensor& s, const Pairs& pairs, int64_t number, const Tensor& parameters, const Given& given,
                const Tensor& row_table, const std::optional<Tensor>& column_table, const GivenPoints& points) {
  const DeclaredPasses<T>& passes = passes_of<T>(number);
  const Tile<T> tile = tile_of<T>(s, pairs);
  const Distances<T> distances(points, tile);
  const DeclaredNumbers numbers = numbers_of(passes, pairs.scale, parameters);
  const DeclaredGiven<T> of_tile = given_of(passes, tile, given);
  const auto rows = table_of<T>(row_table, "row_table", passes.statistics, tile.rows);
  const Partials<T> partials(passes, tile, column_table.has_value());
  DeclaredTable<T> columns{};
  if (column_table) columns = table_of<T>(*column_table, "column_table", passes.statistics, tile.columns);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    distances.form(slab, first);
    passes.fold(slab, numbers, from_row(of_tile, first), from_row(rows, first), partials.of_slab(k));
  });
  if (column_table) partials.merge(numbers, columns);
}

template <typename T>
void weights(const Tensor& s, const Tensor& out, const Pairs& pairs, int64_t number, const Tensor& parameters,
             const Given& given, const Tensor& row_table, const std::optional<Tensor>& column_table,
             const GivenPoints& points, const GivenGradients& gradients) {
  const DeclaredPasses<T>& passes = passes_of<T>(number);
  const Tile<T> tile = tile_of<T>(s, pairs);
  check_matrix<T>(out, "out", tile.rows, tile.columns);
  const DeclaredNumbers numbers = numbers_of(passes, pairs.scale, parameters);
  const DeclaredGiven<T> of_tile = given_of(passes, tile, given);
  const auto rows = table_of<T>(row_table, "row_table", passes.coefficients, tile.rows);
  const int64_t padded = padded_columns(tile.columns);
  const Buffer<T> memory(column_table ? std::max<int64_t>(passes.coefficients, 1) * padded : 0);
  DeclaredTable<T> columns{}, prepared{};
  if (column_table) {
    columns = table_of<T>(*column_table, "column_table", passes.coefficients, tile.columns);
    prepared = {memory.get(), padded};
    passes.prepare(columns, tile.columns, prepared);
  }
  // In one sweep, the totals of columns: those of a tile on the diagonal are its rows' already.
  const Partials<T> partials(passes, tile, passes.one_sweep && column_table && !tile.diagonal);
  T* w = static_cast<T*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0);
  const Distances<T> distances(points, tile);
  DistanceChain<T> chain(distances, gradients, tile, w, stride);
  for_slabs(tile, [&](int64_t k, int64_t first, const Tile<T>& slab) {
    if (!gradients.formed) distances.form(slab, first);
    passes.weights(slab, numbers, from_row(of_tile, first), w + first * stride, stride, from_row(rows, first), prepared,
                   partials.of_slab(k));
    chain.apply(k, first, slab);
  });
  chain.finish();
  if (partials.of_slab(0).data) partials.merge(numbers, columns);
}

}  // namespace

int64_t load_declared_passes(std::string path, bool is_double) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(library, "could not load ", path, ": ", dlerror());
  const auto found = reinterpret_cast<const void* (*)()>(dlsym(library, "replearn_declared_passes"));
  STD_TORCH_CHECK(found, path, " has no passes of a declared loss");
  const void* passes = found();
  // The layout comes first, whatever the type.
  const int64_t layout = *static_cast<const int64_t*>(passes);
  STD_TORCH_CHECK(layout == (is_double ? declared_layout<double> : declared_layout<float>),
                  path, " was compiled from other headers than replearn_kernels itself: build that again");
  const std::lock_guard<std::mutex> lock(loading);
  loaded().push_back({passes, is_double});
  return static_cast<int64_t>(loaded().size()) - 1;
}

void declared_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                          std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                          bool diagonal, int64_t passes, Tensor parameters, std::optional<Tensor> row_values,
                          std::optional<Tensor> column_values, std::optional<Tensor> guide, Tensor row_table,
                          std::optional<Tensor> column_table, std::optional<Tensor> rows, std::optional<Tensor> columns,
                          std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                          bool squared_distances) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const auto run = is_double(s) ? statistics<double> : statistics<float>;
  run(s, pairs, passes, parameters, {row_values, column_values, guide}, row_table, column_table, points);
}

void declared_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                       std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                       bool diagonal, int64_t passes, Tensor parameters, std::optional<Tensor> row_values,
                       std::optional<Tensor> column_values, std::optional<Tensor> guide, Tensor row_table,
                       std::optional<Tensor> column_table, std::optional<Tensor> rows, std::optional<Tensor> columns,
                       std::optional<Tensor> row_squares, std::optional<Tensor> column_squares, bool squared_distances,
                       bool formed, std::optional<Tensor> row_points, std::optional<Tensor> d_rows,
                       std::optional<Tensor> column_points, std::optional<Tensor> d_columns) {
  const Pairs pairs{scale, bias, target, row_group, column_group, first_column, diagonal};
  const GivenPoints points{rows, columns, row_squares, column_squares, squared_distances};
  const GivenGradients gradients{formed, row_points, d_rows, column_points, d_columns};
  const auto run = is_double(s) ? weights<double> : weights<float>;
  run(s, out, pairs, passes, parameters, {row_values, column_values, guide}, row_table, column_table, points, gradients);
}

}  // namespace replearn
