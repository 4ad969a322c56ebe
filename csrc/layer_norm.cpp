// Layer normalisation over the last dimensions (PyTorch's own forward and backward, our double backward) and
// over the channels of NCHW.
#include "normalized_rows.h"

namespace gradnorm_kernels::layer_norm {
namespace {

// How many last dimensions are normalised; kNchw for the channels of NCHW.
using Ndim = int64_t;
constexpr Ndim kNchw = 0;

// The composite takes PyTorch's own layer norm only for nested tensors: from the third order on, and in
// reverse over forward mode, its derivatives take the statistics for constants.
Normalized normalized(const Tensor& input, const Tensor& mean, const Tensor& rstd) {
  auto result = RowLayout(input, mean).normalized(Statistics::kCentred);
  result.set_input(to_opmath(input.contiguous()), rstd);
  return result;
}

struct DoubleBackward {
  static constexpr auto schema =
      "layer_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, bool[3] output_mask) "
      "-> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)";
  const Tensor& grad_grad_input;
  OptionalTensor grad_grad_weight, grad_grad_bias;
  const Tensor &grad_output, &input, &mean, &rstd;
  OptionalTensor weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight,
        output_mask);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight);
  }

  void check() const {
    const auto op = name_of<DoubleBackward>();
    check_elementwise(
        op, {{"input", input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
    check_statistics(op, input, {{"mean", mean}, {"rstd", rstd}});
    TORCH_CHECK_VALUE(
        !output_mask[2] || weight.defined(), op, ": expected weight, whose gradient output_mask asks for");
    check_elements(
        op, input, mean,
        {{"weight", weight},
         {"grad_grad_weight", grad_grad_weight},
         {"grad_grad_bias", grad_grad_bias}});
  }
  // grad_grad_input may be undefined.
  TensorTriple composite() const {
    check();
    const auto contiguous = [](const Tensor& t) { return t.defined() ? to_opmath(t.contiguous()) : t; };
    const auto [grad_grad_output, grad_input, grad_weight] =
        normalized(input, mean, rstd)
            .double_backward(
                contiguous(grad_grad_input), grad_grad_weight, grad_grad_bias, contiguous(grad_output),
                weight, weight, output_mask);
    return {to_dtype_of(input, grad_grad_output), to_dtype_of(input, grad_input), grad_weight};
  }
  TensorTriple cpu() const {
    check();
    const Tensor grad_grad_output = empty_contiguous(input, output_mask[0]);
    const Tensor grad_input = empty_contiguous(input, output_mask[1]);
    if (input.numel() == 0) {
      return {grad_grad_output, grad_input, output_mask[2] ? at::zeros_like(weight) : Tensor()};
    }
    const RowsOnCpu on_cpu(input, mean);
    const Tensor grad_weight = on_cpu.partial_sums(output_mask[2]);
    const bool parameters = grad_grad_weight.defined() || grad_grad_bias.defined();
    GRADNORM_KERNELS(layer_norm_kernels)
        .double_backward(
            {grad_grad_output, grad_input, grad_weight, grad_grad_input.contiguous(),
             parameters ? on_cpu.parameter(grad_grad_weight, 0) : Tensor(),
             parameters ? on_cpu.parameter(grad_grad_bias, 0) : Tensor(), grad_output.contiguous(),
             input.contiguous(), on_cpu.statistic(mean), on_cpu.statistic(rstd), on_cpu.parameter(weight, 1)},
            on_cpu.rows);
    return {grad_grad_output, grad_input, on_cpu.sum(grad_weight, weight)};
  }
  TensorTriple meta() const {
    check();
    return {
        empty_contiguous(input, output_mask[0]), empty_contiguous(input, output_mask[1]),
        output_mask[2] ? at::empty_like(weight) : Tensor()};
  }
};

struct OfBackward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    const DoubleBackward op{
        grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], saved[3], saved[4],
        {needs[0], needs[1], needs[2]}};
    // Only where nothing before this layer is differentiated is there no gradient of the input's.
    return to_list(grads[0].defined() ? call(op) : op.composite());
  }
};

// PyTorch's native_layer_norm_backward or, over channels, ours, with the double backward above.
struct Backward {
  const Tensor &grad_output, &input, &mean, &rstd, &weight, &bias;
  Ndim ndim;
  Mask<3> output_mask;

