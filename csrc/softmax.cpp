// Softmax, with or without a bias added to its input, and its logarithm: the CPU, meta and composite
// implementations of their ops, how they are differentiated, and the override of PyTorch's own.
//
// y = softmax(x) has the gradient h = y (g - sum(g y)), and y = log softmax(x) has h = g - e^y sum(g). With v
// the gradient of h and the sums along dim, everything about h is local to a row of v, g and y.
#include "cpu/softmax.h"

#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>

#include "hooks.h"
#include "op.h"

namespace gradnorm_kernels::softmax {
namespace {

using at::ScalarType;

struct DoubleBackward {
  static constexpr auto schema =
      "softmax_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor output, int dim, "
      "bool to_input, bool log=False) -> (Tensor grad_grad_output, Tensor grad)";
  const Tensor &grad_grad_input, &grad_output, &output;
  int64_t dim;
  bool to_input;  // grad is of the softmax's input, else of its output
  bool log;       // output is the softmax's logarithm
  auto tie() const {
    return std::tie(grad_grad_input, grad_output, output, dim, to_input, log);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, output);
  }

  // grad_grad_input has the dtype of the input, which may be narrower than the output's.
  void check() const {
    const auto op = name_of<DoubleBackward>();
    check_elementwise(op, {{"output", output}, {"grad_output", grad_output}});
    check_floating(op, {{"output", output}, {"grad_grad_input", grad_grad_input}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        grad_grad_input.sym_sizes() == output.sym_sizes(), op,
        ": expected grad_grad_input to have the shape of output (", output.sym_sizes(), "), got ",
        grad_grad_input.sym_sizes());
  }
  TensorPair composite() const {
    check();
    const Tensor y = log ? to_opmath(output).exp() : to_opmath(output);
    const Tensor v = grad_grad_input.to(y.scalar_type()), g = to_opmath(grad_output);
    const auto mean = [&](const Tensor& t) { return (t * y).sum(dim, /*keepdim=*/true); };
    const Tensor v_mean = mean(v), v_centred = v - v_mean;
    if (log) {
      const Tensor grad = -g.sum(dim, /*keepdim=*/true) * y * (to_input ? v_centred : v);
      return {
          v_centred.to(output.scalar_type()),
          grad.to(to_input ? grad_grad_input.scalar_type() : output.scalar_type())};
    }
    const Tensor g_centred = g - mean(g);
    const Tensor grad_grad_output = (y * v_centred).to(output.scalar_type());
    if (!to_input) {
      return {grad_grad_output, (v * g_centred - v_mean * g).to(output.scalar_type())};
    }
    const Tensor product = v_centred * g_centred;
    return {grad_grad_output, (y * (product - mean(product))).to(grad_grad_input.scalar_type())};
  }
  TensorPair cpu() const {
    check();
    const Tensor v = grad_grad_input.to(output.scalar_type()).contiguous();
    const Tensor grad_grad_output = empty_contiguous(output), grad = empty_contiguous(output);
    GRADNORM_KERNELS(softmax_kernels)
        .double_backward(
            grad_grad_output, grad, v, grad_output.contiguous(), output.contiguous(),
            at::maybe_wrap_dim(dim, output.dim()), to_input, log);
    return {grad_grad_output, to_input ? grad.to(grad_grad_input.scalar_type()) : grad};
  }
  TensorPair meta() const {
    check();
    at::maybe_wrap_dim(dim, output.dim());
    return {empty_contiguous(output), empty_contiguous(to_input ? grad_grad_input : output)};
  }
};

struct Backward {
  static constexpr auto schema =
      "softmax_backward(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype, bool log=False) "
      "-> Tensor";
  const Tensor &grad_output, &output;
  int64_t dim;
  ScalarType input_dtype;
  bool log;
  auto tie() const {
    return std::tie(grad_output, output, dim, input_dtype, log);
  }

