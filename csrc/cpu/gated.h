#pragma once

#include <ATen/TensorIterator.h>

#include <variant>

#include "../activation.h"
#include "dispatch.h"

namespace gradnorm_kernels {

// The logistic function of its input; activation.h's Sigmoid is made of its output.
struct LogisticGate {
  template <class V>
  V f(const V& x) const {
    return logistic(x).value;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return g * logistic(x).slope;
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const auto s = logistic(x);
    return v * (s.slope * s.skew) * g;
  }
};

// What gates a value.
using Gate = std::variant<LogisticGate, Silu, GeluErf, GeluTanh>;

// Operands in the iterator's order: outputs first.
struct GatedKernels {
  // (output; gate, value)
  void (*forward)(at::TensorIteratorBase&, const Gate&);
  // (grad_gate, grad_value; grad_output, gate, value)
  void (*backward)(at::TensorIteratorBase&, const Gate&);
  // (grad_grad_output, grad_gate, grad_value; grad_grad_gate, grad_grad_value, grad_output, gate, value)
  void (*double_backward)(at::TensorIteratorBase&, const Gate&);
};

GRADNORM_DECLARE_KERNELS(GatedKernels, gated_kernels)

}  // namespace gradnorm_kernels
