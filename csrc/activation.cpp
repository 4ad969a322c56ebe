// Activations: the CPU, meta and composite implementations of their ops, and how they are differentiated.
#include "activation.h"

#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>

#include "cpu/activation.h"
#include "iterator.h"
#include "op.h"

namespace gradnorm_kernels::activation {
namespace {

// Whether PyTorch's own op is differentiated wrongly or not at all, so that the composite is made of others.
template <class Definition>
constexpr bool has_parts = requires { Definition::aten; };

template <class Definition, class Make = decltype(&Definition::make)>
struct ActivationOps;

// The ops of one activation. Definition gives the activation's name, the schema of its parameters, what they
// make (or an error that names the bad one), f in ATen's ops, and ATen's backward.
template <class Definition, class Act, class... Params>
struct ActivationOps<Definition, Act (*)(Params...)> {
  // A parameter as it is kept between the passes.
  using Settings =
      std::tuple<std::conditional_t<std::is_same_v<Params, std::string_view>, std::string, Params>...>;
  static constexpr bool is_curved = has_d2f<Act>;
  // What the backward and the double backward take, and the forward saves: input for short.
  static constexpr bool saves_output = !has_f<Act>;
  static constexpr auto saved_name = saves_output ? "output" : "input";

  static std::string schema(const char* suffix, const std::string& tensors, const char* returns) {
    return std::string(Definition::name) + suffix + "(" + tensors + Definition::params + ") -> " + returns;
  }
  static bool is_covered(const Tensor& input) {
    return is_elementwise_match(input, input);
  }
  // fn of the activation itself, where there are several.
  template <class Fn>
  static auto visit(const Fn& fn, const Act& act) {
    if constexpr (std::is_same_v<Act, gradnorm_kernels::Gelu>) {
      return std::visit(fn, act);
    } else {
      return fn(act);
    }
  }
  static Activation any(const std::tuple<Params...>& params) {
    return visit([](const auto& act) -> Activation { return act; }, std::apply(Definition::make, params));
  }
  static Tensor df(const Tensor& grad_output, const Tensor& input, const std::tuple<Params...>& params) {
    const Tensor g = to_opmath(grad_output), x = to_opmath(input);
    return visit([&](const auto& act) { return act.df(g, x); }, std::apply(Definition::make, params))
        .to(input.scalar_type());
  }

  struct Forward {
    static std::string schema() {
      return ActivationOps::schema("", "Tensor input", "Tensor");
    }
    const Tensor& input;
    std::tuple<Params...> params;
    Forward(const Tensor& input, const Params&... params) : input(input), params(params...) {}
    auto tie() const {
      return std::apply([&](const auto&... p) { return std::tie(input, p...); }, params);
    }

    // Takes whatever PyTorch does: integers, complex numbers and other layouts, too, for some activations.
    Tensor composite() const {
      std::apply(Definition::make, params);
      try {
        return std::apply([&](const auto&... p) { return Definition::composite(input, p...); }, params);
      } catch (const c10::Error&) {
        check_elementwise(Definition::name, {{"input", input}});
        throw;
      }
    }
    Tensor cpu() const {
      if (saves_output || !is_covered(input)) {
        return composite();
      }
      auto iter = elementwise_iterator<1>(input);
      GRADNORM_KERNELS(activation_kernels).forward(iter, any(params));
      return iter.output();
    }
    Tensor cuda() const
      requires saves_output
    {
      return composite();
    }
    // An ATen op of as many operands lays its output out as ours do: by TensorIterator's rule.
    Tensor meta() const {
      std::apply(Definition::make, params);
      return is_covered(input) ? at::neg(input) : composite();
    }
    Tensor autograd() const {
      if (needs_composite(input) || !is_covered(input)) {
        return composite();
      }
      return record_forward<&call<Forward>, &call<Backward>>(*this);
    }
    // PyTorch's own value, recorded with a fused double backward.
    Tensor switched() const {
      return record_forward<&Forward::by_aten, &Backward::by_switched>(*this);
    }
    static Tensor by_aten(const Forward& op) {
      if constexpr (has_parts<Definition>) {
        return Definition::aten(op.input);
      } else {
        return std::apply([&](const auto&... p) { return Definition::composite(op.input, p...); }, op.params);
      }
    }
  };

