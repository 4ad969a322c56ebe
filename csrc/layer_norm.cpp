// Layer normalisation over the last dimensions (PyTorch's own forward and backward, our double backward) and
// over the channels of NCHW, and root-mean-square normalisation over the last dimensions (Zhang and Sennrich
// 2019, arXiv:1910.07467), which is layer normalisation without a mean and a bias: where it is meant, they
// are undefined.
//
// Rows are adjacent dimensions of an input, and the statistics of a row have the shape of the input with
// these dimensions reduced to 1.
#include "cpu/layer_norm.h"

#include <limits>
#include <numeric>

#include "normalization.h"

namespace gradnorm_kernels::layer_norm {
namespace {

// Where input's own size is 1, it means nothing whether a dimension is normalised.
struct RowLayout {
  std::vector<int64_t> dims;
  c10::SymDimVector shape;   // of these dimensions, and 1 elsewhere: what parameters broadcast as
  c10::SymInt elements = 1;  // in a row
  bool adjacent = true;

  RowLayout(const Tensor& input, const Tensor& statistic) : shape(input.dim(), 1) {
    bool ended = false;
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (input.sym_size(d) == 1) {
        continue;
      }
      if (statistic.sym_size(d) == 1) {
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

// The shape of the statistics of the last ndim dimensions, or of the channels of NCHW.
c10::SymDimVector statistics_shape(const Tensor& input, int64_t first, int64_t ndim) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  std::fill_n(shape.begin() + first, ndim, 1);
  return shape;
}

void check_rows(
    const char* op, const Tensor& input, c10::SymIntArrayRef normalized_shape,
    std::initializer_list<NamedTensor> parameters) {
  check_floating(op, {{"input", input}});
  const auto ndim = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK_VALUE(ndim > 0, op, ": expected normalized_shape to have at least one element");
  TORCH_CHECK_VALUE(
      input.dim() >= ndim && input.sym_sizes().slice(input.dim() - ndim) == normalized_shape, op,
      ": expected the shape of input to end in normalized_shape (", normalized_shape, "), got ",
      input.sym_sizes());
  check_shapes(op, input, parameters, normalized_shape);
}

void check_channels(const char* op, const Tensor& input, std::initializer_list<NamedTensor> parameters) {
  check_floating(op, {{"input", input}});
  TORCH_CHECK_VALUE(
      input.dim() == 4, op, ": expected input to be of shape (N, C, H, W), got ", input.sym_sizes());
  check_shapes(op, input, parameters, input.sym_sizes().slice(1, 1));
}

void check_statistics(const char* op, const Tensor& input, std::initializer_list<NamedTensor> all) {
  const NamedTensor& first = all.begin()->tensor.defined() ? *all.begin() : *std::prev(all.end());
  for (const auto& [name, tensor] : all) {
    if (!tensor.defined()) {
      continue;
    }
    check_floating(op, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    bool matches = tensor.dim() == input.dim() && input.dim() > 0;
    for (int64_t d = 0; matches && d < input.dim(); ++d) {
      matches = tensor.sym_size(d) == 1 || tensor.sym_size(d) == input.sym_size(d);
    }
    TORCH_CHECK_VALUE(
        matches && tensor.sym_sizes() == first.tensor.sym_sizes() && RowLayout(input, tensor).adjacent, op,
        ": expected ", name, " to have the shape of input (", input.sym_sizes(),
        ") with adjacent dimensions reduced to 1, got ", tensor.sym_sizes());
  }
}

// Of the parameters, and of the gradients of their gradients, only the number of elements says which they
// are.
void check_elements(
    const char* op, const Tensor& input, const Tensor& statistic, std::initializer_list<NamedTensor> all) {
  const auto elements = RowLayout(input, statistic).elements;
  for (const auto& [name, tensor] : all) {
    check_floating(op, {{"input", input}, {name, tensor}}, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(
        !tensor.defined() || tensor.sym_numel() == elements, op, ": expected ", name, " to have ", elements,
        " elements, got shape ", tensor.sym_sizes());
  }
}

// The operands of a CPU kernel.
struct RowsOnCpu {
  const Tensor& input;
  NormalizedRows rows;

  // With 1 column in a row, or none, the statistics' sizes still say which rows there are.
  RowsOnCpu(const Tensor& input, const Tensor& mean, const Tensor& rstd) : input(input) {
    int64_t inner = 1;
    for (auto d = input.dim() - 1; d >= 0 && rstd.size(d) == input.size(d); --d) {
      inner *= input.size(d);
    }
    rows = {rstd.numel() / inner, input.numel() / rstd.numel(), inner, /*centred=*/mean.defined()};
  }

  Tensor parameter(const Tensor& tensor, double absent) const {
    const auto options = arithmetic_options(input);
    return tensor.defined() ? tensor.to(options.dtype()).contiguous()
                            : at::full({rows.columns}, absent, options);
  }
  Tensor statistic(const Tensor& tensor) const {
    return tensor.defined() ? tensor.to(arithmetic_options(input).dtype()).contiguous() : tensor;
  }
  Tensor partial_sums(bool wanted) const {
    return wanted ? at::empty({rows.chunks(), rows.columns}, arithmetic_options(input)) : Tensor();
  }
  static Tensor sum(const Tensor& partial_sums, const Tensor& like) {
    return partial_sums.defined() ? partial_sums.sum(0).view(like.sizes()).to(like.scalar_type()) : Tensor();
  }
};

Normalized normalized(const Tensor& input, const Tensor& mean, const Tensor& rstd) {
  const RowLayout layout(input, rstd);
  Normalized result{
      layout.dims, layout.shape, mean.defined() ? Statistics::kCentred : Statistics::kUncentred};
  result.set_input(to_opmath(input.contiguous()), rstd);
  return result;
}

const Tensor kUndefined;

// How many last dimensions are normalised; kNchw for the channels of NCHW, and kRowsOfRms where only the
// statistics say it.
using Ndim = int64_t;
constexpr Ndim kNchw = 0;
constexpr Ndim kRowsOfRms = -1;

// The passes, for whichever normalisation the operands are of; op names it in errors.

struct Forward {
  const Tensor &input, &weight, &bias;
  double eps;

  // dims: what is normalised; shape: what parameters broadcast as.
  Normalized normalized(
      const std::vector<int64_t>& dims, const c10::SymDimVector& shape, Statistics statistics) const {
    Normalized rows{dims, shape, statistics};
    rows.set_input(to_opmath(input.contiguous()), eps);
    return rows;
  }
  Normalized normalized_last(c10::SymIntArrayRef shape, Statistics statistics) const {
    std::vector<int64_t> dims(shape.size());
    std::iota(dims.begin(), dims.end(), input.dim() - static_cast<int64_t>(dims.size()));
    return normalized(dims, {shape.begin(), shape.end()}, statistics);
  }
  Tensor output(const Normalized& rows) const {
    return rows.affine(weight, bias).to(input.scalar_type());
  }
  void cpu(const Tensor& output, const Tensor& mean, const Tensor& rstd) const {
    if (input.numel() != 0) {
      const RowsOnCpu on_cpu(input, mean, rstd);
      GRADNORM_KERNELS(layer_norm_kernels)
          .forward(
              {output, mean, rstd, input.contiguous(), on_cpu.parameter(weight, 1),
               mean.defined() ? on_cpu.parameter(bias, 0) : Tensor()},
              eps, on_cpu.rows);
    }
  }
};

struct Backward {
  const char* op;
  const Tensor &grad_output, &input, &mean, &rstd, &weight, &bias;
  Mask<3> output_mask;

  void check() const {
    check_elementwise(op, {{"input", input}, {"grad_output", grad_output}});
    check_statistics(op, input, {{"mean", mean}, {"rstd", rstd}});
    check_elements(op, input, rstd, {{"weight", weight}});
  }
  // Of the parameters' gradients, the shape and dtype.
  Tensor like(const Tensor& parameter) const {
    if (parameter.defined()) {
      return parameter;
    }
    return weight.defined() ? weight : at::empty_symint({RowLayout(input, rstd).elements}, input.options());
  }
  TensorTriple composite() const {
    check();
    const auto row = normalized(input, mean, rstd);
    const Tensor g = to_opmath(grad_output.contiguous());
    const auto [grad_input, grad_weight, grad_bias] = row.backward(g, weight, like(weight), output_mask);
    return {to_dtype_of(input, grad_input), grad_weight, to_dtype_of(like(bias), grad_bias)};
  }
  TensorTriple cpu() const {
    check();
    const Tensor grad_input = empty_contiguous(input, output_mask[0]);
    const Tensor parameter = like(weight);
    if (input.numel() == 0) {
      const auto zeros = [&](bool wanted) { return wanted ? at::zeros_like(parameter) : Tensor(); };
      return {grad_input, zeros(output_mask[1]), zeros(output_mask[2])};
    }
    const RowsOnCpu on_cpu(input, mean, rstd);
    const Tensor grad_weight = on_cpu.partial_sums(output_mask[1]);
    const Tensor grad_bias = on_cpu.partial_sums(output_mask[2]);
    GRADNORM_KERNELS(layer_norm_kernels)
        .backward(
            {grad_input, grad_weight, grad_bias, grad_output.contiguous(), input.contiguous(),
             on_cpu.statistic(mean), on_cpu.statistic(rstd), on_cpu.parameter(weight, 1)},
            on_cpu.rows);
    return {grad_input, on_cpu.sum(grad_weight, parameter), on_cpu.sum(grad_bias, parameter)};
  }
  TensorTriple meta() const {
    check();
    return {
        empty_contiguous(input, output_mask[0]), empty_contiguous(like(weight), output_mask[1]),
        empty_contiguous(like(weight), output_mask[2])};
  }
  // What compute returns for it, with the double backward below.
  template <class Compute>
  TensorTriple recorded(int64_t ndim, const Compute& compute) const;
};

struct DoubleBackward {
  const char* op;
  const Tensor &grad_grad_input, &grad_grad_weight, &grad_grad_bias, &grad_output, &input, &mean, &rstd,
      &weight;
  Mask<3> output_mask;

  void check() const {
    check_elementwise(
        op, {{"input", input}, {"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
    check_statistics(op, input, {{"mean", mean}, {"rstd", rstd}});
    TORCH_CHECK_VALUE(
        !output_mask[2] || weight.defined(), op, ": expected weight, whose gradient output_mask asks for");
    check_elements(
        op, input, rstd,
        {{"weight", weight}, {"grad_grad_weight", grad_grad_weight}, {"grad_grad_bias", grad_grad_bias}});
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
    const RowsOnCpu on_cpu(input, mean, rstd);
    const Tensor grad_weight = on_cpu.partial_sums(output_mask[2]);
    const bool parameters = grad_grad_weight.defined() || grad_grad_bias.defined();
    GRADNORM_KERNELS(layer_norm_kernels)
        .double_backward(
            {grad_grad_output, grad_input, grad_weight, grad_grad_input.contiguous(),
             parameters ? on_cpu.parameter(grad_grad_weight, 0) : Tensor(),
             parameters && mean.defined() ? on_cpu.parameter(grad_grad_bias, 0) : Tensor(),
             grad_output.contiguous(), input.contiguous(), on_cpu.statistic(mean), on_cpu.statistic(rstd),
             on_cpu.parameter(weight, 1)},
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

// The ops.

struct LayerNormDoubleBackward {
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

  DoubleBackward pass() const {
    return {
        name_of<LayerNormDoubleBackward>(),
        grad_grad_input,
        grad_grad_weight,
        grad_grad_bias,
        grad_output,
        input,
        mean,
        rstd,
        weight,
        output_mask};
  }
  TensorTriple composite() const {
    return pass().composite();
  }
  TensorTriple cpu() const {
    return pass().cpu();
  }
  TensorTriple meta() const {
    return pass().meta();
  }
};

struct RmsNormDoubleBackward {
  static constexpr auto schema =
      "rms_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, Tensor grad_output, "
      "Tensor input, Tensor rstd, Tensor? weight, bool[3] output_mask) "
      "-> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)";
  const Tensor& grad_grad_input;
  OptionalTensor grad_grad_weight;
  const Tensor &grad_output, &input, &rstd;
  OptionalTensor weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_grad_input, grad_grad_weight, grad_output, input, rstd, weight, output_mask);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_grad_weight, grad_output, input, weight);
  }

  DoubleBackward pass() const {
    return {
        name_of<RmsNormDoubleBackward>(),
        grad_grad_input,
        grad_grad_weight,
        kUndefined,
        grad_output,
        input,
        kUndefined,
        rstd,
        weight,
        output_mask};
  }
  TensorTriple composite() const {
    return pass().composite();
  }
  TensorTriple cpu() const {
    return pass().cpu();
  }
  TensorTriple meta() const {
    return pass().meta();
  }
};

struct OfBackward {
  using Settings = std::tuple<Ndim>;

  static variable_list backward(
      variable_list grads, const variable_list& saved, Needs needs, const Settings&) {
    grads.resize(3);  // for an RMS norm, which has no bias
    const Tensor &v = grads[0], &u = grads[1], &t = grads[2], &grad_output = saved[0], &input = saved[1],
                 &mean = saved[2], &rstd = saved[3], &weight = saved[4];
    const Mask<3> wanted{needs[0], needs[1], needs[2]};
    if (!v.defined()) {
      // Only where nothing before this layer is differentiated.
      return to_list(
          DoubleBackward{"layer_norm", v, u, t, grad_output, input, mean, rstd, weight, wanted}.composite());
    }
    return to_list(
        mean.defined()
            ? call(LayerNormDoubleBackward{v, u, t, grad_output, input, mean, rstd, weight, wanted})
            : call(RmsNormDoubleBackward{v, u, grad_output, input, rstd, weight, wanted}));
  }
  static Tensor again(const variable_list& saved, const Settings& settings);
};

template <class Compute>
TensorTriple Backward::recorded(Ndim ndim, const Compute& compute) const {
  return to_tuple<3>(record<OfBackward>({grad_output, input, weight}, {ndim}, [&](variable_list& saved) {
    saved = {grad_output, input, mean, rstd, weight};
    return to_list(compute(), output_mask);
  }));
}

struct LayerNorm2dBackward {
  static constexpr auto schema =
      "layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  const Tensor &grad_output, &input, &mean, &rstd;
  OptionalTensor weight;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, mean, rstd, weight, output_mask);
  }

  Backward pass() const {
    const auto op = name_of<LayerNorm2dBackward>();
    check_channels(op, input, {{"weight", weight}});
    return {op, grad_output, input, mean, rstd, weight, kUndefined, output_mask};
  }
  TensorTriple composite() const {
    return pass().composite();
  }
  TensorTriple cpu() const {
    return pass().cpu();
  }
  TensorTriple meta() const {
    return pass().meta();
  }
  TensorTriple autograd() const {
    return needs_composite(grad_output, input, weight) ? composite()
                                                       : pass().recorded(kNchw, [&] { return call(*this); });
  }
};

struct RmsNormBackward {
  static constexpr auto schema =
      "rms_norm_backward(Tensor grad_output, Tensor input, Tensor rstd, Tensor? weight, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight)";
  const Tensor &grad_output, &input, &rstd;
  OptionalTensor weight;
  Mask<2> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, rstd, weight, output_mask);
  }

  Backward pass() const {
    return {
        name_of<RmsNormBackward>(),
        grad_output,
        input,
        kUndefined,
        rstd,
        weight,
        kUndefined,
        {output_mask[0], output_mask[1], false}};
  }
  TensorPair composite() const {
    return first_two(pass().composite());
  }
  TensorPair cpu() const {
    return first_two(pass().cpu());
  }
  TensorPair meta() const {
    return first_two(pass().meta());
  }
  TensorPair autograd() const {
    return needs_composite(grad_output, input, weight)
               ? composite()
               : first_two(pass().recorded(kRowsOfRms, [&] {
                   return std::tuple_cat(call(*this), std::tuple<Tensor>());
                 }));
  }
  static TensorPair first_two(const TensorTriple& gradients) {
    return {std::get<0>(gradients), std::get<1>(gradients)};
  }
};

// Of (output, mean, rstd).
struct OfLayerNorm {
  using Settings = std::tuple<Ndim, double>;  // and eps
  static constexpr size_t differentiable_results = 1;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const Tensor &input = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3], &bias = saved[4];
    const Backward pass{"layer_norm_backward",         grads[0], input, mean, rstd, weight, bias,
                        {needs[0], needs[1], needs[2]}};
    if (needs_composite(grads[0], input, weight)) {
      return to_list(pass.composite());
    }
    const auto ndim = std::get<Ndim>(settings);
    return to_list(pass.recorded(ndim, [&] {
      return ndim == kNchw ? call(LayerNorm2dBackward{grads[0], input, mean, rstd, weight, pass.output_mask})
                           : at::native_layer_norm_backward_symint(
                                 grads[0], input, input.sym_sizes().slice(input.dim() - ndim), mean, rstd,
                                 optional(weight), optional(bias), pass.output_mask);
    }));
  }
  static Tensor again(const variable_list& saved, const Settings& settings);
};

// Of (output, rstd); the derivative of rstd is -rstd^2 x̂ / M, M the elements of a row.
struct OfRmsNorm {
  using Settings = std::tuple<Ndim, std::optional<double>>;  // and eps

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    const Tensor &input = saved[0], &rstd = saved[1], &weight = saved[2];
    variable_list gradients(1);
    if (grads[0].defined()) {
      gradients = to_list(call(RmsNormBackward{grads[0], input, rstd, weight, {needs[0], needs[1]}}));
    }
    if (grads[1].defined() && needs[0]) {
      const auto row = normalized(input, kUndefined, rstd);
      const Tensor slope = row.rstd.square() * grads[1] / RowLayout(input, rstd).elements;
      const Tensor more = to_dtype_of(input, -row.x_hat * slope);
      gradients[0] = gradients[0].defined() ? gradients[0] + more : more;
    }
    return gradients;
  }
  static Tensor again(const variable_list& saved, const Settings& settings);
};

struct LayerNorm2d {
  static constexpr auto schema =
      "layer_norm_2d(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-06) "
      "-> (Tensor output, Tensor mean, Tensor rstd)";
  const Tensor& input;
  OptionalTensor weight, bias;
  double eps;
  auto tie() const {
    return std::tie(input, weight, bias, eps);
  }

