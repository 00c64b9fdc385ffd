// The tile passes of declared losses as operators, around a library that was compiled for one of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace replearn {

using torch::stable::Tensor;

// Loads a library of one loss and dtype; returns the number by which the passes are called.
int64_t load_declared_passes(std::string path, bool is_double);

void declared_statistics_(Tensor s, double scale, double bias, std::optional<Tensor> target,
                          std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                          bool diagonal, int64_t passes, Tensor parameters, std::optional<Tensor> row_values,
                          std::optional<Tensor> column_values, std::optional<Tensor> guide, Tensor row_table,
                          std::optional<Tensor> column_table, std::optional<Tensor> rows, std::optional<Tensor> columns,
                          std::optional<Tensor> row_squares, std::optional<Tensor> column_squares,
                          bool squared_distances);

void declared_weights_(Tensor s, Tensor out, double scale, double bias, std::optional<Tensor> target,
                       std::optional<Tensor> row_group, std::optional<Tensor> column_group, int64_t first_column,
                       bool diagonal, int64_t passes, Tensor parameters, std::optional<Tensor> row_values,
                       std::optional<Tensor> column_values, std::optional<Tensor> guide, Tensor row_table,
                       std::optional<Tensor> column_table, std::optional<Tensor> rows, std::optional<Tensor> columns,
                       std::optional<Tensor> row_squares, std::optional<Tensor> column_squares, bool squared_distances,
                       bool formed, std::optional<Tensor> row_points, std::optional<Tensor> d_rows,
                       std::optional<Tensor> column_points, std::optional<Tensor> d_columns);

}  // namespace replearn
