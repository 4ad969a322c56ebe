// Every activation, defined once against an arithmetic type V:
//     f(x),    df(g, x) = g f'(x),    d2f(v, g, x) = v f''(x) g    and    d3f(b, v, g, x) = b v f'''(x) g.
// The CPU kernels instantiate them with at::vec::Vectorized<float|double>; the composite path, which
// autograd and torch.func can differentiate further, instantiates all but f with at::Tensor.
//
// At a kink, the derivatives are what PyTorch's own are there.
#pragma once

#include <type_traits>
#include <variant>

#include "elementary.h"

namespace gradnorm_kernels {

// Products are associated so that a factor that underflows to 0 for huge |x| meets one power of x at a
// time: every finite x gives a finite result, where x * x * 0 would give inf * 0 = NaN. For the same reason
// v and g are not multiplied with each other: both may be large where f'' is 0.

// f(x) = x Phi(x)
struct GeluErf {
  template <class V>
  V f(const V& x) const {
    return x * standard_normal(x).distribution;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const auto n = standard_normal(x);
    return g * (n.distribution + x * n.density);
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const V density = standard_normal(x).density;
    return v * (density * 2.0_c - x * (x * density)) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const V moment = x * standard_normal(x).density;
    return b * (x * (x * moment) - moment * 4.0_c) * v * g;
  }
};

// f(x) = x s(v(x)), with s the logistic function and v = 2 sqrt(2 / pi) (x + 0.044715 x^3): the usual
// 0.5 (1 + tanh(v / 2)) is s(v), without its cancellation.
struct GeluTanh {
  template <class V>
  V f(const V& x) const {
    return x * logistic(inner(x)).value;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const auto s = logistic(inner(x));
    return g * (s.value + x * times_inner_slope(x, s.slope));
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const auto s = logistic(inner(x));
    return v * (times_inner_slope(x, s.slope) * 2.0_c + x * gate_curvature(x, s)) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const auto s = logistic(inner(x));
    // s(v)''' = s'(v) v''' + 3 s''(v) v'' v' + s'''(v) v'^3
    const V third = (s.slope + times_inner_slope(x, s.second()) * x * 3.0_c) * Constant{kBend} +
                    times_inner_slope(x, times_inner_slope(x, times_inner_slope(x, s.third())));
    return b * (gate_curvature(x, s) * 3.0_c + x * third) * v * g;
  }

 private:
  static constexpr double kScale = 1.59576912160573071176;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
  static constexpr double kBend = 6.0 * kScale * kCubic;  // v'''

  template <class V>
  static V inner(const V& x) {
    return x * (x * x * Constant{kCubic} + 1.0_c) * Constant{kScale};
  }
  // t v'(x), v' = kScale (1 + 3 kCubic x^2)
  template <class V>
  static V times_inner_slope(const V& x, const V& t) {
    return (x * (x * t) * Constant{3.0 * kCubic} + t) * Constant{kScale};
  }
  // s(v)'' = s'(v) v'' + s''(v) v'^2
  template <class V>
  static V gate_curvature(const V& x, const Logistic<V>& s) {
    return x * s.slope * Constant{kBend} + s.skew * times_inner_slope(x, times_inner_slope(x, s.slope));
  }
};

using Gelu = std::variant<GeluErf, GeluTanh>;

// f(x) = x s(x)
struct Silu {
  template <class V>
  V f(const V& x) const {
    return x * logistic(x).value;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const auto s = logistic(x);
    return g * (s.value + x * s.slope);
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const auto s = logistic(x);
    return v * (s.slope * 2.0_c + x * s.slope * s.skew) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const auto s = logistic(x);
    return b * (s.second() * 3.0_c + x * s.third()) * v * g;
  }
};

// f(x) = x s(c x)
struct QuickGelu {
  static constexpr double kScale = 1.702;  // c

