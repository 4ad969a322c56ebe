#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "dispatch.h"

namespace gradnorm_kernels {

struct CdistKernels {
  // Of n and m points in D coordinates: u and x (batch, n, D), v and y (batch, D, m), in the type of
  // arithmetic; g and grad_grad_output, which may be undefined, (batch, n, m). Returns the gradients of x and
  // y, of their shapes, if these are wanted and not 0, as if not euclidean. Moves 2 n m elements a batch.
  std::tuple<at::Tensor, at::Tensor> (*double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& u, const at::Tensor& v, const at::Tensor& g,
      const at::Tensor& x, const at::Tensor& y, bool euclidean, bool wanted);
};

GRADNORM_DECLARE_KERNELS(CdistKernels, cdist_kernels)

}  // namespace gradnorm_kernels
