// Activations: schemas, autograd Functions, and the CPU, meta and composite implementations of their ops.
#include "activation.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "common.h"
#include "cpu/activation.h"

namespace gradnorm_kernels::activation {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TensorPair = std::tuple<Tensor, Tensor>;

template <class Definition, class Make = decltype(&Definition::make)>
struct ActivationOps;

// The dispatcher ops of one activation, at every key. Definition gives the activation's name, the schema of
// its parameters, what they make (or an error that names the bad one), f in ATen's ops, and ATen's backward.
template <class Definition, class Act, class... Params>
struct ActivationOps<Definition, Act (*)(Params...)> {
  using Saved =
      std::tuple<std::conditional_t<std::is_same_v<Params, std::string_view>, std::string, Params>...>;
  static constexpr bool is_curved = has_d2f<Act>;
  // What the backward and the double backward take, and the forward saves: input for short.
  static constexpr bool saves_output = !has_f<Act>;
  static constexpr auto saved_name = saves_output ? "output" : "input";

  static std::string name(const char* suffix) {
    return std::string(Definition::name) + suffix;
  }
  template <class Signature>
  static auto find(const char* suffix) {
    return find_op<Signature>("gradnorm_kernels::" + name(suffix));
  }
  static Tensor call_forward(const Tensor& input, Params... params) {
    static const auto op = find<Tensor(const Tensor&, Params...)>("");
    return op.call(input, params...);
  }
  static Tensor call_backward(const Tensor& grad_output, const Tensor& input, Params... params) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, Params...)>("_backward");
    return op.call(grad_output, input, params...);
  }
  static TensorPair call_double_backward(
      const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
    static const auto op =
        find<TensorPair(const Tensor&, const Tensor&, const Tensor&, Params...)>("_double_backward");
    return op.call(grad_grad_input, grad_output, input, params...);
  }

  static bool is_covered(const Tensor& input) {
    return is_elementwise_match(input, input);
  }
  static void check(const Tensor& input) {
    check_elementwise(Definition::name, "", {{"input", input}});
  }
  static void check(const Tensor& grad_output, const Tensor& input) {
    check_elementwise(Definition::name, "_backward", {{saved_name, input}, {"grad_output", grad_output}});
  }
  static void check(const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input) {
    check_elementwise(
        Definition::name, "_double_backward",
        {{saved_name, input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
  }

  // Plain ATen ops, differentiable to any order: for torch.func, compilers, the third order, and devices
  // without a kernel of ours.
  struct Composite {
    // Takes whatever PyTorch does: integers, complex numbers and other layouts, too, for some activations.
    static Tensor forward(const Tensor& input, Params... params) {
      Definition::make(params...);
      try {
        return Definition::composite(input, params...);
      } catch (const c10::Error&) {
        check(input);
        throw;
      }
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_output, input);
      return df(grad_output, input, params...);
    }
    static TensorPair double_backward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_grad_input, grad_output, input);
      const Tensor v = to_opmath(grad_grad_input), g = to_opmath(grad_output), x = to_opmath(input);
      const Tensor grad_input =
          visit([&](const auto& act) { return act.d2f(v, g, x); }, Definition::make(params...));
      return {df(grad_grad_input, input, params...), grad_input.to(input.scalar_type())};
    }

   private:
    static Tensor df(const Tensor& grad_output, const Tensor& input, Params... params) {
      const Tensor g = to_opmath(grad_output), x = to_opmath(input);
      return visit([&](const auto& act) { return act.df(g, x); }, Definition::make(params...))
          .to(input.scalar_type());
    }
  };

  struct Cpu {
    static Tensor forward(const Tensor& input, Params... params) {
      if constexpr (saves_output) {
        return Composite::forward(input, params...);
      } else {
        if (!is_covered(input)) {
          return Composite::forward(input, params...);
        }
        auto iter = at::TensorIteratorConfig().add_owned_output(Tensor()).add_const_input(input).build();
        GRADNORM_KERNELS(activation_kernels).forward(iter, any(Definition::make(params...)));
        return iter.output();
      }
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_output, input);
      auto iter = at::TensorIteratorConfig()
                      .add_owned_output(Tensor())
                      .add_const_input(grad_output)
                      .add_const_input(input)
                      .build();
      GRADNORM_KERNELS(activation_kernels).backward(iter, any(Definition::make(params...)));
      return iter.output();
    }
    static TensorPair double_backward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_grad_input, grad_output, input);
      auto iter = at::TensorIteratorConfig()
                      .add_owned_output(Tensor())
                      .add_owned_output(Tensor())
                      .add_const_input(grad_grad_input)
                      .add_const_input(grad_output)
                      .add_const_input(input)
                      .build();
      GRADNORM_KERNELS(activation_kernels).double_backward(iter, any(Definition::make(params...)));
      return {iter.output(0), iter.output(1)};
    }
  };

  // An ATen op of as many operands lays its output out as ours do: by TensorIterator's rule.
  struct Meta {
    static Tensor forward(const Tensor& input, Params... params) {
      Definition::make(params...);
      return is_covered(input) ? at::neg(input) : Composite::forward(input, params...);
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_output, input);
      Definition::make(params...);
      return at::mul(grad_output, input);
    }
    static TensorPair double_backward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_grad_input, grad_output, input);
      Definition::make(params...);
      const Tensor grad_input = at::addcmul(grad_grad_input, grad_output, input);
      return {at::empty_like(grad_input), grad_input};
    }
  };

  struct Autograd {
    static Tensor forward(const Tensor& input, Params... params) {
      if (needs_composite({input}) || !is_covered(input)) {
        return Composite::forward(input, params...);
      }
      return record_forward<&call_forward, &call_backward>(input, params...);
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      if (needs_composite({grad_output, input})) {
        return Composite::backward(grad_output, input, params...);
      }
      return record_backward<&call_backward, &call_backward>(grad_output, input, params...);
    }
    static TensorPair double_backward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
      if (needs_composite({grad_grad_input, grad_output, input}) ||
          torch::autograd::compute_requires_grad(grad_grad_input, grad_output, input)) {
        return Composite::double_backward(grad_grad_input, grad_output, input, params...);
      }
      at::AutoDispatchBelowADInplaceOrView guard;
      return call_double_backward(grad_grad_input, grad_output, input, params...);
    }
  };

  // PyTorch's own values, recorded with a fused double backward.
  struct Switched {
    static Tensor forward(const Tensor& input, Params... params) {
      return record_forward<&Definition::composite, &backward>(input, params...);
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      if (needs_composite({grad_output, input})) {
        return Composite::backward(grad_output, input, params...);
      }
      return record_backward<&Definition::aten_backward, &backward>(grad_output, input, params...);
    }
  };

  static void define(torch::Library& m) {
    const auto schema = [&](const char* suffix, std::string tensors, const char* returns) {
      m.def((name(suffix) + "(" + tensors + Definition::params + ") -> " + returns).c_str());
    };
    const std::string saved = saved_name;
    schema("", "Tensor input", "Tensor");
    schema("_backward", "Tensor grad_output, Tensor " + saved, "Tensor");
    if constexpr (is_curved) {
      schema(
          "_double_backward", "Tensor grad_grad_input, Tensor grad_output, Tensor " + saved,
          saves_output ? "(Tensor grad_grad_output, Tensor grad_of_output)"
                       : "(Tensor grad_grad_output, Tensor grad_input)");
    }
  }

  template <class Kernels>
  static void implement(torch::Library& m, Kernels) {
    m.impl(name("").c_str(), &Kernels::forward);
    m.impl(name("_backward").c_str(), &Kernels::backward);
    if constexpr (is_curved) {
      m.impl(name("_double_backward").c_str(), &Kernels::double_backward);
    }
  }

  // What of the CUDA key is not a Triton kernel.
  static void implement_cuda(torch::Library& m) {
    if constexpr (saves_output) {
      m.impl(name("").c_str(), &Composite::forward);
    }
  }

 private:
  using ForwardOp = Tensor (*)(const Tensor&, Params...);
  using BackwardOp = Tensor (*)(const Tensor&, const Tensor&, Params...);

  // value computes the result, and backward is differentiated with respect to both of its tensors.
  template <ForwardOp value, BackwardOp backward>
  static Tensor record_forward(const Tensor& input, Params... params) {
    if (!torch::autograd::compute_requires_grad(input)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return value(input, params...);
    }
    return Forward<value, backward>::apply(input, Saved(params...));
  }
  template <BackwardOp value, BackwardOp backward>
  static Tensor record_backward(const Tensor& grad_output, const Tensor& input, Params... params) {
    if (!torch::autograd::compute_requires_grad(grad_output, input)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return value(grad_output, input, params...);
    }
    return Backward<value, backward>::apply(grad_output, input, Saved(params...));
  }

  static Saved saved(AutogradContext* ctx) {
    return ctx->saved_data["params"].to<Saved>();
  }

  template <ForwardOp value, BackwardOp backward_op>
  struct Forward : torch::autograd::Function<Forward<value, backward_op>> {
    static Tensor forward(AutogradContext* ctx, const Tensor& input, const Saved& params) {
      ctx->saved_data["params"] = params;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      Tensor output = std::apply([&](const auto&... p) { return value(input, p...); }, params);
      ctx->save_for_backward({saves_output ? output : input});
      return output;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
      if (!grad_outputs[0].defined()) {
        return {Tensor(), Tensor()};
      }
      const auto input = ctx->get_saved_variables()[0];
      return {
          std::apply([&](const auto&... p) { return backward_op(grad_outputs[0], input, p...); }, saved(ctx)),
          Tensor()};
    }
  };

  template <BackwardOp value, BackwardOp backward_op>
  struct Backward : torch::autograd::Function<Backward<value, backward_op>> {
    static Tensor forward(
        AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Saved& params) {
      ctx->save_for_backward({grad_output, input});
      ctx->saved_data["params"] = params;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::apply([&](const auto&... p) { return value(grad_output, input, p...); }, params);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      const Tensor& grad_grad_input = grads[0];
      if (!grad_grad_input.defined()) {
        return {Tensor(), Tensor(), Tensor()};
      }
      const auto variables = ctx->get_saved_variables();
      const Tensor& grad_output = variables[0];
      const Tensor& input = variables[1];
      return std::apply(
          [&](const auto&... p) -> variable_list {
            if constexpr (is_curved) {
              // Where only the input needs a gradient, the other one is still written: one tensor in five.
              if (ctx->needs_input_grad(1)) {
                auto [grad_grad_output, grad_input] =
                    call_double_backward(grad_grad_input, grad_output, input, p...);
                return {grad_grad_output, grad_input, Tensor()};
              }
            }
            if (!ctx->needs_input_grad(0)) {
              return {Tensor(), Tensor(), Tensor()};
            }
            return {backward_op(grad_grad_input, input, p...), Tensor(), Tensor()};
          },
          saved(ctx));
    }
  };

  // fn of the activation itself, where there are several.
  template <class Fn>
  static Tensor visit(const Fn& fn, const Act& act) {
    if constexpr (std::is_same_v<Act, gradnorm_kernels::Gelu>) {
      return std::visit(fn, act);
    } else {
      return fn(act);
    }
  }
  static Activation any(const Act& act) {
    if constexpr (std::is_same_v<Act, gradnorm_kernels::Gelu>) {
      return std::visit([](const auto& mode) -> Activation { return mode; }, act);
    } else {
      return act;
    }
  }
};

