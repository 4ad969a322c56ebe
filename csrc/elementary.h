// The elementary functions that the derivatives are made of, for CPU vectors and for tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

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
const V& operand(const V& value) {
  return value;
}
template <class V>
V operator*(const V& a, Constant b) {
  return a * operand<V>(b);
}
template <class V>
V operator/(const V& a, Constant b) {
  return a / operand<V>(b);
}
template <class V>
V operator+(const V& a, Constant b) {
  return a + operand<V>(b);
}
// Comparisons give what select takes.
template <class V>
V operator<(const V& a, Constant b) {
  return a < operand<V>(b);
}
template <class V>
V operator>(const V& a, Constant b) {
  return a > operand<V>(b);
}
template <class V>
V operator<=(const V& a, Constant b) {
  return a <= operand<V>(b);
}
template <class V>
V operator>=(const V& a, Constant b) {
  return a >= operand<V>(b);
}

// a where the condition holds, else b; either may be a Constant. What is not chosen leaves no trace, be it
// NaN.
template <class V, class A, class B>
V select(const V& condition, const A& a, const B& b) {
  if constexpr (std::is_same_v<V, at::Tensor>) {
    return at::where(condition, operand<V>(a), operand<V>(b));
  } else {
    return V::blendv(operand<V>(b), operand<V>(a), condition);
  }
}

// 0 of x's shape
template <class V>
V zero_like(const V& x) {
  if constexpr (std::is_same_v<V, at::Tensor>) {
    return at::zeros_like(x);
  } else {
    return operand<V>(0.0_c);
  }
}

