// Batch normalisation: schemas, autograd Functions, and the CPU, meta and composite implementations of its
// ops. Forward and first backward are ATen's own kernels, the first backward of the evaluation mode excepted.
#include "cpu/batch_norm.h"

#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::batch_norm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;
using Mask = std::array<bool, 3>;

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
Tensor value(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

// The running statistics where training is false, those of the batch where it is true.
struct Statistics {
  OptionalTensor running_mean, running_var, save_mean, save_invstd;
  bool training;
  double eps;

  // With what is not used left out.
  static Statistics of(const OptionalTensor& mean, const OptionalTensor& spread, bool training, double eps) {
    return training ? Statistics{{}, {}, mean, spread, training, eps}
                    : Statistics{mean, spread, {}, {}, training, eps};
  }
  // The mean, and the variance or, in training, the inverse standard deviation.
  const OptionalTensor& mean() const {
    return training ? save_mean : running_mean;
  }
  const OptionalTensor& spread() const {
    return training ? save_invstd : running_var;
  }
};

TensorTriple call_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight, const Statistics& s,
    Mask output_mask) {
  static const auto op = find_op<TensorTriple(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool, double, Mask)>(
      "gradnorm_kernels::batch_norm_backward");
  return op.call(
      grad_output, input, weight, s.running_mean, s.running_var, s.save_mean, s.save_invstd, s.training,
      s.eps, output_mask);
}

TensorTriple call_double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
    const OptionalTensor& weight, const Statistics& s) {
  static const auto op = find_op<TensorTriple(
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, bool, double)>(
      "gradnorm_kernels::batch_norm_double_backward");
  return op.call(
      grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s.running_mean,
      s.running_var, s.save_mean, s.save_invstd, s.training, s.eps);
}

void check_dimensions(const char* suffix, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.dim() >= 2, "batch_norm", suffix, ": expected ", name,
      " to have at least 2 dimensions, got shape ", tensor.sym_sizes());
}