  Forward pass() const {
    check_channels(name_of<LayerNorm2d>(), input, {{"weight", weight}, {"bias", bias}});
    return {input, weight, bias, eps};
  }
  TensorTriple composite() const {
    const auto rows = pass().normalized({1}, {input.sym_size(1), 1, 1}, Statistics::kCentred);
    return {pass().output(rows), rows.mean_of_input.detach(), rows.rstd.detach()};
  }
  TensorTriple cpu() const {
    const TensorTriple outputs = meta();
    std::apply([&](const auto&... output) { pass().cpu(output...); }, outputs);
    return outputs;
  }
  TensorTriple meta() const {
    pass();
    const Tensor mean = at::empty_symint(statistics_shape(input, 1, 1), arithmetic_options(input));
    return {empty_contiguous(input), mean, at::empty_like(mean)};
  }
  TensorTriple autograd() const {
    if (needs_composite(input, weight, bias)) {
      return composite();
    }
    const Tensor x = pass().input.contiguous();
    return to_tuple<3>(record<OfLayerNorm>({x, weight, bias}, {kNchw, eps}, [&](variable_list& saved) {
      const auto outputs = call(LayerNorm2d{x, weight, bias, eps});
      saved = {x, std::get<1>(outputs), std::get<2>(outputs), weight, bias};
      return to_list(outputs);
    }));
  }
  TensorTriple autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(
        LayerNorm2d{autocast_to_float(input), autocast_to_float(weight), autocast_to_float(bias), eps});
  }
};

// All passes want the input contiguous: it is copied, if at all, once.
struct LayerNorm {
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