  TensorTriple composite() const {
    const auto contiguous = to_opmath(grad_output.contiguous());
    auto [grad_input, grad_weight, grad_bias] = normalized(input, mean, rstd).backward(
        contiguous, weight, weight.defined() ? weight : bias, output_mask);
    return {to_dtype_of(input, grad_input), grad_weight, to_dtype_of(bias.defined() ? bias : input, grad_bias)};
  }
  TensorTriple recorded() const;
};

struct Backward2d {
  static constexpr auto schema =
      "layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor &grad_output, &input, &mean, &rstd;
  OptionalTensor weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, mean, rstd, weight, output_mask);
  }

  void check() const {
    const auto op = name_of<Backward2d>();
    check_channels(op, input, {{"weight", weight}});
    check_elementwise(op, {{"input", input}, {"grad_output", grad_output}});
    check_statistics(op, input, {{"mean", mean}, {"rstd", rstd}});
  }
  TensorTriple composite() const {
    check();
    const Tensor like = parameter_or_stand_in(weight, input, input.scalar_type());
    return Backward{grad_output, input, mean, rstd, like, like, kNchw, output_mask}.composite();
  }
  TensorTriple cpu() const {
    check();
    const Tensor grad_input = empty_contiguous(input, output_mask[0]);
    const Tensor like = parameter_or_stand_in(weight, input, input.scalar_type());
    if (input.numel() == 0) {
      const auto zeros = [&](bool wanted) { return wanted ? at::zeros_like(like) : Tensor(); };
      return {grad_input, zeros(output_mask[1]), zeros(output_mask[2])};
    }
    const RowsOnCpu on_cpu(input, mean);
    const Tensor grad_weight = on_cpu.partial_sums(output_mask[1]);
    const Tensor grad_bias = on_cpu.partial_sums(output_mask[2]);
    GRADNORM_KERNELS(layer_norm_kernels)
        .backward(
            {grad_input, grad_weight, grad_bias, grad_output.contiguous(), input.contiguous(),
             on_cpu.statistic(mean), on_cpu.statistic(rstd), on_cpu.parameter(weight, 1)},
            on_cpu.rows);
    return {grad_input, on_cpu.sum(grad_weight, like), on_cpu.sum(grad_bias, like)};
  }
  TensorTriple meta() const {
    check();
    const Tensor like = parameter_or_stand_in(weight, input, input.scalar_type());
    return {
        empty_contiguous(input, output_mask[0]), empty_contiguous(like, output_mask[1]),
        empty_contiguous(like, output_mask[2])};
  }
  TensorTriple autograd() const {
    if (needs_composite(grad_output, input, weight)) {
      return composite();
    }
    return Backward{grad_output, input, mean, rstd, weight, Tensor(), kNchw, output_mask}.recorded();
  }
};

TensorTriple Backward::recorded() const {
  return to_tuple<3>(record<OfBackward>({grad_output, input, weight}, {}, [&](variable_list& saved) {
    saved = {grad_output, input, mean, rstd, weight};
    return to_list(
        ndim == kNchw
            ? call(Backward2d{grad_output, input, mean, rstd, weight, output_mask})
            : at::native_layer_norm_backward_symint(
                  grad_output, input, input.sym_sizes().slice(input.dim() - ndim), mean, rstd,
                  optional(weight), optional(bias), output_mask),
        output_mask);
  }));
}

// (output, mean, rstd)
struct OfForward {
  using Settings = std::tuple<Ndim>;
  static constexpr size_t differentiable_results = 1;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const Backward op{
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], std::get<Ndim>(settings),
        {needs[0], needs[1], needs[2]}};
    return to_list(
        needs_composite(op.grad_output, op.input, op.weight) ? op.composite() : op.recorded());
  }
};

// All passes want input contiguous: it is copied, if at all, once.
template <class Compute>
TensorTriple record_forward(
    const Tensor& input, const Tensor& weight, const Tensor& bias, Ndim ndim, const Compute& compute) {
  const Tensor contiguous = input.contiguous();
  return to_tuple<3>(record<OfForward>({contiguous, weight, bias}, {ndim}, [&](variable_list& saved) {
    const auto outputs = compute(contiguous);
    const auto& [output, mean, rstd] = outputs;
    saved = {contiguous, mean, rstd, weight, bias};
    return to_list(outputs);
  }));
}

struct Forward2d {
  static constexpr auto schema =
      "layer_norm_2d(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-06) "
      "-> (Tensor output, Tensor mean, Tensor rstd)";
  const Tensor& input;
  OptionalTensor weight, bias;
  double eps;
  auto tie() const {
    return std::tie(input, weight, bias, eps);
  }