  static Tensor by_aten(const Backward& op) {
    const auto& [grad_output, output, dim, input_dtype, log] = op;
    // Of strided operands the logarithm's meta kernel gives other strides than its kernels.
    return log ? at::_log_softmax_backward_data(
                     grad_output.contiguous(), output.contiguous(), dim, input_dtype)
               : at::_softmax_backward_data(grad_output, output, dim, input_dtype);
  }
  Tensor composite() const {
    check_elementwise(name_of<Backward>(), {{"output", output}, {"grad_output", grad_output}});
    return by_aten(*this);
  }
  Tensor autograd() const {
    return differentiated(/*edge=*/Tensor());
  }
  // If output is the result of our own softmax, edge is what stands for that one's input in the graph.
  Tensor differentiated(const Tensor& edge) const {
    return needs_composite(grad_output, output) ? composite() : recorded(edge, &call<Backward>);
  }
  Tensor recorded(const Tensor& edge, Tensor (*value)(const Backward&)) const;
};

// Of grad_output, output and, if there is one, the edge to the softmax's input: output's gradient then goes
// there, past the softmax's backward.
struct OfBackward {
  using Settings = std::tuple<int64_t, bool, bool>;  // dim, log, has_edge

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    constexpr size_t kOutput = 1, kEdge = 2;
    const Tensor &grad_grad_input = grads[0], &grad_output = saved[0], &output = saved[1];
    const auto [dim, log, has_edge] = settings;
    // Past the softmax's backward, a gradient of output would not be seen.
    const bool to_input = has_edge && !has_hooks(output);
    const size_t operand = to_input ? kEdge : kOutput;
    // Where only one of the two needs a gradient, the other one is still written, unless it is grad_output:
    // its gradient is a first backward.
    if (!needs[operand] && !log) {
      const auto dtype = output.scalar_type();
      return {call(Backward{grad_grad_input.to(dtype), output, dim, dtype, log})};
    }
    variable_list result(3);
    std::tie(result[0], result[operand]) =
        call(DoubleBackward{grad_grad_input, grad_output, output, dim, to_input, log});
    return result;
  }
};

// value: our own kernel, or PyTorch's where only its double backward is replaced.
Tensor Backward::recorded(const Tensor& edge, Tensor (*value)(const Backward&)) const {
  return record<OfBackward>(
      {grad_output, output, edge}, {dim, log, edge.defined()}, [&](variable_list& saved) {
        saved = {grad_output, output};
        return variable_list{value(*this)};
      })[0];
}

struct OfForward {
  using Settings = std::tuple<int64_t, bool>;  // dim, log

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [dim, log] = settings;
    const Tensor &output = saved[0], &edge = saved[1];
    return {Backward{grads[0], output, dim, edge.scalar_type(), log}.differentiated(edge)};
  }
};

// input: what the softmax is of, or only its node in the graph.
template <class Op>
Tensor record_forward(const Tensor& input, int64_t dim, bool log, const Op& op) {
  if (!torch::autograd::compute_requires_grad(input)) {
    return call_below_autograd(op);
  }
  return record<OfForward>({input}, {dim, log}, [&](variable_list& saved) {
    const Tensor output = call(op);
    // Without values, so that input need not be kept.
    Tensor edge = at::empty({0}, input.options());
    torch::autograd::impl::set_gradient_edge(edge, torch::autograd::impl::gradient_edge(input));
    saved = {output, edge};
    return variable_list{output};
  })[0];
}

// PyTorch's own softmax gives float32 in a region of autocast for CUDA; elsewhere it is left alone.
std::optional<ScalarType> autocast_dtype(const Tensor& input, std::optional<ScalarType> dtype) {
  const bool eligible = input.is_cuda() && at::isReducedFloatingType(input.scalar_type());
  return !dtype && eligible ? at::kFloat : dtype;
}

template <bool log>
struct Forward {
  static std::string schema() {
    return std::string(log ? "log_softmax" : "softmax") +
           "(Tensor input, int dim, ScalarType? dtype=None) -> Tensor";
  }
  const Tensor& input;
  int64_t dim;
  std::optional<ScalarType> dtype;
  auto tie() const {
    return std::tie(input, dim, dtype);
  }

  // input in the dtype that is asked for, unless ATen's kernel converts it as it reads it.
  Tensor converted() const {
    const bool kernel_converts = input.is_cuda() && input.scalar_type() == at::kHalf && dtype == at::kFloat;
    return dtype && !kernel_converts ? input.to(*dtype) : input;
  }
  Tensor checked() const {
    const Tensor x = converted();
    check_elementwise(name_of<Forward>(), {{"input", x}});
    return x;
  }
  Tensor composite() const {
    const Tensor x = checked();
    const Tensor y = (log ? log_softmax_by_parts : softmax_by_parts)(to_opmath(x), dim);
    return y.to(dtype.value_or(x.scalar_type()));
  }
  Tensor any_device() const {
    const Tensor x = checked();
    return (log ? at::_log_softmax : at::_softmax)(
        x, dim, /*half_to_float=*/dtype && dtype != x.scalar_type());
  }
  Tensor cpu() const {
    const Tensor x = checked();
    if (log || at::maybe_wrap_dim(dim, x.dim()) < x.dim() - 1) {
      return any_device();
    }
    const Tensor output = empty_contiguous(x);
    GRADNORM_KERNELS(softmax_kernels).forward(output, x.contiguous(), Tensor());
    return output;
  }
  Tensor autograd() const {
    if (needs_composite(input)) {
      return composite();
    }
    const Tensor x = converted();
    return record_forward(x, dim, log, Forward{x, dim, dtype});
  }
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(Forward{input, dim, autocast_dtype(input, dtype)});
  }
};

