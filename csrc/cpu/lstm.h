#pragma once

#include <ATen/TensorIterator.h>

#include <array>

#include "../elementary.h"
#include "dispatch.h"

namespace gradnorm_kernels {

// A step of a cell whose gates a are already sums of products: with s the logistic function,
//     c = s(f) c' + s(i) tanh(g)    and    h = s(o) tanh(c),
// and its first two derivatives.
template <class V>
struct LstmStep {
  Logistic<V> i, f, o;
  V cell, g, next, t;  // c', tanh(g), c, tanh(c)

  LstmStep(const V& i, const V& f, const V& g, const V& o, const V& cell)
      : i(logistic(i)),
        f(logistic(f)),
        o(logistic(o)),
        cell(cell),
        g(g.tanh()),
        next(this->f.value * cell + this->i.value * this->g),
        t(next.tanh()) {}

  static V slope_of_tanh(const V& tanh) {
    return tanh * tanh * Constant{-1.0} + 1.0_c;
  }

  // h, c
  std::array<V, 2> values() const {
    return {o.value * t, next};
  }
  // With the gradients dh and dc of h and c: those of i, f, g, o and c'.
  std::array<V, 5> gradients(const V& dh, const V& dc) const {
    const V d = dc + dh * o.value * slope_of_tanh(t);
    return {
        d * g * i.slope, d * cell * f.slope, d * i.value * slope_of_tanh(g), dh * t * o.slope, d * f.value};
  }
  // With the gradients v of those five: those of dh, dc, i, f, g, o and c'.
  std::array<V, 7> second(const std::array<V, 5>& v, const V& dh, const V& dc) const {
    const V dg = slope_of_tanh(g), dt = slope_of_tanh(t);
    const V d = dc + dh * o.value * dt;
    // Of d, and of c through t.
    const V of_d = v[0] * g * i.slope + v[1] * cell * f.slope + v[2] * i.value * dg + v[4] * f.value;
    const V of_c = (v[3] * o.slope - of_d * o.value * t * 2.0_c) * dh * dt;
    return {
        of_d * o.value * dt + v[3] * t * o.slope,
        of_d,
        d * (v[0] * g * i.second() + v[2] * i.slope * dg) + of_c * g * i.slope,
        d * (v[1] * cell * f.second() + v[4] * f.slope) + of_c * cell * f.slope,
        d * (v[0] * i.slope - v[2] * i.value * g * 2.0_c) * dg + of_c * i.value * dg,
        dh * (of_d * dt * o.slope + v[3] * t * o.second()),
        d * v[1] * f.slope + of_c * f.value};
  }
};

// Operands in the iterator's order: outputs first; of gates, i, f, g and o.
struct LstmKernels {
  // (hidden, next_cell; gates, cell)
  void (*forward)(at::TensorIteratorBase&);
  // (grad_gates, grad_cell; grad_hidden, grad_next_cell, gates, cell)
  void (*backward)(at::TensorIteratorBase&);
  // (grad_grad_hidden, grad_grad_next_cell, grad_gates, grad_cell; grad_grad_gates, grad_grad_cell,
  // grad_hidden, grad_next_cell, gates, cell)
  void (*double_backward)(at::TensorIteratorBase&);
};

GRADNORM_DECLARE_KERNELS(LstmKernels, lstm_kernels)

}  // namespace gradnorm_kernels
