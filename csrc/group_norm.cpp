// Group normalisation: schemas, autograd Functions, composite implementations, and the switch for
// PyTorch's own op. Forward and first backward are ATen's kernels; the double backward is ours.
#include "cpu/group_norm.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::group_norm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

constexpr auto kName = "group_norm";
constexpr auto kBackward = "group_norm_backward";
constexpr auto kDoubleBackward = "group_norm_double_backward";

Tensor call_forward(
    const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps) {
  static const auto op =
      find_op<Tensor(const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, double)>(
          "gradnorm_kernels::group_norm");
  return op.call(input, num_groups, weight, bias, eps);
}

TensorTriple call_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
  static const auto op = find_op<TensorTriple(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, double,
      Mask)>("gradnorm_kernels::group_norm_backward");
  return op.call(grad_output, input, mean, rstd, weight, num_groups, eps, output_mask);
}

TensorTriple call_double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
  static const auto op = find_op<TensorTriple(
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const OptionalTensor&, int64_t, double, Mask)>(
      "gradnorm_kernels::group_norm_double_backward");
  return op.call(
      grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, num_groups,
      eps, output_mask);
}

bool is_given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}
OptionalTensor given(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

template <class... Tensors>
bool any_needs_composite(const Tensors&... tensors) {
  std::vector<Tensor> all;
  all.reserve(sizeof...(tensors));
  const auto add = [&](const OptionalTensor& tensor) {
    if (is_given(tensor)) {
      all.push_back(*tensor);
    }
  };
  (add(tensors), ...);
  return needs_composite(all);
}

void check_input(const char* op, const Tensor& input, int64_t num_groups) {
  check_floating(op, "", {{"input", input}});
  TORCH_CHECK_VALUE(
      input.dim() >= 2, op, ": expected input to have at least 2 dimensions, got shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(num_groups > 0, op, ": expected num_groups to be positive, got ", num_groups);
  TORCH_CHECK_VALUE(
      input.sym_size(1) % num_groups == 0, op,
      ": expected num_groups to divide the channels of input, got num_groups ", num_groups, " and shape ",
      input.sym_sizes());
}

bool is_mixed(at::ScalarType input, at::ScalarType parameter) {
  return at::isReducedFloatingType(input) && parameter == at::kFloat;
}

// ATen's fused backward takes the parameters' dtype from weight alone.
bool is_mixed_by_bias_alone(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return !is_given(weight) && is_given(bias) && is_mixed(input.scalar_type(), bias->scalar_type());
}

void check_parameter(const char* op, const char* name, const OptionalTensor& parameter, const Tensor& input) {
  if (!is_given(parameter)) {
    return;
  }
  check_floating(op, "", {{"input", input}, {name, *parameter}}, /*same_dtype=*/false);
  TORCH_CHECK_TYPE(
      parameter->scalar_type() == input.scalar_type() ||
          is_mixed(input.scalar_type(), parameter->scalar_type()),
      op, ": expected ", name, " to have the dtype of input (", input.scalar_type(),
      "), or float32 beside float16 and bfloat16, got ", parameter->scalar_type());
  TORCH_CHECK_VALUE(
      parameter->dim() == 1 && parameter->sym_size(0) == input.sym_size(1), op, ": expected ", name,
      " to have shape (", input.sym_size(1), "), the channels of input, got ", parameter->sym_sizes());
}

void check_statistic(
    const char* op, const char* name, const Tensor& statistic, const Tensor& input, int64_t num_groups) {
  check_floating(op, "", {{"input", input}, {name, statistic}}, /*same_dtype=*/false);
  TORCH_CHECK_VALUE(
      statistic.dim() == 2 && statistic.sym_size(0) == input.sym_size(0) &&
          statistic.sym_size(1) == num_groups,
      op, ": expected ", name, " to have shape (", input.sym_size(0), ", ", num_groups, "), got ",
      statistic.sym_sizes());
}

void check(
    const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_input(kName, input, num_groups);
  check_parameter(kName, "weight", weight, input);
  check_parameter(kName, "bias", bias, input);
  // As torch.nn.functional: the one value is 0, whatever it was, and so are all its derivatives.
  TORCH_CHECK_VALUE(
      input.sym_numel() != num_groups || input.sym_size(0) > 1, kName,
      ": expected input to have more than one value for each group, got shape ", input.sym_sizes(),
      " and num_groups ", num_groups);
}

void check(
    const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, int64_t num_groups) {
  check_input(op, input, num_groups);
  check_elementwise(op, "", {{"input", input}, {"grad_output", grad_output}});
  check_statistic(op, "mean", mean, input, num_groups);
  check_statistic(op, "rstd", rstd, input, num_groups);
  check_parameter(op, "weight", weight, input);
}

void check(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups) {
  check(kDoubleBackward, grad_output, input, mean, rstd, weight, num_groups);
  if (is_given(grad_grad_input)) {
    check_elementwise(kDoubleBackward, "", {{"input", input}, {"grad_grad_input", *grad_grad_input}});
  }
  check_parameter(kDoubleBackward, "grad_grad_weight", grad_grad_weight, input);
  check_parameter(kDoubleBackward, "grad_grad_bias", grad_grad_bias, input);
}

// The elements of a channel.
c10::SymInt inner_size(const Tensor& input) {
  return c10::multiply_integers(input.sym_sizes().slice(2));
}

// Plain ATen ops, differentiable to any order: for torch.func, compilers, the third order, and devices
// without a kernel of ours. Statistics come from the input again, whose derivative they have a part in.
struct Composite {
  static Tensor forward(
      const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
      double eps) {
    check(input, num_groups, weight, bias);
    return at::group_norm(input, num_groups, weight, bias, eps);
  }

  static TensorTriple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
    check(kBackward, grad_output, input, mean, rstd, weight, num_groups);
    const Grouped grouped(input, num_groups, eps);
    const Tensor g = grouped.split(grad_output);
    const Tensor a = is_given(weight) ? g * grouped.split_parameter(*weight) : g;
    const auto dtype = (is_given(weight) ? *weight : input).scalar_type();
    TensorTriple result;
    if (output_mask[0]) {
      std::get<0>(result) = grouped.join(grouped.project(a) * grouped.rstd);
    }
    if (output_mask[1]) {
      std::get<1>(result) = grouped.sum_parameter(g * grouped.normalized).to(dtype);
    }
    if (output_mask[2]) {
      std::get<2>(result) = grouped.sum_parameter(g).to(dtype);
    }
    return result;
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups, double eps,
      Mask output_mask) {
    check(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        num_groups);
    const Grouped grouped(input, num_groups, eps);
    const Tensor& b = grouped.normalized;
    const Tensor g = grouped.split(grad_output);
    // What (grad_grad_output, grad_input, grad_weight) are the sums of.
    Tensor out = at::zeros_like(g), in = out, grad_weight = out;
    if (is_given(grad_grad_input)) {
      const Tensor v = grouped.split(*grad_grad_input);
      const Tensor w = is_given(weight) ? grouped.split_parameter(*weight) : Tensor();
      const auto weighted = [&](const Tensor& tensor) { return w.defined() ? tensor * w : tensor; };
      const Tensor a = weighted(g);
      // The derivative of grad_input along v, from its rstd and then from its normalized input.
      const Tensor projected_v = grouped.project(v) * grouped.rstd;
      out = weighted(projected_v);
      grad_weight = g * projected_v;
      const Tensor covariance = grouped.mean(v * grouped.project(a));
      const Tensor slope = a * grouped.mean(v * b) + v * grouped.mean(a * b);
      in = (grouped.project(slope) + b * covariance) * grouped.rstd.square().neg();
    }
    if (is_given(grad_grad_weight)) {
      const Tensor p = grouped.split_parameter(*grad_grad_weight);
      out = out + b * p;
      in = in + grouped.project(g * p) * grouped.rstd;
    }
    if (is_given(grad_grad_bias)) {
      out = out + grouped.split_parameter(*grad_grad_bias);
    }
    TensorTriple result;
    if (output_mask[0]) {
      std::get<0>(result) = grouped.join(out);
    }
    if (output_mask[1]) {
      std::get<1>(result) = grouped.join(in);
    }
    if (output_mask[2]) {
      std::get<2>(result) =
          grouped.sum_parameter(grad_weight).to((is_given(weight) ? *weight : input).scalar_type());
    }
    return result;
  }

  // What the statistics' own gradients add to grad_input; their derivatives are 1 / M and
  // -rstd^2 normalized / M, M the elements of a group.
  static Tensor statistics_backward(
      const Tensor& grad_mean, const Tensor& grad_rstd, const Tensor& input, int64_t num_groups, double eps) {
    const Grouped grouped(input, num_groups, eps);
    Tensor total = at::zeros_like(grouped.normalized);
    if (grad_mean.defined()) {
      total = total + grouped.split_statistic(grad_mean);
    }
    if (grad_rstd.defined()) {
      total = total - grouped.normalized * (grouped.rstd.square() * grouped.split_statistic(grad_rstd));
    }
    return grouped.join(total / (inner_size(input) * (input.sym_size(1) / num_groups)));
  }

 private:
  // The input, its channels split in (num_groups, channels of a group).
  struct Grouped {
    Grouped(const Tensor& input, int64_t num_groups, double eps)
        : dtype(input.scalar_type()), num_groups(num_groups), size(input.sym_size(1) / num_groups) {
      const Tensor x = split(input);
      for (int64_t dim = 2; dim < x.dim(); ++dim) {
        dims.push_back(dim);
      }
      const Tensor centered = x - mean(x);
      rstd = (mean(centered.square()) + eps).rsqrt();
      normalized = centered * rstd;
    }

    Tensor split(const Tensor& tensor) const {
      return at::unflatten_symint(to_opmath(tensor), 1, {num_groups, size});
    }
    Tensor join(const Tensor& tensor) const {
      // Not flatten, which has no batching rule under torch.func.vmap.
      auto sizes = tensor.sym_sizes().vec();
      sizes[1] = sizes[1] * sizes[2];
      sizes.erase(sizes.begin() + 2);
      return tensor.reshape_symint(sizes).to(dtype);
    }
    Tensor split_parameter(const Tensor& parameter) const {
      std::vector<c10::SymInt> shape(dims.size() + 2, 1);
      shape[1] = num_groups;
      shape[2] = size;
      return to_opmath(parameter).reshape_symint(shape);
    }
    Tensor split_statistic(const Tensor& statistic) const {
      std::vector<c10::SymInt> shape(dims.size() + 2, 1);
      shape[0] = statistic.sym_size(0);
      shape[1] = num_groups;
      return to_opmath(statistic).reshape_symint(shape);
    }
    Tensor mean(const Tensor& tensor) const {
      return tensor.mean(dims, /*keepdim=*/true);
    }
    // Free of its mean and of its part along the normalized input: rstd times this is the derivative of the
    // latter, applied to tensor.
    Tensor project(const Tensor& tensor) const {
      return tensor - mean(tensor) - normalized * mean(tensor * normalized);
    }
    Tensor sum_parameter(const Tensor& tensor) const {
      std::vector<int64_t> all_but_channels{0};
      all_but_channels.insert(all_but_channels.end(), dims.begin() + 1, dims.end());
      return tensor.sum(all_but_channels).reshape(-1);
    }

    at::ScalarType dtype;
    int64_t num_groups;
    c10::SymInt size;
    std::vector<int64_t> dims;
    Tensor rstd, normalized;
  };
};

// Before PyTorch 2.15 the kernels take it for granted that the caller has done this.
Tensor as_native_kernels_want(const Tensor& tensor, const Tensor& input) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 15
  return tensor.contiguous(input.is_cuda() ? at::MemoryFormat::Contiguous : input.suggest_memory_format());
#else
  return tensor;
#endif
}

