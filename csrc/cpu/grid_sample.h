#pragma once

#include <ATen/ATen.h>

#include "dispatch.h"

namespace gradnorm_kernels {

// Points of a grid between the pixels of an input. All tensors of a call are contiguous, and of one dtype,
// float32 or float64.
struct GridSample {
  const at::Tensor& input;  // (N, C, pixels of two or three dimensions)
  const at::Tensor& grid;   // (N, points of as many dimensions, coordinates)
  int64_t padding;          // a GridSamplerPadding
  bool align_corners;
};

struct GridSampleKernels {
  // Bilinear. grad_grad_input may be undefined, and so may results.
  void (*double_backward)(
      const at::Tensor& grad_grad_output, const at::Tensor& grad_input, const at::Tensor& grad_grid,
      const at::Tensor& grad_grad_input, const at::Tensor& grad_grad_grid, const at::Tensor& grad_output,
      const GridSample&);
};

GRADNORM_DECLARE_KERNELS(GridSampleKernels, grid_sample_kernels)

}  // namespace gradnorm_kernels