  struct Backward {
    static std::string schema() {
      return ActivationOps::schema(
          "_backward", "Tensor grad_output, Tensor " + std::string(saved_name), "Tensor");
    }
    const Tensor& grad_output;
    const Tensor& input;
    std::tuple<Params...> params;
    Backward(const Tensor& grad_output, const Tensor& input, const Params&... params)
        : grad_output(grad_output), input(input), params(params...) {}
    auto tie() const {
      return std::apply([&](const auto&... p) { return std::tie(grad_output, input, p...); }, params);
    }

    void check() const {
      check_elementwise(name_of<Backward>(), {{saved_name, input}, {"grad_output", grad_output}});
    }
    Tensor composite() const {
      check();
      if constexpr (!is_curved && !has_parts<Definition>) {
        return by_aten(*this);  // which has a second derivative, of zeros
      } else {
        return df(grad_output, input, params);
      }
    }
    Tensor cpu() const {
      check();
      auto iter = elementwise_iterator<1>(grad_output, input);
      GRADNORM_KERNELS(activation_kernels).backward(iter, any(params));
      return iter.output();
    }
    Tensor meta() const {
      check();
      std::apply(Definition::make, params);
      return at::mul(grad_output, input);
    }
    Tensor autograd() const {
      return recorded<&call<Backward>, &call<Backward>>();
    }
    Tensor switched() const {
      return recorded<&Backward::by_aten, &Backward::by_switched>();
    }
    static Tensor by_switched(const Backward& op) {
      return op.switched();
    }
    static Tensor by_aten(const Backward& op) {
      if constexpr (std::is_null_pointer_v<decltype(Definition::aten_backward)>) {
        return call(op);
      } else {
        return std::apply(
            [&](const auto&... p) { return Definition::aten_backward(op.grad_output, op.input, p...); },
            op.params);
      }
    }

   private:
    template <Tensor (*value)(const Backward&), Tensor (*backward)(const Backward&)>
    Tensor recorded() const {
      if (needs_composite(grad_output, input)) {
        return composite();
      }
      return record<OfBackward<backward>>({grad_output, input}, Settings(params), [&](variable_list& saved) {
        saved = {grad_output, input};
        return variable_list{value(*this)};
      })[0];
    }
  };

  struct DoubleBackward {
    static std::string schema() {
      return ActivationOps::schema(
          "_double_backward", "Tensor grad_grad_input, Tensor grad_output, Tensor " + std::string(saved_name),
          saves_output ? "(Tensor grad_grad_output, Tensor grad_of_output)"
                       : "(Tensor grad_grad_output, Tensor grad_input)");
    }
    const Tensor& grad_grad_input;
    const Tensor& grad_output;
    const Tensor& input;
    std::tuple<Params...> params;
    DoubleBackward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input,
        const Params&... params)
        : grad_grad_input(grad_grad_input), grad_output(grad_output), input(input), params(params...) {}
    auto tie() const {
      return std::apply(
          [&](const auto&... p) { return std::tie(grad_grad_input, grad_output, input, p...); }, params);
    }

