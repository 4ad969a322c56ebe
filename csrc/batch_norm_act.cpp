// Batch normalisation and the activation after it as one op, which keeps the input alone: neither the
// normalised tensor nor its gradients are in memory between the passes.
#include "cpu/batch_norm_act.h"

#include "batch_norm.h"

namespace gradnorm_kernels::batch_norm_act {
namespace {

using batch_norm::BatchNormArguments;
using batch_norm::BatchStatistics;
using Params = at::ArrayRef<double>;

struct Row {
  const char* name;
  size_t params;
  ActOfBatchNorm (*make)(Params params);
  // PyTorch's own, in place.
  void (*apply)(Tensor& z, Params params);
};
const Row rows[] = {
    {"relu", 0, [](Params) -> ActOfBatchNorm { return Relu{}; }, [](Tensor& z, Params) { at::relu_(z); }},
    {"relu6", 0, [](Params) -> ActOfBatchNorm { return Relu6{}; },
     [](Tensor& z, Params) { at::hardtanh_(z, 0, 6); }},
    {"leaky_relu", 1, [](Params p) -> ActOfBatchNorm { return LeakyRelu{p[0]}; },
     [](Tensor& z, Params p) { at::leaky_relu_(z, p[0]); }},
    {"hardswish", 0, [](Params) -> ActOfBatchNorm { return Hardswish{}; },
     [](Tensor& z, Params) { at::hardswish_(z); }},
    {"silu", 0, [](Params) -> ActOfBatchNorm { return Silu{}; }, [](Tensor& z, Params) { at::silu_(z); }},
    {"mish", 0, [](Params) -> ActOfBatchNorm { return Mish{}; }, [](Tensor& z, Params) { at::mish_(z); }},
    {"gelu_none", 0, [](Params) -> ActOfBatchNorm { return GeluErf{}; },
     [](Tensor& z, Params) { at::gelu_(z, "none"); }},
    {"gelu_tanh", 0, [](Params) -> ActOfBatchNorm { return GeluTanh{}; },
     [](Tensor& z, Params) { at::gelu_(z, "tanh"); }},
};

const Row& row_of(std::string_view activation, Params params) {
  std::string names;
  for (const Row& row : rows) {
    if (activation == row.name) {
      TORCH_CHECK_VALUE(
          params.size() == row.params, "batch_norm_act: expected params to have ", row.params,
          " values for '", activation, "', got ", params.size());
      return row;
    }
    names += std::string(names.empty() ? "'" : ", '") + row.name + "'";
  }
  TORCH_CHECK_VALUE(
      false, "batch_norm_act: expected activation to be one of ", names, ", got '", activation, "'");
}
ActOfBatchNorm make(std::string_view activation, Params params) {
  return row_of(activation, params).make(params);
}

// Of the CPU's kernels, which take no float16: seldom met on a CPU, it would add half a minute to the build.
Tensor for_kernel(const Tensor& tensor, bool channels_last) {
  const Tensor in_layout = batch_norm::in_layout(tensor, channels_last);
  return tensor.scalar_type() == at::kHalf ? to_opmath(in_layout) : in_layout;
}

// One number a channel, for a kernel.
struct Parameters {
  std::vector<double> weight, mean, invstd, bias;

  Parameters(const Tensor& w, const Tensor& b, const BatchStatistics& s, int64_t channels)
      : weight(batch_norm::channel_values(w, channels, 1)),
        mean(batch_norm::channel_values(s.mean(), channels, 0)),
        invstd(batch_norm::channel_invstd(s, channels)),
        bias(batch_norm::channel_values(b, channels, 0)) {}
  ChannelParameters of_norm() const {
    return {weight.data(), mean.data(), invstd.data(), nullptr, nullptr};
  }
};

// What the backward and the double backward take beside gradients.
struct Arguments {
  const Tensor& input;
  OptionalTensor weight, bias;
  BatchStatistics s;
  std::string_view activation;
  Params params;
  auto tie() const {
    return std::tuple_cat(std::tie(input, weight, bias), s.tie(), std::tie(activation, params));
  }

