// Layer normalisation over the last dimensions (PyTorch's own forward and backward, our double backward) and
// over the channels of NCHW: schemas, autograd Functions, and the CPU, meta and composite implementations.
#include "cpu/layer_norm.h"

#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::layer_norm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

constexpr auto kRows = "layer_norm";
constexpr auto kChannels = "layer_norm_2d";

Tensor value(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}
bool is_defined(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

// Ops. PyTorch's native_layer_norm_backward is the backward of layer_norm; its double backward, and that of
// layer_norm_2d, is layer_norm_double_backward.

Triple call_2d(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  static const auto op = find_op<Triple(const Tensor&, const OptionalTensor&, const OptionalTensor&, double)>(
      "gradnorm_kernels::layer_norm_2d");
  return op.call(input, weight, bias, eps);
}
Triple call_2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, Mask output_mask) {
  static const auto op = find_op<Triple(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, Mask)>(
      "gradnorm_kernels::layer_norm_2d_backward");
  return op.call(grad_output, input, mean, rstd, weight, output_mask);
}
Triple call_double_backward(
    const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
  static const auto op = find_op<Triple(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const OptionalTensor&, Mask)>(
      "gradnorm_kernels::layer_norm_double_backward");
  return op.call(
      grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, output_mask);
}

// Checks.

void check_parameter(
    const char* op, const char* suffix, const Tensor& input, const char* name,
    const OptionalTensor& parameter, c10::SymIntArrayRef shape) {
  if (!is_defined(parameter)) {
    return;
  }
  check_floating(op, suffix, {{"input", input}, {name, *parameter}}, /*same_dtype=*/false);
  TORCH_CHECK_VALUE(
      parameter->sym_sizes() == shape, op, suffix, ": expected ", name, " to have shape ", shape, ", got ",
      parameter->sym_sizes());
}

void check_rows(
    const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias) {
  check_floating(kRows, "", {{"input", input}});
  const auto ndim = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK_VALUE(ndim > 0, kRows, ": expected normalized_shape to have at least one element");
  TORCH_CHECK_VALUE(
      input.dim() >= ndim && input.sym_sizes().slice(input.dim() - ndim) == normalized_shape, kRows,
      ": expected the shape of input to end in normalized_shape (", normalized_shape, "), got ",
      input.sym_sizes());
  check_parameter(kRows, "", input, "weight", weight, normalized_shape);
  check_parameter(kRows, "", input, "bias", bias, normalized_shape);
}

void check_channels(
    const char* suffix, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_floating(kChannels, suffix, {{"input", input}});
  TORCH_CHECK_VALUE(
      input.dim() == 4, kChannels, suffix, ": expected input to be of shape (N, C, H, W), got ",
      input.sym_sizes());
  const auto channels = input.sym_sizes().slice(1, 1);
  check_parameter(kChannels, suffix, input, "weight", weight, channels);
  check_parameter(kChannels, suffix, input, "bias", bias, channels);
}

// An input is normalised over the dimensions that its statistics have reduced to 1; where its own size there
// is 1, that means nothing.
struct Normalized {
  std::vector<int64_t> dims;
  c10::SymDimVector shape;   // of these dimensions, and 1 elsewhere: what parameters broadcast as
  c10::SymInt elements = 1;  // in a row
  bool adjacent = true;

  Normalized(const Tensor& input, const Tensor& mean) : shape(input.dim(), 1) {
    bool ended = false;
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (input.sym_size(d) == 1) {
        continue;
      }
      if (mean.sym_size(d) == 1) {
        adjacent &= !ended;
        dims.push_back(d);
        shape[d] = input.sym_size(d);
        elements *= shape[d];
      } else {
        ended = !dims.empty();
      }
    }
  }
};