    void check() const {
      check_elementwise(
          name_of<DoubleBackward>(),
          {{saved_name, input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
    }
    TensorPair composite() const {
      check();
      const Tensor v = to_opmath(grad_grad_input), g = to_opmath(grad_output), x = to_opmath(input);
      const Tensor grad_input =
          visit([&](const auto& act) { return act.d2f(v, g, x); }, std::apply(Definition::make, params));
      return {df(grad_grad_input, input, params), grad_input.to(input.scalar_type())};
    }
    TensorPair cpu() const {
      check();
      auto iter = elementwise_iterator<2>(grad_grad_input, grad_output, input);
      GRADNORM_KERNELS(activation_kernels).double_backward(iter, any(params));
      return {iter.output(0), iter.output(1)};
    }
    TensorPair meta() const {
      check();
      std::apply(Definition::make, params);
      const Tensor grad_input = at::addcmul(grad_grad_input, grad_output, input);
      return {at::empty_like(grad_input), grad_input};
    }
    TensorPair autograd() const {
      if (needs_composite(grad_grad_input, grad_output, input)) {
        return composite();
      }
      return to_tuple<2>(record<OfDoubleBackward>(
          {grad_grad_input, grad_output, input}, Settings(params), [&](variable_list& saved) {
            saved = {grad_grad_input, grad_output, input};
            return to_list(call(*this));
          }));
    }
  };

  // Of a third derivative. With the gradients a of grad_grad_output = v f'(x) and b of
  // grad_input = v f''(x) g:
  //     v: a f' + b f'' g,    g: b f'' v,    x: a f'' v + b f''' v g.
  struct TripleBackward {
    static std::string schema() {
      return ActivationOps::schema(
          "_triple_backward",
          "Tensor grad_of_grad_grad_output, Tensor grad_of_grad_input, Tensor grad_grad_input, "
          "Tensor grad_output, Tensor " +
              std::string(saved_name),
          "(Tensor grad_of_grad_grad_input, Tensor grad_of_grad_output, Tensor grad_of_operand)");
    }
    const Tensor& grad_of_grad_grad_output;
    const Tensor& grad_of_grad_input;
    const Tensor& grad_grad_input;
    const Tensor& grad_output;
    const Tensor& input;
    std::tuple<Params...> params;
    TripleBackward(
        const Tensor& grad_of_grad_grad_output, const Tensor& grad_of_grad_input,
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input,
        const Params&... params)
        : grad_of_grad_grad_output(grad_of_grad_grad_output),
          grad_of_grad_input(grad_of_grad_input),
          grad_grad_input(grad_grad_input),
          grad_output(grad_output),
          input(input),
          params(params...) {}
    auto tie() const {
      return std::apply(
          [&](const auto&... p) {
            return std::tie(
                grad_of_grad_grad_output, grad_of_grad_input, grad_grad_input, grad_output, input, p...);
          },
          params);
    }
    auto differentiable() const {
      return std::tie(grad_of_grad_grad_output, grad_of_grad_input, grad_grad_input, grad_output, input);
    }

    void check() const {
      check_elementwise(
          name_of<TripleBackward>(), {{saved_name, input},
                                      {"grad_output", grad_output},
                                      {"grad_grad_input", grad_grad_input},
                                      {"grad_of_grad_input", grad_of_grad_input},
                                      {"grad_of_grad_grad_output", grad_of_grad_grad_output}});
    }
    TensorTriple composite() const {
      check();
      const Tensor a = to_opmath(grad_of_grad_grad_output), b = to_opmath(grad_of_grad_input),
                   v = to_opmath(grad_grad_input), g = to_opmath(grad_output), x = to_opmath(input);
      const auto narrow = [&](const Tensor& tensor) { return tensor.to(input.scalar_type()); };
      return visit(
          [&](const auto& act) -> TensorTriple {
            return {
                narrow(act.df(a, x) + act.d2f(b, g, x)), narrow(act.d2f(b, v, x)),
                narrow(act.d2f(a, v, x) + act.d3f(b, v, g, x))};
          },
          std::apply(Definition::make, params));
    }
    TensorTriple cpu() const {
      check();
      auto iter = elementwise_iterator<3>(
          grad_of_grad_grad_output, grad_of_grad_input, grad_grad_input, grad_output, input);
      GRADNORM_KERNELS(activation_kernels).triple_backward(iter, any(params));
      return {iter.output(0), iter.output(1), iter.output(2)};
    }
    TensorTriple meta() const {
      check();
      std::apply(Definition::make, params);
      const Tensor like = at::addcmul(
          at::addcmul(grad_of_grad_grad_output, grad_of_grad_input, grad_grad_input), grad_output, input);
      return {like, at::empty_like(like), at::empty_like(like)};
    }
  };

  struct OfDoubleBackward {
    using Settings = ActivationOps::Settings;

    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
      return to_list(
          with_settings<TripleBackward>(
              settings, &call<TripleBackward>, or_zeros(grads[0], saved[2]), or_zeros(grads[1], saved[2]),
              saved[0], saved[1], saved[2]));
    }
  };

  template <Tensor (*value)(const Forward&), Tensor (*backward)(const Backward&)>
  static Tensor record_forward(const Forward& op) {
    return record<OfForward<backward>>({op.input}, Settings(op.params), [&](variable_list& saved) {
      const Tensor output = value(op);
      saved = {saves_output ? output : op.input};
      return variable_list{output};
    })[0];
  }

  template <Tensor (*backward_op)(const Backward&)>
  struct OfForward {
    using Settings = ActivationOps::Settings;

    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
      return {with_settings<Backward>(settings, backward_op, grads[0], saved[0])};
    }
    static Tensor again(const variable_list& saved, const Settings& settings)
      requires(!saves_output)
    {
      return with_settings<Forward>(settings, &call<Forward>, saved[0]);
    }
  };

