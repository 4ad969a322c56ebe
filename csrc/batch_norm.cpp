// Batch normalisation. Forward and first backward are ATen's own kernels, the first backward of the
// evaluation mode excepted.
#include "batch_norm.h"

namespace gradnorm_kernels::batch_norm {
namespace {

TensorTriple aten_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const BatchStatistics& s,
    Mask<3> output_mask) {
  // The CPU's takes what it has of each channel for contiguous.
  const auto dense = [](const Tensor& tensor) {
    return optional(tensor.defined() ? tensor.contiguous() : tensor);
  };
  return at::native_batch_norm_backward(
      grad_output, input, dense(weight), dense(s.running_mean), dense(s.running_var), dense(s.save_mean),
      dense(s.save_invstd), s.training, s.eps, output_mask);
}

// Where only the gradient of the input is wanted in evaluation mode, input is not read, and need not be
// given.
struct Backward {
  static constexpr auto schema =
      "batch_norm_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean, "
      "Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool training, float eps, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor& grad_output;
  OptionalTensor input, weight;
  BatchStatistics s;
  Mask<3> output_mask;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_output, input, weight), s.tie(), std::tie(output_mask));
  }

  const Tensor& like() const {
    return input.defined() ? input : grad_output;
  }
  Tensor like_weight() const {
    return parameter_or_stand_in(weight, grad_output, opmath(grad_output));
  }
  void check() const {
    const auto op = name_of<Backward>();
    check_elementwise(op, {{"input", like()}, {"grad_output", grad_output}});
    check_given(op, "input", input.defined() || (!s.training && !output_mask[1]), "where it is read");
    check_dimensions(op, "grad_output", grad_output);
    check_per_channel(op, grad_output, {{"weight", weight}});
    check_statistics(op, grad_output, s);
  }
  TensorTriple composite() const {
    check();
    auto [grad_input, grad_weight, grad_bias] =
        normalized(grad_output, s.training || output_mask[1] ? Tensor(input) : Tensor(), s)
            .backward(to_opmath(grad_output), weight, like_weight(), output_mask);
    return {to_dtype_of(grad_output, grad_input), grad_weight, grad_bias};
  }
  TensorTriple cpu() const {
    check();
    if (grad_output.numel() == 0) {
      return composite();
    }
    if (s.training) {
      return aten_backward(grad_output, input, weight, s, output_mask);
    }
    const bool channels_last = is_channels_last(like());
    const Tensor g = in_layout(grad_output, channels_last);
    // What only grad_bias needs multiplies a sum that is not wanted.
    const Tensor x = input.defined() ? in_layout(input, channels_last) : g;
    const auto layout = layout_of(g, channels_last);
    const int64_t channels = layout.channels;
    const auto mean = channel_values(s.mean(), channels, 0), invstd = channel_invstd(s, channels);
    auto scale = channel_values(weight, channels, 1);
    multiply(scale.data(), invstd);
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
    if (output_mask[1]) {
      multiply(data(grad_weight), invstd);
    }
    const Tensor parameter = like_weight();
    return {
        output_mask[0] ? grad_input : Tensor(),
        output_mask[1] ? to_dtype_of(parameter, grad_weight) : Tensor(),
        output_mask[2] ? to_dtype_of(parameter, grad_bias) : Tensor()};
  }
  TensorTriple meta() const {
    check();
    if (s.training && grad_output.sym_numel() != 0) {
      return aten_backward(grad_output, input, weight, s, output_mask);
    }
    return {
        output_mask[0] ? empty_in_layout_of(like()) : Tensor(),
        empty_contiguous(like_weight(), output_mask[1]), empty_contiguous(like_weight(), output_mask[2])};
  }
  // compute: the gradients, by a kernel of PyTorch's or ours.
  template <class Compute>
  TensorTriple recorded(const Compute& compute) const;
  TensorTriple autograd() const {
    if (needs_composite(grad_output, input, weight)) {
      return composite();
    }
    check();
    return recorded([&] {
      return s.training && grad_output.numel() != 0
                 ? aten_backward(grad_output, input, weight, s, output_mask)
                 : call(*this);
    });
  }
};