void check_statistics(
    const char* op, const char* suffix, const Tensor& input, const Tensor& mean, const Tensor& rstd) {
  for (const auto& [name, tensor] : {NamedTensor{"mean", mean}, NamedTensor{"rstd", rstd}}) {
    check_floating(op, suffix, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    bool matches = tensor.dim() == input.dim() && input.dim() > 0;
    for (int64_t d = 0; matches && d < input.dim(); ++d) {
      matches = tensor.sym_size(d) == 1 || tensor.sym_size(d) == input.sym_size(d);
    }
    TORCH_CHECK_VALUE(
        matches && tensor.sym_sizes() == mean.sym_sizes() && Normalized(input, tensor).adjacent, op, suffix,
        ": expected ", name, " to have the shape of input (", input.sym_sizes(),
        ") with adjacent dimensions reduced to 1, got ", tensor.sym_sizes());
  }
}

void check_2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight) {
  constexpr auto suffix = "_backward";
  check_channels(suffix, input, weight, {});
  check_elementwise(kChannels, suffix, {{"input", input}, {"grad_output", grad_output}});
  check_statistics(kChannels, suffix, input, mean, rstd);
}

void check_double_backward(
    const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const Mask& output_mask) {
  constexpr auto suffix = "_double_backward";
  check_elementwise(
      kRows, suffix, {{"input", input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
  check_statistics(kRows, suffix, input, mean, rstd);
  TORCH_CHECK_VALUE(
      !output_mask[2] || is_defined(weight), kRows, suffix,
      ": expected weight, whose gradient output_mask asks for");
  const auto elements = Normalized(input, mean).elements;
  for (const auto& [name, parameter] :
       {std::pair{"weight", &weight},
        {"grad_grad_weight", &grad_grad_weight},
        {"grad_grad_bias", &grad_grad_bias}}) {
    if (is_defined(*parameter)) {
      check_floating(kRows, suffix, {{"input", input}, {name, **parameter}}, /*same_dtype=*/false);
      TORCH_CHECK_VALUE(
          (*parameter)->sym_numel() == elements, kRows, suffix, ": expected ", name, " to have ", elements,
          " elements, got shape ", (*parameter)->sym_sizes());
    }
  }
}

// Plain ATen ops, differentiable to any order, on contiguous tensors: for torch.func, compilers, the third
// order, and devices without a kernel of ours. PyTorch's own layer norm is not among them: from the third
// order on, and in reverse over forward mode, its derivatives take the statistics for constants.
struct Composite {
  // The input of one call in the dtype of arithmetic, with its statistics as functions of it.
  struct Row {
    std::vector<int64_t> dims;
    Tensor rstd, mean_of_input, x_hat;

    Row(const Tensor& input, std::vector<int64_t> over, double eps) : dims(std::move(over)) {
      const auto [centred, variance] = moments(input);
      rstd = (variance + eps).rsqrt();
      x_hat = centred * rstd;
    }
    // With the rstd that is given: eps is what it implies.
    Row(const Tensor& input, const Normalized& normalized, const Tensor& saved_rstd) : dims(normalized.dims) {
      const auto [centred, variance] = moments(input);
      const Tensor eps = to_opmath(saved_rstd).pow(-2) - variance;
      rstd = (variance + eps.detach()).rsqrt();
      x_hat = centred * rstd;
    }

    Tensor mean(const Tensor& tensor) const {
      // ATen takes no dimensions for all of them; here they are those of a single element.
      return dims.empty() ? tensor : tensor.mean(dims, /*keepdim=*/true);
    }
    // The backward is rstd * project(grad_output * weight).
    Tensor project(const Tensor& tensor) const {
      return tensor - mean(tensor) - x_hat * mean(tensor * x_hat);
    }

   private:
    std::pair<Tensor, Tensor> moments(const Tensor& input) {
      const Tensor x = to_opmath(input.contiguous());
      mean_of_input = mean(x);
      const Tensor centred = x - mean_of_input;
      return {centred, mean(centred * centred)};
    }
  };

  static Tensor affine(
      const Tensor& x_hat, const OptionalTensor& weight, const OptionalTensor& bias,
      c10::SymIntArrayRef shape) {
    Tensor output = x_hat;
    if (is_defined(weight)) {
      output = output * to_opmath(*weight).reshape_symint(shape);
    }
    if (is_defined(bias)) {
      output = output + to_opmath(*bias).reshape_symint(shape);
    }
    return output;
  }

  static Tensor forward(
      const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps) {
    if (input.is_nested()) {
      return at::layer_norm_symint(input, normalized_shape, weight, bias, eps);
    }
    check_rows(input, normalized_shape, weight, bias);
    std::vector<int64_t> dims;
    for (auto d = input.dim() - static_cast<int64_t>(normalized_shape.size()); d < input.dim(); ++d) {
      dims.push_back(d);
    }
    return affine(Row(input, dims, eps).x_hat, weight, bias, normalized_shape).to(input.scalar_type());
  }

  static Triple forward_2d(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    check_channels("", input, weight, bias);
    const Row row(input, {1}, eps);
    const c10::SymDimVector shape{input.sym_size(1), 1, 1};
    return {
        affine(row.x_hat, weight, bias, shape).to(input.scalar_type()), row.mean_of_input.detach(),
        row.rstd.detach()};
  }

  static Tensor sum_like(const Tensor& tensor, const Normalized& normalized, const Tensor& parameter) {
    return tensor.sum_to_size_symint(normalized.shape)
        .reshape_symint(parameter.sym_sizes())
        .to(parameter.scalar_type());
  }

  // bias is for the shape and dtype of its gradient.
  static Triple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, const OptionalTensor& bias, Mask output_mask) {
    const Normalized normalized(input, mean);
    const Row row(input, normalized, rstd);
    const Tensor g = to_opmath(grad_output.contiguous());
    Triple gradients;
    if (output_mask[0]) {
      const Tensor projected = row.project(affine(g, weight, {}, normalized.shape));
      std::get<0>(gradients) = (row.rstd * projected).to(input.scalar_type());
    }
    if (output_mask[1]) {
      std::get<1>(gradients) = sum_like(g * row.x_hat, normalized, *weight);
    }
    if (output_mask[2]) {
      std::get<2>(gradients) = sum_like(g, normalized, *bias);
    }
    return gradients;
  }

  static Triple backward_2d(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, Mask output_mask) {
    check_2d_backward(grad_output, input, mean, rstd, weight);
    const Tensor parameter = like_parameter(input, weight);
    return backward(grad_output, input, mean, rstd, parameter, parameter, output_mask);
  }

  static Triple double_backward(
      const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
    check_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
    return any_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
  }

  // Any of the incoming gradients may be undefined.
  static Triple any_double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
    const Normalized normalized(input, mean);
    const Row row(input, normalized, rstd);
    const Tensor g = to_opmath(grad_output.contiguous());
    Tensor grad_grad_output, grad_input, grad_weight;
    const auto accumulate = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
    if (is_defined(grad_grad_input)) {
      const Tensor v = to_opmath(grad_grad_input->contiguous());
      const Tensor projected = row.project(v);
      if (output_mask[0]) {
        accumulate(grad_grad_output, affine(row.rstd * projected, weight, {}, normalized.shape));
      }
      if (output_mask[1]) {
        const Tensor gw = affine(g, weight, {}, normalized.shape);
        const Tensor gw_projected = row.project(gw);
        const Tensor sum = row.x_hat * row.mean(v * gw_projected) + projected * row.mean(gw * row.x_hat) +
                           gw_projected * row.mean(v * row.x_hat);
        accumulate(grad_input, -row.rstd * row.rstd * sum);
      }
      if (output_mask[2]) {
        grad_weight = sum_like(g * row.rstd * projected, normalized, *weight);
      }
    }
    if (is_defined(grad_grad_weight)) {
      if (output_mask[0]) {
        accumulate(grad_grad_output, affine(row.x_hat, grad_grad_weight, {}, normalized.shape));
      }
      if (output_mask[1]) {
        accumulate(grad_input, row.rstd * row.project(affine(g, grad_grad_weight, {}, normalized.shape)));
      }
    }
    if (is_defined(grad_grad_bias) && output_mask[0]) {
      accumulate(
          grad_grad_output,
          to_opmath(*grad_grad_bias).reshape_symint(normalized.shape).expand_symint(input.sym_sizes()));
    }
    const auto in_dtype = [&](const Tensor& tensor) {
      return tensor.defined() ? tensor.to(input.scalar_type()) : tensor;
    };
    return {in_dtype(grad_grad_output), in_dtype(grad_input), grad_weight};
  }

  // What stands for an absent parameter, of the channels of input.
  static Tensor like_parameter(const Tensor& input, const OptionalTensor& weight) {
    return is_defined(weight) ? *weight : at::ones_symint({input.sym_size(1)}, input.options());
  }
};

at::TensorOptions arithmetic_options(const Tensor& tensor) {
  return tensor.options().dtype(at::toOpMathType(tensor.scalar_type()));
}

Tensor empty_contiguous(const Tensor& like, bool wanted = true) {
  return wanted ? at::empty_like(like, at::MemoryFormat::Contiguous) : Tensor();
}

// The shape of the channels' statistics.
c10::SymDimVector statistics_shape(const Tensor& input) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape[1] = 1;
  return shape;
}