  Tensor like_weight() const {
    return parameter_or_stand_in(weight, input, batch_norm::opmath(input));
  }
  void check(const char* op, std::initializer_list<NamedTensor> tensors) const {
    check_elementwise(op, tensors);
    batch_norm::check_dimensions(op, "input", input);
    batch_norm::check_per_channel(op, input, {{"weight", weight}, {"bias", bias}});
    batch_norm::check_statistics(op, input, s);
    row_of(activation, params);
  }
  Normalized normalized() const {
    return batch_norm::normalized(input, input, s);
  }
};

// By plain ops. Of v, u and t, the gradients of those of input, weight and bias, some may be undefined.
variable_list double_backward_by_parts(
    const Tensor& v, const Tensor& u, const Tensor& t, const Tensor& grad_output,
    const Arguments& arguments) {
  const auto n = arguments.normalized();
  const Tensor z = n.affine(arguments.weight, arguments.bias), g = to_opmath(grad_output);
  const Tensor like = arguments.like_weight();
  return std::visit(
      [&](const auto& act) -> variable_list {
        auto [q, grad_input, grad_weight] =
            n.double_backward(to_opmath(v), u, t, act.df(g, z), arguments.weight, like, {true, true, true});
        Tensor grad_bias;
        if constexpr (has_d2f<std::decay_t<decltype(act)>>) {
          const auto [of_input, of_weight, of_bias] =
              n.backward(act.d2f(q, g, z), arguments.weight, like, {true, true, true});
          grad_input = grad_input.defined() ? grad_input + of_input : of_input;
          grad_weight = grad_weight.defined() ? grad_weight + of_weight : of_weight;
          grad_bias = of_bias;
        }
        return {
            to_dtype_of(grad_output, act.df(q, z)), to_dtype_of(grad_output, grad_input), grad_weight,
            grad_bias};
      },
      make(arguments.activation, arguments.params));
}

using TensorQuadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct DoubleBackward {
  static constexpr auto schema =
      "batch_norm_act_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? save_mean, "
      "Tensor? save_invstd, bool training, float eps, str activation, float[] params) -> "
      "(Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor &grad_grad_input, &grad_output;
  Arguments arguments;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_grad_input, grad_output), arguments.tie());
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, arguments.input, arguments.weight, arguments.bias);
  }

  void check() const {
    arguments.check(
        name_of<DoubleBackward>(),
        {{"input", arguments.input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
  }
  TensorQuadruple composite() const {
    check();
    auto results = double_backward_by_parts(grad_grad_input, {}, {}, grad_output, arguments);
    const Tensor like = arguments.like_weight();
    return {
        results[0], results[1].defined() ? results[1] : at::zeros_like(arguments.input), results[2],
        results[3].defined() ? results[3] : at::zeros_like(like, at::MemoryFormat::Contiguous)};
  }
  TensorQuadruple cpu() const {
    check();
    const Tensor& input = arguments.input;
    if (input.numel() == 0) {
      return composite();
    }
    const bool channels_last = batch_norm::is_channels_last(input);
    const Tensor v = for_kernel(grad_grad_input, channels_last), g = for_kernel(grad_output, channels_last),
                 x = for_kernel(input, channels_last);
    const auto layout = batch_norm::layout_of(x, channels_last);
    const Parameters parameters(arguments.weight, arguments.bias, arguments.s, layout.channels);
    const Tensor grad_grad_output = at::empty_like(x), grad_input = at::empty_like(x);
    const Tensor grad_weight = at::empty({layout.channels}, x.options().dtype(at::kDouble));
    const Tensor grad_bias = at::empty_like(grad_weight);
    GRADNORM_KERNELS(batch_norm_act_kernels)
        .double_backward(
            x.scalar_type(), layout, parameters.of_norm(), parameters.bias.data(), arguments.s.training,
            make(arguments.activation, arguments.params), v.const_data_ptr(), g.const_data_ptr(),
            x.const_data_ptr(), grad_grad_output.mutable_data_ptr(), grad_input.mutable_data_ptr(),
            batch_norm::data(grad_weight), batch_norm::data(grad_bias));
    const Tensor like = arguments.like_weight();
    return {
        to_dtype_of(input, grad_grad_output), to_dtype_of(input, grad_input), to_dtype_of(like, grad_weight),
        to_dtype_of(like, grad_bias)};
  }
  TensorQuadruple meta() const {
    check();
    const Tensor grad_grad_output = batch_norm::empty_in_layout_of(arguments.input);
    const Tensor like = arguments.like_weight();
    return {
        grad_grad_output, at::empty_like(grad_grad_output), empty_contiguous(like), empty_contiguous(like)};
  }
};

// What is saved beside tensors.
struct Settings {
  using Tuple = std::tuple<bool, double, std::string, std::vector<double>>;
  static Tuple of(bool training, double eps, std::string_view activation, Params params) {
    return {training, eps, std::string(activation), params.vec()};
  }
  // tensors: input, weight, bias, and of the statistics the mean and the variance or invstd.
  static Arguments arguments(const Tensor* tensors, const Tuple& settings) {
    const auto& [training, eps, activation, params] = settings;
    return {tensors[0], tensors[1], tensors[2], BatchStatistics::of(tensors[3], tensors[4], training, eps),
            activation, params};
  }
};

struct OfBackward {
  static constexpr auto if_changed = kIfChanged;
  using Settings = batch_norm_act::Settings::Tuple;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto arguments = batch_norm_act::Settings::arguments(&saved[1], settings);
    if (grads[1].defined() || grads[2].defined()) {
      // Gradients of parameters that are differentiated: seldom, and not worth a kernel.
      return double_backward_by_parts(grads[0], grads[1], grads[2], saved[0], arguments);
    }
    return to_list(call(DoubleBackward{grads[0], saved[0], arguments}));
  }
};

struct Backward {
  static constexpr auto schema =
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool training, "
      "float eps, str activation, float[] params, bool[3] output_mask) -> (Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias)";
  const Tensor& grad_output;
  Arguments arguments;
  Mask<3> output_mask;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_output), arguments.tie(), std::tie(output_mask));
  }

  void check() const {
    arguments.check(name_of<Backward>(), {{"input", arguments.input}, {"grad_output", grad_output}});
  }
  TensorTriple composite() const {
    check();
    const auto n = arguments.normalized();
    const Tensor z = n.affine(arguments.weight, arguments.bias);
    const Tensor a = std::visit(
        [&](const auto& act) { return act.df(to_opmath(grad_output), z); },
        make(arguments.activation, arguments.params));
    auto [grad_input, grad_weight, grad_bias] =
        n.backward(a, arguments.weight, arguments.like_weight(), output_mask);
    return {to_dtype_of(grad_output, grad_input), grad_weight, grad_bias};
  }
  TensorTriple cpu() const {
    check();
    const Tensor& input = arguments.input;
    if (input.numel() == 0) {
      return composite();
    }
    const bool channels_last = batch_norm::is_channels_last(input);
    const Tensor g = for_kernel(grad_output, channels_last), x = for_kernel(input, channels_last);
    const auto layout = batch_norm::layout_of(x, channels_last);
    const Parameters parameters(arguments.weight, arguments.bias, arguments.s, layout.channels);
    const Tensor grad_input = at::empty_like(x);
    const Tensor grad_weight = at::empty({layout.channels}, x.options().dtype(at::kDouble));
    const Tensor grad_bias = at::empty_like(grad_weight);
    GRADNORM_KERNELS(batch_norm_act_kernels)
        .backward(
            x.scalar_type(), layout, parameters.of_norm(), parameters.bias.data(), arguments.s.training,
            make(arguments.activation, arguments.params), g.const_data_ptr(), x.const_data_ptr(),
            grad_input.mutable_data_ptr(), batch_norm::data(grad_weight), batch_norm::data(grad_bias));
    const Tensor like = arguments.like_weight();
    return {
        output_mask[0] ? to_dtype_of(input, grad_input) : Tensor(),
        output_mask[1] ? to_dtype_of(like, grad_weight) : Tensor(),
        output_mask[2] ? to_dtype_of(like, grad_bias) : Tensor()};
  }
  TensorTriple meta() const {
    check();
    const Tensor like = arguments.like_weight();
    return {
        output_mask[0] ? batch_norm::empty_in_layout_of(arguments.input) : Tensor(),
        empty_contiguous(like, output_mask[1]), empty_contiguous(like, output_mask[2])};
  }
  TensorTriple autograd() const {
    const auto& [input, weight, bias, s, activation, params] = arguments;
    if (needs_composite(grad_output, input, weight, bias)) {
      return composite();
    }
    check();
    return to_tuple<3>(record<OfBackward>(
        {grad_output, input, weight, bias}, Settings::of(s.training, s.eps, activation, params),
        [&](variable_list& saved) {
          saved = {grad_output,    arguments.input,    arguments.weight,
                   arguments.bias, arguments.s.mean(), arguments.s.var_or_invstd()};
          return to_list(call(*this));
        }));
  }
};

