#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "dispatch.h"

namespace gradnorm_kernels {

// A dense tensor as outer x channels x inner: N x C x HW when contiguous, NHW x C x 1 when channels_last.
struct ChannelLayout {
  int64_t outer, channels, inner;
};

// One number a channel, each.
struct ChannelParameters {
  const double* weight;
  const double* mean;
  const double* invstd;
  const double* grad_grad_weight;
  const double* grad_grad_bias;
};

struct BatchNormKernels {
  // output = input * scale. Unless sum is null, also the sums over each channel of input and of
  // input * (factor - shift).
  void (*scale)(
      c10::ScalarType, const ChannelLayout&, const void* input, const void* factor, const double* scale,
      const double* shift, void* output, double* sum, double* product_sum);
  // grad_weight is that of weight 1 too where there is none.
  void (*double_backward)(
      c10::ScalarType, const ChannelLayout&, const ChannelParameters&, bool training,
      const void* grad_grad_input, const void* grad_output, const void* input, void* grad_grad_output,
      void* grad_input, double* grad_weight);
};

GRADNORM_DECLARE_KERNELS(BatchNormKernels, batch_norm_kernels)

}  // namespace gradnorm_kernels
