// The elementary functions that the derivatives are made of, for CPU vectors and for tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>

namespace gradnorm_kernels {

// A literal that either arithmetic type takes: Vectorized<float> has no operators with a double.
struct Constant {
  double value;
};
constexpr Constant operator""_c(long double value) {
  return {static_cast<double>(value)};
}
template <class V>
auto operand(Constant constant) {
  if constexpr (std::is_same_v<V, at::Tensor>) {
    return constant.value;
  } else {
    return V(static_cast<typename V::value_type>(constant.value));
  }
}
template <class V>
V operator*(const V& a, Constant b) {
  return a * operand<V>(b);
}
template <class V>
V operator+(const V& a, Constant b) {
  return a + operand<V>(b);
}

template <class V, class... Coefficients>
V polynomial(const V& x, double constant, Coefficients... rising) {
  if constexpr (sizeof...(rising) == 0) {
    return operand<V>({constant});
  } else {
    return at::vec::fmadd(polynomial(x, rising...), x, operand<V>({constant}));
  }
}

// exp(x) for x <= 0. In float32 inlined, since a call to Sleef's spills every vector register around it.
// Relative error < 2e-7 + 2e-8 |x|; results below 2^-126 are 0.
template <class T>
at::vec::Vectorized<T> exp_nonpositive(const at::vec::Vectorized<T>& x) {
  return x.exp();
}
inline at::vec::Vectorized<float> exp_nonpositive(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  const V log2_e(1.44269504089f);
  // At -127 log(2) the exponent's bits are all zero, and so is the result.
  const V clamped = at::vec::clamp_min(x, V(-88.02969f));
  const V power = (clamped * log2_e).round();
  // 2^r for |r| <= 1/2, a minimax fit.
  const V fraction = at::vec::fmadd(clamped, log2_e, power.neg());
  const V mantissa =
      polynomial(fraction, 1.0, 0.6931472, 0.24022646, 0.055503286, 0.009618489, 0.0013399931, 0.0001534581);
  const auto exponent = at::vec::convert_to_int_of_same_size(power) + at::vec::Vectorized<int32_t>(127);
  return mantissa * at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
}

// The logistic function s and what its derivatives are made of.
template <class V>
struct Logistic {
  V value;  // s
  V slope;  // s (1 - s)
  V skew;   // 1 - 2 s
};
// Through exp(-|x|), so that neither 1 - s nor exp loses the small side.
template <class T>
Logistic<at::vec::Vectorized<T>> logistic(const at::vec::Vectorized<T>& x) {
  using V = at::vec::Vectorized<T>;
  const V one(static_cast<T>(1)), zero(static_cast<T>(0));
  const V decay = exp_nonpositive(x.abs().neg());
  const V larger = one / (one + decay);
  const V smaller = decay * larger;
  const V value = V::blendv(smaller, larger, x >= zero);
  const V complement = V::blendv(larger, smaller, x >= zero);
  return {value, smaller * larger, complement - value};
}
// Through sigmoid, whose own derivatives are exact everywhere; those of |x| are not at 0.
inline Logistic<at::Tensor> logistic(const at::Tensor& x) {
  const at::Tensor value = x.sigmoid(), complement = x.neg().sigmoid();
  return {value, value * complement, complement - value};
}

// The standard normal's distribution Phi and density phi.
template <class V>
struct Normal {
  V distribution;
  V density;
};
constexpr Constant kInvSqrtTwoPi = 0.39894228040143267794_c;
template <class V>
Normal<V> standard_normal(const V& x) {
  constexpr Constant sqrt_half = 0.70710678118654752440_c;
  return {(x * sqrt_half).erf() * 0.5_c + 0.5_c, (x * x * Constant{-0.5}).exp() * kInvSqrtTwoPi};
}
// In float32, where erf would cost more than all the memory traffic: the tail Phi(-|x|) is exp(-x^2/2)
// times a smooth ratio, here a minimax fit on [0, 9] whose positive coefficients lose nothing to
// cancellation. |error of Phi| < 1.4e-7, and 5e-6 relative in the left tail, where 0.5 (1 + erf) has none.
inline Normal<at::vec::Vectorized<float>> standard_normal(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  // Beyond 16, where decay is 0, the polynomials need not overflow.
  const V size = at::vec::clamp_max(x.abs(), V(16.0f));
  const V decay = exp_nonpositive(x * x * Constant{-0.5});
  const V tail = decay * (polynomial(size, 0.4999999959, 0.3212141927, 0.09742274063, 0.01210489062) /
                          polynomial(size, 1.0, 1.440312290, 0.8440566846, 0.2434350229, 0.03037289321));
  return {V::blendv(tail, V(1.0f) - tail, x >= V(0.0f)), decay * kInvSqrtTwoPi};
}

}  // namespace gradnorm_kernels