  Forward pass() const {
    check_rows(name_of<LayerNorm>(), input, normalized_shape, {{"weight", weight}, {"bias", bias}});
    return {input, weight, bias, eps};
  }
  // PyTorch's own layer norm only for nested tensors: from the third order on, and in reverse over forward
  // mode, its derivatives take the statistics for constants.
  Tensor composite() const {
    if (input.is_nested()) {
      return at::layer_norm_symint(input, normalized_shape, optional(weight), optional(bias), eps);
    }
    return pass().output(pass().normalized_last(normalized_shape, Statistics::kCentred));
  }
  TensorTriple native(const Tensor& x) const {
    return at::native_layer_norm_symint(x, normalized_shape, optional(weight), optional(bias), eps);
  }
  Tensor any_device() const {
    return std::get<0>(native(pass().input));
  }
  Tensor autograd() const {
    if (needs_composite(input, weight, bias)) {
      return composite();
    }
    const Tensor x = pass().input.contiguous();
    const auto ndim = static_cast<Ndim>(normalized_shape.size());
    return record<OfLayerNorm>({x, weight, bias}, {ndim, eps}, [&](variable_list& saved) {
      const auto outputs = native(x);
      saved = {x, std::get<1>(outputs), std::get<2>(outputs), weight, bias};
      return to_list(outputs);
    })[0];
  }
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(
        LayerNorm{
            autocast_to_float(input), normalized_shape, autocast_to_float(weight), autocast_to_float(bias),
            eps});
  }
};