struct Cpu {
  // With 1 column in a row, or none, the statistics' sizes still say which rows there are.
  static NormalizedRows rows_of(const Tensor& input, const Tensor& mean) {
    int64_t inner = 1;
    for (auto d = input.dim() - 1; d >= 0 && mean.size(d) == input.size(d); --d) {
      inner *= input.size(d);
    }
    return {mean.numel() / inner, input.numel() / mean.numel(), inner};
  }
  static Tensor parameter(
      const OptionalTensor& parameter, double absent, const Tensor& input, const NormalizedRows& rows) {
    const auto options = arithmetic_options(input);
    return is_defined(parameter) ? parameter->to(options.dtype()).contiguous()
                                 : at::full({rows.columns}, absent, options);
  }
  static Tensor statistic(const Tensor& tensor, const Tensor& input) {
    return tensor.to(arithmetic_options(input).dtype()).contiguous();
  }
  static Tensor partial_sums(bool wanted, const Tensor& input, const NormalizedRows& rows) {
    return wanted ? at::empty({rows.chunks(), rows.columns}, arithmetic_options(input)) : Tensor();
  }
  static Tensor sum(const Tensor& partial_sums, const Tensor& like) {
    return partial_sums.defined() ? partial_sums.sum(0).view(like.sizes()).to(like.scalar_type()) : Tensor();
  }