struct DoubleBackward {
  static constexpr auto schema =
      "batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean, Tensor? running_var, "
      "Tensor? save_mean, Tensor? save_invstd, bool training, float eps) "
      "-> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)";
  OptionalTensor grad_grad_input, grad_grad_weight, grad_grad_bias;
  const Tensor& grad_output;
  OptionalTensor input, weight;
  BatchStatistics s;
  auto tie() const {
    return std::tuple_cat(
        std::tie(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight), s.tie());
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight);
  }

  const Tensor& like() const {
    return input.defined() ? input : grad_output;
  }
  Tensor like_weight() const {
    return parameter_or_stand_in(weight, grad_output, opmath(grad_output));
  }
  void check() const {
    const auto op = name_of<DoubleBackward>();
    check_elementwise(
        op, {{"input", like()}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
    check_dimensions(op, "grad_output", grad_output);
    check_given(
        op, "input", input.defined() || (!s.training && !grad_grad_weight.defined()), "where it is read");
    check_per_channel(
        op, like(),
        {{"weight", weight}, {"grad_grad_weight", grad_grad_weight}, {"grad_grad_bias", grad_grad_bias}});
    check_statistics(op, like(), s);
  }
  TensorTriple composite() const {
    check();
    auto [grad_grad_output, grad_input, grad_weight] =
        normalized(like(), input, s)
            .double_backward(
                to_opmath(grad_grad_input), grad_grad_weight, grad_grad_bias, to_opmath(grad_output), weight,
                like_weight(), {true, true, true});
    return {to_dtype_of(grad_output, grad_grad_output), to_dtype_of(grad_output, grad_input), grad_weight};
  }
  TensorTriple cpu() const {
    check();
    if (grad_output.numel() == 0) {
      return composite();
    }
    const bool channels_last = is_channels_last(like());
    const Tensor g = in_layout(grad_output, channels_last);
    // Undefined where only gradients of parameters are differentiated: seldom, and not worth a kernel.
    const Tensor v =
        grad_grad_input.defined() ? in_layout(grad_grad_input, channels_last) : at::zeros_like(g);
    const auto layout = layout_of(g, channels_last);
    const int64_t channels = layout.channels;
    const auto invstd = channel_invstd(s, channels);
    auto scale = channel_values(weight, channels, 1);
    Tensor grad_grad_output = at::empty_like(g), grad_input;
    const Tensor grad_weight = at::empty({channels}, g.options().dtype(at::kDouble));
    const auto& kernels = GRADNORM_KERNELS(batch_norm_kernels);
    if (input.defined()) {
      const Tensor x = in_layout(input, channels_last);
      const auto mean = channel_values(s.mean(), channels, 0),
                 u = channel_values(grad_grad_weight, channels, 0),
                 t = channel_values(grad_grad_bias, channels, 0);
      grad_input = at::empty_like(x);
      kernels.double_backward(
          g.scalar_type(), layout, {scale.data(), mean.data(), invstd.data(), u.data(), t.data()}, s.training,
          v.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr(), grad_grad_output.mutable_data_ptr(),
          grad_input.mutable_data_ptr(), data(grad_weight));
    } else {
      multiply(scale.data(), invstd);
      const std::vector<double> zero(channels, 0);
      std::vector<double> unused(channels);
      kernels.scale(
          g.scalar_type(), layout, v.const_data_ptr(), g.const_data_ptr(), scale.data(), zero.data(),
          grad_grad_output.mutable_data_ptr(), unused.data(), data(grad_weight));
      multiply(data(grad_weight), invstd);
      if (grad_grad_bias.defined()) {
        std::vector<int64_t> shape(g.dim(), 1);
        shape[1] = channels;
        grad_grad_output.add_(grad_grad_bias.to(g.scalar_type()).view(shape));
      }
    }
    return {
        grad_grad_output, grad_input,
        grad_grad_input.defined() ? to_dtype_of(like_weight(), grad_weight) : Tensor()};
  }
  TensorTriple meta() const {
    check();
    const Tensor grad_grad_output = empty_in_layout_of(like());
    return {
        grad_grad_output, input.defined() ? at::empty_like(grad_grad_output) : Tensor(),
        empty_contiguous(like_weight(), grad_grad_input.defined())};
  }
};

struct OfBackward {
  static constexpr auto if_changed = kIfChanged;
  using Settings = std::tuple<bool, double>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [training, eps] = settings;
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    const Tensor &v = grads[0], &u = grads[1];
    const auto s = BatchStatistics::of(saved[3], saved[4], training, eps);
    const bool reads_input = training || u.defined();
    if (!u.defined() && !grads[2].defined() && !(needs[1] && training) && !needs[2]) {
      // The first backward is linear in grad_output.
      const auto gradients = call(Backward{v, training ? input : Tensor(), weight, s, {true, false, false}});
      return {std::get<0>(gradients)};
    }
    return to_list(
        call(DoubleBackward{v, u, grads[2], grad_output, reads_input ? input : Tensor(), weight, s}),
        {true, needs[1] && reads_input, needs[2]});
  }
};

