// What layer and RMS normalisation share: rows are adjacent dimensions of an input, and the statistics of a
// row have the shape of the input with these dimensions reduced to 1.
#pragma once

#include <numeric>
#include <vector>

#include "cpu/layer_norm.h"
#include "normalization.h"

namespace gradnorm_kernels {

// Where input's own size is 1, it means nothing whether a dimension is normalised.
struct RowLayout {
  std::vector<int64_t> dims;
  c10::SymDimVector shape;   // of these dimensions, and 1 elsewhere: what parameters broadcast as
  c10::SymInt elements = 1;  // in a row
  bool adjacent = true;

  RowLayout(const Tensor& input, const Tensor& statistic) : shape(input.dim(), 1) {
    bool ended = false;
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (input.sym_size(d) == 1) {
        continue;
      }
      if (statistic.sym_size(d) == 1) {
        adjacent &= !ended;
        dims.push_back(d);
        shape[d] = input.sym_size(d);
        elements *= shape[d];
      } else {
        ended = !dims.empty();
      }
    }
  }

  Normalized normalized(Statistics statistics) const {
    return {dims, shape, statistics, {}, {}, {}};
  }
};

// The shape of the statistics of the last ndim dimensions, or of the channels of NCHW.
inline c10::SymDimVector statistics_shape(const Tensor& input, int64_t first, int64_t ndim) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  std::fill_n(shape.begin() + first, ndim, 1);
  return shape;
}

inline void check_rows(
    const char* op, const Tensor& input, c10::SymIntArrayRef normalized_shape,
    std::initializer_list<NamedTensor> parameters) {
  check_floating(op, {{"input", input}});
  const auto ndim = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK_VALUE(ndim > 0, op, ": expected normalized_shape to have at least one element");
  TORCH_CHECK_VALUE(
      input.dim() >= ndim && input.sym_sizes().slice(input.dim() - ndim) == normalized_shape, op,
      ": expected the shape of input to end in normalized_shape (", normalized_shape, "), got ",
      input.sym_sizes());
  check_shapes(op, input, parameters, normalized_shape);
}

inline void check_channels(
    const char* op, const Tensor& input, std::initializer_list<NamedTensor> parameters) {
  check_floating(op, {{"input", input}});
  TORCH_CHECK_VALUE(
      input.dim() == 4, op, ": expected input to be of shape (N, C, H, W), got ", input.sym_sizes());
  check_shapes(op, input, parameters, input.sym_sizes().slice(1, 1));
}

inline void check_statistics(const char* op, const Tensor& input, std::initializer_list<NamedTensor> all) {
  for (const auto& [name, tensor] : all) {
    check_floating(op, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    bool matches = tensor.dim() == input.dim() && input.dim() > 0;
    for (int64_t d = 0; matches && d < input.dim(); ++d) {
      matches = tensor.sym_size(d) == 1 || tensor.sym_size(d) == input.sym_size(d);
    }
    TORCH_CHECK_VALUE(
        matches && tensor.sym_sizes() == all.begin()->tensor.sym_sizes() &&
            RowLayout(input, tensor).adjacent,
        op, ": expected ", name, " to have the shape of input (", input.sym_sizes(),
        ") with adjacent dimensions reduced to 1, got ", tensor.sym_sizes());
  }
}

// Of the parameters, and of the gradients of their gradients, only the number of elements says which they are.
inline void check_elements(
    const char* op, const Tensor& input, const Tensor& statistic, std::initializer_list<NamedTensor> all) {
  const auto elements = RowLayout(input, statistic).elements;
  for (const auto& [name, tensor] : all) {
    check_floating(op, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        !tensor.defined() || tensor.sym_numel() == elements, op, ": expected ", name, " to have ", elements,
        " elements, got shape ", tensor.sym_sizes());
  }
}

// The operands of a CPU kernel.
struct RowsOnCpu {
  const Tensor& input;
  NormalizedRows rows;

  // With 1 column in a row, or none, the statistics' sizes still say which rows there are.
  RowsOnCpu(const Tensor& input, const Tensor& statistic) : input(input) {
    int64_t inner = 1;
    for (auto d = input.dim() - 1; d >= 0 && statistic.size(d) == input.size(d); --d) {
      inner *= input.size(d);
    }
    rows = {statistic.numel() / inner, input.numel() / statistic.numel(), inner};
  }

  Tensor parameter(const Tensor& tensor, double absent) const {
    const auto options = arithmetic_options(input);
    return tensor.defined() ? tensor.to(options.dtype()).contiguous()
                            : at::full({rows.columns}, absent, options);
  }
  Tensor statistic(const Tensor& tensor) const {
    return tensor.to(arithmetic_options(input).dtype()).contiguous();
  }
  Tensor partial_sums(bool wanted) const {
    return wanted ? at::empty({rows.chunks(), rows.columns}, arithmetic_options(input)) : Tensor();
  }
  static Tensor sum(const Tensor& partial_sums, const Tensor& like) {
    return partial_sums.defined() ? partial_sums.sum(0).view(like.sizes()).to(like.scalar_type()) : Tensor();
  }
};

}  // namespace gradnorm_kernels