// Each is undefined, or has one number for each channel of like.
void check_channels(
    const char* suffix, const Tensor& like,
    std::initializer_list<std::pair<const char*, OptionalTensor>> all) {
  for (const auto& [name, tensor] : all) {
    if (!tensor.has_value()) {
      continue;
    }
    check_floating("batch_norm", suffix, {{"input", like}, {name, *tensor}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        tensor->dim() == 1 && tensor->sym_size(0) == like.sym_size(1), "batch_norm", suffix, ": expected ",
        name, " to have shape [", like.sym_size(1), "], one number for each channel of input, got ",
        tensor->sym_sizes());
  }
}

void check_given(const char* suffix, const char* name, bool given, const char* mode) {
  TORCH_CHECK_VALUE(given, "batch_norm", suffix, ": expected ", name, " to be given ", mode);
}

void check_statistics(const char* suffix, const Tensor& like, const Statistics& s) {
  const char* mean = s.training ? "save_mean" : "running_mean";
  const char* spread = s.training ? "save_invstd" : "running_var";
  const char* mode = s.training ? "where training is True" : "where training is False";
  check_given(suffix, mean, s.mean().has_value(), mode);
  check_given(suffix, spread, s.spread().has_value(), mode);
  check_channels(suffix, like, {{mean, s.mean()}, {spread, s.spread()}});
}

void check_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training) {
  check_floating("batch_norm", "", {{"input", input}});
  check_dimensions("", "input", input);
  check_channels(
      "", input,
      {{"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}});
  if (training) {
    TORCH_CHECK_VALUE(
        running_mean.has_value() == running_var.has_value(),
        "batch_norm: expected running_mean and running_var to be given together");
    c10::SymInt values = input.sym_size(0);
    for (const auto& size : input.sym_sizes().slice(2)) {
      values = values * size;
    }
    TORCH_CHECK_VALUE(
        values != 1,
        "batch_norm: expected input to have more than 1 value per channel where training is True, got shape ",
        input.sym_sizes());
  } else {
    check_given("", "running_mean", running_mean.has_value(), "where training is False");
    check_given("", "running_var", running_var.has_value(), "where training is False");
  }
}

void check_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight, const Statistics& s,
    Mask output_mask) {
  if (input.has_value()) {
    check_elementwise("batch_norm", "_backward", {{"input", *input}, {"grad_output", grad_output}});
  } else {
    check_floating("batch_norm", "_backward", {{"grad_output", grad_output}});
    check_given("_backward", "input", !s.training && !output_mask[1], "where it is read");
  }
  check_dimensions("_backward", "grad_output", grad_output);
  check_channels("_backward", grad_output, {{"weight", weight}});
  check_statistics("_backward", grad_output, s);
}

void check_double_backward(
    const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
    const OptionalTensor& weight, const Statistics& s) {
  const Tensor& like = input.has_value() ? *input : grad_output;
  check_elementwise(
      "batch_norm", "_double_backward",
      {{"input", like},
       {"grad_output", grad_output},
       {"grad_grad_input", grad_grad_input.has_value() ? *grad_grad_input : like}});
  check_dimensions("_double_backward", "grad_output", grad_output);
  check_given(
      "_double_backward", "input", input.has_value() || (!s.training && !grad_grad_weight.has_value()),
      "where it is read");
  check_channels(
      "_double_backward", like,
      {{"weight", weight}, {"grad_grad_weight", grad_grad_weight}, {"grad_grad_bias", grad_grad_bias}});
  check_statistics("_double_backward", like, s);
}

at::ScalarType opmath(const Tensor& tensor) {
  return at::toOpMathType(tensor.scalar_type());
}

at::ScalarType parameter_dtype(const OptionalTensor& weight, const Tensor& like) {
  return weight.has_value() ? weight->scalar_type() : opmath(like);
}

// A layout that our kernels take, contiguous or with interleaved channels (channels_last).
bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && tensor.movedim(1, -1).is_contiguous();
}
Tensor in_layout(const Tensor& tensor, bool channels_last) {
  return channels_last ? tensor.movedim(1, -1).contiguous().movedim(-1, 1) : tensor.contiguous();
}
ChannelLayout layout_of(const Tensor& tensor, bool channels_last) {
  const int64_t channels = tensor.size(1);
  if (channels_last) {
    return {tensor.numel() / channels, channels, 1};
  }
  return {tensor.size(0), channels, tensor.numel() / (tensor.size(0) * channels)};
}

// One number for each channel.
std::vector<double> channel_values(const OptionalTensor& tensor, int64_t channels, double otherwise) {
  if (!tensor.has_value()) {
    return std::vector<double>(channels, otherwise);
  }
  const Tensor values = tensor->to(at::kDouble).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + channels};
}

std::vector<double> channel_invstd(const Statistics& s, int64_t channels) {
  auto values = channel_values(s.spread(), channels, 1);
  if (!s.training) {
    for (double& value : values) {
      value = 1 / std::sqrt(value + s.eps);
    }
  }
  return values;
}

// PyTorch's own kernels; which of them, its backend index says.
auto aten_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
    double eps) {
  if (training) {
    for (const auto& statistic : {running_mean, running_var}) {
      if (statistic.has_value() && !statistic->is_inference()) {
        torch::autograd::impl::bump_version(*statistic);
      }
    }
  }
  return at::_batch_norm_impl_index(
      input, weight, bias, running_mean, running_var, training, momentum, eps,
      at::globalContext().userEnabledCuDNN());
}

TensorTriple aten_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight, const Statistics& s,
    Mask output_mask) {
  // The CPU's takes what it has of each channel for contiguous.
  const auto dense = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor;
  };
  return at::native_batch_norm_backward(
      grad_output, value(input), dense(weight), dense(s.running_mean), dense(s.running_var),
      dense(s.save_mean), dense(s.save_invstd), s.training, s.eps, output_mask);
}