// What ActivationOps needs to know of each. composite is f in ATen's ops, where PyTorch differentiates them
// to any order; aten_backward is for the switch alone.
namespace definitions {

template <class Act>
struct WithoutParams {
  static constexpr auto params = "";
  static Act make() {
    return {};
  }
};

struct Gelu {
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
  static Tensor composite(const Tensor& input, std::string_view approximate) {
    return at::gelu(input, approximate);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input, std::string_view approximate) {
    return at::gelu_backward(grad_output, input, approximate);
  }
};

struct Silu : WithoutParams<gradnorm_kernels::Silu> {
  static constexpr auto name = "silu";
  static Tensor composite(const Tensor& input) {
    return at::silu(input);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input) {
    return at::silu_backward(grad_output, input);
  }
};

struct Mish : WithoutParams<gradnorm_kernels::Mish> {
  static constexpr auto name = "mish";
  static Tensor composite(const Tensor& input) {
    return at::mish(input);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input) {
    return at::mish_backward(grad_output, input);
  }
};

struct Softplus {
  static constexpr auto name = "softplus";
  static constexpr auto params = ", *, float beta=1.0, float threshold=20.0";

  static gradnorm_kernels::Softplus make(double beta, double threshold) {
    return {beta, threshold};
  }
  static Tensor composite(const Tensor& input, double beta, double threshold) {
    return at::softplus(input, beta, threshold);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input, double beta, double threshold) {
    return at::softplus_backward(grad_output, input, beta, threshold);
  }
};

struct Elu {
  static constexpr auto name = "elu";
  static constexpr auto params = ", *, float alpha=1.0, float scale=1.0, float input_scale=1.0";

