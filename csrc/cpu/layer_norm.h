#pragma once

#include <ATen/core/Tensor.h>

#include "dispatch.h"

namespace gradnorm_kernels {

using at::Tensor;

// A contiguous tensor as [outer, columns, inner], normalised over its columns. inner is 1 where these are the
// last dimensions, and height * width for the channels of NCHW. Not centred is an RMS norm, which has no mean
// and no bias: what stands for them and their gradients below is undefined.
struct NormalizedRows {
  int64_t outer, columns, inner;
  bool centred = true;

  // A kernel's unit of work: one row, or a tile of neighbouring rows that are interleaved in memory.
  static constexpr int64_t kTile = 128;
  int64_t tiles() const {
    return (inner + kTile - 1) / kTile;
  }
  int64_t units() const {
    return outer * tiles();
  }
  // Parameter gradients are summed within chunks of at most 1024 rows, and then over the chunks in their
  // order: the number of threads makes no difference to their bits, and few terms follow one another.
  int64_t units_in_chunk() const {
    return inner == 1 ? 64 : 1024 / kTile;
  }
  int64_t chunks() const {
    return (units() + units_in_chunk() - 1) / units_in_chunk();
  }
};

// Tensors are contiguous. Inputs and outputs share one dtype; parameters, their gradients and the statistics
// are of the dtype of arithmetic, and gradients of parameters are [chunks, columns]. An output that is
// undefined is not computed.
struct LayerNormKernels {
  struct Forward {
    Tensor output, mean, rstd, input, weight, bias;
  };
  void (*forward)(const Forward&, double eps, const NormalizedRows&);

  struct Backward {
    Tensor grad_input, grad_weight, grad_bias, grad_output, input, mean, rstd, weight;
  };
  void (*backward)(const Backward&, const NormalizedRows&);

  // grad_grad_weight and grad_grad_bias are both defined, or neither is; grad_grad_bias is not if not
  // centred.
  struct DoubleBackward {
    Tensor grad_grad_output, grad_input, grad_weight;
    Tensor grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight;
  };
  void (*double_backward)(const DoubleBackward&, const NormalizedRows&);
};

GRADNORM_DECLARE_KERNELS(LayerNormKernels, layer_norm_kernels)

}  // namespace gradnorm_kernels
