#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// Cross-entropies of rows of classes along dim. All tensors of a call are contiguous; those that are not of
// input's shape have an element a row.
struct CrossEntropy {
  const at::Tensor& input;
  const at::Tensor& target;  // int64 classes, or probabilities like input
  int64_t dim;
  int64_t ignore_index;
  double label_smoothing;
};

struct CrossEntropyKernels {
  // Moves N elements, as input is read once; of probabilities another N here and below.
  void (*forward)(const at::Tensor& output, const CrossEntropy&);
  // Moves 2N elements.
  void (*backward)(const at::Tensor& grad_input, const at::Tensor& grad_output, const CrossEntropy&);
  // Moves 3N elements.
  void (*double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad_input, const at::Tensor& grad_grad_input,
      const at::Tensor& grad_output, const CrossEntropy&);
};

GRADNORM_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

}  // namespace gradnorm_kernels