// Plain ATen ops, differentiable to any order: for torch.func, compilers, the third order, and devices
// without a kernel of ours. In training the statistics are those of input, computed here: as constants,
// which save_mean and save_invstd are to ATen's own formulas, they make the third order wrong.
struct Composite {
  struct Normalized {
    Tensor deviation;  // from the mean
    Tensor invstd;

    Tensor value() const {
      return deviation * invstd;
    }
  };

  static std::vector<int64_t> all_but_channels(const Tensor& tensor) {
    std::vector<int64_t> dims;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      if (dim != 1) {
        dims.push_back(dim);
      }
    }
    return dims;
  }
  static Tensor sum(const Tensor& tensor) {
    return tensor.sum(all_but_channels(tensor));
  }
  static Tensor mean(const Tensor& tensor) {
    return tensor.mean(all_but_channels(tensor), /*keepdim=*/true);
  }
  static Tensor expand(const Tensor& per_channel, const Tensor& like) {
    std::vector<int64_t> shape(like.dim() - 1, 1);
    shape[0] = -1;
    return per_channel.to(like.scalar_type()).reshape(shape);
  }
  static Tensor times(const Tensor& tensor, const OptionalTensor& per_channel) {
    return per_channel.has_value() ? tensor * expand(*per_channel, tensor) : tensor;
  }
  static Normalized normalize(const Tensor& x, const Statistics& s) {
    if (!s.training) {
      return {x - expand(*s.running_mean, x), invstd(x, s)};
    }
    const Tensor deviation = x - mean(x);
    return {deviation, (mean(deviation * deviation) + s.eps).rsqrt()};
  }
  // Of the running statistics.
  static Tensor invstd(const Tensor& like, const Statistics& s) {
    return (expand(*s.running_var, like) + s.eps).rsqrt();
  }
  static Tensor as(const Tensor& result, at::ScalarType dtype) {
    return result.to(dtype);
  }

  static Tensor forward(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
      double eps) {
    check_forward(input, weight, bias, running_mean, running_var, training);
    if (training && running_mean.has_value()) {
      // For its effect on the running statistics, in the way that each transform knows.
      at::native_batch_norm(input.detach(), {}, {}, running_mean, running_var, training, momentum, eps);
    }
    const Statistics statistics{running_mean, running_var, {}, {}, training, eps};
    const Tensor output = times(normalize(to_opmath(input), statistics).value(), weight);
    return as(bias.has_value() ? output + expand(*bias, output) : output, input.scalar_type());
  }

  static TensorTriple backward(
      const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& save_mean,
      const OptionalTensor& save_invstd, bool training, double eps, Mask output_mask) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_backward(grad_output, input, weight, s, output_mask);
    const Tensor g = to_opmath(grad_output);
    Tensor grad_input, grad_weight, grad_bias, h, r;
    if (training || output_mask[1]) {
      const auto normalized = normalize(to_opmath(*input), s);
      h = normalized.value();
      r = normalized.invstd;
    } else {
      r = invstd(g, s);
    }
    if (output_mask[0]) {
      grad_input = times(training ? g - mean(g) - h * mean(g * h) : g, weight) * r;
      grad_input = as(grad_input, grad_output.scalar_type());
    }
    if (output_mask[1]) {
      grad_weight = as(sum(g * h), parameter_dtype(weight, g));
    }
    if (output_mask[2]) {
      grad_bias = as(sum(g), parameter_dtype(weight, g));
    }
    return {grad_input, grad_weight, grad_bias};
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
      const OptionalTensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& save_mean, const OptionalTensor& save_invstd, bool training, double eps) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_double_backward(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s);
    const Tensor g = to_opmath(grad_output);
    Tensor grad_grad_output, grad_input, grad_weight;
    Normalized normalized;
    if (input.has_value()) {
      normalized = normalize(to_opmath(*input), s);
    }
    const Tensor r = input.has_value() ? normalized.invstd : invstd(g, s);
    const auto add = [](Tensor& total, const Tensor& term) { total = total.defined() ? total + term : term; };
    // What the mean and the variance take away from a gradient.
    const auto centred = [&](const Tensor& a) {
      const Tensor h = normalized.value();
      return a - mean(a) - h * mean(a * h);
    };
    if (grad_grad_input.has_value()) {
      const Tensor v = to_opmath(*grad_grad_input);
      const Tensor slope = training ? centred(v) : v;
      grad_grad_output = times(slope, weight) * r;
      grad_weight = as(sum(slope * g * r), parameter_dtype(weight, g));
      if (training) {
        const Tensor h = normalized.value();
        const Tensor curvature = centred(g) * mean(v * h) + slope * mean(g * h) + h * mean(slope * g);
        grad_input = times(curvature, weight) * (-r * r);
      }
    }
    if (grad_grad_weight.has_value()) {
      const Tensor u = expand(*grad_grad_weight, g);
      add(grad_grad_output, normalized.value() * u);
      add(grad_input, (training ? centred(g) : g) * (u * r));
    }
    if (grad_grad_bias.has_value()) {
      add(grad_grad_output, expand(*grad_grad_bias, g).expand_as(g));
    }
    const auto dtype = grad_output.scalar_type();
    return {
        grad_grad_output.defined() ? as(grad_grad_output, dtype) : grad_grad_output,
        grad_input.defined() ? as(grad_input, dtype) : grad_input, grad_weight};
  }
};

