// Softmax, with or without a bias added to its input: schemas, autograd Functions, the CPU, meta and
// composite implementations of its ops, and the override of PyTorch's own.
//
// y = softmax(x) has the gradient h = y (g - sum(g y)). With v the gradient of h and the sums along dim,
// everything about h is local to a row of v, g and y.
#include "cpu/softmax.h"

#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <optional>
#include <tuple>

#include "common.h"

namespace gradnorm_kernels::softmax {
namespace {

using at::ScalarType;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TensorPair = std::tuple<Tensor, Tensor>;

constexpr auto kName = "softmax";

template <class Signature>
auto find(const char* suffix) {
  return find_op<Signature>(std::string("gradnorm_kernels::") + kName + suffix);
}
Tensor call_forward(const Tensor& input, int64_t dim, std::optional<ScalarType> dtype) {
  static const auto op = find<Tensor(const Tensor&, int64_t, std::optional<ScalarType>)>("");
  return op.call(input, dim, dtype);
}
Tensor call_with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, std::optional<ScalarType>)>("_with_bias");
  return op.call(input, bias, dtype);
}
Tensor call_backward(const Tensor& grad_output, const Tensor& output, int64_t dim, ScalarType input_dtype) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, ScalarType)>("_backward");
  return op.call(grad_output, output, dim, input_dtype);
}
TensorPair call_double_backward(
    const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim,
    bool to_input) {
  static const auto op =
      find<TensorPair(const Tensor&, const Tensor&, const Tensor&, int64_t, bool)>("_double_backward");
  return op.call(grad_grad_input, grad_output, output, dim, to_input);
}

void check(const Tensor& input) {
  check_elementwise(kName, "", {{"input", input}});
}
void check(const Tensor& grad_output, const Tensor& output) {
  check_elementwise(kName, "_backward", {{"output", output}, {"grad_output", grad_output}});
}
// grad_grad_input has the dtype of the input, which may be narrower than the output's.
void check(const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output) {
  constexpr auto suffix = "_double_backward";
  check_elementwise(kName, suffix, {{"output", output}, {"grad_output", grad_output}});
  check_floating(kName, suffix, {{"output", output}, {"grad_grad_input", grad_grad_input}}, false);
  TORCH_CHECK_VALUE(
      grad_grad_input.sym_sizes() == output.sym_sizes(), kName, suffix,
      ": expected grad_grad_input to have the shape of output (", output.sym_sizes(), "), got ",
      grad_grad_input.sym_sizes());
}

// The dtype of softmax_with_bias's result.
ScalarType check_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
  constexpr auto suffix = "_with_bias";
  check_floating(kName, suffix, {{"input", input}, {"bias", bias}}, false);
  TORCH_CHECK_VALUE(
      input.dim() > 0 && at::is_expandable_to(bias.sym_sizes(), input.sym_sizes()), kName, suffix,
      ": expected bias to broadcast to input's shape (", input.sym_sizes(), "), got ", bias.sym_sizes());
  return dtype.value_or(at::promote_types(input.scalar_type(), bias.scalar_type()));
}

// input in the dtype that is asked for, unless ATen's kernel converts it as it reads it.
Tensor to_dtype(const Tensor& input, std::optional<ScalarType> dtype) {
  const bool kernel_converts = input.is_cuda() && input.scalar_type() == at::kHalf && dtype == at::kFloat;
  return dtype.has_value() && !kernel_converts ? input.to(*dtype) : input;
}

