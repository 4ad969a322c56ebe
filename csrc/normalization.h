// The mathematics that layer, RMS, group, instance and batch normalisation share, in plain ATen ops that are
// differentiable to any order, and the checks of their arguments.
//
// An input x is x̂ = (x - <x>) rstd, with < > the mean over the dimensions it is normalised over, times a
// weight w plus a bias. With P a = a - <a> - x̂ <a x̂>, which x̂ and rstd leave of a derivative, a gradient g
// has the backward
//     x: rstd P(g w),    w: sum g x̂,    bias: sum g,
// and that, for gradients v of x's, u of w's and t of the bias's, the double backward
//     g: w rstd P v + u x̂ + t,
//     x: rstd P(g u) - rstd^2 (x̂ <v P(g w)> + P v <g w x̂> + P(g w) <v x̂>),
//     w: sum g rstd P v.
// RMS normalisation leaves out <x> and <a>. Where the statistics are constants, P a = a.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>

#include <vector>

#include "op.h"

namespace gradnorm_kernels {

enum class Statistics { kCentred, kUncentred, kConstant };

// One input in the dtype of arithmetic. Statistics are functions of it, computed here: as constants, which
// saved ones are to PyTorch's own formulas, they make the third order wrong.
struct Normalized {
  std::vector<int64_t> dims;  // that x is normalised over
  c10::SymDimVector shape;    // that a parameter broadcasts as
  Statistics statistics = Statistics::kCentred;
  Tensor mean_of_input, rstd, x_hat;

  void set_input(const Tensor& x, double eps) {
    const Tensor deviation = deviation_of(x);
    normalize(deviation, (mean(deviation * deviation) + eps).rsqrt());
  }
  // Of the rstd that is given this takes eps alone, which it implies.
  void set_input(const Tensor& x, const Tensor& saved_rstd) {
    const Tensor deviation = deviation_of(x), variance = mean(deviation * deviation);
    const Tensor eps = to_opmath(saved_rstd).pow(-2) - variance;
    normalize(deviation, (variance + eps.detach()).rsqrt());
  }
  void normalize(const Tensor& deviation, const Tensor& with_rstd) {
    rstd = with_rstd;
    x_hat = deviation * rstd;
  }

  Tensor mean(const Tensor& tensor) const {
    // ATen takes no dimensions for all of them; here they are those of a single element.
    return dims.empty() ? tensor : tensor.mean(dims, /*keepdim=*/true);
  }
  Tensor project(const Tensor& tensor) const {
    if (statistics == Statistics::kConstant) {
      return tensor;
    }
    const Tensor rest = tensor - x_hat * mean(tensor * x_hat);
    return statistics == Statistics::kCentred ? rest - mean(tensor) : rest;
  }
  Tensor expand(const Tensor& parameter) const {
    return to_opmath(parameter).reshape_symint(shape);
  }
  Tensor times(const Tensor& tensor, const Tensor& parameter) const {
    return parameter.defined() ? tensor * expand(parameter) : tensor;
  }
  Tensor affine(const Tensor& weight, const Tensor& bias) const {
    const Tensor scaled = times(x_hat, weight);
    return bias.defined() ? scaled + expand(bias) : scaled;
  }
  // In the shape and dtype of parameter.
  Tensor sum_like(const Tensor& tensor, const Tensor& parameter) const {
    return tensor.sum_to_size_symint(shape).reshape_symint(parameter.sym_sizes()).to(parameter.scalar_type());
  }

  // like: of the shape and dtype of the parameters' gradients.
  TensorTriple backward(const Tensor& g, const Tensor& weight, const Tensor& like, Mask<3> wanted) const {
    return {
        wanted[0] ? rstd * project(times(g, weight)) : Tensor(),
        wanted[1] ? sum_like(g * x_hat, like) : Tensor(), wanted[2] ? sum_like(g, like) : Tensor()};
  }

  // Of v, u and t those that are undefined are 0. A result may be undefined where it is 0, or not wanted.
  TensorTriple double_backward(
      const Tensor& v, const Tensor& u, const Tensor& t, const Tensor& g, const Tensor& weight,
      const Tensor& like, Mask<3> wanted) const {
    Tensor grad_g, grad_x, grad_weight;
    const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
    if (v.defined()) {
      const Tensor projected = project(v);
      if (wanted[0]) {
        add(grad_g, times(rstd * projected, weight));
      }
      if (wanted[1] && statistics != Statistics::kConstant) {
        const Tensor gw = times(g, weight);
        const Tensor gw_projected = project(gw);
        const Tensor sum =
            x_hat * mean(v * gw_projected) + projected * mean(gw * x_hat) + gw_projected * mean(v * x_hat);
        add(grad_x, -rstd * rstd * sum);
      }
      if (wanted[2]) {
        grad_weight = sum_like(g * rstd * projected, like);
      }
    }
    if (u.defined()) {
      if (wanted[0]) {
        add(grad_g, times(x_hat, u));
      }
      if (wanted[1]) {
        add(grad_x, rstd * project(times(g, u)));
      }
    }
    if (t.defined() && wanted[0]) {
      add(grad_g, expand(t).expand_symint(g.sym_sizes()));
    }
    return {grad_g, grad_x, grad_weight};
  }

 private:
  Tensor deviation_of(const Tensor& x) {
    if (statistics == Statistics::kUncentred) {
      return x;
    }
    mean_of_input = mean(x);
    return x - mean_of_input;
  }
};

inline Tensor to_dtype_of(const Tensor& like, const Tensor& tensor) {
  return tensor.defined() ? tensor.to(like.scalar_type()) : tensor;
}

// A weight or, where there is none, what has the shape and dtype of its gradient.
inline Tensor parameter_or_stand_in(const Tensor& weight, const Tensor& input, at::ScalarType dtype) {
  return weight.defined() ? weight
                          : at::empty({}, input.options().dtype(dtype)).expand_symint({input.sym_size(1)});
}

inline at::TensorOptions arithmetic_options(const Tensor& tensor) {
  return tensor.options().dtype(at::toOpMathType(tensor.scalar_type()));
}

// CUDA's autocast runs normalisations in float32; the CPU's leaves them alone.
inline Tensor autocast_to_float(const Tensor& tensor) {
  return tensor.defined() ? at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA) : tensor;
}

// Raises unless the tensors, where they are defined, have this shape, and the device of input.
inline void check_shapes(
    const char* op, const Tensor& input, std::initializer_list<NamedTensor> tensors,
    c10::SymIntArrayRef shape) {
  for (const auto& [name, tensor] : tensors) {
    check_floating(op, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        !tensor.defined() || tensor.sym_sizes() == shape, op, ": expected ", name, " to have shape ", shape,
        ", got ", tensor.sym_sizes());
  }
}

}  // namespace gradnorm_kernels
