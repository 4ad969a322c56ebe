// Every activation, defined once: f, f' and f'' written against an arithmetic type V.
// The CPU kernels instantiate them with at::vec::Vectorized<float|double>; the composite path, which
// autograd and torch.func can differentiate to any order, instantiates them with at::Tensor.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>

#include <variant>

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
  const V decay = x.abs().neg().exp();
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
  const auto polynomial = [](const V& at, std::initializer_list<float> highest_first) {
    V sum(0.0f);
    for (const float coefficient : highest_first) {
      sum = at::vec::fmadd(sum, at, V(coefficient));
    }
    return sum;
  };
  // Beyond 16, where decay is 0, the polynomials need not overflow.
  const V size = at::vec::minimum(x.abs(), V(16.0f));
  const V decay = (x * x * Constant{-0.5}).exp();
  const V tail =
      decay * (polynomial(size, {0.01210489062f, 0.09742274063f, 0.3212141927f, 0.4999999959f}) /
               polynomial(size, {0.03037289321f, 0.2434350229f, 0.8440566846f, 1.440312290f, 1.0f}));
  return {V::blendv(tail, V(1.0f) - tail, x >= V(0.0f)), decay * kInvSqrtTwoPi};
}

// Products are associated so that a factor that underflows to 0 for huge |x| meets one power of x at a
// time: every finite x gives a finite result, where x * x * 0 would give inf * 0 = NaN.

// f(x) = x Phi(x)
struct GeluErf {
  template <class V>
  V f(const V& x) const {
    return x * standard_normal(x).distribution;
  }
  template <class V>
  V df(const V& x) const {
    const auto n = standard_normal(x);
    return n.distribution + x * n.density;
  }
  template <class V>
  V d2f(const V& x) const {
    const V density = standard_normal(x).density;
    return density * 2.0_c - x * (x * density);
  }
};

// f(x) = x s(v(x)), with s the logistic function and v = 2 sqrt(2 / pi) (x + 0.044715 x^3): the usual
// 0.5 (1 + tanh(v / 2)) is s(v), without its cancellation.
struct GeluTanh {
  template <class V>
  V f(const V& x) const {
    return x * logistic(v(x)).value;
  }
  template <class V>
  V df(const V& x) const {
    const auto s = logistic(v(x));
    return s.value + x * times_dv(x, s.slope);
  }
  template <class V>
  V d2f(const V& x) const {
    const auto s = logistic(v(x));
    const V slope = times_dv(x, s.slope);                              // s(v)'
    const V curvature = x * s.slope * Constant{6.0 * kScale * kCubic}  // s(v)'' = s'(v) v''
                        + s.skew * times_dv(x, slope);                 //          + s''(v) v'^2
    return slope * 2.0_c + x * curvature;
  }

 private:
  static constexpr double kScale = 1.59576912160573071176;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;

  template <class V>
  static V v(const V& x) {
    return x * (x * x * Constant{kCubic} + 1.0_c) * Constant{kScale};
  }
  // t v'(x), v' = kScale (1 + 3 kCubic x^2)
  template <class V>
  static V times_dv(const V& x, const V& t) {
    return (x * (x * t) * Constant{3.0 * kCubic} + t) * Constant{kScale};
  }
};

using Activation = std::variant<GeluErf, GeluTanh>;

}  // namespace gradnorm_kernels