TensorTriple native_group_norm(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups,
    double eps) {
  return at::native_group_norm_symint(
      as_native_kernels_want(input, input), weight, bias, input.sym_size(0), input.sym_size(1),
      inner_size(input), num_groups, eps);
}

TensorTriple native_group_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, int64_t num_groups, Mask output_mask) {
  OptionalTensor gamma = weight;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 15
  // They take the weight's type for that of both parameters' gradients.
  if (!is_given(weight) && (output_mask[1] || output_mask[2])) {
    gamma = at::ones_symint({input.sym_size(1)}, input.options());
  }
#endif
  return at::native_group_norm_backward_symint(
      as_native_kernels_want(grad_output, input), as_native_kernels_want(input, input), mean, rstd, gamma,
      input.sym_size(0), input.sym_size(1), inner_size(input), num_groups, output_mask);
}

// CPU and CUDA.
struct Native {
  static Tensor forward(
      const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
      double eps) {
    check(input, num_groups, weight, bias);
    return std::get<0>(native_group_norm(input, weight, bias, num_groups, eps));
  }
  static TensorTriple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
    check(kBackward, grad_output, input, mean, rstd, weight, num_groups);
    return native_group_norm_backward(grad_output, input, mean, rstd, weight, num_groups, output_mask);
  }
};