  struct OfInPlace {
    using Settings = ActivationOps::Settings;
    static constexpr bool is_in_place = true;
    static constexpr auto backward = &OfForward<&Backward::by_switched>::backward;
  };

  template <Tensor (*backward_op)(const Backward&)>
  struct OfBackward {
    using Settings = ActivationOps::Settings;

    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
      const Tensor &grad_output = saved[0], &input = saved[1];
      if constexpr (is_curved) {
        // Where only the input needs a gradient, the other one is still written: one tensor in five.
        if (needs[1]) {
          return to_list(
              with_settings<DoubleBackward>(settings, &call<DoubleBackward>, grads[0], grad_output, input));
        }
      }
      return {
          needs[0] ? with_settings<Backward>(settings, backward_op, grads[0], input) : Tensor(),
          needs[1] && is_zero_asked_for(1) ? at::zeros_like(input) : Tensor()};
    }
    static Tensor again(const variable_list& saved, const Settings& settings) {
      return with_settings<Backward>(settings, &call<Backward>, saved[0], saved[1]);
    }
  };

  template <class Op, class Fn, class... Tensors>
  static auto with_settings(const Settings& settings, const Fn& fn, const Tensors&... tensors) {
    return std::apply([&](const auto&... p) { return fn(Op(tensors..., p...)); }, settings);
  }

