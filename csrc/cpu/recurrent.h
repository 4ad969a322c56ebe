#pragma once

#include <ATen/TensorIterator.h>

#include <array>

#include "../elementary.h"
#include "dispatch.h"

namespace gradnorm_kernels {

// Steps of recurrent cells. Each makes of four sums of products and of its state c' its output h and its
// next state c, and has the first two derivatives of these.

template <class V>
V slope_of_tanh(const V& tanh) {
  return tanh * tanh * Constant{-1.0} + 1.0_c;
}

// LSTM (Hochreiter and Schmidhuber 1997): with s the logistic function,
//     c = s(f) c' + s(i) tanh(g)    and    h = s(o) tanh(c).
template <class V>
struct LstmStep {
  Logistic<V> i, f, o;
  V state, g, next, t;  // c', tanh(g), c, tanh(c)

  LstmStep(const V& i, const V& f, const V& g, const V& o, const V& state)
      : i(logistic(i)),
        f(logistic(f)),
        o(logistic(o)),
        state(state),
        g(g.tanh()),
        next(this->f.value * state + this->i.value * this->g),
        t(next.tanh()) {}

  // h, c
  std::array<V, 2> values() const {
    return {o.value * t, next};
  }
  // With the gradients dh and dc of h and c: those of the four sums and of c'.
  std::array<V, 5> gradients(const V& dh, const V& dc) const {
    const V d = dc + dh * o.value * slope_of_tanh(t);
    return {
        d * g * i.slope, d * state * f.slope, d * i.value * slope_of_tanh(g), dh * t * o.slope, d * f.value};
  }
  // With the gradients v of those five: those of dh, dc, the four sums and c'.
  std::array<V, 7> second(const std::array<V, 5>& v, const V& dh, const V& dc) const {
    const V dg = slope_of_tanh(g), dt = slope_of_tanh(t);
    const V d = dc + dh * o.value * dt;
    // Of d, and of c through t.
    const V of_d = v[0] * g * i.slope + v[1] * state * f.slope + v[2] * i.value * dg + v[4] * f.value;
    const V of_c = (v[3] * o.slope - of_d * o.value * t * 2.0_c) * dh * dt;
    return {
        of_d * o.value * dt + v[3] * t * o.slope,
        of_d,
        d * (v[0] * g * i.second() + v[2] * i.slope * dg) + of_c * g * i.slope,
        d * (v[1] * state * f.second() + v[4] * f.slope) + of_c * state * f.slope,
        d * (v[0] * i.slope - v[2] * i.value * g * 2.0_c) * dg + of_c * i.value * dg,
        dh * (of_d * dt * o.slope + v[3] * t * o.second()),
        d * v[1] * f.slope + of_c * f.value};
  }
};

// GRU (Cho et al. 2014, arXiv:1406.1078; the reset after the product, as in cuDNN): with n = tanh(x + s(r)
// a),
//     h = c = n + s(z) (c' - n).
template <class V>
struct GruStep {
  Logistic<V> r, z;
  V a, state, n;

  GruStep(const V& r, const V& z, const V& x, const V& a, const V& state)
      : r(logistic(r)), z(logistic(z)), a(a), state(state), n((x + this->r.value * a).tanh()) {}

  std::array<V, 2> values() const {
    const V next = n + z.value * (state - n);
    return {next, next};
  }
  std::array<V, 5> gradients(const V& dh, const V& dc) const {
    const V d = dh + dc, of_sum = d * rest() * slope_of_tanh(n);
    return {of_sum * a * r.slope, d * (state - n) * z.slope, of_sum, of_sum * r.value, d * z.value};
  }
  std::array<V, 7> second(const std::array<V, 5>& v, const V& dh, const V& dc) const {
    const V d = dh + dc, dn = slope_of_tanh(n), m = rest(), change = state - n;
    // Of the sum's gradient over d m dn, and of the sum itself.
    const V k = v[0] * a * r.slope + v[2] + v[3] * r.value;
    const V of_sum = d * dn * (m * n * k * Constant{-2.0} - v[1] * z.slope);
    const V of_d = m * dn * k + v[1] * change * z.slope + v[4] * z.value;
    return {
        of_d,
        of_d,
        of_sum * a * r.slope + d * m * dn * (v[0] * a * r.second() + v[3] * r.slope),
        d * (v[1] * change * z.second() + (v[4] - dn * k) * z.slope),
        of_sum,
        of_sum * r.value + d * m * dn * v[0] * r.slope,
        d * v[1] * z.slope};
  }

 private:
  // 1 - s(z)
  V rest() const {
    return z.value * Constant{-1.0} + 1.0_c;
  }
};

// Operands in the iterator's order: outputs first; of gates, the four sums.
struct RecurrentKernels {
  // (hidden, next_state; gates, state)
  void (*forward)(at::TensorIteratorBase&);
  // (grad_gates, grad_state; grad_hidden, grad_next_state, gates, state)
  void (*backward)(at::TensorIteratorBase&);
  // (grad_grad_hidden, grad_grad_next_state, grad_gates, grad_state; grad_grad_gates, grad_grad_state,
  // grad_hidden, grad_next_state, gates, state)
  void (*double_backward)(at::TensorIteratorBase&);
};

GRADNORM_DECLARE_KERNELS(RecurrentKernels, lstm_kernels)
GRADNORM_DECLARE_KERNELS(RecurrentKernels, gru_kernels)

}  // namespace gradnorm_kernels