  static Triple forward_2d(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    check_channels("", input, weight, bias);
    const auto shape = C10_AS_INTARRAYREF_SLOW(statistics_shape(input));
    Triple outputs{
        empty_contiguous(input), at::empty(shape, arithmetic_options(input)),
        at::empty(shape, arithmetic_options(input))};
    const auto& [output, mean, rstd] = outputs;
    if (input.numel() != 0) {
      const NormalizedRows rows = rows_of(input, mean);
      GRADNORM_KERNELS(layer_norm_kernels)
          .forward(
              {output, mean, rstd, input.contiguous(), parameter(weight, 1, input, rows),
               parameter(bias, 0, input, rows)},
              eps, rows);
    }
    return outputs;
  }

  static Triple backward_2d(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, Mask output_mask) {
    check_2d_backward(grad_output, input, mean, rstd, weight);
    const Tensor grad_input = empty_contiguous(input, output_mask[0]);
    const Tensor like = Composite::like_parameter(input, weight);
    if (input.numel() == 0) {
      const Tensor zeros = at::zeros_like(like);
      return {grad_input, output_mask[1] ? zeros : Tensor(), output_mask[2] ? zeros.clone() : Tensor()};
    }
    const NormalizedRows rows = rows_of(input, mean);
    const Tensor grad_weight = partial_sums(output_mask[1], input, rows);
    const Tensor grad_bias = partial_sums(output_mask[2], input, rows);
    GRADNORM_KERNELS(layer_norm_kernels)
        .backward(
            {grad_input, grad_weight, grad_bias, grad_output.contiguous(), input.contiguous(),
             statistic(mean, input), statistic(rstd, input), parameter(like, 1, input, rows)},
            rows);
    return {grad_input, sum(grad_weight, like), sum(grad_bias, like)};
  }