// Where only the gradient of the input is wanted in evaluation mode, input is not read, and need not be
// given.
struct Cpu {
  static Tensor forward(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
      double eps) {
    check_forward(input, weight, bias, running_mean, running_var, training);
    return std::get<0>(aten_forward(input, weight, bias, running_mean, running_var, training, momentum, eps));
  }

  static TensorTriple backward(
      const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& save_mean,
      const OptionalTensor& save_invstd, bool training, double eps, Mask output_mask) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_backward(grad_output, input, weight, s, output_mask);
    if (grad_output.numel() == 0) {
      return Composite::backward(
          grad_output, input, weight, running_mean, running_var, save_mean, save_invstd, training, eps,
          output_mask);
    }
    if (training) {
      return aten_backward(grad_output, input, weight, s, output_mask);
    }
    const bool channels_last = is_channels_last(input.value_or(grad_output));
    const Tensor g = in_layout(grad_output, channels_last);
    // What only grad_bias needs multiplies a sum that is not wanted.
    const Tensor x = input.has_value() ? in_layout(*input, channels_last) : g;
    const auto layout = layout_of(g, channels_last);
    const int64_t channels = layout.channels;
    const auto mean = channel_values(s.mean(), channels, 0), invstd = channel_invstd(s, channels);
    auto scale = channel_values(weight, channels, 1);
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] *= invstd[c];
    }
    Tensor grad_input = at::empty_like(g);
    Tensor grad_weight, grad_bias;
    if (output_mask[1] || output_mask[2]) {
      grad_weight = at::empty({channels}, g.options().dtype(at::kDouble));
      grad_bias = at::empty_like(grad_weight);
    }
    GRADNORM_KERNELS(batch_norm_kernels)
        .scale(
            g.scalar_type(), layout, g.const_data_ptr(), x.const_data_ptr(), scale.data(), mean.data(),
            grad_input.mutable_data_ptr(), data(grad_bias), data(grad_weight));
    const auto dtype = parameter_dtype(weight, g);
    if (output_mask[1]) {
      times(grad_weight, invstd);
    }
    grad_weight = output_mask[1] ? grad_weight.to(dtype) : Tensor();
    grad_bias = output_mask[2] ? grad_bias.to(dtype) : Tensor();
    return {output_mask[0] ? grad_input : Tensor(), grad_weight, grad_bias};
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
      const OptionalTensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& save_mean, const OptionalTensor& save_invstd, bool training, double eps) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_double_backward(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s);
    if (grad_output.numel() == 0) {
      return Composite::double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, running_mean,
          running_var, save_mean, save_invstd, training, eps);
    }
    const bool channels_last = is_channels_last(input.value_or(grad_output));
    const Tensor g = in_layout(grad_output, channels_last);
    // Undefined where only gradients of parameters are differentiated: seldom, and not worth a kernel.
    const Tensor v =
        grad_grad_input.has_value() ? in_layout(*grad_grad_input, channels_last) : at::zeros_like(g);
    const auto layout = layout_of(g, channels_last);
    const int64_t channels = layout.channels;
    const auto invstd = channel_invstd(s, channels);
    auto scale = channel_values(weight, channels, 1);
    Tensor grad_grad_output = at::empty_like(g), grad_input;
    const Tensor grad_weight = at::empty({channels}, g.options().dtype(at::kDouble));
    const auto& kernels = GRADNORM_KERNELS(batch_norm_kernels);
    if (input.has_value()) {
      const Tensor x = in_layout(*input, channels_last);
      const auto mean = channel_values(s.mean(), channels, 0),
                 u = channel_values(grad_grad_weight, channels, 0),
                 t = channel_values(grad_grad_bias, channels, 0);
      grad_input = at::empty_like(x);
      kernels.double_backward(
          g.scalar_type(), layout, {scale.data(), mean.data(), invstd.data(), u.data(), t.data()}, training,
          v.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr(), grad_grad_output.mutable_data_ptr(),
          grad_input.mutable_data_ptr(), data(grad_weight));
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        scale[c] *= invstd[c];
      }
      const std::vector<double> zero(channels, 0);
      std::vector<double> unused(channels);
      kernels.scale(
          g.scalar_type(), layout, v.const_data_ptr(), g.const_data_ptr(), scale.data(), zero.data(),
          grad_grad_output.mutable_data_ptr(), unused.data(), data(grad_weight));
      times(grad_weight, invstd);
      if (grad_grad_bias.has_value()) {
        grad_grad_output.add_(Composite::expand(*grad_grad_bias, grad_grad_output));
      }
    }
    return {
        grad_grad_output, grad_input,
        grad_grad_input.has_value() ? grad_weight.to(parameter_dtype(weight, g)) : Tensor()};
  }

 private:
  static double* data(const Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<double>() : nullptr;
  }
  static void times(const Tensor& per_channel, const std::vector<double>& factors) {
    for (size_t c = 0; c < factors.size(); ++c) {
      data(per_channel)[c] *= factors[c];
    }
  }
};