  template <class V>
  V f(const V& x) const {
    return x * logistic(x * Constant{kScale}).value;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const auto s = logistic(x * Constant{kScale});
    return g * (s.value + x * s.slope * Constant{kScale});
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const auto s = logistic(x * Constant{kScale});
    const V curvature = s.slope * 2.0_c + x * s.slope * s.skew * Constant{kScale};
    return v * (curvature * Constant{kScale}) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const auto s = logistic(x * Constant{kScale});
    const V third = s.second() * 3.0_c + x * s.third() * Constant{kScale};
    return b * (third * Constant{kScale * kScale}) * v * g;
  }
};

// f(x) = x tanh(softplus(x))
struct Mish {
  template <class V>
  V f(const V& x) const {
    return x * mish_gate(x).value;
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const auto gate = mish_gate(x);
    return g * (gate.value + x * gate.slope);
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const auto gate = mish_gate(x);
    return v * (gate.slope * 2.0_c + x * gate.curvature) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    return b * (mish_gate(x).curvature * 3.0_c + x * mish_gate_third(x)) * v * g;
  }
};

// f(x) = log(1 + exp(beta x)) / beta, and x where beta x exceeds the threshold.
struct Softplus {
  double beta;
  double threshold;

  template <class V>
  V f(const V& x) const {
    const V z = x * Constant{beta};
    const V smooth =
        at::vec::clamp_min(z, operand<V>(0.0_c)) + log1p_fraction(exp_nonpositive(z.abs().neg()));
    return select(z > Constant{threshold}, x, smooth / Constant{beta});
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const V z = x * Constant{beta};
    return select(z > Constant{threshold}, g, g * logistic(z).value);
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const V z = x * Constant{beta};
    return v * select(z >= Constant{threshold}, 0.0_c, logistic(z).slope * Constant{beta}) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const V z = x * Constant{beta};
    const V third = logistic(z).second() * Constant{beta * beta};
    return b * select(z >= Constant{threshold}, 0.0_c, third) * v * g;
  }
};

// f(x) = scale x for x > 0, else scale alpha (exp(input_scale x) - 1). Not for a negative input_scale.
struct Elu {
  double alpha;
  double scale;
  double input_scale;

  template <class V>
  V f(const V& x) const {
    const V negative = (x * Constant{input_scale}).expm1() * Constant{alpha * scale};
    return select(x > 0.0_c, x * Constant{scale}, negative);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x > 0.0_c, g * Constant{scale}, g * (decay(x) * Constant{alpha * scale * input_scale}));
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const V curvature = decay(x) * Constant{alpha * scale * input_scale * input_scale};
    return v * select(x >= 0.0_c, 0.0_c, curvature) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    return b * d2f(v, g, x) * Constant{input_scale};
  }

 private:
  template <class V>
  V decay(const V& x) const {
    return exp_nonpositive(x * Constant{input_scale});
  }
};

// The derivatives of these two are made of y = f(x), which PyTorch saves too. f itself is ATen's.

struct Tanh {
  template <class V>
  V df(const V& g, const V& y) const {
    return g * ((y * Constant{-1.0} + 1.0_c) * (y + 1.0_c));
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& y) const {
    return v * (y * Constant{-2.0}) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V&) const {
    return b * Constant{-2.0} * v * g;
  }
};

struct Sigmoid {
  template <class V>
  V df(const V& g, const V& y) const {
    return g * (y * (y * Constant{-1.0} + 1.0_c));
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& y) const {
    return v * (y * Constant{-2.0} + 1.0_c) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V&) const {
    return b * Constant{-2.0} * v * g;
  }
};

// Those of linear pieces have no f'': the double backward is the backward, and x gets no gradient from it.

struct Relu {
  template <class V>
  V f(const V& x) const {
    return select(x <= 0.0_c, 0.0_c, x);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x <= 0.0_c, 0.0_c, g);
  }
};

struct Relu6 {
  template <class V>
  V f(const V& x) const {
    return select(x <= 0.0_c, 0.0_c, select(x >= 6.0_c, 6.0_c, x));
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x <= 0.0_c, 0.0_c, select(x >= 6.0_c, 0.0_c, g));
  }
};

struct LeakyRelu {
  double negative_slope;

  template <class V>
  V f(const V& x) const {
    return select(x > 0.0_c, x, x * Constant{negative_slope});
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x > 0.0_c, g, g * Constant{negative_slope});
  }
};

// f(x) = (x + 3) / 6 between -3 and 3, where it is 0 and 1.
struct Hardsigmoid {
  template <class V>
  V f(const V& x) const {
    return select(x <= Constant{-3.0}, 0.0_c, select(x >= 3.0_c, 1.0_c, (x + 3.0_c) / 6.0_c));
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x > Constant{-3.0}, select(x < 3.0_c, g / 6.0_c, 0.0_c), 0.0_c);
  }
};