  static Triple double_backward(
      const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
    check_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
    const Tensor grad_grad_output = empty_contiguous(input, output_mask[0]);
    const Tensor grad_input = empty_contiguous(input, output_mask[1]);
    if (input.numel() == 0) {
      return {grad_grad_output, grad_input, output_mask[2] ? at::zeros_like(*weight) : Tensor()};
    }
    const NormalizedRows rows = rows_of(input, mean);
    const Tensor grad_weight = partial_sums(output_mask[2], input, rows);
    const bool parameters = is_defined(grad_grad_weight) || is_defined(grad_grad_bias);
    GRADNORM_KERNELS(layer_norm_kernels)
        .double_backward(
            {grad_grad_output, grad_input, grad_weight, grad_grad_input.contiguous(),
             parameters ? parameter(grad_grad_weight, 0, input, rows) : Tensor(),
             parameters ? parameter(grad_grad_bias, 0, input, rows) : Tensor(), grad_output.contiguous(),
             input.contiguous(), statistic(mean, input), statistic(rstd, input),
             parameter(weight, 1, input, rows)},
            rows);
    return {grad_grad_output, grad_input, output_mask[2] ? sum(grad_weight, *weight) : Tensor()};
  }
};

struct Meta {
  static Triple forward_2d(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    check_channels("", input, weight, bias);
    const Tensor mean = at::empty_symint(statistics_shape(input), arithmetic_options(input));
    return {empty_contiguous(input), mean, at::empty_like(mean)};
  }
  static Triple backward_2d(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, Mask output_mask) {
    check_2d_backward(grad_output, input, mean, rstd, weight);
    const Tensor like = Composite::like_parameter(input, weight);
    return {
        empty_contiguous(input, output_mask[0]), empty_contiguous(like, output_mask[1]),
        empty_contiguous(like, output_mask[2])};
  }
  static Triple double_backward(
      const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
    check_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
    return {
        empty_contiguous(input, output_mask[0]), empty_contiguous(input, output_mask[1]),
        output_mask[2] ? at::empty_like(*weight) : Tensor()};
  }
};

// PyTorch's own forward, on every device.
struct Native {
  static Tensor forward(
      const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps) {
    check_rows(input, normalized_shape, weight, bias);
    return std::get<0>(at::native_layer_norm_symint(input, normalized_shape, weight, bias, eps));
  }
};

// The number of last dimensions that are normalised; 0 for the channels of NCHW.
using Ndim = int64_t;
constexpr Ndim kNchw = 0;