struct OfForward {
  static constexpr auto if_changed = kIfChanged;
  using Settings = batch_norm_act::Settings::Tuple;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const Mask<3> mask{needs[0], needs[1], needs[2]};
    return to_list(
        call(Backward{grads[0], batch_norm_act::Settings::arguments(saved.data(), settings), mask}), mask);
  }
  static Tensor again(const variable_list& saved, const Settings& settings);
};

struct Forward {
  static constexpr auto schema =
      "batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps, str activation, float[] params) -> "
      "Tensor";
  BatchNormArguments norm;
  std::string_view activation;
  Params params;
  auto tie() const {
    return std::tuple_cat(norm.tie(), std::tie(activation, params));
  }

  void check() const {
    norm.check(name_of<Forward>());
    row_of(activation, params);
  }
  Tensor activated(Tensor z) const {
    row_of(activation, params).apply(z, params);
    return z;
  }
  Tensor composite() const {
    check();
    static const auto batch_norm = find_op<Tensor(
        const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
        const std::optional<Tensor>&, const std::optional<Tensor>&, bool, double, double)>(
        "gradnorm_kernels::batch_norm");
    const Tensor z = batch_norm.call(
        norm.input, optional(norm.weight), optional(norm.bias), optional(norm.running_mean),
        optional(norm.running_var), norm.training, norm.momentum, norm.eps);
    return std::visit([&](const auto& act) { return act.f(to_opmath(z)); }, make(activation, params))
        .to(z.scalar_type());
  }
  // In half types the CPU's own statistics are too rough to make the activation's input again.
  auto normalized() const {
    const bool is_rough = norm.input.is_cpu() && at::isReducedFloatingType(norm.input.scalar_type());
    return is_rough ? norm.aten_in_opmath() : norm.aten();
  }
  Tensor cpu() const {
    check();
    return activated(std::get<0>(normalized()));
  }
  Tensor cuda() const {
    return cpu();
  }
  Tensor meta() const {
    return cpu();
  }
  Tensor autograd() const {
    check();
    const auto& [input, weight, bias, running_mean, running_var, training, momentum, eps] = norm;
    if (input.sym_numel() == 0 || needs_composite(input, weight, bias)) {
      return composite();
    }
    norm.check_constants(name_of<Forward>());
    return record<OfForward>(
        {input, weight, bias}, Settings::of(training, eps, activation, params), [&](variable_list& saved) {
          const auto [output, save_mean, save_invstd, reserve, backend] = normalized();
          saved =
              norm.training
                  ? variable_list{norm.input, norm.weight, norm.bias, save_mean, save_invstd}
                  : variable_list{norm.input, norm.weight, norm.bias, norm.running_mean, norm.running_var};
          return variable_list{activated(output)};
        })[0];
  }
};

// Of the statistics that the backward takes, not from the input anew.
Tensor OfForward::again(const variable_list& saved, const Settings& settings) {
  const auto [input, weight, bias, s, activation, params] =
      batch_norm_act::Settings::arguments(saved.data(), settings);
  const Tensor var = s.training ? s.save_invstd.square().reciprocal_().sub_(s.eps) : Tensor(s.running_var);
  const BatchNormArguments norm{input,          weight, bias, s.mean(), var, /*training=*/false,
                                /*momentum=*/0, s.eps};
  return Forward{norm, activation, params}.cpu();
}

const Registration<Forward, Backward, DoubleBackward> registration;

}  // namespace
}  // namespace gradnorm_kernels::batch_norm_act