  void check() const {
    check_channels(name_of<Forward2d>(), input, {{"weight", weight}, {"bias", bias}});
  }
  TensorTriple composite() const {
    check();
    Normalized row{{1}, {input.sym_size(1), 1, 1}};
    row.set_input(to_opmath(input.contiguous()), eps);
    return {
        row.affine(weight, bias).to(input.scalar_type()), row.mean_of_input.detach(), row.rstd.detach()};
  }
  TensorTriple cpu() const {
    const TensorTriple outputs = meta();
    const auto& [output, mean, rstd] = outputs;
    if (input.numel() != 0) {
      const RowsOnCpu on_cpu(input, mean);
      GRADNORM_KERNELS(layer_norm_kernels)
          .forward(
              {output, mean, rstd, input.contiguous(), on_cpu.parameter(weight, 1),
               on_cpu.parameter(bias, 0)},
              eps, on_cpu.rows);
    }
    return outputs;
  }
  TensorTriple meta() const {
    check();
    const Tensor mean = at::empty_symint(statistics_shape(input, 1, 1), arithmetic_options(input));
    return {empty_contiguous(input), mean, at::empty_like(mean)};
  }
  TensorTriple autograd() const {
    if (needs_composite(input, weight, bias)) {
      return composite();
    }
    check();
    return record_forward(
        input, weight, bias, kNchw, [&](const Tensor& x) { return call(Forward2d{x, weight, bias, eps}); });
  }
  TensorTriple autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(Forward2d{
        autocast_to_float(input), autocast_to_float(weight), autocast_to_float(bias), eps});
  }
};

struct Forward {
  static constexpr auto schema =
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05) -> Tensor";
  const Tensor& input;
  c10::SymIntArrayRef normalized_shape;
  OptionalTensor weight, bias;
  double eps;
  auto tie() const {
    return std::tie(input, normalized_shape, weight, bias, eps);
  }

  void check() const {
    check_rows(name_of<Forward>(), input, normalized_shape, {{"weight", weight}, {"bias", bias}});
  }
  Tensor composite() const {
    if (input.is_nested()) {
      return at::layer_norm_symint(input, normalized_shape, optional(weight), optional(bias), eps);
    }
    check();
    std::vector<int64_t> dims(normalized_shape.size());
    std::iota(dims.begin(), dims.end(), input.dim() - static_cast<int64_t>(dims.size()));
    Normalized rows{dims, {normalized_shape.begin(), normalized_shape.end()}};
    rows.set_input(to_opmath(input.contiguous()), eps);
    return rows.affine(weight, bias).to(input.scalar_type());
  }
  TensorTriple native(const Tensor& x) const {
    return at::native_layer_norm_symint(x, normalized_shape, optional(weight), optional(bias), eps);
  }
  Tensor any_device() const {
    check();
    return std::get<0>(native(input));
  }
  Tensor autograd() const {
    if (needs_composite(input, weight, bias)) {
      return composite();
    }
    check();
    return std::get<0>(record_forward(
        input, weight, bias, static_cast<Ndim>(normalized_shape.size()),
        [&](const Tensor& x) { return native(x); }));
  }
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(Forward{
        autocast_to_float(input), normalized_shape, autocast_to_float(weight), autocast_to_float(bias), eps});
  }
};

const Registration<Forward, Forward2d, Backward2d, DoubleBackward> registration;

// Its own backward is fused. Whatever ours does not cover stays PyTorch's.
struct AtenLayerNormBackward : Override<AtenLayerNormBackward> {
  static bool is_covered(const Backward& op) {
    return !needs_composite(op.grad_output, op.input, op.weight) &&
           is_elementwise_match(op.grad_output, op.input) && op.mean.defined() &&
           op.mean.dim() == op.input.dim() &&
           (op.weight.defined() ? op.weight.scalar_type() == op.input.scalar_type() : !op.output_mask[1]) &&
           (op.bias.defined() || !op.output_mask[2]);
  }

  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& grad_out, const Tensor& input,
      c10::SymIntArrayRef normalized_shape, const Tensor& mean, const Tensor& rstd,
      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, Mask<3> output_mask) {
    const OptionalTensor w(weight), b(bias);
    const Backward op{
        grad_out, input, mean, rstd, w, b, static_cast<Ndim>(normalized_shape.size()), output_mask};
    return is_covered(op) ? op.recorded()
                          : stock<TensorTriple>(
                                keys, grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
  }
};

const StockOverride override_aten([](torch::Library& m) {
  AtenLayerNormBackward::install(m, "native_layer_norm_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::layer_norm