struct Meta {
  static Tensor parameter_like(const OptionalTensor& weight, const Tensor& like) {
    return at::empty_symint({like.sym_size(1)}, like.options().dtype(parameter_dtype(weight, like)));
  }
  static Tensor empty_in_layout_of(const Tensor& like) {
    return at::empty_like(in_layout(like, is_channels_last(like)));
  }

  static TensorTriple backward(
      const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& save_mean,
      const OptionalTensor& save_invstd, bool training, double eps, Mask output_mask) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_backward(grad_output, input, weight, s, output_mask);
    if (training) {
      return aten_backward(grad_output, input, weight, s, output_mask);
    }
    return {
        output_mask[0] ? empty_in_layout_of(input.value_or(grad_output)) : Tensor(),
        output_mask[1] ? parameter_like(weight, grad_output) : Tensor(),
        output_mask[2] ? parameter_like(weight, grad_output) : Tensor()};
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
      const OptionalTensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& save_mean, const OptionalTensor& save_invstd, bool training, double eps) {
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_double_backward(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s);
    const Tensor grad_grad_output = empty_in_layout_of(input.value_or(grad_output));
    return {
        grad_grad_output, input.has_value() ? at::empty_like(grad_grad_output) : Tensor(),
        grad_grad_input.has_value() ? parameter_like(weight, grad_output) : Tensor()};
  }
};

// first computes the gradients: a kernel of PyTorch's, or ours. Those that it leaves undefined are no outputs
// of the Function, which cannot have such.
struct Backward : torch::autograd::Function<Backward> {
  using First = c10::function_ref<TensorTriple()>;

