// PyTorch's ops of linear pieces under the switch: their backward is linear in the gradient, and of the input
// takes only which piece it is in. PyTorch gives the input zeros, which are written, and added to what comes
// from elsewhere.
#include <algorithm>
#include <limits>

#include "op.h"

namespace gradnorm_kernels::piecewise_linear {
namespace {

// The first of two tensors, as a function of both.
struct OfBoth {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    return {grads[0], needs[1] && is_zero_asked_for(1) ? at::zeros_like(saved[0]) : Tensor()};
  }
};

// On a node of PyTorch's own that a module of fuse made: what its backward calls is ours, switch or not.
struct Mark : torch::autograd::FunctionPreHook {
  variable_list operator()(const variable_list& grads) override {
    return grads;
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
};

bool is_in_marked_node() {
  const auto node = torch::autograd::get_current_node();
  return node && std::ranges::any_of(node->pre_hooks(), [](const auto& hook) {
           return dynamic_cast<const Mark*>(hook.get()) != nullptr;
         });
}

struct AtenBackward : BoxedOverride<AtenBackward> {
  static bool is_on() {
    return is_fused_double_backward_enabled() || is_in_marked_node();
  }
  static void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const AtenArguments arguments(op, *stack);
    const Tensor input = arguments.tensor({"self"});
    const Tensor grad_output = arguments.tensor({"grad_output", "grad_out"});
    if (!torch::autograd::compute_requires_grad(input) || needs_composite(input, grad_output)) {
      return stock(op, keys, stack);
    }
    const auto first = stack->size() - arguments.values.size();
    (*stack)[first + *arguments.schema.argumentIndexWithName("self")] = input.detach();
    stock(op, keys, stack);
    const Tensor grad_input = torch::jit::pop(*stack).toTensor();
    stack->emplace_back(record<OfBoth>({grad_input, input}, {}, [&](variable_list& saved) {
      saved = {input.detach()};
      return variable_list{grad_input.detach()};
    })[0]);
  }
};

// The backward (g or w g, 0 or x g) of PReLU, where x >= 0 and where it is negative. With the gradients v and
// u of these:
//     g: v or w v + u x,    x: 0 or u g,    w: 0 or v g.
struct OfPreluBackward {
  using Settings = std::tuple<>;
  static constexpr auto kInfinity = std::numeric_limits<double>::infinity();

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    const Tensor &v = grads[0], &u = grads[1], &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    // Of an operand that is 0 or `with` g.
    const auto where_negative = [&](const Tensor& with) {
      return at::hardtanh_backward(with * grad_output, input.detach(), -kInfinity, 0);
    };
    Tensor of_grad_output;
    if (needs[0] && v.defined()) {
      of_grad_output = std::get<0>(at::_prelu_kernel_backward(v, input, weight));
    }
    if (needs[0] && u.defined()) {
      const Tensor of_weight = std::get<1>(at::_prelu_kernel_backward(u, input, weight));
      of_grad_output = of_grad_output.defined() ? of_grad_output + of_weight : of_weight;
    }
    Tensor of_input;
    if (needs[1] && u.defined()) {
      of_input = where_negative(u);
    } else if (needs[1] && is_zero_asked_for(1)) {
      of_input = at::zeros_like(input);
    }
    return {of_grad_output, of_input, needs[2] && v.defined() ? where_negative(v) : Tensor()};
  }
};

struct AtenPreluBackward : Override<AtenPreluBackward> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& weight) {
    if (!torch::autograd::compute_requires_grad(grad_output, self, weight) ||
        needs_composite(grad_output, self, weight)) {
      return stock(keys, grad_output, self, weight);
    }
    return to_tuple<2>(record<OfPreluBackward>({grad_output, self, weight}, {}, [&](variable_list& saved) {
      saved = {grad_output, self, weight};
      return to_list(at::_prelu_kernel_backward(grad_output, self, weight));
    }));
  }
};

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def("mark_piecewise_linear(Tensor output) -> ()", [](const Tensor& output) {
    if (const auto& node = output.grad_fn()) {
      node->add_pre_hook(std::make_unique<Mark>());
    }
  });
}

const StockOverride override_aten([](AtenAutograd& aten) {
  for (const auto* name :
       {"_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
        "adaptive_max_pool3d_backward", "avg_pool2d_backward", "avg_pool3d_backward", "hardshrink_backward",
        "hardtanh_backward", "leaky_relu_backward", "max_pool2d_with_indices_backward",
        "max_pool3d_with_indices_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
        "reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward",
        "replication_pad3d_backward", "softshrink_backward", "threshold_backward"}) {
    AtenBackward::install(aten, name);
  }
  AtenPreluBackward::install(aten, "_prelu_kernel_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::piecewise_linear
