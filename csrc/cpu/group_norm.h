#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// Tensors of the input's size are dense, share one dtype, and lie in memory as (N, C, HxW) or all as
// (N, HxW, C); the others are contiguous and of the dtype that arithmetic is done in.
struct GroupNormDoubleBackward {
  at::Tensor grad_grad_output, grad_input, grad_weight;  // outputs, which may be undefined
  at::Tensor grad_grad_input, grad_output, input;
  at::Tensor mean, rstd;                                // (N, num_groups)
  at::Tensor weight, grad_grad_weight, grad_grad_bias;  // (C), and may be undefined
  int64_t batch, channels, inner, num_groups;
  bool channels_last;
};

struct GroupNormKernels {
  void (*double_backward)(const GroupNormDoubleBackward&);
};

GRADNORM_DECLARE_KERNELS(GroupNormKernels, group_norm_kernels)

}  // namespace gradnorm_kernels
