#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// All tensors of a call are contiguous, of one dtype and of one shape. dim is not negative.
struct SoftmaxKernels {
  // output = softmax(input + bias) along the last dimension. bias, if it is defined, is expanded to input's
  // shape, its rows contiguous. Moves 2N elements and the bias.
  void (*forward)(const at::Tensor& output, const at::Tensor& input, const at::Tensor& bias);
  // grad is the gradient of the softmax's input if to_input, else of its output, which is the softmax's
  // logarithm if log. Moves 5N elements.
  void (*double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad, const at::Tensor& grad_grad_input,
      const at::Tensor& grad_output, const at::Tensor& output, int64_t dim, bool to_input, bool log);
};

GRADNORM_DECLARE_KERNELS(SoftmaxKernels, softmax_kernels)

}  // namespace gradnorm_kernels
