// Gated linear units, act(gate) value (Shazeer 2020, arXiv:2002.05202): the CPU, meta and composite
// implementations of their ops, how they are differentiated, and the override of PyTorch's glu.
//
// y = a(x) z has the gradients X = g a'(x) z of the gate x and Z = g a(x) of the value z. With v and u the
// gradients of X and Z, those of g, x and z are v a'(x) z + u a(x), v a''(x) g z + u g a'(x) and v g a'(x).
#include "cpu/gated.h"

#include "iterator.h"
#include "op.h"

namespace gradnorm_kernels::gated {
namespace {

Gate make(std::string_view activation) {
  if (activation == "sigmoid") {
    return LogisticGate{};
  }
  if (activation == "silu") {
    return Silu{};
  }
  if (activation == "gelu_none") {
    return GeluErf{};
  }
  TORCH_CHECK_VALUE(
      activation == "gelu_tanh",
      "gated_unit: expected activation to be 'sigmoid', 'silu', 'gelu_none' or 'gelu_tanh', got '",
      activation, "'");
  return GeluTanh{};
}

struct DoubleBackward {
  static constexpr auto schema =
      "gated_unit_double_backward(Tensor grad_grad_gate, Tensor grad_grad_value, Tensor grad_output, "
      "Tensor gate, Tensor value, str activation) -> (Tensor grad_grad_output, Tensor grad_gate, "
      "Tensor grad_value)";
  const Tensor &grad_grad_gate, &grad_grad_value, &grad_output, &gate, &value;
  std::string_view activation;
  auto tie() const {
    return std::tie(grad_grad_gate, grad_grad_value, grad_output, gate, value, activation);
  }
  auto differentiable() const {
    return std::tie(grad_grad_gate, grad_grad_value, grad_output, gate, value);
  }

  void check() const {
    check_elementwise(
        name_of<DoubleBackward>(), {{"gate", gate},
                                    {"value", value},
                                    {"grad_output", grad_output},
                                    {"grad_grad_gate", grad_grad_gate},
                                    {"grad_grad_value", grad_grad_value}});
  }
  TensorTriple composite() const {
    check();
    const Tensor v = to_opmath(grad_grad_gate), u = to_opmath(grad_grad_value), g = to_opmath(grad_output);
    const Tensor x = to_opmath(gate), z = to_opmath(value);
    const auto narrow = [&](const Tensor& t) { return t.to(gate.scalar_type()); };
    return std::visit(
        [&](const auto& act) -> TensorTriple {
          return {
              narrow(act.df(v * z, x) + u * act.f(x)), narrow(act.d2f(v, g * z, x) + act.df(u * g, x)),
              narrow(act.df(v * g, x))};
        },
        make(activation));
  }
  TensorTriple cpu() const {
    check();
    auto iter = elementwise_iterator<3>(grad_grad_gate, grad_grad_value, grad_output, gate, value);
    GRADNORM_KERNELS(gated_kernels).double_backward(iter, make(activation));
    return {iter.output(0), iter.output(1), iter.output(2)};
  }
  TensorTriple meta() const {
    check();
    make(activation);
    const Tensor like = at::addcmul(grad_grad_gate, grad_grad_value, grad_output).addcmul(gate, value);
    return {like, at::empty_like(like), at::empty_like(like)};
  }
};

struct OfBackward {
  using Settings = std::tuple<std::string>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const Tensor v = or_zeros(grads[0], saved[1]), u = or_zeros(grads[1], saved[1]);
    return to_list(call(DoubleBackward{v, u, saved[0], saved[1], saved[2], std::get<0>(settings)}));
  }
};

struct Backward {
  static constexpr auto schema =
      "gated_unit_backward(Tensor grad_output, Tensor gate, Tensor value, str activation) -> "
      "(Tensor grad_gate, Tensor grad_value)";
  const Tensor &grad_output, &gate, &value;
  std::string_view activation;
  auto tie() const {
    return std::tie(grad_output, gate, value, activation);
  }