struct RmsNorm {
  static constexpr auto schema =
      "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) "
      "-> (Tensor output, Tensor rstd)";
  const Tensor& input;
  c10::SymIntArrayRef normalized_shape;
  OptionalTensor weight;
  std::optional<double> eps;
  auto tie() const {
    return std::tie(input, normalized_shape, weight, eps);
  }

  Forward pass() const {
    check_rows(name_of<RmsNorm>(), input, normalized_shape, {{"weight", weight}});
    // As PyTorch's, the machine epsilon of the dtype of arithmetic where it is not given.
    const double epsilon = input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                              : std::numeric_limits<float>::epsilon();
    return {input, weight, kUndefined, eps.value_or(epsilon)};
  }
  TensorPair composite() const {
    const auto rows = pass().normalized_last(normalized_shape, Statistics::kUncentred);
    return {pass().output(rows), rows.rstd};
  }
  TensorPair cpu() const {
    const TensorPair outputs = meta();
    pass().cpu(std::get<0>(outputs), kUndefined, std::get<1>(outputs));
    return outputs;
  }
  TensorPair meta() const {
    pass();
    const auto ndim = static_cast<int64_t>(normalized_shape.size());
    const auto shape = statistics_shape(input, input.dim() - ndim, ndim);
    return {empty_contiguous(input), at::empty_symint(shape, arithmetic_options(input))};
  }
  TensorPair autograd() const {
    if (needs_composite(input, weight)) {
      return composite();
    }
    const Tensor x = pass().input.contiguous();
    const auto ndim = static_cast<Ndim>(normalized_shape.size());
    return to_tuple<2>(record<OfRmsNorm>({x, weight}, {ndim, eps}, [&](variable_list& saved) {
      const auto outputs = call(RmsNorm{x, normalized_shape, weight, eps});
      saved = {x, std::get<1>(outputs), weight};
      return to_list(outputs);
    }));
  }
  TensorPair autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(RmsNorm{autocast_to_float(input), normalized_shape, autocast_to_float(weight), eps});
  }
};