template <class Compute>
TensorTriple Backward::recorded(const Compute& compute) const {
  return to_tuple<3>(
      record<OfBackward>({grad_output, input, weight}, {s.training, s.eps}, [&](variable_list& saved) {
        saved = {grad_output, input, weight, s.mean(), s.var_or_invstd()};
        return to_list(compute());
      }));
}

struct OfForward {
  static constexpr auto if_changed = kIfChanged;
  using Settings = std::tuple<bool, double, int64_t>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [training, eps, backend] = settings;
    const Mask<3> mask{needs[0], needs[1], needs[2]};
    const Tensor &input = saved[0], &weight = saved[1];
    const Backward op{
        grads[0], training || mask[1] ? input : Tensor(), weight,
        BatchStatistics::of(saved[2], saved[3], training, eps), mask};
    constexpr int64_t native = 0;
    if (!training || backend == native || needs_composite(op.grad_output, input, weight)) {
      return to_list(call(op), mask);
    }
    return to_list(
        op.recorded([&] {
          return at::_batch_norm_impl_index_backward(
              backend, input, op.grad_output.contiguous(input.suggest_memory_format()), optional(weight), {},
              {}, optional(op.s.save_mean), optional(op.s.save_invstd), training, eps, mask,
              // cuDNN may write into what it reserved.
              saved[4].clone());
        }),
        mask);
  }
};

