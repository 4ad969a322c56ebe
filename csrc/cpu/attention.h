#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// A batch of attention problems. Every tensor is (batch 0, batch 1, batch 2, rows, columns), its columns
// contiguous. Inputs that are absent and results that are not wanted are undefined.
struct AttentionProblem {
  at::Tensor query, key, value;
  at::Tensor attn_mask;  // of the dtype of arithmetic, and broadcast by strides of 0
  double scale;
  at::Tensor grad_output;
  at::Tensor grad_grad_query, grad_grad_key, grad_grad_value, grad_grad_attn_mask;

  at::Tensor output;
  at::Tensor grad_grad_output;
  at::Tensor grad_query, grad_key, grad_value;
  // (parts, tiles, rows, columns), contiguous, of the dtype of arithmetic. Its tiles are the trailing batch
  // dimensions; the leading ones are summed, in as many parts.
  at::Tensor grad_attn_mask;
};

struct AttentionKernels {
  void (*forward)(const AttentionProblem&);
  void (*backward)(const AttentionProblem&);
  void (*double_backward)(const AttentionProblem&);
};

GRADNORM_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace gradnorm_kernels