  static gradnorm_kernels::Elu make(double alpha, double scale, double input_scale) {
    TORCH_CHECK_VALUE(input_scale >= 0, "elu: expected input_scale to be 0 or more, got ", input_scale);
    return {alpha, scale, input_scale};
  }
  static Tensor composite(const Tensor& input, double alpha, double scale, double input_scale) {
    return at::elu(input, alpha, scale, input_scale);
  }
  static Tensor aten_backward(
      const Tensor& grad_output, const Tensor& input, double alpha, double scale, double input_scale) {
    return at::elu_backward(grad_output, alpha, scale, input_scale, /*is_result=*/false, input);
  }
};

struct Tanh : WithoutParams<gradnorm_kernels::Tanh> {
  static constexpr auto name = "tanh";
  static Tensor composite(const Tensor& input) {
    return at::tanh(input);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& output) {
    return at::tanh_backward(grad_output, output);
  }
};

struct Sigmoid : WithoutParams<gradnorm_kernels::Sigmoid> {
  static constexpr auto name = "sigmoid";
  static Tensor composite(const Tensor& input) {
    return at::sigmoid(input);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& output) {
    return at::sigmoid_backward(grad_output, output);
  }
};

struct Relu : WithoutParams<gradnorm_kernels::Relu> {
  static constexpr auto name = "relu";
  static Tensor composite(const Tensor& input) {
    return at::relu(input);
  }
};

struct Relu6 : WithoutParams<gradnorm_kernels::Relu6> {
  static constexpr auto name = "relu6";
  static Tensor composite(const Tensor& input) {
    return at::relu6(input);
  }
};

struct LeakyRelu {
  static constexpr auto name = "leaky_relu";
  static constexpr auto params = ", *, float negative_slope=0.01";