  static variable_list forward(
      AutogradContext* ctx, const Tensor& grad_output, const OptionalTensor& input,
      const OptionalTensor& weight, const Statistics& s, First first) {
    ctx->save_for_backward({grad_output, value(input), value(weight), value(s.mean()), value(s.spread())});
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [grad_input, grad_weight, grad_bias] = first();
    ctx->saved_data["mode"] =
        std::make_tuple(s.training, s.eps, grad_input.defined(), grad_weight.defined(), grad_bias.defined());
    variable_list outputs;
    for (const auto& gradient : {grad_input, grad_weight, grad_bias}) {
      if (gradient.defined()) {
        outputs.push_back(gradient);
      }
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    const auto [training, eps, has_input, has_weight, has_bias] =
        ctx->saved_data["mode"].to<std::tuple<bool, double, bool, bool, bool>>();
    const auto [v, u, t] = spread(grads, {has_input, has_weight, has_bias});
    if (!v.defined() && !u.defined() && !t.defined()) {
      return results;
    }
    const auto saved = ctx->get_saved_variables();
    const Tensor& grad_output = saved[0];
    const OptionalTensor input = optional(saved[1]), weight = optional(saved[2]);
    const auto s = Statistics::of(optional(saved[3]), optional(saved[4]), training, eps);
    // Counted by the tensors that were there.
    const bool needs_input = input.has_value() && ctx->needs_input_grad(1),
               needs_weight = weight.has_value() && ctx->needs_input_grad(1 + input.has_value());
    if (!u.defined() && !t.defined() && !(needs_input && training) && !needs_weight) {
      // The first backward is linear in grad_output.
      results[0] =
          std::get<0>(call_backward(v, training ? input : std::nullopt, weight, s, {true, false, false}));
      return results;
    }
    const bool reads_input = training || u.defined();
    auto [grad_grad_output, grad_input, grad_weight] = call_double_backward(
        optional(v), optional(u), optional(t), grad_output, reads_input ? input : std::nullopt, weight, s);
    results[0] = grad_grad_output;
    if (needs_input && (training || u.defined())) {
      results[1] = grad_input;
    }
    if (needs_weight) {
      results[2] = grad_weight;
    }
    return results;
  }

  // first's result, recorded where anything requires a gradient.
  static TensorTriple record(
      const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
      const Statistics& s, First first) {
    if (!torch::autograd::compute_requires_grad(grad_output, value(input), value(weight))) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return first();
    }
    Mask is_output;
    const auto outputs = apply(grad_output, input, weight, s, [&] {
      const auto gradients = first();
      is_output = {
          std::get<0>(gradients).defined(), std::get<1>(gradients).defined(),
          std::get<2>(gradients).defined()};
      return gradients;
    });
    return spread(outputs, is_output);
  }

 private:
  // The tensors at the places that have one.
  static TensorTriple spread(const variable_list& tensors, Mask places) {
    auto next = tensors.begin();
    const auto take = [&](bool has_one) { return has_one ? *next++ : Tensor(); };
    // In the order of a braced list.
    return TensorTriple{take(places[0]), take(places[1]), take(places[2])};
  }
};

