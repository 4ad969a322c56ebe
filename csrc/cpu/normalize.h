#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// Rows along dim, which is not negative. All tensors of a call are contiguous, of one dtype and of one shape;
// in the double backward of the norm grad_output and its gradient have an element a row, as has in that of
// weight normalisation what is called g.
struct NormalizeKernels {
  // Moves 2N elements.
  void (*forward)(const at::Tensor& output, const at::Tensor& input, int64_t dim, double eps);
  // Moves 3N elements.
  void (*backward)(
      const at::Tensor& grad_input, const at::Tensor& grad_output, const at::Tensor& input, int64_t dim,
      double eps);
  // Moves 5N elements.
  void (*double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad_input, const at::Tensor& grad_grad_input,
      const at::Tensor& grad_output, const at::Tensor& input, int64_t dim, double eps);
  // Moves 3N elements.
  void (*norm_double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad_input, const at::Tensor& grad_grad_input,
      const at::Tensor& grad_output, const at::Tensor& input, int64_t dim);
  // Moves 5N elements.
  void (*weight_norm_double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad_v, const at::Tensor& grad_g,
      const at::Tensor& grad_grad_v, const at::Tensor& grad_output, const at::Tensor& grad_grad_g,
      const at::Tensor& g, const at::Tensor& v, int64_t dim);
};

GRADNORM_DECLARE_KERNELS(NormalizeKernels, normalize_kernels)

}  // namespace gradnorm_kernels