  static gradnorm_kernels::LeakyRelu make(double negative_slope) {
    return {negative_slope};
  }
  static Tensor composite(const Tensor& input, double negative_slope) {
    return at::leaky_relu(input, negative_slope);
  }
};

struct Hardsigmoid : WithoutParams<gradnorm_kernels::Hardsigmoid> {
  static constexpr auto name = "hardsigmoid";
  static Tensor composite(const Tensor& input) {
    if (input.is_nested() || !is_elementwise_match(input, input)) {
      return at::hardsigmoid(input);
    }
    // PyTorch's own has no second derivative.
    return make().f(to_opmath(input)).to(input.scalar_type());
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input) {
    return at::hardsigmoid_backward(grad_output, input);
  }
};

struct Hardswish : WithoutParams<gradnorm_kernels::Hardswish> {
  static constexpr auto name = "hardswish";
  static Tensor composite(const Tensor& input) {
    return at::hardswish(input);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input) {
    return at::hardswish_backward(grad_output, input);
  }
};

template <class Visitor>
void for_each(const Visitor& visit) {
  visit(ActivationOps<Gelu>());
  visit(ActivationOps<Silu>());
  visit(ActivationOps<Mish>());
  visit(ActivationOps<Softplus>());
  visit(ActivationOps<Elu>());
  visit(ActivationOps<Tanh>());
  visit(ActivationOps<Sigmoid>());
  visit(ActivationOps<Relu>());
  visit(ActivationOps<Relu6>());
  visit(ActivationOps<LeakyRelu>());
  visit(ActivationOps<Hardsigmoid>());
  visit(ActivationOps<Hardswish>());
}

}  // namespace definitions

// PyTorch's own ops under the switch. Whatever ours does not cover stays with the stock kernel.