Tensor empty_like_input(const Tensor& input, bool wanted) {
  return wanted ? at::empty_like(input, input.suggest_memory_format()) : Tensor();
}
Tensor empty_like_weight(const Tensor& input, const OptionalTensor& weight, bool wanted) {
  const auto options = (is_given(weight) ? *weight : input).options();
  return wanted ? at::empty_symint({input.sym_size(1)}, options) : Tensor();
}

struct Cpu {
  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups, double eps,
      Mask output_mask) {
    check(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        num_groups);
    const auto format = input.suggest_memory_format();
    const auto opmath = at::isReducedFloatingType(input.scalar_type()) ? at::kFloat : input.scalar_type();
    const auto in_opmath = [&](const OptionalTensor& tensor) {
      return is_given(tensor) ? tensor->to(opmath).contiguous() : Tensor();
    };
    GroupNormDoubleBackward args;
    args.grad_grad_output = empty_like_input(input, output_mask[0]);
    args.grad_input = empty_like_input(input, output_mask[1]);
    if (output_mask[2]) {
      args.grad_weight = at::zeros({input.size(1)}, input.options().dtype(opmath));
    }
    if (input.numel() > 0) {
      args.grad_grad_input =
          is_given(grad_grad_input) ? grad_grad_input->contiguous(format) : at::zeros_like(input, {}, format);
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
    if (output_mask[2]) {
      args.grad_weight = args.grad_weight.to((is_given(weight) ? *weight : input).scalar_type());
    }
    return {args.grad_grad_output, args.grad_input, args.grad_weight};
  }
};