  using Registered = std::conditional_t<
      is_curved, Registration<Forward, Backward, DoubleBackward, TripleBackward>,
      Registration<Forward, Backward>>;
};

// What ActivationOps needs to know of each activation: f in ATen's ops, where PyTorch differentiates them to
// any order, and, for the switch alone, ATen's backward.
template <auto f, auto backward = nullptr>
struct InAten {
  static constexpr auto composite = f;
  static constexpr auto aten_backward = backward;
};
template <class Act, auto f, auto backward = nullptr>
struct WithoutParams : InAten<f, backward> {
  static constexpr auto params = "";
  static Act make() {
    return {};
  }
};

namespace definitions {

struct Gelu : InAten<&at::gelu, &at::gelu_backward> {
  static constexpr auto name = "gelu";
  static constexpr auto params = ", *, str approximate='none'";
  static gradnorm_kernels::Gelu make(std::string_view approximate) {
    if (approximate == "none") {
      return GeluErf{};
    }
    TORCH_CHECK_VALUE(
        approximate == "tanh", "gelu: expected approximate to be 'none' or 'tanh', got '", approximate, "'");
    return GeluTanh{};
  }
};

struct Silu : WithoutParams<gradnorm_kernels::Silu, &at::silu, &at::silu_backward> {
  static constexpr auto name = "silu";
};

// Whether a composite is made of ops that differ from PyTorch's own, which takes more than ours.
bool takes_parts(const Tensor& input) {
  return !input.is_nested() && is_elementwise_match(input, input);
}

// The derivatives of PyTorch's own are NaN where the exponential overflows.
Tensor mish_by_parts(const Tensor& input) {
  if (!takes_parts(input)) {
    return at::mish(input);
  }
  const Tensor x = to_opmath(input);
  return (x * at::softplus(x).tanh()).to(input.scalar_type());
}
struct Mish : WithoutParams<gradnorm_kernels::Mish, &mish_by_parts, &at::mish_backward> {
  static constexpr auto name = "mish";
  static constexpr auto aten = &at::mish;
};

struct Softplus : InAten<&at::softplus, &at::softplus_backward> {
  static constexpr auto name = "softplus";
  static constexpr auto params = ", *, float beta=1.0, float threshold=20.0";
  static gradnorm_kernels::Softplus make(double beta, double threshold) {
    return {beta, threshold};
  }
};

Tensor elu_backward(
    const Tensor& grad_output, const Tensor& input, double alpha, double scale, double input_scale) {
  return at::elu_backward(grad_output, alpha, scale, input_scale, /*is_result=*/false, input);
}
struct Elu : InAten<&at::elu, &elu_backward> {
  static constexpr auto name = "elu";
  static constexpr auto params = ", *, float alpha=1.0, float scale=1.0, float input_scale=1.0";
  static gradnorm_kernels::Elu make(double alpha, double scale, double input_scale) {
    TORCH_CHECK_VALUE(input_scale >= 0, "elu: expected input_scale to be 0 or more, got ", input_scale);
    return {alpha, scale, input_scale};
  }
};

struct Tanh : WithoutParams<gradnorm_kernels::Tanh, &at::tanh, &at::tanh_backward> {
  static constexpr auto name = "tanh";
};

struct Sigmoid : WithoutParams<gradnorm_kernels::Sigmoid, &at::sigmoid, &at::sigmoid_backward> {
  static constexpr auto name = "sigmoid";
};

Tensor relu_backward(const Tensor& grad_output, const Tensor& input) {
  return at::threshold_backward(grad_output, input, 0);
}
struct Relu : WithoutParams<gradnorm_kernels::Relu, &at::relu, &relu_backward> {
  static constexpr auto name = "relu";
};

Tensor relu6_backward(const Tensor& grad_output, const Tensor& input) {
  return at::hardtanh_backward(grad_output, input, 0, 6);
}
struct Relu6 : WithoutParams<gradnorm_kernels::Relu6, &at::relu6, &relu6_backward> {
  static constexpr auto name = "relu6";
};

Tensor leaky_relu_backward(const Tensor& grad_output, const Tensor& input, double negative_slope) {
  return at::leaky_relu_backward(grad_output, input, negative_slope, /*self_is_result=*/false);
}
struct LeakyRelu : InAten<&at::leaky_relu, &leaky_relu_backward> {
  static constexpr auto name = "leaky_relu";
  static constexpr auto params = ", *, float negative_slope=0.01";
  static gradnorm_kernels::LeakyRelu make(double negative_slope) {
    return {negative_slope};
  }
};

// PyTorch's own has no second derivative.
Tensor hardsigmoid_by_parts(const Tensor& input) {
  if (!takes_parts(input)) {
    return at::hardsigmoid(input);
  }
  return gradnorm_kernels::Hardsigmoid().f(to_opmath(input)).to(input.scalar_type());
}
struct Hardsigmoid
    : WithoutParams<gradnorm_kernels::Hardsigmoid, &hardsigmoid_by_parts, &at::hardsigmoid_backward> {
  static constexpr auto name = "hardsigmoid";
  static constexpr auto aten = &at::hardsigmoid;
};

struct Hardswish : WithoutParams<gradnorm_kernels::Hardswish, &at::hardswish, &at::hardswish_backward> {
  static constexpr auto name = "hardswish";
};

// PyTorch's own is made of several ops, of which none is to be overridden.
Tensor softsign_by_parts(const Tensor& input) {
  if (!takes_parts(input)) {
    // Of nested tensors there is no sum with a Scalar.
    return input / (input.abs() + at::native::wrapped_scalar_tensor(1));
  }
  return gradnorm_kernels::Softsign().f(to_opmath(input)).to(input.scalar_type());
}
struct Softsign : WithoutParams<gradnorm_kernels::Softsign, &softsign_by_parts> {
  static constexpr auto name = "softsign";
};

// f, computed as wide as the kernels do where those take the input.
template <class Fn>
Tensor widened(const Tensor& input, const Fn& f) {
  return takes_parts(input) ? f(to_opmath(input)).to(input.scalar_type()) : f(input);
}

// As users write it.
Tensor quick_gelu_by_parts(const Tensor& input) {
  return widened(
      input, [](const Tensor& x) { return x * (x * gradnorm_kernels::QuickGelu::kScale).sigmoid(); });
}
struct QuickGelu : WithoutParams<gradnorm_kernels::QuickGelu, &quick_gelu_by_parts> {
  static constexpr auto name = "quick_gelu";
};

Tensor squared_relu_by_parts(const Tensor& input) {
  return at::relu(input).square();
}
struct SquaredRelu : WithoutParams<gradnorm_kernels::SquaredRelu, &squared_relu_by_parts> {
  static constexpr auto name = "squared_relu";
};

template <Tensor (*wave)(const Tensor&)>
Tensor wave_by_parts(const Tensor& input, double frequency) {
  if (frequency == 1) {
    return wave(input);
  }
  return widened(input, [&](const Tensor& x) { return wave(x * frequency); });
}
// PyTorch's own backward is made of two ops, for which ours is one under the switch, too.
template <class Act, Tensor (*wave)(const Tensor&)>
struct Wave : InAten<&wave_by_parts<wave>> {
  static constexpr auto params = ", *, float frequency=1.0";
  static Act make(double frequency) {
    return {frequency};
  }
};
struct Sin : Wave<gradnorm_kernels::Sin, &at::sin> {
  static constexpr auto name = "sin";
};
struct Cos : Wave<gradnorm_kernels::Cos, &at::cos> {
  static constexpr auto name = "cos";
};

// PyTorch's own backward takes a third tensor: AtenLogsigmoidBackward.
struct Logsigmoid : WithoutParams<gradnorm_kernels::Logsigmoid, &at::log_sigmoid> {
  static constexpr auto name = "logsigmoid";
};

}  // namespace definitions

template <class... Definitions>
struct Registrations {
  std::tuple<typename ActivationOps<Definitions>::Registered...> of_each;
};
const Registrations<
    definitions::Gelu, definitions::Silu, definitions::Mish, definitions::Softplus, definitions::Elu,
    definitions::Tanh, definitions::Sigmoid, definitions::Relu, definitions::Relu6, definitions::LeakyRelu,
    definitions::Hardsigmoid, definitions::Hardswish, definitions::Softsign, definitions::Logsigmoid,
    definitions::QuickGelu, definitions::SquaredRelu, definitions::Sin, definitions::Cos>
    registrations;

// PyTorch's own ops under the switch. Whatever ours does not cover stays with the stock kernel.

bool is_covered(const Tensor& a, const Tensor& b) {
  return !needs_composite(a, b) && is_elementwise_match(a, b);
}

std::string_view unscalar(std::string_view value) {
  return value;
}
double unscalar(const at::Scalar& value) {
  return value.toDouble();
}

// An op of the signature (Tensor self), whose backward PyTorch makes of several ops, at least when that is to
// be differentiated, or cannot differentiate twice; with our parameters.
template <class Definition, int... params>
struct AtenForward : Override<AtenForward<Definition, params...>> {
  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self) {
    if (has_parts<Definition> && is_differentiated_by_transform({self})) {
      return Definition::composite(self, params...);
    }
    if (!is_covered(self, self)) {
      return AtenForward::stock(keys, self);
    }
    return typename ActivationOps<Definition>::Forward(self, params...).switched();
  }
};