// The gradient of the input.
Tensor OfBackward::again(const variable_list& saved, const Settings& settings) {
  const auto [ndim] = settings;
  const Tensor &grad_output = saved[0], &input = saved[1], &mean = saved[2], &rstd = saved[3],
               &weight = saved[4];
  switch (ndim) {
    case kNchw:
      return std::get<0>(
          call(LayerNorm2dBackward{grad_output, input, mean, rstd, weight, {true, false, false}}));
    case kRowsOfRms:
      return std::get<0>(call(RmsNormBackward{grad_output, input, rstd, weight, {true, false}}));
    default:
      return std::get<0>(at::native_layer_norm_backward_symint(
          grad_output, input, input.sym_sizes().slice(input.dim() - ndim), mean, rstd, optional(weight), {},
          {true, false, false}));
  }
}
Tensor OfLayerNorm::again(const variable_list& saved, const Settings& settings) {
  const auto [ndim, eps] = settings;
  const Tensor &input = saved[0], &weight = saved[3], &bias = saved[4];
  return ndim == kNchw
             ? std::get<0>(call(LayerNorm2d{input, weight, bias, eps}))
             : call(LayerNorm{input, input.sym_sizes().slice(input.dim() - ndim), weight, bias, eps});
}
Tensor OfRmsNorm::again(const variable_list& saved, const Settings& settings) {
  const auto [ndim, eps] = settings;
  const Tensor &input = saved[0], &weight = saved[2];
  return std::get<0>(call(RmsNorm{input, input.sym_sizes().slice(input.dim() - ndim), weight, eps}));
}