struct Meta {
  static Tensor forward(
      const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
      double eps) {
    check(input, num_groups, weight, bias);
    return at::empty_like(input, input.suggest_memory_format());
  }
  static TensorTriple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
    check(kBackward, grad_output, input, mean, rstd, weight, num_groups);
    return {
        empty_like_input(input, output_mask[0]), empty_like_weight(input, weight, output_mask[1]),
        empty_like_weight(input, weight, output_mask[2])};
  }
  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups, double eps,
      Mask output_mask) {
    check(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        num_groups);
    return {
        empty_like_input(input, output_mask[0]), empty_like_input(input, output_mask[1]),
        empty_like_weight(input, weight, output_mask[2])};
  }
};

// What the Functions pass on beside the tensors that they differentiate. Gradients of the statistics are part
// of the input's, which is why they are hidden from autograd here.
struct Constants {
  Tensor mean, rstd;
  int64_t num_groups;
  double eps;
};

void save(
    AutogradContext* ctx, variable_list tensors, const OptionalTensor& weight, const Constants& constants) {
  tensors.insert(tensors.end(), {constants.mean, constants.rstd, weight.value_or(Tensor())});
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["num_groups"] = constants.num_groups;
  ctx->saved_data["eps"] = constants.eps;
  ctx->set_materialize_grads(false);
}

// needs_input_grad counts the tensors that were given.
template <size_t N>
std::array<bool, N> needs_grads(AutogradContext* ctx, const std::array<bool, N>& given) {
  std::array<bool, N> needed{};
  for (size_t i = 0, next = 0; i < N; ++i) {
    needed[i] = given[i] && ctx->needs_input_grad(next++);
  }
  return needed;
}

