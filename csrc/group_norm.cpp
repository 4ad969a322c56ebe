// Group normalisation. Forward and first backward are ATen's kernels; the double backward is ours.
#include "cpu/group_norm.h"

#include <torch/version.h>

#include "normalization.h"

namespace gradnorm_kernels::group_norm {
namespace {

bool is_mixed(at::ScalarType input, at::ScalarType parameter) {
  return at::isReducedFloatingType(input) && parameter == at::kFloat;
}

// ATen's fused backward takes the parameters' dtype from weight alone.
bool is_mixed_by_bias_alone(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return !weight.defined() && bias.defined() && is_mixed(input.scalar_type(), bias.scalar_type());
}

// The elements of a channel.
c10::SymInt inner_size(const Tensor& input) {
  return c10::multiply_integers(input.sym_sizes().slice(2));
}

// An input and its groups, of whom every op checks this.
void check_input(
    const char* op, const Tensor& input, int64_t num_groups, std::initializer_list<NamedTensor> parameters) {
  check_floating(op, {{"input", input}});
  TORCH_CHECK_VALUE(
      input.dim() >= 2, op, ": expected input to have at least 2 dimensions, got shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(num_groups > 0, op, ": expected num_groups to be positive, got ", num_groups);
  TORCH_CHECK_VALUE(
      input.sym_size(1) % num_groups == 0, op,
      ": expected num_groups to divide the channels of input, got num_groups ", num_groups, " and shape ",
      input.sym_sizes());
  check_shapes(op, input, parameters, input.sym_sizes().slice(1, 1));
  for (const auto& [name, parameter] : parameters) {
    TORCH_CHECK_TYPE(
        !parameter.defined() || parameter.scalar_type() == input.scalar_type() ||
            is_mixed(input.scalar_type(), parameter.scalar_type()),
        op, ": expected ", name, " to have the dtype of input (", input.scalar_type(),
        "), or float32 beside float16 and bfloat16, got ", parameter.scalar_type());
  }
}

void check_statistics(
    const char* op, const Tensor& input, int64_t num_groups, const Tensor& mean, const Tensor& rstd) {
  const std::array<c10::SymInt, 2> shape{input.sym_size(0), num_groups};
  check_shapes(op, input, {{"mean", mean}, {"rstd", rstd}}, shape);
}

// The composite's view of an input: its channels split in (num_groups, channels of a group).
struct Grouped : Normalized {
  Grouped(const Tensor& input, int64_t num_groups, double eps)
      : num_groups(num_groups), size(input.sym_size(1) / num_groups) {
    const Tensor x = split(input);
    for (int64_t dim = 2; dim < x.dim(); ++dim) {
      dims.push_back(dim);
    }
    shape.assign(x.dim(), 1);
    shape[1] = num_groups;
    shape[2] = size;
    set_input(x, eps);
  }

  Tensor split(const Tensor& tensor) const {
    if (!tensor.defined()) {
      return tensor;
    }
    auto sizes = tensor.sym_sizes().vec();
    sizes[1] = size;
    sizes.insert(sizes.begin() + 1, num_groups);
    // Not unflatten: that is a view, which not every stride allows under vmap.
    return to_opmath(tensor).reshape_symint(sizes);
  }
  Tensor join(const Tensor& tensor, const Tensor& input) const {
    return tensor.defined() ? tensor.reshape_symint(input.sym_sizes()).to(input.scalar_type()) : tensor;
  }
  Tensor split_statistic(const Tensor& statistic) const {
    auto sizes = shape;
    sizes[0] = statistic.sym_size(0);
    sizes[2] = 1;
    return to_opmath(statistic).reshape_symint(sizes);
  }

  int64_t num_groups;
  c10::SymInt size;
};

Tensor empty_like_input(const Tensor& input, bool wanted) {
  return wanted ? at::empty_like(input, input.suggest_memory_format()) : Tensor();
}
Tensor like_weight(const Tensor& input, const Tensor& weight) {
  return parameter_or_stand_in(weight, input, input.scalar_type());
}

// Before PyTorch 2.15 the kernels take it for granted that the caller has done this.
Tensor as_native_kernels_want(const Tensor& tensor, const Tensor& input) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 15
  return tensor.contiguous(input.is_cuda() ? at::MemoryFormat::Contiguous : input.suggest_memory_format());
#else
  return tensor;
#endif
}

std::optional<Tensor> as_native_kernels_want(const Tensor& parameter) {
  return optional(parameter.defined() ? parameter.contiguous() : parameter);
}

struct DoubleBackward {
  static constexpr auto schema =
      "group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int num_groups, "
      "float eps, bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)";
  OptionalTensor grad_grad_input, grad_grad_weight, grad_grad_bias;
  const Tensor &grad_output, &input, &mean, &rstd;
  OptionalTensor weight;
  int64_t num_groups;
  double eps;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, num_groups,
        eps, output_mask);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight);
  }

  void check() const {
    const auto op = name_of<DoubleBackward>();
    check_input(
        op, input, num_groups,
        {{"weight", weight}, {"grad_grad_weight", grad_grad_weight}, {"grad_grad_bias", grad_grad_bias}});
    check_elementwise(
        op, {{"input", input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
    check_statistics(op, input, num_groups, mean, rstd);
  }
  TensorTriple composite() const {
    check();
    const Grouped grouped(input, num_groups, eps);
    auto [grad_grad_output, grad_input, grad_weight] = grouped.double_backward(
        grouped.split(grad_grad_input), grad_grad_weight, grad_grad_bias, grouped.split(grad_output), weight,
        like_weight(input, weight), output_mask);
    return {grouped.join(grad_grad_output, input), grouped.join(grad_input, input), grad_weight};
  }
  TensorTriple cpu() const {
    check();
    const auto format = input.suggest_memory_format();
    const auto opmath = at::toOpMathType(input.scalar_type());
    const auto in_opmath = [&](const Tensor& tensor) {
      return tensor.defined() ? tensor.to(opmath).contiguous() : tensor;
    };
    GroupNormDoubleBackward args;
    args.grad_grad_output = empty_like_input(input, output_mask[0]);
    args.grad_input = empty_like_input(input, output_mask[1]);
    if (output_mask[2]) {
      args.grad_weight = at::zeros({input.size(1)}, input.options().dtype(opmath));
    }
    if (input.numel() > 0) {
      args.grad_grad_input =
          grad_grad_input.defined() ? grad_grad_input.contiguous(format) : at::zeros_like(input, {}, format);
      args.grad_output = grad_output.contiguous(format);
      args.input = input.contiguous(format);
      args.mean = in_opmath(mean);
      args.rstd = in_opmath(rstd);
      args.weight = in_opmath(weight);
      args.grad_grad_weight = in_opmath(grad_grad_weight);
      args.grad_grad_bias = in_opmath(grad_grad_bias);
      args.batch = input.size(0);
      args.channels = input.size(1);
      args.inner = input.numel() / (args.batch * args.channels);
      args.num_groups = num_groups;
      args.channels_last = format != at::MemoryFormat::Contiguous;
      GRADNORM_KERNELS(group_norm_kernels).double_backward(args);
    }
    return {
        args.grad_grad_output, args.grad_input,
        to_dtype_of(weight.defined() ? weight : input, args.grad_weight)};
  }
  TensorTriple meta() const {
    check();
    return {
        empty_like_input(input, output_mask[0]), empty_like_input(input, output_mask[1]),
        empty_contiguous(like_weight(input, weight), output_mask[2])};
  }
};

struct OfBackward {
  using Settings = std::tuple<int64_t, double>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [num_groups, eps] = settings;
    return to_list(call(
        DoubleBackward{
            grads[0],
            grads[1],
            grads[2],
            saved[0],
            saved[1],
            saved[2],
            saved[3],
            saved[4],
            num_groups,
            eps,
            {needs[0], needs[1], needs[2]}}));
  }
};

struct Backward {
  // mean and rstd are what native_group_norm gave for input and eps; gradients reach them through input.
  static constexpr auto schema =
      "group_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "int num_groups, float eps, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor &grad_output, &input, &mean, &rstd;
  OptionalTensor weight;
  int64_t num_groups;
  double eps;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, mean, rstd, weight, num_groups, eps, output_mask);
  }

  void check() const {
    const auto op = name_of<Backward>();
    check_input(op, input, num_groups, {{"weight", weight}});
    check_elementwise(op, {{"input", input}, {"grad_output", grad_output}});
    check_statistics(op, input, num_groups, mean, rstd);
  }
  TensorTriple composite() const {
    check();
    const Grouped grouped(input, num_groups, eps);
    auto [grad_input, grad_weight, grad_bias] =
        grouped.backward(grouped.split(grad_output), weight, like_weight(input, weight), output_mask);
    return {grouped.join(grad_input, input), grad_weight, grad_bias};
  }
  TensorTriple cpu() const {
    check();
    std::optional<Tensor> gamma = as_native_kernels_want(weight);
    auto mask = output_mask;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 14
    // With interleaved channels the kernel writes to the gradient of the input, whether it is there or not.
    mask[0] = true;
#endif
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 15
    // The kernels take the weight's type for that of both parameters' gradients.
    if (!gamma && (output_mask[1] || output_mask[2])) {
      gamma = at::ones_symint({input.sym_size(1)}, input.options());
    }
#endif
    auto gradients = at::native_group_norm_backward_symint(
        as_native_kernels_want(grad_output, input), as_native_kernels_want(input, input), mean, rstd, gamma,
        input.sym_size(0), input.sym_size(1), inner_size(input), num_groups, mask);
    if (!output_mask[0]) {
      std::get<0>(gradients).reset();
    }
    return gradients;
  }
  TensorTriple cuda() const {
    return cpu();
  }
  TensorTriple meta() const {
    check();
    return {
        empty_like_input(input, output_mask[0]), empty_contiguous(like_weight(input, weight), output_mask[1]),
        empty_contiguous(like_weight(input, weight), output_mask[2])};
  }
  TensorTriple autograd() const {
    if (needs_composite(grad_output, input, weight)) {
      return composite();
    }
    return to_tuple<3>(
        record<OfBackward>({grad_output, input, weight}, {num_groups, eps}, [&](variable_list& saved) {
          saved = {grad_output, input, mean, rstd, weight};
          return to_list(call(*this), output_mask);
        }));
  }
};