  void check() const {
    check_elementwise(name_of<Backward>(), {{"gate", gate}, {"value", value}, {"grad_output", grad_output}});
  }
  TensorPair composite() const {
    check();
    const Tensor g = to_opmath(grad_output), x = to_opmath(gate), z = to_opmath(value);
    const auto narrow = [&](const Tensor& t) { return t.to(gate.scalar_type()); };
    return std::visit(
        [&](const auto& act) -> TensorPair { return {narrow(act.df(g * z, x)), narrow(g * act.f(x))}; },
        make(activation));
  }
  TensorPair cpu() const {
    check();
    auto iter = elementwise_iterator<2>(grad_output, gate, value);
    GRADNORM_KERNELS(gated_kernels).backward(iter, make(activation));
    return {iter.output(0), iter.output(1)};
  }
  TensorPair meta() const {
    check();
    make(activation);
    const Tensor like = at::addcmul(grad_output, gate, value);
    return {like, at::empty_like(like)};
  }
  TensorPair autograd() const {
    if (needs_composite(grad_output, gate, value)) {
      return composite();
    }
    const OfBackward::Settings settings{activation};
    return to_tuple<2>(record<OfBackward>({grad_output, gate, value}, settings, [&](variable_list& saved) {
      saved = {grad_output, gate, value};
      return to_list(call(*this));
    }));
  }
};

struct OfForward {
  using Settings = std::tuple<std::string>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    return to_list(call(Backward{grads[0], saved[0], saved[1], std::get<0>(settings)}));
  }
};

struct Forward {
  static constexpr auto schema = "gated_unit(Tensor gate, Tensor value, str activation) -> Tensor";
  const Tensor &gate, &value;
  std::string_view activation;
  auto tie() const {
    return std::tie(gate, value, activation);
  }

  void check() const {
    check_elementwise(name_of<Forward>(), {{"gate", gate}, {"value", value}});
  }
  Tensor composite() const {
    check();
    const Tensor x = to_opmath(gate);
    const Tensor gating = std::visit([&](const auto& act) { return act.f(x); }, make(activation));
    return (gating * to_opmath(value)).to(gate.scalar_type());
  }
  Tensor cpu() const {
    check();
    auto iter = elementwise_iterator<1>(gate, value);
    GRADNORM_KERNELS(gated_kernels).forward(iter, make(activation));
    return iter.output();
  }
  Tensor meta() const {
    check();
    make(activation);
    return at::mul(gate, value);
  }
  Tensor autograd() const {
    if (needs_composite(gate, value)) {
      return composite();
    }
    return record<OfForward>({gate, value}, {std::string(activation)}, [&](variable_list& saved) {
      saved = {gate, value};
      return variable_list{call(*this)};
    })[0];
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// aten::glu_backward whose own backward is fused: of halves of self, the value and then the gate. Whatever
// ours does not cover stays PyTorch's.
struct OfGluBackward {
  using Settings = std::tuple<int64_t>;  // dim

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto dim = std::get<0>(settings);
    const auto of_grads = grads[0].chunk(2, dim), of_self = saved[1].chunk(2, dim);
    const auto [grad_grad_output, grad_gate, grad_value] =
        call(DoubleBackward{of_grads[1], of_grads[0], saved[0], of_self[1], of_self[0], "sigmoid"});
    return {grad_grad_output, needs[1] ? at::cat({grad_value, grad_gate}, dim) : Tensor()};
  }
};

struct AtenGluBackward : Override<AtenGluBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, int64_t dim) {
    if (needs_composite(grad_output, self) || !is_elementwise_match(self, self) ||
        grad_output.scalar_type() != self.scalar_type() || grad_output.layout() != at::kStrided) {
      return stock(keys, grad_output, self, dim);
    }
    return record<OfGluBackward>({grad_output, self}, {dim}, [&](variable_list& saved) {
      saved = {grad_output, self};
      return variable_list{at::glu_backward(grad_output, self, dim)};
    })[0];
  }
};

// Whose forward-mode derivative PyTorch cannot differentiate.
struct AtenGlu : Override<AtenGlu> {
  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self, int64_t dim) {
    if (self.dim() == 0 || self.sym_size(dim) % 2 != 0 || !is_differentiated_by_transform({self})) {
      return stock(keys, self, dim);
    }
    const auto half = self.sym_size(dim) / 2;
    return self.narrow_symint(dim, 0, half) * self.narrow_symint(dim, half, half).sigmoid();
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenGlu::install(aten, "glu");
  AtenGluBackward::install(aten, "glu_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::gated