// The wanted ones of three gradients, as a Function's outputs, and back.
variable_list pack(const TensorTriple& gradients, Mask wanted) {
  const auto& [first, second, third] = gradients;
  variable_list packed;
  for (const auto& [gradient, is_wanted] :
       {std::pair(first, wanted[0]), std::pair(second, wanted[1]), std::pair(third, wanted[2])}) {
    if (is_wanted) {
      packed.push_back(gradient);
    }
  }
  return packed;
}
std::array<OptionalTensor, 3> unpack(const variable_list& packed, Mask wanted) {
  std::array<OptionalTensor, 3> gradients;
  for (size_t i = 0, next = 0; i < gradients.size(); ++i) {
    if (wanted[i]) {
      gradients[i] = given(packed[next++]);
    }
  }
  return gradients;
}

struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
      const Constants& constants, Mask output_mask) {
    save(ctx, {grad_output, input}, weight, constants);
    ctx->saved_data["output_mask"] = c10::List<bool>({output_mask[0], output_mask[1], output_mask[2]});
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& [mean, rstd, num_groups, eps] = constants;
    return pack(
        call_backward(grad_output, input, mean, rstd, weight, num_groups, eps, output_mask), output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto variables = ctx->get_saved_variables();
    const auto weight = given(variables[4]);
    const auto masked = ctx->saved_data["output_mask"].toBoolList();
    const auto [grad_grad_input, grad_grad_weight, grad_grad_bias] =
        unpack(grads, {masked[0], masked[1], masked[2]});
    if (!grad_grad_input && !grad_grad_weight && !grad_grad_bias) {
      return variable_list(5);
    }
    auto [grad_grad_output, grad_input, grad_weight] = call_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, variables[0], variables[1], variables[2],
        variables[3], weight, ctx->saved_data["num_groups"].toInt(), ctx->saved_data["eps"].toDouble(),
        needs_grads<3>(ctx, {true, true, is_given(weight)}));
    return {grad_grad_output, grad_input, grad_weight, Tensor(), Tensor()};
  }
};

// With its statistics as further outputs for PyTorch's native_group_norm.
struct Forward : torch::autograd::Function<Forward> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      int64_t num_groups, double eps, bool with_statistics) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = native_group_norm(input, weight, bias, num_groups, eps);
    save(ctx, {input}, weight, {mean, rstd, num_groups, eps});
    ctx->saved_data["has_bias"] = is_given(bias);
    return with_statistics ? variable_list{output, mean, rstd} : variable_list{output};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto variables = ctx->get_saved_variables();
    const Tensor& input = variables[0];
    const auto weight = given(variables[3]);
    const int64_t num_groups = ctx->saved_data["num_groups"].toInt();
    const double eps = ctx->saved_data["eps"].toDouble();
    const Mask needed = needs_grads<3>(ctx, {true, is_given(weight), ctx->saved_data["has_bias"].toBool()});
    variable_list gradients(6);
    if (grads[0].defined()) {
      std::tie(gradients[0], gradients[1], gradients[2]) =
          call_backward(grads[0], input, variables[1], variables[2], weight, num_groups, eps, needed);
    }
    if (grads.size() > 1 && needed[0] && (grads[1].defined() || grads[2].defined())) {
      const Tensor more = Composite::statistics_backward(grads[1], grads[2], input, num_groups, eps);
      gradients[0] = gradients[0].defined() ? gradients[0] + more : more;
    }
    return gradients;
  }
};

struct Autograd {
  static Tensor forward(
      const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
      double eps) {
    if (any_needs_composite(input, weight, bias) || is_mixed_by_bias_alone(input, weight, bias)) {
      return Composite::forward(input, num_groups, weight, bias, eps);
    }
    if (!torch::autograd::compute_requires_grad(input, weight, bias)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call_forward(input, num_groups, weight, bias, eps);
    }
    check(input, num_groups, weight, bias);
    return Forward::apply(input, weight, bias, num_groups, eps, /*with_statistics=*/false)[0];
  }