struct Forward : torch::autograd::Function<Forward> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const Statistics& s, double momentum) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, save_mean, save_invstd, reserve, backend] =
        aten_forward(input, weight, bias, s.running_mean, s.running_var, s.training, momentum, s.eps);
    if (s.training) {
      ctx->save_for_backward({input, value(weight), save_mean, save_invstd, reserve});
    } else {
      ctx->save_for_backward({input, value(weight), value(s.running_mean), value(s.running_var)});
    }
    ctx->saved_data["mode"] = std::make_tuple(s.training, s.eps, backend, bias.has_value());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list results(5);
    const Tensor& grad_output = grad_outputs[0];
    if (!grad_output.defined()) {
      return results;
    }
    const auto saved = ctx->get_saved_variables();
    const Tensor& input = saved[0];
    const OptionalTensor weight = optional(saved[1]);
    const auto [training, eps, backend, has_bias] =
        ctx->saved_data["mode"].to<std::tuple<bool, double, int64_t, bool>>();
    const auto s = Statistics::of(saved[2], saved[3], training, eps);
    // Counted by the tensors that were there.
    const Mask mask{
        ctx->needs_input_grad(0), weight.has_value() && ctx->needs_input_grad(1),
        has_bias && ctx->needs_input_grad(1 + weight.has_value())};
    constexpr int64_t native = 0;
    TensorTriple gradients;
    if (!training || backend == native || needs_composite({grad_output, input, value(weight)})) {
      gradients =
          call_backward(grad_output, training || mask[1] ? optional(input) : std::nullopt, weight, s, mask);
    } else {
      const Tensor& reserve = saved[4];
      gradients = Backward::record(grad_output, input, weight, s, [&] {
        return at::_batch_norm_impl_index_backward(
            backend, input, grad_output.contiguous(input.suggest_memory_format()), weight, s.running_mean,
            s.running_var, s.save_mean, s.save_invstd, s.training, s.eps, mask,
            // cuDNN may write into it.
            reserve.clone());
      });
    }
    for (size_t k = 0; k < mask.size(); ++k) {
      if (mask[k]) {
        results[k] = k == 0   ? std::get<0>(gradients)
                     : k == 1 ? std::get<1>(gradients)
                              : std::get<2>(gradients);
      }
    }
    return results;
  }
};

struct Autograd {
  static Tensor forward(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
      double eps) {
    check_forward(input, weight, bias, running_mean, running_var, training);
    if (input.sym_numel() == 0) {
      return at::batch_norm(
          input, weight, bias, running_mean, running_var, training, momentum, eps, /*cudnn_enabled=*/false);
    }
    if (needs_composite({input, value(weight), value(bias)})) {
      return Composite::forward(input, weight, bias, running_mean, running_var, training, momentum, eps);
    }
    for (const auto& [name, statistic] :
         {std::pair("running_mean", running_mean), std::pair("running_var", running_var)}) {
      TORCH_CHECK_VALUE(
          !statistic.has_value() || !torch::autograd::compute_requires_grad(*statistic),
          "batch_norm: expected ", name, " not to require a gradient");
    }
    if (!torch::autograd::compute_requires_grad(input, value(weight), value(bias))) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::get<0>(
          aten_forward(input, weight, bias, running_mean, running_var, training, momentum, eps));
    }
    return Forward::apply(
        input, weight, bias, Statistics{running_mean, running_var, {}, {}, training, eps}, momentum);
  }

  static TensorTriple backward(
      const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
      const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& save_mean,
      const OptionalTensor& save_invstd, bool training, double eps, Mask output_mask) {
    if (needs_composite({grad_output, value(input), value(weight)})) {
      return Composite::backward(
          grad_output, input, weight, running_mean, running_var, save_mean, save_invstd, training, eps,
          output_mask);
    }
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_backward(grad_output, input, weight, s, output_mask);
    return Backward::record(grad_output, input, weight, s, [&] {
      return training && grad_output.numel() != 0 ? aten_backward(grad_output, input, weight, s, output_mask)
                                                  : call_backward(grad_output, input, weight, s, output_mask);
    });
  }

  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const OptionalTensor& input,
      const OptionalTensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& save_mean, const OptionalTensor& save_invstd, bool training, double eps) {
    const std::array operands{value(grad_grad_input), value(grad_grad_weight),
                              value(grad_grad_bias),  grad_output,
                              value(input),           value(weight)};
    bool composite = false;
    for (const auto& operand : operands) {
      composite |= operand.defined() &&
                   (needs_composite({operand}) || torch::autograd::compute_requires_grad(operand));
    }
    if (composite) {
      return Composite::double_backward(
          grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, running_mean,
          running_var, save_mean, save_invstd, training, eps);
    }
    const Statistics s{running_mean, running_var, save_mean, save_invstd, training, eps};
    check_double_backward(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_double_backward(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight, s);
  }
};