// f(x) = x h(x), with h the hard sigmoid.
struct Hardswish {
  template <class V>
  V f(const V& x) const {
    return x * Hardsigmoid().f(x);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x <= Constant{-3.0}, 0.0_c, select(x >= 3.0_c, g, g * (x / 3.0_c + 0.5_c)));
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    return select(x > Constant{-3.0}, select(x < 3.0_c, v / 3.0_c * g, 0.0_c), 0.0_c);
  }
  template <class V>
  V d3f(const V&, const V&, const V&, const V& x) const {
    return zero_like(x);
  }
};

// f(x) = x / (1 + |x|)
struct Softsign {
  template <class V>
  V f(const V& x) const {
    return x / (magnitude(x) + 1.0_c);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    const V gate = reciprocal(x);
    return g * gate * gate;
  }
  // The powers of the gate fall as slowly as |x| grows, so that v and g may outweigh them: each is multiplied
  // with its share.
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    const V gate = reciprocal(x);
    return v * gate * gate * side(x) * (g * gate);
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    const V gate = reciprocal(x), sides = side(x) * side(x);
    return b * gate * (v * gate) * (g * gate) * gate * sides * 1.5_c;
  }

 private:
  // f'' and f''' are 0 where f'' jumps.
  template <class V>
  static V side(const V& x) {
    return select(x > 0.0_c, Constant{-2.0}, select(x < 0.0_c, 2.0_c, 0.0_c));
  }
  // 1 / (1 + |x|)
  template <class V>
  static V reciprocal(const V& x) {
    return operand<V>(1.0_c) / (magnitude(x) + 1.0_c);
  }
};

// f(x) = log s(x), with s the logistic function
struct Logsigmoid {
  template <class V>
  V f(const V& x) const {
    return at::vec::clamp_max(x, operand<V>(0.0_c)) - log1p_fraction(exp_nonpositive(x.abs().neg()));
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return g * logistic(x.neg()).value;
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    return v * logistic(x.neg()).slope.neg() * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    return b * logistic(x.neg()).second() * v * g;
  }
};

// f(x) = sin(w x + start pi / 2), with w the frequency
template <int start>
struct Wave {
  double frequency;

  template <class V>
  V f(const V& x) const {
    return nth<0>(x);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return g * (nth<1>(x) * Constant{frequency});
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    return v * (nth<2>(x) * Constant{frequency * frequency}) * g;
  }
  template <class V>
  V d3f(const V& b, const V& v, const V& g, const V& x) const {
    return b * (nth<3>(x) * Constant{frequency * frequency * frequency}) * v * g;
  }

 private:
  template <int n, class V>
  V nth(const V& x) const {
    return sine<start + n>(x * Constant{frequency});
  }
};
using Sin = Wave<0>;
using Cos = Wave<1>;

// f(x) = max(x, 0)^2
struct SquaredRelu {
  template <class V>
  V f(const V& x) const {
    return select(x <= 0.0_c, 0.0_c, x * x);
  }
  template <class V>
  V df(const V& g, const V& x) const {
    return select(x <= 0.0_c, 0.0_c, g * x * 2.0_c);
  }
  template <class V>
  V d2f(const V& v, const V& g, const V& x) const {
    return select(x <= 0.0_c, 0.0_c, v * g * 2.0_c);
  }
  template <class V>
  V d3f(const V&, const V&, const V&, const V& x) const {
    return zero_like(x);
  }
};

using Activation = std::variant<
    GeluErf, GeluTanh, Silu, QuickGelu, Mish, Softplus, Elu, Tanh, Sigmoid, Relu, Relu6, LeakyRelu,
    Hardsigmoid, Hardswish, Softsign, Logsigmoid, Sin, Cos, SquaredRelu>;

// False of those whose derivatives are made of the output.
template <class Act>
constexpr bool has_f = requires(const Act& act, const at::Tensor& x) { act.f(x); };
template <>
inline constexpr bool has_f<Gelu> = true;
// False of those of linear pieces.
template <class Act>
constexpr bool has_d2f = requires(const Act& act, const at::Tensor& x) { act.d2f(x, x, x); };
template <>
inline constexpr bool has_d2f<Gelu> = true;

}  // namespace gradnorm_kernels