  static TensorTriple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, int64_t num_groups, double eps, Mask output_mask) {
    if (any_needs_composite(grad_output, input, weight)) {
      return Composite::backward(grad_output, input, mean, rstd, weight, num_groups, eps, output_mask);
    }
    if (!torch::autograd::compute_requires_grad(grad_output, input, weight)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call_backward(grad_output, input, mean, rstd, weight, num_groups, eps, output_mask);
    }
    const auto gradients = unpack(
        Backward::apply(grad_output, input, weight, Constants{mean, rstd, num_groups, eps}, output_mask),
        output_mask);
    const auto result = [&](size_t i) { return gradients[i].value_or(Tensor()); };
    return {result(0), result(1), result(2)};
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, int64_t num_groups, double eps,
      Mask output_mask) {
    if (any_needs_composite(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight) ||
        torch::autograd::compute_requires_grad(
            grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight)) {
      return Composite::double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
          num_groups, eps, output_mask);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, num_groups,
        eps, output_mask);
  }
};

// aten::native_group_norm whose double backward is fused. PyTorch takes the first backward to pieces where it
// is to be differentiated, so that this one's, in one kernel, is at stake too. Whatever ours does not cover
// stays PyTorch's.
struct AtenGroupNorm {
  static StockKernel& stock() {
    static StockKernel kernel("aten::native_group_norm");
    return kernel;
  }

  static bool is_covered(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const c10::SymInt& batch,
      const c10::SymInt& channels, const c10::SymInt& inner, int64_t num_groups) {
    const auto matches = [&](const OptionalTensor& parameter) {
      return !is_given(parameter) ||
             (parameter->layout() == at::kStrided && parameter->device() == input.device() &&
              (parameter->scalar_type() == input.scalar_type() ||
               is_mixed(input.scalar_type(), parameter->scalar_type())) &&
              parameter->dim() == 1 && parameter->sym_size(0) == channels);
    };
    return is_elementwise_match(input, input) && input.dim() >= 2 && num_groups > 0 &&
           input.sym_size(0) == batch && input.sym_size(1) == channels && inner_size(input) == inner &&
           channels % num_groups == 0 && matches(weight) && matches(bias) &&
           !is_mixed_by_bias_alone(input, weight, bias);
  }

  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      c10::SymInt batch, c10::SymInt channels, c10::SymInt inner, int64_t group, double eps) {
    if (any_needs_composite(input, weight, bias) ||
        !is_covered(input, weight, bias, batch, channels, inner, group)) {
      return stock().call<TensorTriple>(keys, input, weight, bias, batch, channels, inner, group, eps);
    }
    if (!torch::autograd::compute_requires_grad(input, weight, bias)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return native_group_norm(input, weight, bias, group, eps);
    }
    auto outputs = Forward::apply(input, weight, bias, group, eps, /*with_statistics=*/true);
    return {outputs[0], outputs[1], outputs[2]};
  }

  static void install(torch::Library& aten_autograd) {
    stock();
    aten_autograd.impl("native_group_norm", &autograd);
  }
};

const StockOverride group_norm_override(&AtenGroupNorm::install);

template <class Kernels>
void implement(torch::Library& m) {
  if constexpr (requires { &Kernels::forward; }) {
    m.impl(kName, &Kernels::forward);
    m.impl(kBackward, &Kernels::backward);
  }
  if constexpr (requires { &Kernels::double_backward; }) {
    m.impl(kDoubleBackward, &Kernels::double_backward);
  }
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> "
      "Tensor");
  // mean and rstd are what native_group_norm gave for input and eps; gradients reach them through input.
  m.def(
      "group_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "int num_groups, float eps, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int num_groups, "
      "float eps, bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  implement<Native>(m);
  implement<Cpu>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CUDA, m) {
  implement<Native>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  implement<Meta>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  implement<Autograd>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  implement<Composite>(m);
}

// Devices without a kernel of ours.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  implement<Composite>(m);
}

// PyTorch's own group_norm is among the ops that CUDA's autocast runs in float32.
TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  using Signature = Tensor(const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, double);
  m.impl(
      kName, &at::autocast::WrapFunction<
                 at::autocast::CastPolicy::fp32, c10::DeviceType::CUDA, Signature, Signature,
                 &call_forward>::type::call);
}

}  // namespace
}  // namespace gradnorm_kernels::group_norm
