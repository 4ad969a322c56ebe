// Activations: schemas, autograd Functions, and the CPU, meta and composite implementations of their ops.
#include "activation.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>
#include <string_view>
#include <tuple>

#include "common.h"
#include "cpu/activation.h"

namespace gradnorm_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TensorPair = std::tuple<Tensor, Tensor>;

template <class Definition, class Make = decltype(&Definition::make)>
struct ActivationOps;

// The three dispatcher ops of one activation, at every key. Definition gives the activation's name, the
// schema of its parameters, the Activation they make (or an error that names the bad one), and ATen's own
// forward and backward.
template <class Definition, class... Params>
struct ActivationOps<Definition, Activation (*)(Params...)> {
  using Saved =
      std::tuple<std::conditional_t<std::is_same_v<Params, std::string_view>, std::string, Params>...>;

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

  static void check(const Tensor& input) {
    check_elementwise(Definition::name, "", {{"input", input}});
  }
  static void check(const Tensor& grad_output, const Tensor& input) {
    check_elementwise(Definition::name, "_backward", {{"input", input}, {"grad_output", grad_output}});
  }
  static void check(const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input) {
    check_elementwise(
        Definition::name, "_double_backward",
        {{"input", input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
  }

  // Plain ATen ops, differentiable to any order: for torch.func, compilers, the third order, and devices
  // without a kernel of ours.
  struct Composite {
    static Tensor forward(const Tensor& input, Params... params) {
      check(input);
      Definition::make(params...);
      return Definition::aten_forward(input, params...);
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_output, input);
      Definition::make(params...);
      return Definition::aten_backward(grad_output, input, params...);
    }
    static TensorPair double_backward(
        const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_grad_input, grad_output, input);
      const Tensor x = to_opmath(input);
      const Tensor curvature =
          std::visit([&](const auto& act) { return act.d2f(x); }, Definition::make(params...));
      return {
          Definition::aten_backward(grad_grad_input, input, params...),
          (grad_grad_input * curvature * grad_output).to(input.scalar_type())};
    }
  };

  struct Cpu {
    static Tensor forward(const Tensor& input, Params... params) {
      check(input);
      auto iter = at::TensorIteratorConfig().add_owned_output(Tensor()).add_const_input(input).build();
      GRADNORM_KERNELS(activation_kernels).forward(iter, Definition::make(params...));
      return iter.output();
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      check(grad_output, input);
      auto iter = at::TensorIteratorConfig()
                      .add_owned_output(Tensor())
                      .add_const_input(grad_output)
                      .add_const_input(input)
                      .build();
      GRADNORM_KERNELS(activation_kernels).backward(iter, Definition::make(params...));
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
      GRADNORM_KERNELS(activation_kernels).double_backward(iter, Definition::make(params...));
      return {iter.output(0), iter.output(1)};
    }
  };

  // An ATen op of as many operands lays its output out as ours do: by TensorIterator's rule.
  struct Meta {
    static Tensor forward(const Tensor& input, Params... params) {
      check(input);
      Definition::make(params...);
      return at::neg(input);
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
      if (needs_composite({input})) {
        return Composite::forward(input, params...);
      }
      if (!torch::autograd::compute_requires_grad(input)) {
        at::AutoDispatchBelowADInplaceOrView guard;
        return call_forward(input, params...);
      }
      return Forward::apply(input, Saved(params...));
    }
    static Tensor backward(const Tensor& grad_output, const Tensor& input, Params... params) {
      if (needs_composite({grad_output, input})) {
        return Composite::backward(grad_output, input, params...);
      }
      if (!torch::autograd::compute_requires_grad(grad_output, input)) {
        at::AutoDispatchBelowADInplaceOrView guard;
        return call_backward(grad_output, input, params...);
      }
      return Backward::apply(grad_output, input, Saved(params...), &call_backward);
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

  static Saved saved(AutogradContext* ctx) {
    return ctx->saved_data["params"].to<Saved>();
  }

  struct Forward : torch::autograd::Function<Forward> {
    static Tensor forward(AutogradContext* ctx, const Tensor& input, const Saved& params) {
      ctx->save_for_backward({input});
      ctx->saved_data["params"] = params;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::apply([&](const auto&... p) { return call_forward(input, p...); }, params);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
      if (!grad_outputs[0].defined()) {
        return {Tensor(), Tensor()};
      }
      const auto input = ctx->get_saved_variables()[0];
      return {
          std::apply(
              [&](const auto&... p) { return call_backward(grad_outputs[0], input, p...); }, saved(ctx)),
          Tensor()};
    }
  };

  // first computes the value: our own kernel, or PyTorch's where only its double backward is replaced.
  struct Backward : torch::autograd::Function<Backward> {
    using First = Tensor (*)(const Tensor&, const Tensor&, Params...);

    static Tensor forward(
        AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Saved& params,
        First first) {
      ctx->save_for_backward({grad_output, input});
      ctx->saved_data["params"] = params;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::apply([&](const auto&... p) { return first(grad_output, input, p...); }, params);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      const Tensor& grad_grad_input = grads[0];
      if (!grad_grad_input.defined()) {
        return {Tensor(), Tensor(), Tensor(), Tensor()};
      }
      const auto variables = ctx->get_saved_variables();
      const Tensor& grad_output = variables[0];
      const Tensor& input = variables[1];
      return std::apply(
          [&](const auto&... p) -> variable_list {
            // Where only the input needs a gradient, the other one is still written: one tensor in five.
            if (!ctx->needs_input_grad(1)) {
              return {call_backward(grad_grad_input, input, p...), Tensor(), Tensor(), Tensor()};
            }
            auto [grad_grad_output, grad_input] =
                call_double_backward(grad_grad_input, grad_output, input, p...);
            return {grad_grad_output, grad_input, Tensor(), Tensor()};
          },
          saved(ctx));
    }
  };

  static void define(torch::Library& m) {
    const auto schema = [&](const char* suffix, const char* tensors, const char* returns) {
      m.def((name(suffix) + "(" + tensors + Definition::params + ") -> " + returns).c_str());
    };
    schema("", "Tensor input", "Tensor");
    schema("_backward", "Tensor grad_output, Tensor input", "Tensor");
    schema(
        "_double_backward", "Tensor grad_grad_input, Tensor grad_output, Tensor input",
        "(Tensor grad_grad_output, Tensor grad_input)");
  }

  template <class Kernels>
  static void implement(torch::Library& m, Kernels) {
    m.impl(name("").c_str(), &Kernels::forward);
    m.impl(name("_backward").c_str(), &Kernels::backward);
    m.impl(name("_double_backward").c_str(), &Kernels::double_backward);
  }
};

struct Gelu {
  static constexpr auto name = "gelu";
  static constexpr auto params = ", *, str approximate='none'";

  static Activation make(std::string_view approximate) {
    if (approximate == "none") {
      return GeluErf{};
    }
    TORCH_CHECK_VALUE(
        approximate == "tanh", "gelu: expected approximate to be 'none' or 'tanh', got '", approximate, "'");
    return GeluTanh{};
  }
  static Tensor aten_forward(const Tensor& input, std::string_view approximate) {
    return at::gelu(input, approximate);
  }
  static Tensor aten_backward(const Tensor& grad_output, const Tensor& input, std::string_view approximate) {
    return at::gelu_backward(grad_output, input, approximate);
  }
};

// aten::gelu_backward whose own backward is fused. Whatever ours does not cover stays PyTorch's.
struct AtenGeluBackward {
  static StockKernel& stock() {
    static StockKernel kernel("aten::gelu_backward");
    return kernel;
  }

  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, std::string_view approximate) {
    if (needs_composite({grad_output, self}) || !is_elementwise_match(grad_output, self)) {
      return stock().call<Tensor>(keys, grad_output, self, std::string(approximate));
    }
    if (!torch::autograd::compute_requires_grad(grad_output, self)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return at::gelu_backward(grad_output, self, approximate);
    }
    using Ops = ActivationOps<Gelu>;
    return Ops::Backward::apply(grad_output, self, Ops::Saved(approximate), &at::gelu_backward);
  }

  static void install(torch::Library& aten_autograd) {
    stock();
    aten_autograd.impl("gelu_backward", &autograd);
  }
};

const StockOverride gelu_override(&AtenGeluBackward::install);

template <class Visitor>
void for_each_activation(const Visitor& visit) {
  visit(ActivationOps<Gelu>());
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  for_each_activation([&](auto ops) { ops.define(m); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  for_each_activation([&](auto ops) { ops.implement(m, typename decltype(ops)::Cpu()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  for_each_activation([&](auto ops) { ops.implement(m, typename decltype(ops)::Meta()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  for_each_activation([&](auto ops) { ops.implement(m, typename decltype(ops)::Autograd()); });
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  for_each_activation([&](auto ops) { ops.implement(m, typename decltype(ops)::Composite()); });
}

// Devices without a kernel of ours.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  for_each_activation([&](auto ops) { ops.implement(m, typename decltype(ops)::Composite()); });
}

}  // namespace
}  // namespace gradnorm_kernels
