#pragma once

#include <variant>

#include "../activation.h"
#include "batch_norm.h"

namespace gradnorm_kernels {

// Those that follow a batch normalisation in the networks of the field.
using ActOfBatchNorm = std::variant<Relu, Relu6, LeakyRelu, Hardswish, Silu, Mish, GeluErf, GeluTanh>;

// Of float, double and bfloat16. Of the parameters, grad_grad_weight and grad_grad_bias are not read, and
// bias is.
struct BatchNormActKernels {
  // grad_weight and grad_bias are those of weight 1 and bias 0 too where there are none.
  void (*backward)(
      c10::ScalarType, const ChannelLayout&, const ChannelParameters&, const double* bias, bool training,
      const ActOfBatchNorm&, const void* grad_output, const void* input, void* grad_input,
      double* grad_weight, double* grad_bias);
  void (*double_backward)(
      c10::ScalarType, const ChannelLayout&, const ChannelParameters&, const double* bias, bool training,
      const ActOfBatchNorm&, const void* grad_grad_input, const void* grad_output, const void* input,
      void* grad_grad_output, void* grad_input, double* grad_weight, double* grad_bias);
};

GRADNORM_DECLARE_KERNELS(BatchNormActKernels, batch_norm_act_kernels)

}  // namespace gradnorm_kernels