template <class... Params>
auto settings_of(Params... params) {
  return std::make_tuple(unscalar(params)...);
}
auto wave_settings() {
  return std::make_tuple(1.0);
}
auto celu_settings(const at::Scalar& alpha) {
  return std::make_tuple(alpha.toDouble(), 1.0, 1 / alpha.toDouble());
}

// An op of the signature (Tensor(a!) self, Params...) -> Tensor(a!).
template <class Definition, auto aten, auto settings, class... Params>
struct AtenInPlace : Override<AtenInPlace<Definition, aten, settings, Params...>> {
  static Tensor& autograd(c10::DispatchKeySet keys, Tensor& self, Params... params) {
    using Ops = ActivationOps<Definition>;
    if (!torch::autograd::compute_requires_grad(self) || !is_covered(self, self) || !accepts(params...)) {
      AtenInPlace::stock(keys, self, params...);
      return self;
    }
    // A function of what self was: a second derivative takes this way.
    const Tensor input = self.clone();
    record<typename Ops::OfInPlace>({self}, settings(params...), [&](variable_list& saved) {
      saved = {input};
      aten(self, params...);
      return variable_list{self};
    });
    return self;
  }
  static bool accepts(const Params&... params) try {
    std::apply(Definition::make, settings(params...));
    return true;
  } catch (const c10::Error&) {
    return false;
  }
};