struct Backward : torch::autograd::Function<Backward> {
  // Its outputs are those gradients that output_mask asks for: a Function cannot return undefined tensors.
  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& mean,
      const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias, Ndim ndim,
      const Mask& output_mask) {
    ctx->save_for_backward({grad_output, input, mean, rstd, value(weight)});
    ctx->saved_data["output_mask"] = c10::List<bool>({output_mask[0], output_mask[1], output_mask[2]});
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [grad_input, grad_weight, grad_bias] =
        value_of(grad_output, input, mean, rstd, value(weight), value(bias), ndim, output_mask);
    return gather({grad_input, grad_weight, grad_bias}, output_mask);
  }

  static variable_list gather(const variable_list& all, const Mask& output_mask) {
    variable_list tensors;
    for (size_t k = 0; k < all.size(); ++k) {
      if (output_mask[k]) {
        tensors.push_back(all[k]);
      }
    }
    return tensors;
  }
  // Back at their places.
  template <class Wanted>
  static variable_list spread(const variable_list& tensors, const Wanted& output_mask) {
    variable_list all(3);
    auto next = tensors.begin();
    for (size_t k = 0; k < 3; ++k) {
      if (output_mask[k]) {
        all[k] = *next++;
      }
    }
    return all;
  }

  // Below autograd.
  static Triple value_of(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const Tensor& weight, const Tensor& bias, Ndim ndim, const Mask& output_mask) {
    if (ndim == kNchw) {
      return call_2d_backward(grad_output, input, mean, rstd, weight, output_mask);
    }
    return at::native_layer_norm_backward_symint(
        grad_output, input, input.sym_sizes().slice(input.dim() - ndim), mean, rstd, weight, bias,
        output_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& wanted_grads) {
    const auto grads = spread(wanted_grads, ctx->saved_data["output_mask"].toBoolList());
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &mean = saved[2], &rstd = saved[3],
                 &weight = saved[4];
    const Tensor &grad_grad_input = grads[0], &grad_grad_weight = grads[1], &grad_grad_bias = grads[2];
    const Mask mask{
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), weight.defined() && ctx->needs_input_grad(4)};
    Triple gradients;
    if (grad_grad_input.defined()) {
      gradients = call_double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, mask);
    } else if (grad_grad_weight.defined() || grad_grad_bias.defined()) {
      // Only where nothing before this layer is differentiated.
      gradients = Composite::any_double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight, mask);
    }
    // mean and rstd are functions of the input, whose gradient has their part in it.
    return {
        std::get<0>(gradients),
        std::get<1>(gradients),
        Tensor(),
        Tensor(),
        std::get<2>(gradients),
        Tensor(),
        Tensor(),
        Tensor()};
  }

  static Triple dispatch(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const Tensor& weight, const Tensor& bias, Ndim ndim, const Mask& output_mask) {
    if (!torch::autograd::compute_requires_grad(grad_output, input, weight)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return value_of(grad_output, input, mean, rstd, weight, bias, ndim, output_mask);
    }
    const auto gradients = spread(
        apply(
            grad_output, input, mean, rstd, OptionalTensor(weight), OptionalTensor(bias), ndim, output_mask),
        output_mask);
    return {gradients[0], gradients[1], gradients[2]};
  }
};

// (output, mean, rstd)
struct Forward : torch::autograd::Function<Forward> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      double eps, Ndim ndim) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] =
        ndim == kNchw ? call_2d(input, weight, bias, eps)
                      : at::native_layer_norm_symint(
                            input, input.sym_sizes().slice(input.dim() - ndim), weight, bias, eps);
    ctx->save_for_backward({input, value(weight), value(bias), mean, rstd});
    ctx->saved_data["ndim"] = ndim;
    ctx->mark_non_differentiable({mean, rstd});
    return {output, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) {
      return variable_list(5);
    }
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    // An optional argument that is absent has no number among the inputs.
    const Mask mask{
        ctx->needs_input_grad(0), weight.defined() && ctx->needs_input_grad(1),
        bias.defined() && ctx->needs_input_grad(weight.defined() ? 2 : 1)};
    auto [grad_input, grad_weight, grad_bias] =
        needs_composite({grad_output, input, weight})
            ? Composite::backward(grad_output, input, mean, rstd, weight, bias, mask)
            : Backward::dispatch(
                  grad_output, input, mean, rstd, weight, bias, ctx->saved_data["ndim"].toInt(), mask);
    return {grad_input, grad_weight, grad_bias, Tensor(), Tensor()};
  }
};

struct Autograd {
  static Tensor forward(
      const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps) {
    const Tensor w = value(weight), b = value(bias);
    if (needs_composite({input, w, b})) {
      return Composite::forward(input, normalized_shape, weight, bias, eps);
    }
    if (!torch::autograd::compute_requires_grad(input, w, b)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return Native::forward(input, normalized_shape, weight, bias, eps);
    }
    check_rows(input, normalized_shape, weight, bias);
    // All passes want it contiguous: it is copied, if at all, once.
    return Forward::apply(
        input.contiguous(), OptionalTensor(w), OptionalTensor(b), eps,
        static_cast<Ndim>(normalized_shape.size()))[0];
  }

  static Triple forward_2d(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    const Tensor w = value(weight), b = value(bias);
    if (needs_composite({input, w, b})) {
      return Composite::forward_2d(input, weight, bias, eps);
    }
    if (!torch::autograd::compute_requires_grad(input, w, b)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call_2d(input, weight, bias, eps);
    }
    check_channels("", input, weight, bias);
    const auto outputs = Forward::apply(input.contiguous(), OptionalTensor(w), OptionalTensor(b), eps, kNchw);
    return {outputs[0], outputs[1], outputs[2]};
  }

