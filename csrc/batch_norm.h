// What batch normalisation and its fusion with an activation share: the statistics, checks, memory layouts
// and the composite.
#pragma once

#include <cmath>

#include "cpu/batch_norm.h"
#include "normalization.h"

namespace gradnorm_kernels::batch_norm {

// The running statistics where training is false, those of the batch where it is true.
struct BatchStatistics {
  OptionalTensor running_mean, running_var, save_mean, save_invstd;
  bool training;
  double eps;

  // With what is not used left out.
  static BatchStatistics of(const Tensor& mean, const Tensor& var_or_invstd, bool training, double eps) {
    return training ? BatchStatistics{{}, {}, mean, var_or_invstd, training, eps}
                    : BatchStatistics{mean, var_or_invstd, {}, {}, training, eps};
  }
  const OptionalTensor& mean() const {
    return training ? save_mean : running_mean;
  }
  const OptionalTensor& var_or_invstd() const {
    return training ? save_invstd : running_var;
  }
  auto tie() const {
    return std::tie(running_mean, running_var, save_mean, save_invstd, training, eps);
  }
};

inline void check_dimensions(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.dim() >= 2, op, ": expected ", name, " to have at least 2 dimensions, got shape ",
      tensor.sym_sizes());
}

inline void check_given(const char* op, const char* name, bool given, const char* mode) {
  TORCH_CHECK_VALUE(given, op, ": expected ", name, " to be given ", mode);
}

inline void check_per_channel(
    const char* op, const Tensor& like, std::initializer_list<NamedTensor> tensors) {
  check_shapes(op, like, tensors, like.sym_sizes().slice(1, 1));
}

inline void check_statistics(const char* op, const Tensor& like, const BatchStatistics& s) {
  const char* mean = s.training ? "save_mean" : "running_mean";
  const char* var_or_invstd = s.training ? "save_invstd" : "running_var";
  const char* mode = s.training ? "where training is True" : "where training is False";
  check_given(op, mean, s.mean().defined(), mode);
  check_given(op, var_or_invstd, s.var_or_invstd().defined(), mode);
  check_per_channel(op, like, {{mean, s.mean()}, {var_or_invstd, s.var_or_invstd()}});
}

inline at::ScalarType opmath(const Tensor& tensor) {
  return at::toOpMathType(tensor.scalar_type());
}

// A layout that our kernels take, contiguous or with interleaved channels (channels_last).
inline bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && tensor.movedim(1, -1).is_contiguous();
}
inline Tensor in_layout(const Tensor& tensor, bool channels_last) {
  return channels_last ? tensor.movedim(1, -1).contiguous().movedim(-1, 1) : tensor.contiguous();
}
inline Tensor empty_in_layout_of(const Tensor& like) {
  return at::empty_like(in_layout(like, is_channels_last(like)));
}
inline ChannelLayout layout_of(const Tensor& tensor, bool channels_last) {
  const int64_t channels = tensor.size(1);
  if (channels_last) {
    return {tensor.numel() / channels, channels, 1};
  }
  return {tensor.size(0), channels, tensor.numel() / (tensor.size(0) * channels)};
}

// One number for each channel.
inline std::vector<double> channel_values(const Tensor& tensor, int64_t channels, double otherwise) {
  if (!tensor.defined()) {
    return std::vector<double>(channels, otherwise);
  }
  const Tensor values = tensor.to(at::kDouble).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + channels};
}

inline std::vector<double> channel_invstd(const BatchStatistics& s, int64_t channels) {
  auto values = channel_values(s.var_or_invstd(), channels, 1);
  if (!s.training) {
    for (double& value : values) {
      value = 1 / std::sqrt(value + s.eps);
    }
  }
  return values;
}

inline double* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<double>() : nullptr;
}
inline void multiply(double* values, const std::vector<double>& factors) {
  for (size_t c = 0; c < factors.size(); ++c) {
    values[c] *= factors[c];
  }
}

// Of what is changed in place below autograd, which would do it.
inline void bump_version(const Tensor& tensor) {
  if (tensor.defined() && !tensor.is_inference()) {
    torch::autograd::impl::bump_version(tensor);
  }
}

// What a forward takes.
struct BatchNormArguments {
  const Tensor& input;
  OptionalTensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;
  auto tie() const {
    return std::tie(input, weight, bias, running_mean, running_var, training, momentum, eps);
  }

  void check(const char* op) const {
    check_floating(op, {{"input", input}});
    check_dimensions(op, "input", input);
    check_per_channel(
        op, input,
        {{"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}});
    if (!training) {
      check_given(op, "running_mean", running_mean.defined(), "where training is False");
      check_given(op, "running_var", running_var.defined(), "where training is False");
      return;
    }
    TORCH_CHECK_VALUE(
        running_mean.defined() == running_var.defined(), op,
        ": expected running_mean and running_var to be given together");
    const auto values = input.sym_size(0) * c10::multiply_integers(input.sym_sizes().slice(2));
    TORCH_CHECK_VALUE(
        values != 1, op,
        ": expected input to have more than 1 value per channel where training is True, got shape ",
        input.sym_sizes());
  }
  void check_constants(const char* op) const {
    for (const auto& [name, statistic] :
         {NamedTensor{"running_mean", running_mean}, NamedTensor{"running_var", running_var}}) {
      TORCH_CHECK_VALUE(
          !torch::autograd::compute_requires_grad(statistic), op, ": expected ", name,
          " not to require a gradient");
    }
  }
  // PyTorch's own kernels; which of them, its backend index says.
  auto aten() const {
    if (training) {
      bump_version(running_mean);
      bump_version(running_var);
    }
    return at::_batch_norm_impl_index(
        input, optional(weight), optional(bias), optional(running_mean), optional(running_var), training,
        momentum, eps, at::globalContext().userEnabledCuDNN());
  }
  // The CPU's kernels keep statistics in the dtype of the parameters. This gives them all in opmath_t.
  auto aten_in_opmath() const {
    const Tensor factors = weight.defined()
                               ? to_opmath(weight)
                               : at::ones_symint({input.sym_size(1)}, input.options().dtype(opmath(input)));
    const Tensor mean = to_opmath(running_mean), var = to_opmath(running_var);
    auto results =
        BatchNormArguments{input, factors, to_opmath(bias), mean, var, training, momentum, eps}.aten();
    const auto update = [&](const Tensor& running, const Tensor& updated) {
      if (training && running.defined() && !running.is_same(updated)) {
        bump_version(running);
        running.copy_(updated);
      }
    };
    update(running_mean, mean);
    update(running_var, var);
    return results;
  }
  Tensor aten_of_empty() const {
    return at::batch_norm(
        input, optional(weight), optional(bias), optional(running_mean), optional(running_var), training,
        momentum, eps, /*cudnn_enabled=*/false);
  }
};

// For the composite; without x, and not in training, what it says of x alone is undefined.
inline Normalized normalized(const Tensor& like, const Tensor& x, const BatchStatistics& s) {
  Normalized result;
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    if (dim != 1) {
      result.dims.push_back(dim);
    }
  }
  result.shape.assign(like.dim(), 1);
  result.shape[1] = like.sym_size(1);
  if (s.training) {
    result.set_input(to_opmath(x), s.eps);
    return result;
  }
  result.statistics = Statistics::kConstant;
  const auto constant = [&](const Tensor& t) { return result.expand(t.to(opmath(like))); };
  result.rstd = (constant(s.running_var) + s.eps).rsqrt();
  if (x.defined()) {
    result.normalize(to_opmath(x) - constant(s.running_mean), result.rstd);
  }
  return result;
}

}  // namespace gradnorm_kernels::batch_norm