bool is_covered(const Tensor& a, const Tensor& b) {
  return !needs_composite({a, b}) && is_elementwise_match(a, b);
}

std::string unscalar(std::string_view value) {
  return std::string(value);
}
double unscalar(const at::Scalar& value) {
  return value.toDouble();
}

// An op of the signature (Tensor self), which PyTorch decomposes when its backward is to be differentiated.
template <class Definition>
struct AtenForward {
  static inline std::optional<StockKernel> stock;

  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self) {
    if (!is_covered(self, self)) {
      return stock->call<Tensor>(keys, self);
    }
    return ActivationOps<Definition>::Switched::forward(self);
  }
};

// An op of the signature (Tensor grad_output, Tensor self or output, Params...).
template <class Definition, class... Params>
struct AtenBackward {
  static inline std::optional<StockKernel> stock;

  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& operand, Params... params) {
    if (!is_covered(grad_output, operand)) {
      return stock->call<Tensor>(keys, grad_output, operand, params...);
    }
    return ActivationOps<Definition>::Switched::backward(grad_output, operand, unscalar(params)...);
  }
};

struct AtenEluBackward {
  static inline std::optional<StockKernel> stock;

  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const at::Scalar& alpha, const at::Scalar& scale,
      const at::Scalar& input_scale, bool is_result, const Tensor& self_or_result) {
    // is_result: elu_ saves its result, from which ours does not compute.
    if (is_result || input_scale.toDouble() < 0 || !is_covered(grad_output, self_or_result)) {
      return stock->call<Tensor>(keys, grad_output, alpha, scale, input_scale, is_result, self_or_result);
    }
    return ActivationOps<definitions::Elu>::Switched::backward(
        grad_output, self_or_result, alpha.toDouble(), scale.toDouble(), input_scale.toDouble());
  }
};

template <class Override>
void replace(torch::Library& aten_autograd, const char* op) {
  if (!Override::stock) {
    Override::stock.emplace((std::string("aten::") + op).c_str());
  }
  aten_autograd.impl(op, &Override::autograd);
}

// Not relu, relu6 and leaky_relu: of their double backward, PyTorch's own is one kernel, and zeros.
const StockOverride override_aten([](torch::Library& m) {
  using namespace definitions;
  replace<AtenForward<Silu>>(m, "silu");
  replace<AtenForward<Mish>>(m, "mish");
  replace<AtenBackward<Gelu, std::string_view>>(m, "gelu_backward");
  replace<AtenBackward<Silu>>(m, "silu_backward");
  replace<AtenBackward<Mish>>(m, "mish_backward");
  replace<AtenBackward<Softplus, const at::Scalar&, const at::Scalar&>>(m, "softplus_backward");
  replace<AtenEluBackward>(m, "elu_backward");
  replace<AtenBackward<Tanh>>(m, "tanh_backward");
  replace<AtenBackward<Sigmoid>>(m, "sigmoid_backward");
  replace<AtenBackward<Hardsigmoid>>(m, "hardsigmoid_backward");
  replace<AtenBackward<Hardswish>>(m, "hardswish_backward");
});

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  definitions::for_each([&](auto ops) { ops.define(m); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  definitions::for_each([&](auto ops) { ops.implement(m, typename decltype(ops)::Cpu()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CUDA, m) {
  definitions::for_each([&](auto ops) { ops.implement_cuda(m); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  definitions::for_each([&](auto ops) { ops.implement(m, typename decltype(ops)::Meta()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  definitions::for_each([&](auto ops) { ops.implement(m, typename decltype(ops)::Autograd()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  definitions::for_each([&](auto ops) { ops.implement(m, typename decltype(ops)::Composite()); });
}

// Devices without a kernel of ours.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  definitions::for_each([&](auto ops) { ops.implement(m, typename decltype(ops)::Composite()); });
}

// PyTorch's autocast runs softplus in float32 on CUDA.
TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  m.impl("softplus", [](const Tensor& input, double beta, double threshold) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return ActivationOps<definitions::Softplus>::call_forward(
        at::autocast::cached_cast(at::kFloat, input, c10::DeviceType::CUDA), beta, threshold);
  });
}

}  // namespace
}  // namespace gradnorm_kernels::activation