// Plain ATen ops, differentiable to any order: for torch.func, compilers, the third order, and devices
// without a kernel of ours.
struct Composite {
  static Tensor forward(const Tensor& input, int64_t dim, std::optional<ScalarType> dtype) {
    const Tensor x = to_dtype(input, dtype);
    check(x);
    return softmax_by_parts(to_opmath(x), dim).to(x.scalar_type());
  }
  static Tensor with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
    const auto result = check_bias(input, bias, dtype);
    const auto arithmetic = at::toOpMathType(result);
    return softmax_by_parts(input.to(arithmetic) + bias.to(arithmetic), -1).to(result);
  }
  static Tensor backward(
      const Tensor& grad_output, const Tensor& output, int64_t dim, ScalarType input_dtype) {
    check(grad_output, output);
    return at::_softmax_backward_data(grad_output, output, dim, input_dtype);
  }
  static TensorPair double_backward(
      const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim,
      bool to_input) {
    check(grad_grad_input, grad_output, output);
    const Tensor y = to_opmath(output);
    const Tensor v = grad_grad_input.to(y.scalar_type()), g = to_opmath(grad_output);
    const auto mean = [&](const Tensor& t) { return (t * y).sum(dim, /*keepdim=*/true); };
    const Tensor v_mean = mean(v), v_centred = v - v_mean, g_centred = g - mean(g);
    const Tensor grad_grad_output = (y * v_centred).to(output.scalar_type());
    if (!to_input) {
      return {grad_grad_output, (v * g_centred - v_mean * g).to(output.scalar_type())};
    }
    const Tensor product = v_centred * g_centred;
    return {grad_grad_output, (y * (product - mean(product))).to(grad_grad_input.scalar_type())};
  }
};

struct Cpu {
  static Tensor forward(const Tensor& input, int64_t dim, std::optional<ScalarType> dtype) {
    const Tensor x = to_dtype(input, dtype);
    check(x);
    if (at::maybe_wrap_dim(dim, x.dim()) < x.dim() - 1) {
      return at::_softmax(x, dim, /*half_to_float=*/false);
    }
    const Tensor output = empty_output(x);
    GRADNORM_KERNELS(softmax_kernels).forward(output, x.contiguous(), Tensor());
    return output;
  }
  static Tensor with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
    const auto result = check_bias(input, bias, dtype);
    const Tensor x = input.to(result).contiguous(), output = empty_output(x);
    const bool constant_rows = bias.dim() == 0 || bias.size(-1) != x.size(-1);
    Tensor b = bias.to(result);
    if (constant_rows) {
      auto shape = bias.dim() == 0 ? std::vector<int64_t>{1} : bias.sizes().vec();
      shape.back() = x.size(-1);
      b = b.expand(shape);
    }
    GRADNORM_KERNELS(softmax_kernels).forward(output, x, b.contiguous().expand(x.sizes()));
    return output;
  }
  static TensorPair double_backward(
      const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim,
      bool to_input) {
    check(grad_grad_input, grad_output, output);
    const Tensor v = grad_grad_input.to(output.scalar_type()).contiguous();
    const Tensor grad_grad_output = empty_output(output), grad = empty_output(output);
    GRADNORM_KERNELS(softmax_kernels)
        .double_backward(
            grad_grad_output, grad, v, grad_output.contiguous(), output.contiguous(),
            at::maybe_wrap_dim(dim, output.dim()), to_input);
    return {grad_grad_output, to_input ? grad.to(grad_grad_input.scalar_type()) : grad};
  }

  // Contiguous, as ATen's.
  static Tensor empty_output(const Tensor& like) {
    return at::empty_like(like, LEGACY_CONTIGUOUS_MEMORY_FORMAT);
  }
};

struct Meta {
  static Tensor with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
    const auto result = check_bias(input, bias, dtype);
    return at::empty_like(input, input.options().dtype(result), LEGACY_CONTIGUOUS_MEMORY_FORMAT);
  }
  static TensorPair double_backward(
      const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim,
      bool to_input) {
    check(grad_grad_input, grad_output, output);
    at::maybe_wrap_dim(dim, output.dim());
    return {
        at::empty_like(output, LEGACY_CONTIGUOUS_MEMORY_FORMAT),
        at::empty_like(to_input ? grad_grad_input : output, LEGACY_CONTIGUOUS_MEMORY_FORMAT)};
  }
};

// The sum of input and bias in the graph, without its values: the kernel adds while it reads. All gradients
// of the sum meet here, so that the bias's is reduced once.
struct Sum : torch::autograd::Function<Sum> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& bias, ScalarType dtype) {
    ctx->saved_data["input_dtype"] = input.scalar_type();
    ctx->saved_data["bias_dtype"] = bias.scalar_type();
    ctx->saved_data["bias_sizes"] = bias.sizes();
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return at::empty({}, input.options().dtype(dtype)).expand(input.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) {
      return result;
    }
    if (ctx->needs_input_grad(0)) {
      result[0] = grads[0].to(ctx->saved_data["input_dtype"].toScalarType());
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = at::sum_to(grads[0], ctx->saved_data["bias_sizes"].toDimVector())
                      .to(ctx->saved_data["bias_dtype"].toScalarType());
    }
    return result;
  }
};