// |x|
template <class T>
at::vec::Vectorized<T> magnitude(const at::vec::Vectorized<T>& x) {
  return x.abs();
}
// Not by abs: its second derivative is a zero that is of no tensor subclass.
inline at::Tensor magnitude(const at::Tensor& x) {
  return x * x.sign();
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
// Relative error < 1e-7, with and without fused multiply-add; results below 2^-126 are 0.
template <class T>
at::vec::Vectorized<T> exp_nonpositive(const at::vec::Vectorized<T>& x) {
  return x.exp();
}
inline at::vec::Vectorized<float> exp_nonpositive(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  // At -127 log(2) the exponent's bits are all zero, and so is the result.
  const V clamped = at::vec::clamp_min(x, V(-88.02969f));
  // Added, it leaves no bits for a fraction, and the exponent of 2^power in the lowest ones.
  const V shift(0x1.8p23f + 127.0f);
  const V shifted = at::vec::fmadd(clamped, V(1.44269504089f), shift);
  const V power = shifted - shift;
  // log(2) in two parts, of which the first has so few bits that its product is exact.
  const V rest = at::vec::fmadd(power, V(2.12194440e-4f), at::vec::fmadd(power, V(-0.693359375f), clamped));
  // For |rest| <= log(2) / 2, a minimax fit.
  const V mantissa = polynomial(rest, 1.0, 1.0, 0.49999993, 0.1666652, 0.04166839, 0.00836878, 0.00138145);
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  return mantissa * at::vec::cast<float>(exponent);
}
// Defined for x <= 0 alone, where masking leaves exp finite, and so its gradients.
inline at::Tensor exp_nonpositive(const at::Tensor& x) {
  return x.masked_fill(x > 0, 0).exp();
}

// log(1 + x) for 0 <= x <= 1. In float32 by the series of 2 artanh(x / (2 + x)), whose remainder is below
// 1e-8 of the result.
template <class T>
at::vec::Vectorized<T> log1p_fraction(const at::vec::Vectorized<T>& x) {
  return x.log1p();
}
inline at::vec::Vectorized<float> log1p_fraction(const at::vec::Vectorized<float>& x) {
  const auto ratio = x / (x + 2.0_c);
  return ratio *
         polynomial(ratio * ratio, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15);
}

// sin(x + quarters pi / 2), and so the derivatives of the sine of that order.
template <int quarters, class V>
V sine(const V& x) {
  const V wave = quarters % 2 ? x.cos() : x.sin();
  return quarters % 4 < 2 ? wave : wave.neg();
}
// In float32 to half the error of at::vec's: |error| < 5e-8 up to |x| = 2^17. Beyond it is at::vec's, which
// it is everywhere where multiply-add is not fused.
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
template <int quarters>
C10_ALWAYS_INLINE at::vec::Vectorized<float> sine(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  using I = at::vec::Vectorized<int32_t>;
  // Added, it leaves no bits for a fraction, and the number of quarter turns in the lowest ones.
  const V shift(0x1.8p23f);
  const V shifted = at::vec::fmadd(x, V(0.636619772f), shift);
  const V turns = shifted - shift;
  // x = turns pi / 2 + rest + low, with pi / 2 in three parts. The first product and its difference are
  // exact.
  const V middle(0x1.4442dp-24f);
  const V far = at::vec::fmadd(turns, V(-0x1.921fb4p0f), x);
  const V step = turns * middle, rest = far - step;
  const V low = far - rest - step - at::vec::fmsub(turns, middle, step) - turns * V(0x1.84698ap-48f);
  // For |rest| <= pi / 4, minimax fits.
  const V square = rest * rest;
  const V odd = polynomial(square, -0.166666666, 0.00833332808, -0.000198389991, 2.71561854e-6);
  const V even = polynomial(square, 0.0416666666, -0.00138888836, 2.47994785e-5, -2.72067797e-7);
  const V one(1.0f), half = square * 0.5_c, most = one - half;
  const V cosine = most + (one - most - half + at::vec::fmsub(even * square, square, rest * low));
  const V sine = rest + at::vec::fmadd(rest * square, odd, low * cosine);
  // The lowest bit says which of the two it is, the next one its sign.
  const I turn = at::vec::cast<int32_t>(shifted) + I(quarters);
  const V is_cosine = at::vec::cast<float>((turn & I(1)) == I(1));
  const V wave = V::blendv(sine, cosine, is_cosine) ^ at::vec::cast<float>((turn & I(2)) << I(30));
  const V is_near = x.abs() <= V(0x1p17f);  // NaN is not
  return C10_LIKELY(!is_near.zero_mask()) ? wave
                                          : V::blendv(gradnorm_kernels::sine<quarters, V>(x), wave, is_near);
}
#endif

// The logistic function s and what its derivatives are made of.
template <class V>
struct Logistic {
  V value;  // s
  V slope;  // s (1 - s)
  V skew;   // 1 - 2 s

  V second() const {
    return slope * skew;
  }
  V third() const {
    return slope * (skew * skew - slope * 2.0_c);
  }
};
// Through exp(-|x|), so that neither 1 - s nor exp loses the small side. Inlined, or each of the two calls
// for a vector of half types would spill the registers.
template <class T>
C10_ALWAYS_INLINE Logistic<at::vec::Vectorized<T>> logistic(const at::vec::Vectorized<T>& x) {
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

// tanh(softplus(x)), by which Mish multiplies x, and its first two derivatives.
template <class V>
struct MishGate {
  V value;
  V slope;
  V curvature;
};
// Rational in e = exp(x): with D = 2 + 2 e + e^2 they are e (2 + e) / D = 1 - 2 / D, 4 e (1 + e) / D^2 and
// 4 e (2 + 2 e - 3 e^2 - 2 e^3) / D^3. For x > 0 the fractions are reduced by the powers of e, to be
// written in d = exp(-|x|) on either side. Inlined as above.
template <class T>
C10_ALWAYS_INLINE MishGate<at::vec::Vectorized<T>> mish_gate(const at::vec::Vectorized<T>& x) {
  const auto positive = x > 0.0_c;
  const auto d = exp_nonpositive(x.abs().neg());
  const auto scale = operand<at::vec::Vectorized<T>>(1.0_c) /
                     select(positive, polynomial(d, 1.0, 2.0, 2.0), polynomial(d, 2.0, 2.0, 1.0));
  const auto decay = select(positive, d * d, d) * scale;
  return {
      select(positive, decay * Constant{-2.0} + 1.0_c, decay * (d + 2.0_c)),
      decay * (d + 1.0_c) * scale * 4.0_c,
      decay * scale * scale * 4.0_c *
          select(positive, polynomial(d, -2.0, -3.0, 2.0, 2.0), polynomial(d, 2.0, 2.0, -3.0, -2.0))};
}
// By the chain rule, without the |x| that has no derivative at 0.
inline MishGate<at::Tensor> mish_gate(const at::Tensor& x) {
  const at::Tensor value = at::softplus(x).tanh(), sigmoid = x.sigmoid();
  const at::Tensor slope = (value * value * Constant{-1.0} + 1.0_c) * sigmoid;
  return {value, slope, slope * (sigmoid * (value * Constant{-2.0} + Constant{-1.0}) + 1.0_c)};
}

// The gate's third derivative. With t the gate, s the logistic function and u = 1 - t^2, t' = u s and
// u' = -2 t u s, so that t''' = u (s'' - 6 t s s' + s^3 (4 t^2 - 2 u)).
template <class V>
C10_ALWAYS_INLINE V mish_gate_third(const V& t, const V& u, const Logistic<V>& s) {
  const V bend = s.slope * (s.skew - t * s.value * 6.0_c);
  return u * (bend + s.value * s.value * s.value * (t * t * 4.0_c - u * 2.0_c));
}
// With D as above u is 4 (1 + e)^2 / D^2, which loses nothing where t is near 1.
template <class T>
C10_ALWAYS_INLINE at::vec::Vectorized<T> mish_gate_third(const at::vec::Vectorized<T>& x) {
  using V = at::vec::Vectorized<T>;
  const V positive = x > 0.0_c;
  const V d = exp_nonpositive(x.abs().neg());
  const V scale =
      operand<V>(1.0_c) / select(positive, polynomial(d, 1.0, 2.0, 2.0), polynomial(d, 2.0, 2.0, 1.0));
  const V root = select(positive, d, operand<V>(1.0_c)) * (d + 1.0_c) * scale * 2.0_c;
  return mish_gate_third(mish_gate(x).value, root * root, logistic(x));
}
inline at::Tensor mish_gate_third(const at::Tensor& x) {
  const at::Tensor value = mish_gate(x).value;
  return mish_gate_third(value, value * value * Constant{-1.0} + 1.0_c, logistic(x));
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