// PyTorch's own backwards of batch normalisation, whose own backward is fused. Whatever ours does not cover
// stays PyTorch's.
struct AtenBatchNormBackward {
  static bool is_covered(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Statistics& s) {
    const auto is_real = [](const Tensor& tensor) {
      return tensor.defined() && at::isFloatingType(tensor.scalar_type()) && tensor.layout() == at::kStrided;
    };
    return !needs_composite({grad_output, input, weight}) && is_elementwise_match(grad_output, input) &&
           input.dim() >= 2 && input.sym_numel() != 0 && (!weight.defined() || is_real(weight)) &&
           is_real(value(s.mean())) && is_real(value(s.spread()));
  }

  struct Native {
    static StockKernel& stock() {
      static StockKernel kernel("aten::native_batch_norm_backward");
      return kernel;
    }
    static TensorTriple autograd(
        c10::DispatchKeySet keys, const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
        const OptionalTensor& running_mean, const OptionalTensor& running_var,
        const OptionalTensor& save_mean, const OptionalTensor& save_invstd, bool train, double eps,
        Mask output_mask) {
      const Statistics s{running_mean, running_var, save_mean, save_invstd, train, eps};
      // ATen's own calls have an undefined tensor for an absent weight.
      const OptionalTensor w = optional(value(weight));
      if (!is_covered(grad_out, input, value(w), s)) {
        return stock().call<TensorTriple>(
            keys, grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps,
            output_mask);
      }
      return Backward::record(
          grad_out, input, w, s, [&] { return aten_backward(grad_out, input, w, s, output_mask); });
    }
  };

  struct Cudnn {
    static StockKernel& stock() {
      static StockKernel kernel("aten::cudnn_batch_norm_backward");
      return kernel;
    }
    static TensorTriple autograd(
        c10::DispatchKeySet keys, const Tensor& input, const Tensor& grad_output, const Tensor& weight,
        const OptionalTensor& running_mean, const OptionalTensor& running_var,
        const OptionalTensor& save_mean, const OptionalTensor& save_var, double epsilon,
        const Tensor& reserve) {
      // What cuDNN calls save_var is the inverse standard deviation.
      const Statistics s{running_mean, running_var, save_mean, save_var, /*training=*/true, epsilon};
      if (!is_covered(grad_output, input, weight, s)) {
        return stock().call<TensorTriple>(
            keys, input, grad_output, weight, running_mean, running_var, save_mean, save_var, epsilon,
            reserve);
      }
      return Backward::record(grad_output, input, weight, s, [&] {
        return at::cudnn_batch_norm_backward(
            input, grad_output, weight, running_mean, running_var, save_mean, save_var, epsilon, reserve);
      });
    }
  };

  static void install(torch::Library& aten_autograd) {
    Native::stock();
    Cudnn::stock();
    aten_autograd.impl("native_batch_norm_backward", &Native::autograd);
    aten_autograd.impl("cudnn_batch_norm_backward", &Cudnn::autograd);
  }
};

const StockOverride batch_norm_override(&AtenBatchNormBackward::install);

template <class Kernels>
void implement_derivatives(torch::Library& m) {
  m.impl("batch_norm_backward", &Kernels::backward);
  m.impl("batch_norm_double_backward", &Kernels::double_backward);
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean, "
      "Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool training, float eps, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean, Tensor? running_var, "
      "Tensor? save_mean, Tensor? save_invstd, bool training, float eps) "
      "-> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  m.impl("batch_norm", &Cpu::forward);
  implement_derivatives<Cpu>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CUDA, m) {
  m.impl("batch_norm", &Cpu::forward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  m.impl("batch_norm", &Cpu::forward);
  implement_derivatives<Meta>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  m.impl("batch_norm", &Autograd::forward);
  implement_derivatives<Autograd>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  m.impl("batch_norm", &Composite::forward);
  implement_derivatives<Composite>(m);
}

// Devices without a kernel of ours.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  m.impl("batch_norm", &Composite::forward);
  implement_derivatives<Composite>(m);
}

}  // namespace
}  // namespace gradnorm_kernels::batch_norm