// An op of the signature (Tensor grad_output, Tensor self or output, Params...).
template <class Definition, class... Params>
struct AtenBackward : Override<AtenBackward<Definition, Params...>> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& operand, Params... params) {
    if (!is_covered(grad_output, operand)) {
      return AtenBackward::stock(keys, grad_output, operand, params...);
    }
    return typename ActivationOps<Definition>::Backward(grad_output, operand, unscalar(params)...).switched();
  }
};

struct AtenEluBackward : Override<AtenEluBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const at::Scalar& alpha, const at::Scalar& scale,
      const at::Scalar& input_scale, bool is_result, const Tensor& self_or_result) {
    // is_result: of elu_ without the switch, whose result is saved, from which ours does not compute.
    if (is_result || input_scale.toDouble() < 0 || !is_covered(grad_output, self_or_result)) {
      return stock(keys, grad_output, alpha, scale, input_scale, is_result, self_or_result);
    }
    return ActivationOps<definitions::Elu>::Backward(
               grad_output, self_or_result, alpha.toDouble(), scale.toDouble(), input_scale.toDouble())
        .switched();
  }
};

struct AtenLogsigmoidBackward : Override<AtenLogsigmoidBackward> {
  // buffer: exp(-|self|) on the CPU, nothing on CUDA. Ours do without.
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& buffer) {
    using Ops = ActivationOps<definitions::Logsigmoid>;
    if (!is_covered(grad_output, self)) {
      return stock(keys, grad_output, self, buffer);
    }
    return record<Ops::OfBackward<&call<Ops::Backward>>>({grad_output, self}, {}, [&](variable_list& saved) {
      saved = {grad_output, self};
      return variable_list{at::log_sigmoid_backward(grad_output, self, buffer)};
    })[0];
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  using namespace definitions;
  using Scalar = const at::Scalar&;
  AtenForward<Hardsigmoid>::install(m, "hardsigmoid");
  AtenInPlace<Elu, &at::celu_, &celu_settings, Scalar>::install(m, "celu_");
  AtenInPlace<Elu, &at::elu_, &settings_of<Scalar, Scalar, Scalar>, Scalar, Scalar, Scalar>::install(
      m, "elu_");
  AtenInPlace<Mish, &at::mish_, &settings_of<>>::install(m, "mish_");
  AtenInPlace<Silu, &at::silu_, &settings_of<>>::install(m, "silu_");
  AtenInPlace<Sin, &at::sin_, &wave_settings>::install(m, "sin_");
  AtenInPlace<Cos, &at::cos_, &wave_settings>::install(m, "cos_");
  AtenForward<Silu>::install(m, "silu");
  AtenForward<Mish>::install(m, "mish");
  AtenForward<Sin, 1>::install(m, "sin");
  AtenForward<Cos, 1>::install(m, "cos");
  AtenBackward<Gelu, std::string_view>::install(m, "gelu_backward");
  AtenBackward<Silu>::install(m, "silu_backward");
  AtenBackward<Mish>::install(m, "mish_backward");
  AtenBackward<Softplus, Scalar, Scalar>::install(m, "softplus_backward");
  AtenEluBackward::install(m, "elu_backward");
  AtenBackward<Tanh>::install(m, "tanh_backward");
  AtenBackward<Sigmoid>::install(m, "sigmoid_backward");
  AtenBackward<Hardsigmoid>::install(m, "hardsigmoid_backward");
  AtenBackward<Hardswish>::install(m, "hardswish_backward");
  AtenLogsigmoidBackward::install(m, "log_sigmoid_backward");
});

// PyTorch's autocast runs softplus in float32 on CUDA.
TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  m.impl("softplus", [](const Tensor& input, double beta, double threshold) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    const Tensor x = at::autocast::cached_cast(at::kFloat, input, c10::DeviceType::CUDA);
    return call(ActivationOps<definitions::Softplus>::Forward(x, beta, threshold));
  });
}

}  // namespace
}  // namespace gradnorm_kernels::activation