struct Forward {
  static constexpr auto schema =
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps) -> Tensor";
  BatchNormArguments norm;
  auto tie() const {
    return norm.tie();
  }

  void check() const {
    norm.check(name_of<Forward>());
  }
  Tensor composite() const {
    check();
    if (norm.training && norm.running_mean.defined()) {
      // For its effect on the running statistics, in the way that each transform knows.
      at::native_batch_norm(
          norm.input.detach(), {}, {}, optional(norm.running_mean), optional(norm.running_var), norm.training,
          norm.momentum, norm.eps);
    }
    return normalized(
               norm.input, norm.input, {norm.running_mean, norm.running_var, {}, {}, norm.training, norm.eps})
        .affine(norm.weight, norm.bias)
        .to(norm.input.scalar_type());
  }
  Tensor cpu() const {
    check();
    return std::get<0>(norm.aten());
  }
  Tensor cuda() const {
    return cpu();
  }
  Tensor meta() const {
    return cpu();
  }
  Tensor autograd() const {
    check();
    if (norm.input.sym_numel() == 0) {
      return norm.aten_of_empty();
    }
    if (needs_composite(norm.input, norm.weight, norm.bias)) {
      return composite();
    }
    norm.check_constants(name_of<Forward>());
    OfForward::Settings settings{norm.training, norm.eps, 0};
    return record<OfForward>({norm.input, norm.weight, norm.bias}, settings, [&](variable_list& saved) {
      auto [output, save_mean, save_invstd, reserve, backend] = norm.aten();
      std::get<int64_t>(settings) = backend;
      saved = norm.training ? variable_list{norm.input, norm.weight, save_mean, save_invstd, reserve}
                            : variable_list{norm.input, norm.weight, norm.running_mean, norm.running_var};
      return variable_list{output};
    })[0];
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// The backwards of PyTorch's own batch normalisation, whose own backward is fused. Whatever ours does not
// cover stays PyTorch's.
bool is_covered(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const BatchStatistics& s) {
  const auto is_real = [](const Tensor& tensor) {
    return tensor.defined() && at::isFloatingType(tensor.scalar_type()) && tensor.layout() == at::kStrided;
  };
  return !needs_composite(grad_output, input, weight) && is_elementwise_match(grad_output, input) &&
         input.dim() >= 2 && input.sym_numel() != 0 && (!weight.defined() || is_real(weight)) &&
         is_real(s.mean()) && is_real(s.var_or_invstd());
}

template <class... Running>
constexpr TensorTriple (*kLegit)(
    const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, Running..., bool, double,
    double) = &at::_native_batch_norm_legit;

// Of these arguments, and of running statistics that are optional, mutable or absent.
template <auto aten, class... Running>
struct AtenBatchNorm : Override<AtenBatchNorm<aten, Running...>> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias, Running... running, bool training, double momentum, double eps) {
    const OptionalTensor w(weight), b(bias);
    // With running statistics alone, which are constants, PyTorch's own is right.
    if (!training || input.sym_numel() == 0 || !is_differentiated_by_transform({input, w, b})) {
      return AtenBatchNorm::stock(keys, input, weight, bias, running..., training, momentum, eps);
    }
    const auto [output, mean, invstd] =
        aten(input.detach(), std::nullopt, std::nullopt, running..., training, momentum, eps);
    const auto normal = normalized(input, input, {{}, {}, {}, {}, training, eps});
    return {normal.affine(w, b).to(input.scalar_type()), mean, invstd};
  }
};

struct AtenBatchNormBackward : Override<AtenBatchNormBackward> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& grad_out, const Tensor& input,
      const std::optional<Tensor>& weight, const std::optional<Tensor>& running_mean,
      const std::optional<Tensor>& running_var, const std::optional<Tensor>& save_mean,
      const std::optional<Tensor>& save_invstd, bool train, double eps, Mask<3> output_mask) {
    const Backward op{grad_out,  input,       weight, running_mean, running_var,
                      save_mean, save_invstd, train,  eps,          output_mask};
    if (!is_covered(grad_out, input, op.weight, op.s)) {
      return stock(
          keys, grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps,
          output_mask);
    }
    return op.recorded([&] { return aten_backward(grad_out, input, op.weight, op.s, output_mask); });
  }
};

struct AtenCudnnBatchNormBackward : Override<AtenCudnnBatchNormBackward> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, const Tensor& grad_output, const Tensor& weight,
      const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
      const std::optional<Tensor>& save_mean, const std::optional<Tensor>& save_var, double epsilon,
      const Tensor& reserve) {
    // What cuDNN calls save_var is the inverse standard deviation.
    const Backward op{grad_output, input,
                      weight,      running_mean,
                      running_var, save_mean,
                      save_var,    /*training=*/true,
                      epsilon,     {true, true, true}};
    if (!is_covered(grad_output, input, weight, op.s)) {
      return stock(
          keys, input, grad_output, weight, running_mean, running_var, save_mean, save_var, epsilon, reserve);
    }
    return op.recorded([&] {
      return at::cudnn_batch_norm_backward(
          input, grad_output, weight, running_mean, running_var, save_mean, save_var, epsilon, reserve);
    });
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  using Given = const std::optional<Tensor>&;
  AtenBatchNorm<&at::native_batch_norm, Given, Given>::install(m, "native_batch_norm");
  // Compilers take these.
  AtenBatchNorm<kLegit<Tensor&, Tensor&>, Tensor&, Tensor&>::install(m, "_native_batch_norm_legit");
  AtenBatchNorm<kLegit<>>::install(m, "_native_batch_norm_legit.no_stats");
  AtenBatchNormBackward::install(m, "native_batch_norm_backward");
  AtenCudnnBatchNormBackward::install(m, "cudnn_batch_norm_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::batch_norm