// A tensor that an autograd Function is given without becoming an edge of the graph.
struct Value {
  Tensor tensor;
};

// True if somebody wants the gradient of this very tensor: by a hook, retain_grad or autograd.grad.
bool is_watched(const Tensor& tensor) {
  const auto& node = tensor.grad_fn();
  if (!node->pre_hooks().empty() || !node->tensor_pre_hooks().empty() ||
      !node->retains_grad_hooks().empty() || !node->post_hooks().empty()) {
    return true;
  }
  const auto* execution = torch::autograd::get_current_graph_task_exec_info();
  if (!execution) {
    return false;
  }
  const auto found = execution->find(node.get());
  return found != execution->end() && found->second.captures_;
}

// The derivative of softmax_backward, of grad_output and output. If output is the result of our own softmax,
// place says where that one's input is in the graph: the gradient goes there, past the softmax's backward.
struct Backward : torch::autograd::Function<Backward> {
  using First = Tensor (*)(const Tensor&, const Tensor&, int64_t, ScalarType);

  // first computes the value: our own kernel, or PyTorch's where only its double backward is replaced.
  static Tensor forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& output,
      const std::optional<Tensor>& place, int64_t dim, ScalarType input_dtype, First first) {
    ctx->save_for_backward({grad_output, output});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["to_input"] = place.has_value();
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return first(grad_output, output, dim, input_dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kGradOutput = 0, kOutput = 1, kPlace = 2;
    variable_list result(6);
    const Tensor& grad_grad_input = grads[0];
    if (!grad_grad_input.defined()) {
      return result;
    }
    const auto variables = ctx->get_saved_variables();
    const Tensor &grad_output = variables[0], &output = variables[1];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    // Past the softmax's backward, a gradient of output would not be seen.
    const bool to_input = ctx->saved_data["to_input"].toBool() && !is_watched(output);
    const size_t operand = to_input ? kPlace : kOutput;
    // Where only one of the two needs a gradient, the other one is still written, unless it is grad_output:
    // its gradient is a first backward.
    if (!ctx->needs_input_grad(operand)) {
      const auto dtype = output.scalar_type();
      result[kGradOutput] = call_backward(grad_grad_input.to(dtype), output, dim, dtype);
    } else {
      std::tie(result[kGradOutput], result[operand]) =
          call_double_backward(grad_grad_input, grad_output, output, dim, to_input);
    }
    return result;
  }
};

struct Forward : torch::autograd::Function<Forward> {
  // scores: what the softmax is of, or only its place in the graph.
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, const Value& output, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // Without values, so that scores need not be kept.
    Tensor place = at::empty({0}, scores.options());
    torch::autograd::impl::set_gradient_edge(place, torch::autograd::impl::gradient_edge(scores));
    ctx->save_for_backward({output.tensor, place});
    ctx->saved_data["dim"] = dim;
    ctx->set_materialize_grads(false);
    return output.tensor;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    if (!grad_output.defined()) {
      return variable_list(3);
    }
    const auto variables = ctx->get_saved_variables();
    const Tensor &output = variables[0], &place = variables[1];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    const auto dtype = place.scalar_type();
    if (needs_composite({grad_output, output}) || !torch::autograd::compute_requires_grad(output)) {
      return {call_backward(grad_output, output, dim, dtype), Tensor(), Tensor()};
    }
    return {
        Backward::apply(grad_output, output, std::optional(place), dim, dtype, &call_backward), Tensor(),
        Tensor()};
  }
};