// The gradients of (output, mean, rstd): the derivatives of the statistics are 1 / M and
// -rstd^2 normalized / M, M the elements of a group.
struct OfForward {
  using Settings = std::tuple<int64_t, double>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [num_groups, eps] = settings;
    const Tensor &input = saved[0], &weight = saved[3];
    variable_list gradients(1);
    if (grads[0].defined()) {
      gradients = to_list(call(
          Backward{
              grads[0], input, saved[1], saved[2], weight, num_groups, eps, {needs[0], needs[1], needs[2]}}));
    }
    if (needs[0] && grads.size() > 1 && (grads[1].defined() || grads[2].defined())) {
      const Grouped grouped(input, num_groups, eps);
      Tensor total = at::zeros_like(grouped.x_hat);
      if (grads[1].defined()) {
        total = total + grouped.split_statistic(grads[1]);
      }
      if (grads[2].defined()) {
        total = total - grouped.x_hat * (grouped.rstd.square() * grouped.split_statistic(grads[2]));
      }
      const Tensor more = grouped.join(total / (inner_size(input) * grouped.size), input);
      gradients[0] = gradients[0].defined() ? gradients[0] + more : more;
    }
    return gradients;
  }
};

struct Forward {
  static constexpr auto schema =
      "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> "
      "Tensor";
  const Tensor& input;
  int64_t num_groups;
  OptionalTensor weight, bias;
  double eps;
  auto tie() const {
    return std::tie(input, num_groups, weight, bias, eps);
  }