const Registration<
    LayerNorm, LayerNorm2d, LayerNorm2dBackward, LayerNormDoubleBackward, RmsNorm, RmsNormBackward,
    RmsNormDoubleBackward>
    registration;

// PyTorch's own ops. Whatever ours do not cover stays PyTorch's.

struct AtenLayerNorm : Override<AtenLayerNorm> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, c10::SymIntArrayRef normalized_shape,
      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
    const LayerNorm op{input, normalized_shape, weight, bias, eps};
    if (!is_differentiated_by_transform({input, op.weight, op.bias})) {
      return stock(keys, input, normalized_shape, weight, bias, eps);
    }
    const auto rows = op.pass().normalized_last(normalized_shape, Statistics::kCentred);
    return {op.pass().output(rows), rows.mean_of_input, rows.rstd};
  }
};

struct AtenLayerNormBackward : Override<AtenLayerNormBackward> {
  static bool is_covered(const Backward& pass) {
    const auto& [op, grad_output, input, mean, rstd, weight, bias, output_mask] = pass;
    return !needs_composite(grad_output, input, weight) && is_elementwise_match(grad_output, input) &&
           mean.defined() && mean.dim() == input.dim() &&
           (weight.defined() ? weight.scalar_type() == input.scalar_type() : !output_mask[1]) &&
           (bias.defined() || !output_mask[2]);
  }

  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& grad_out, const Tensor& input,
      c10::SymIntArrayRef normalized_shape, const Tensor& mean, const Tensor& rstd,
      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, Mask<3> output_mask) {
    const OptionalTensor w(weight), b(bias);
    const Backward pass{"layer_norm_backward", grad_out, input, mean, rstd, w, b, output_mask};
    if (!is_covered(pass)) {
      return stock(keys, grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
    }
    return pass.recorded(static_cast<Ndim>(normalized_shape.size()), [&] {
      return at::native_layer_norm_backward_symint(
          grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask);
    });
  }
};