// The sum of input and bias in the graph, without its values: the kernel adds while it reads. All gradients
// of the sum meet here, so that the bias's is reduced once.
struct OfSum {
  using Settings = std::tuple<ScalarType, ScalarType, std::vector<int64_t>>;  // of input, bias, bias's sizes

  static variable_list backward(
      const variable_list& grads, const variable_list&, Needs needs, const Settings& settings) {
    const auto& [input_dtype, bias_dtype, bias_sizes] = settings;
    return {
        needs[0] ? grads[0].to(input_dtype) : Tensor(),
        needs[1] ? at::sum_to(grads[0], bias_sizes).to(bias_dtype) : Tensor()};
  }
};

struct WithBias {
  static constexpr auto schema =
      "softmax_with_bias(Tensor input, Tensor bias, ScalarType? dtype=None) -> Tensor";
  const Tensor &input, &bias;
  std::optional<ScalarType> dtype;
  auto tie() const {
    return std::tie(input, bias, dtype);
  }

  // The dtype of the result.
  ScalarType check() const {
    const auto op = name_of<WithBias>();
    check_floating(op, {{"input", input}, {"bias", bias}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        input.dim() > 0 && at::is_expandable_to(bias.sym_sizes(), input.sym_sizes()), op,
        ": expected bias to broadcast to input's shape (", input.sym_sizes(), "), got ", bias.sym_sizes());
    return dtype.value_or(at::result_type(input, bias));
  }
  Tensor composite() const {
    const auto result = check();
    const auto arithmetic = at::toOpMathType(result);
    return softmax_by_parts(input.to(arithmetic) + bias.to(arithmetic), -1).to(result);
  }
  Tensor cpu() const {
    const auto result = check();
    const Tensor x = input.to(result).contiguous(), output = empty_contiguous(x);
    Tensor b = bias.to(result);
    if (bias.dim() == 0 || bias.size(-1) != x.size(-1)) {
      auto shape = bias.dim() == 0 ? std::vector<int64_t>{1} : bias.sizes().vec();
      shape.back() = x.size(-1);
      b = b.expand(shape);
    }
    GRADNORM_KERNELS(softmax_kernels).forward(output, x, b.contiguous().expand(x.sizes()));
    return output;
  }
  Tensor meta() const {
    return at::empty_like(input, input.options().dtype(check()), LEGACY_CONTIGUOUS_MEMORY_FORMAT);
  }
  Tensor autograd() const {
    return needs_composite(input, bias) ? composite()
                                        : record_forward(sum(), /*dim=*/-1, /*log=*/false, *this);
  }
  // What the softmax is of. Where only an input of the result's dtype is differentiated, input stands for it.
  Tensor sum() const {
    if (!torch::autograd::compute_requires_grad(input, bias)) {
      return input;
    }
    const auto result = check();
    if (!bias.requires_grad() && input.scalar_type() == result) {
      return input;
    }
    return record<OfSum>(
        {input, bias}, {input.scalar_type(), bias.scalar_type(), bias.sizes().vec()}, [&](variable_list&) {
          return variable_list{at::empty({}, input.options().dtype(result)).expand(input.sizes())};
        })[0];
  }
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(WithBias{input, bias, autocast_dtype(input, dtype)});
  }
};

const Registration<Forward<false>, Forward<true>, WithBias, Backward, DoubleBackward> registration;

// PyTorch's own backwards, whose own backward is fused. Whatever ours does not cover stays PyTorch's.
template <bool log>
struct AtenSoftmax : Override<AtenSoftmax<log>> {
  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self, int64_t dim, bool half_to_float) {
    if (!is_differentiated_by_transform({self})) {
      return AtenSoftmax::stock(keys, self, dim, half_to_float);
    }
    const Tensor y = (log ? log_softmax_by_parts : softmax_by_parts)(to_opmath(self), dim);
    return y.to(half_to_float ? at::kFloat : self.scalar_type());
  }
};

template <bool log>
struct AtenSoftmaxBackward : Override<AtenSoftmaxBackward<log>> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& output, int64_t dim,
      ScalarType input_dtype) {
    if (needs_composite(grad_output, output) || !is_elementwise_match(grad_output, output)) {
      return AtenSoftmaxBackward::stock(keys, grad_output, output, dim, input_dtype);
    }
    return Backward{grad_output, output, dim, input_dtype, log}.recorded(
        /*edge=*/Tensor(), &Backward::by_aten);
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  AtenSoftmax<false>::install(m, "_softmax");
  AtenSoftmax<true>::install(m, "_log_softmax");
  AtenSoftmaxBackward<false>::install(m, "_softmax_backward_data");
  AtenSoftmaxBackward<true>::install(m, "_log_softmax_backward_data");
});

}  // namespace
}  // namespace gradnorm_kernels::softmax
