#pragma once

#include <ATen/TensorIterator.h>

#include "../activation.h"
#include "dispatch.h"

namespace gradnorm_kernels {

// Operands in the iterator's order: outputs first. What is called input here is the activation's output where
// its derivatives are made of that.
struct ActivationKernels {
  // (output; input)
  void (*forward)(at::TensorIteratorBase&, const Activation&);
  // (grad_input; grad_output, input)
  void (*backward)(at::TensorIteratorBase&, const Activation&);
  // (grad_grad_output, grad_input; grad_grad_input, grad_output, input)
  void (*double_backward)(at::TensorIteratorBase&, const Activation&);
  // (grad_of_grad_grad_input, grad_of_grad_output, grad_of_input; grad_of_grad_grad_output,
  // grad_of_grad_input, grad_grad_input, grad_output, input)
  void (*triple_backward)(at::TensorIteratorBase&, const Activation&);
};

GRADNORM_DECLARE_KERNELS(ActivationKernels, activation_kernels)

}  // namespace gradnorm_kernels