bool is_covered(const RmsNorm& op) {
  const Tensor &x = op.input, &weight = op.weight;
  const auto ndim = static_cast<int64_t>(op.normalized_shape.size());
  return !needs_composite(x, weight) && is_elementwise_match(x, x) && ndim > 0 && x.dim() >= ndim &&
         x.sym_sizes().slice(x.dim() - ndim) == op.normalized_shape &&
         (!weight.defined() || (is_elementwise_match(weight, weight) && weight.device() == x.device() &&
                                weight.sym_sizes() == op.normalized_shape));
}

struct AtenRmsNorm : Override<AtenRmsNorm> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& input, c10::SymIntArrayRef normalized_shape,
      const std::optional<Tensor>& weight, std::optional<double> eps) {
    const RmsNorm op{input, normalized_shape, weight, eps};
    return is_covered(op) ? std::get<0>(op.autograd()) : stock(keys, input, normalized_shape, weight, eps);
  }
};

struct AtenFusedRmsNorm : Override<AtenFusedRmsNorm> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& input, at::IntArrayRef normalized_shape,
      const std::optional<Tensor>& weight, std::optional<double> eps) {
    const RmsNorm op{input, c10::fromIntArrayRefSlow(normalized_shape), weight, eps};
    return is_covered(op) ? op.autograd() : stock(keys, input, normalized_shape, weight, eps);
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  AtenLayerNorm::install(m, "native_layer_norm");
  AtenLayerNormBackward::install(m, "native_layer_norm_backward");
  AtenRmsNorm::install_whole(m, "rms_norm");
  AtenFusedRmsNorm::install_whole(m, "_fused_rms_norm");
});

}  // namespace
}  // namespace gradnorm_kernels::layer_norm
