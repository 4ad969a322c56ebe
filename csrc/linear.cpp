// Linear layers: ATen's products. They are ops of ours so that operands which normalisations, activations and
// their backwards computed need not be kept, but are made again (record in op.h).
#include "bilinear.h"

namespace gradnorm_kernels::linear {
namespace {

// (..., features) as rows.
Tensor rows(const Tensor& tensor) {
  return tensor.reshape_symint({-1, tensor.sym_size(-1)});
}

struct Forward {
  static constexpr auto schema = "linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor";
  const Tensor &input, &weight;
  OptionalTensor bias;
  auto tie() const {
    return std::tie(input, weight, bias);
  }

  // Differentiable to any order.
  Tensor composite() const {
    const auto op = name_of<Forward>();
    check_floating(op, {{"input", input}, {"weight", weight}, {"bias", bias}});
    TORCH_CHECK_VALUE(
        weight.dim() == 2, op, ": expected weight of shape (out_features, in_features), got ",
        weight.sym_sizes());
    if (!input.is_nested()) {
      TORCH_CHECK_VALUE(
          input.dim() > 0 && input.sym_size(-1) == weight.sym_size(1), op,
          ": expected input of shape (..., in_features), with ", weight.sym_size(1), " of these, got ",
          input.sym_sizes());
    }
    TORCH_CHECK_VALUE(
        !bias.defined() || (bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(0)), op,
        ": expected bias of shape (", weight.sym_size(0), "), got ", bias.sym_sizes());
    return at::linear(input, weight, optional(bias));
  }
  Tensor autograd() const;
  Tensor autocast() const {
    return in_lower_precision(
        input, [&](const auto& cast) { return call(Forward{cast(input), cast(weight), cast(bias)}); });
  }
};

struct Backward {
  static constexpr auto schema =
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor& grad_output;
  // Each may be undefined where the gradient of the other is not wanted.
  OptionalTensor input, weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, weight, output_mask);
  }

  void check() const {
    const auto op = name_of<Backward>();
    check_floating(op, {{"grad_output", grad_output}, {"input", input}, {"weight", weight}});
    if (output_mask[0]) {
      TORCH_CHECK_VALUE(
          weight.defined() && weight.dim() == 2, op,
          ": expected weight of shape (out_features, in_features), whose product output_mask asks for");
    }
    const bool has_features = grad_output.dim() > 0;
    TORCH_CHECK_VALUE(
        has_features && (!output_mask[0] || grad_output.sym_size(-1) == weight.sym_size(0)), op,
        ": expected grad_output of shape (..., out_features), got ", grad_output.sym_sizes());
    if (output_mask[1]) {
      const auto leading = [](const Tensor& tensor) { return tensor.sym_sizes().slice(0, tensor.dim() - 1); };
      TORCH_CHECK_VALUE(
          input.defined() && input.dim() == grad_output.dim() && leading(input) == leading(grad_output), op,
          ": expected input of the shape of grad_output (", grad_output.sym_sizes(),
          ") but for the last dimension, got ", input.defined() ? input.sym_sizes() : c10::SymIntArrayRef());
    }
  }
  TensorTriple composite() const {
    check();
    TensorTriple grads;
    const Tensor g = rows(grad_output);
    if (output_mask[0]) {
      std::vector<c10::SymInt> shape = grad_output.sym_sizes().vec();
      shape.back() = weight.sym_size(1);
      std::get<0>(grads) = g.mm(weight).view_symint(shape);
    }
    if (output_mask[1]) {
      std::get<1>(grads) = g.t().mm(rows(input));
    }
    if (output_mask[2]) {
      std::get<2>(grads) = g.sum(0);
    }
    return grads;
  }
  TensorTriple autograd() const;
};

struct DoubleBackward {
  static constexpr auto schema =
      "linear_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask) -> "
      "(Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)";
  OptionalTensor grad_grad_input, grad_grad_weight, grad_grad_bias;
  const Tensor& grad_output;
  OptionalTensor input, weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, output_mask);
  }

  TensorTriple implicit() const {
    return bilinear_double_backward(*this, [](const Tensor& bias, const Tensor&) { return bias; });
  }
  Tensor forward(const Tensor& x, const Tensor& w, const Tensor& b) const {
    return call(Forward{x, w, b});
  }
  TensorTriple backward(const Tensor& x, const Tensor& w, Mask<2> mask) const {
    return call(Backward{grad_output, x, w, {mask[0], mask[1], false}});
  }
};

struct OfBackward : BilinearBackwardOperands {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    return to_list(
        DoubleBackward{grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], needs}.implicit());
  }
};

TensorTriple Backward::autograd() const {
  if (needs_composite(grad_output, input, weight)) {
    return composite();
  }
  return to_tuple<3>(record<OfBackward>({grad_output, input, weight}, {}, [&](variable_list& saved) {
    // An operand that only meets the gradient of a result not asked for is not read again.
    saved = {
        grad_output, output_mask[1] ? input : OptionalTensor(), output_mask[0] ? weight : OptionalTensor()};
    return to_list(composite());
  }));
}

struct OfForward : BilinearForwardOperands {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    return to_list(call(Backward{grads[0], saved[0], saved[1], needs}));
  }
};

Tensor Forward::autograd() const {
  if (needs_composite(input, weight, bias)) {
    return composite();
  }
  return record<OfForward>({input, weight, bias}, {}, [&](variable_list& saved) {
    saved = {input, weight};
    return variable_list{composite()};
  })[0];
}

const Registration<Forward, Backward, DoubleBackward> registration;

}  // namespace
}  // namespace gradnorm_kernels::linear