  static Triple backward_2d(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, Mask output_mask) {
    const Tensor w = value(weight);
    if (needs_composite({grad_output, input, w})) {
      return Composite::backward_2d(grad_output, input, mean, rstd, weight, output_mask);
    }
    return Backward::dispatch(grad_output, input, mean, rstd, w, Tensor(), kNchw, output_mask);
  }

  static Triple double_backward(
      const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight, Mask output_mask) {
    const Tensor ggw = value(grad_grad_weight), ggb = value(grad_grad_bias), w = value(weight);
    if (needs_composite({grad_grad_input, ggw, ggb, grad_output, input, w}) ||
        torch::autograd::compute_requires_grad(grad_grad_input, ggw, ggb, grad_output, input, w)) {
      return Composite::double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
          output_mask);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
  }
};

// CUDA's autocast runs layer_norm in float32; the CPU's leaves it alone.
struct AutocastCuda {
  static Tensor cast(const Tensor& tensor) {
    return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA);
  }
  static OptionalTensor cast(const OptionalTensor& tensor) {
    return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA);
  }
  static Tensor forward(
      const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    static const auto op = find_op<decltype(forward)>("gradnorm_kernels::layer_norm");
    return op.call(cast(input), normalized_shape, cast(weight), cast(bias), eps);
  }
  static Triple forward_2d(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call_2d(cast(input), cast(weight), cast(bias), eps);
  }
};

// aten::native_layer_norm_backward whose own backward is fused. Whatever ours does not cover stays PyTorch's.
struct AtenLayerNormBackward {
  static StockKernel& stock() {
    static StockKernel kernel("aten::native_layer_norm_backward");
    return kernel;
  }

  static bool is_covered(
      const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& weight,
      const Tensor& bias, const Mask& output_mask) {
    return is_elementwise_match(grad_output, input) && mean.defined() && mean.dim() == input.dim() &&
           (weight.defined() ? weight.scalar_type() == input.scalar_type() : !output_mask[1]) &&
           (bias.defined() || !output_mask[2]);
  }

  static Triple autograd(
      c10::DispatchKeySet keys, const Tensor& grad_out, const Tensor& input,
      c10::SymIntArrayRef normalized_shape, const Tensor& mean, const Tensor& rstd,
      const OptionalTensor& weight, const OptionalTensor& bias, Mask output_mask) {
    const Tensor w = value(weight), b = value(bias);
    if (needs_composite({grad_out, input, w}) || !is_covered(grad_out, input, mean, w, b, output_mask)) {
      return stock().call<Triple>(
          keys, grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
    }
    return Backward::dispatch(
        grad_out, input, mean, rstd, w, b, static_cast<Ndim>(normalized_shape.size()), output_mask);
  }

  static void install(torch::Library& aten_autograd) {
    stock();
    aten_autograd.impl("native_layer_norm_backward", &autograd);
  }
};

const StockOverride layer_norm_override(&AtenLayerNormBackward::install);

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05) -> Tensor");
  m.def(
      "layer_norm_2d(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-06) "
      "-> (Tensor output, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "layer_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, bool[3] output_mask) "
      "-> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)");
}

template <class Kernels>
void implement(torch::Library& m) {
  m.impl("layer_norm_2d", &Kernels::forward_2d);
  m.impl("layer_norm_2d_backward", &Kernels::backward_2d);
  m.impl("layer_norm_double_backward", &Kernels::double_backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  implement<Cpu>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  implement<Meta>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  m.impl("layer_norm", &Autograd::forward);
  implement<Autograd>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  m.impl("layer_norm", &AutocastCuda::forward);
  m.impl("layer_norm_2d", &AutocastCuda::forward_2d);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  m.impl("layer_norm", &Composite::forward);
  implement<Composite>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  m.impl("layer_norm", &Native::forward);
  // Devices without a kernel of ours.
  implement<Composite>(m);
}

}  // namespace
}  // namespace gradnorm_kernels::layer_norm
