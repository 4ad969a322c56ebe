#pragma once

#include <ATen/ATen.h>

#include <array>

#include "dispatch.h"

namespace gradnorm_kernels {

// Of the two spatial dimensions, height and width.
struct ConvolutionGeometry {
  std::array<int64_t, 2> stride, padding, dilation;
};

struct ConvolutionKernels {
  // The weight's gradient (C, 1, kernel height, kernel width) of a depthwise convolution with one output
  // channel for each input channel. grad_output and input are float32 or float64, not empty, and dense in one
  // memory format, contiguous or channels_last. Both are read once.
  at::Tensor (*depthwise_grad_weight)(
      const at::Tensor& grad_output, const at::Tensor& input, bool channels_last, at::IntArrayRef kernel_size,
      const ConvolutionGeometry&);
};

GRADNORM_DECLARE_KERNELS(ConvolutionKernels, convolution_kernels)

}  // namespace gradnorm_kernels
