// PyTorch's own ops whose second derivatives it gets wrong, or NaN where the function is smooth, under the
// switch: by formulas of plain ops, which are right to every order.
#include <numbers>

#include "op.h"

namespace gradnorm_kernels::corrected {
namespace {

bool is_real(const Tensor& tensor) {
  return is_elementwise_match(tensor, tensor);
}

// c[0] + c[1] x + c[2] x^2 + ...
template <size_t N>
Tensor polynomial(const Tensor& x, const std::array<double, N>& coefficients) {
  Tensor sum = at::full_like(x, coefficients[N - 1]);
  for (size_t i = N - 1; i-- > 0;) {
    sum = sum * x + coefficients[i];
  }
  return sum;
}

// sin(t) / t and its derivative by t, from their power series where a quotient would cancel or divide by 0.
Tensor by_series(const Tensor& t, bool is_derivative) {
  std::array<double, 11> coefficients;  // of t^(2k)
  double factorial = 1;                 // (2k + 1)!, with the sign of the term
  for (size_t k = 0; k <= coefficients.size(); ++k) {
    if (is_derivative && k > 0) {
      coefficients[k - 1] = 2 * k / factorial;
    } else if (!is_derivative && k < coefficients.size()) {
      coefficients[k] = 1 / factorial;
    }
    factorial *= -(2.0 * k + 2) * (2.0 * k + 3);
  }
  const Tensor is_small = t.detach().abs() < 1;
  const Tensor near = t.masked_fill(is_small.logical_not(), 0), far = t.masked_fill(is_small, 1);
  const Tensor series = polynomial(near * near, coefficients);
  return is_derivative ? at::where(is_small, near * series, (far.cos() - far.sin() / far) / far)
                       : at::where(is_small, series, far.sin() / far);
}

struct OfSinc {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    const Tensor t = to_opmath(saved[0]) * std::numbers::pi;
    return {
        (grads[0] * (by_series(t, /*is_derivative=*/true) * std::numbers::pi)).to(saved[0].scalar_type())};
  }
};

// sin(pi x) / (pi x), whose second derivative at 0 is -pi^2 / 3.
struct AtenSinc : Override<AtenSinc> {
  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self) {
    if (!is_real(self)) {
      return stock(keys, self);
    }
    if (is_differentiated_by_transform({self})) {
      return by_series(to_opmath(self) * std::numbers::pi, /*is_derivative=*/false).to(self.scalar_type());
    }
    if (!torch::autograd::compute_requires_grad(self) || needs_composite(self)) {
      return stock(keys, self);
    }
    return record<OfSinc>({self}, {}, [&](variable_list& saved) {
      saved = {self};
      return variable_list{at::sinc(self)};
    })[0];
  }
};

const StockOverride override_aten([](AtenAutograd& aten) { AtenSinc::install(aten, "sinc"); });

}  // namespace
}  // namespace gradnorm_kernels::corrected
