// What the CPU kernels of elementwise ops are given.
#pragma once

#include <ATen/TensorIterator.h>

namespace gradnorm_kernels {

// Over inputs, and so many outputs that it makes, laid out by TensorIterator's rule.
template <size_t outputs, class... Inputs>
at::TensorIterator elementwise_iterator(const Inputs&... inputs) {
  at::TensorIteratorConfig config;
  for (size_t k = 0; k < outputs; ++k) {
    config.add_owned_output(at::Tensor());
  }
  (config.add_const_input(inputs), ...);
  return config.build();
}

}  // namespace gradnorm_kernels
