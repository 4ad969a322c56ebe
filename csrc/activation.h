// Every activation, defined once: f, f' and f'' written against an arithmetic type V.
// The CPU kernels instantiate them with at::vec::Vectorized<float|double>; the composite path, which
// autograd and torch.func can differentiate further, instantiates f'' with at::Tensor.
#pragma once

#include <variant>

#include "elementary.h"

namespace gradnorm_kernels {

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