struct Autograd {
  static Tensor forward(const Tensor& input, int64_t dim, std::optional<ScalarType> dtype) {
    if (needs_composite({input})) {
      return Composite::forward(input, dim, dtype);
    }
    const Tensor x = to_dtype(input, dtype);
    Tensor output;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      output = call_forward(x, dim, dtype);
    }
    if (!torch::autograd::compute_requires_grad(x)) {
      return output;
    }
    return Forward::apply(x, Value{output}, dim);
  }
  static Tensor with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
    if (needs_composite({input, bias})) {
      return Composite::with_bias(input, bias, dtype);
    }
    Tensor output;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      output = call_with_bias(input, bias, dtype);
    }
    if (!torch::autograd::compute_requires_grad(input, bias)) {
      return output;
    }
    const auto result = output.scalar_type();
    const bool is_sum = bias.requires_grad() || input.scalar_type() != result;
    constexpr int64_t last = -1;
    return Forward::apply(is_sum ? Sum::apply(input, bias, result) : input, Value{output}, last);
  }
  static Tensor backward(
      const Tensor& grad_output, const Tensor& output, int64_t dim, ScalarType input_dtype) {
    if (needs_composite({grad_output, output})) {
      return Composite::backward(grad_output, output, dim, input_dtype);
    }
    if (!torch::autograd::compute_requires_grad(grad_output, output)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call_backward(grad_output, output, dim, input_dtype);
    }
    return Backward::apply(grad_output, output, std::optional<Tensor>(), dim, input_dtype, &call_backward);
  }
  static TensorPair double_backward(
      const Tensor& grad_grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim,
      bool to_input) {
    if (needs_composite({grad_grad_input, grad_output, output}) ||
        torch::autograd::compute_requires_grad(grad_grad_input, grad_output, output)) {
      return Composite::double_backward(grad_grad_input, grad_output, output, dim, to_input);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_double_backward(grad_grad_input, grad_output, output, dim, to_input);
  }
};

// PyTorch's own softmax gives float32 in a region of autocast for CUDA; elsewhere it is left alone.
struct AutocastCuda {
  static std::optional<ScalarType> wider(const Tensor& input, std::optional<ScalarType> dtype) {
    const bool eligible = input.is_cuda() && at::isReducedFloatingType(input.scalar_type());
    return !dtype && eligible ? at::kFloat : dtype;
  }
  static Tensor forward(const Tensor& input, int64_t dim, std::optional<ScalarType> dtype) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::Autocast);
    return call_forward(input, dim, wider(input, dtype));
  }
  static Tensor with_bias(const Tensor& input, const Tensor& bias, std::optional<ScalarType> dtype) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::Autocast);
    return call_with_bias(input, bias, wider(input, dtype));
  }
};

// aten::_softmax_backward_data whose own backward is fused. Whatever ours does not cover stays PyTorch's.
struct AtenSoftmaxBackward {
  static StockKernel& stock() {
    static StockKernel kernel("aten::_softmax_backward_data");
    return kernel;
  }

  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& output, int64_t dim,
      ScalarType input_dtype) {
    if (needs_composite({grad_output, output}) || !is_elementwise_match(grad_output, output)) {
      return stock().call<Tensor>(keys, grad_output, output, dim, input_dtype);
    }
    if (!torch::autograd::compute_requires_grad(grad_output, output)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return at::_softmax_backward_data(grad_output, output, dim, input_dtype);
    }
    return Backward::apply(
        grad_output, output, std::optional<Tensor>(), dim, input_dtype, &at::_softmax_backward_data);
  }

  static void install(torch::Library& aten_autograd) {
    stock();
    aten_autograd.impl("_softmax_backward_data", &autograd);
  }
};

const StockOverride softmax_override(&AtenSoftmaxBackward::install);

template <class Kernels>
void implement(torch::Library& m) {
  m.impl("softmax", &Kernels::forward);
  m.impl("softmax_with_bias", &Kernels::with_bias);
  m.impl("softmax_backward", &Kernels::backward);
  m.impl("softmax_double_backward", &Kernels::double_backward);
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def("softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor");
  m.def("softmax_with_bias(Tensor input, Tensor bias, ScalarType? dtype=None) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor");
  m.def(
      "softmax_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor output, int dim, "
      "bool to_input) -> (Tensor grad_grad_output, Tensor grad)");
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  m.impl("softmax", &Cpu::forward);
  m.impl("softmax_with_bias", &Cpu::with_bias);
  m.impl("softmax_double_backward", &Cpu::double_backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  m.impl("softmax_with_bias", &Meta::with_bias);
  m.impl("softmax_double_backward", &Meta::double_backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  implement<Autograd>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  m.impl("softmax", &AutocastCuda::forward);
  m.impl("softmax_with_bias", &AutocastCuda::with_bias);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  implement<Composite>(m);
}

// Devices without a kernel of ours, and the passes that ATen has at the floor.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  implement<Composite>(m);
}

}  // namespace
}  // namespace gradnorm_kernels::softmax