  void check() const {
    const auto op = name_of<Forward>();
    check_input(op, input, num_groups, {{"weight", weight}, {"bias", bias}});
    // As torch.nn.functional: the one value is 0, whatever it was, and so are all its derivatives.
    TORCH_CHECK_VALUE(
        input.sym_numel() != num_groups || input.sym_size(0) > 1, op,
        ": expected input to have more than one value for each group, got shape ", input.sym_sizes(),
        " and num_groups ", num_groups);
  }
  Tensor composite() const {
    check();
    return at::group_norm(input, num_groups, optional(weight), optional(bias), eps);
  }
  TensorTriple native() const {
    return at::native_group_norm_symint(
        as_native_kernels_want(input, input), as_native_kernels_want(weight), as_native_kernels_want(bias),
        input.sym_size(0), input.sym_size(1), inner_size(input), num_groups, eps);
  }
  Tensor cpu() const {
    check();
    return std::get<0>(native());
  }
  Tensor cuda() const {
    return cpu();
  }
  Tensor meta() const {
    check();
    return at::empty_like(input, input.suggest_memory_format());
  }
  // With its statistics as further outputs for PyTorch's native_group_norm.
  variable_list recorded(bool with_statistics) const {
    return record<OfForward>({input, weight, bias}, {num_groups, eps}, [&](variable_list& saved) {
      auto outputs = to_list(native());
      saved = {input, outputs[1], outputs[2], weight};
      if (!with_statistics) {
        outputs.resize(1);
      }
      return outputs;
    });
  }
  Tensor autograd() const {
    if (needs_composite(input, weight, bias) || is_mixed_by_bias_alone(input, weight, bias)) {
      return composite();
    }
    check();
    return torch::autograd::compute_requires_grad(input, weight, bias) ? recorded(false)[0]
                                                                       : call_below_autograd(*this);
  }
  // PyTorch's own group_norm is among the ops that CUDA's autocast runs in float32.
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(
        Forward{
            autocast_to_float(input), num_groups, autocast_to_float(weight), autocast_to_float(bias), eps});
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// PyTorch takes the first backward to pieces where it is to be differentiated, so that this one's, in one
// kernel, is at stake too. Whatever ours does not cover stays PyTorch's.
struct AtenGroupNorm : Override<AtenGroupNorm> {
  static bool is_covered(
      const Forward& op, const c10::SymInt& batch, const c10::SymInt& channels, const c10::SymInt& inner) {
    const auto& [input, num_groups, weight, bias, eps] = op;
    const auto matches = [&](const Tensor& parameter) {
      return !parameter.defined() ||
             (parameter.layout() == at::kStrided && parameter.device() == op.input.device() &&
              (parameter.scalar_type() == op.input.scalar_type() ||
               is_mixed(op.input.scalar_type(), parameter.scalar_type())) &&
              parameter.dim() == 1 && parameter.sym_size(0) == channels);
    };
    return !needs_composite(input, weight, bias) && is_elementwise_match(input, input) && input.dim() >= 2 &&
           num_groups > 0 && input.sym_size(0) == batch && input.sym_size(1) == channels &&
           inner_size(input) == inner && channels % num_groups == 0 && matches(weight) && matches(bias) &&
           !is_mixed_by_bias_alone(input, weight, bias);
  }

  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias, c10::SymInt batch, c10::SymInt channels, c10::SymInt inner,
      int64_t group, double eps) {
    const Forward op{input, group, weight, bias, eps};
    return is_covered(op, batch, channels, inner)
               ? to_tuple<3>(op.recorded(true))
               : stock(keys, input, weight, bias, batch, channels, inner, group, eps);
  }
};

const StockOverride override_aten([](AtenAutograd& m) { AtenGroupNorm::install(m, "native_group_norm"); });

}  // namespace
}  // namespace gradnorm_kernels::group_norm
