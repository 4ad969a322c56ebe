// Convolutions of any dimension, transposed ones too: ATen's forward and backward, and a double backward of
// three convolutions at most. PyTorch's own takes one for every group.
#include "cpu/convolution.h"

#include <ATen/autocast_mode.h>

#include "bilinear.h"

namespace gradnorm_kernels::convolution {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

// What every op takes after its tensors.
struct Geometry {
  static std::string schema(const char* before, const char* after) {
    constexpr auto settings =
        "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
        "SymInt groups";
    return std::string(before) + settings + after;
  }
  SymIntArrayRef stride, padding, dilation;
  bool transposed;
  SymIntArrayRef output_padding;
  SymInt groups;
  auto tie() const {
    return std::tie(stride, padding, dilation, transposed, output_padding, groups);
  }

  // As it is kept between the passes.
  using Dimensions = std::vector<SymInt>;
  using Kept = std::tuple<Dimensions, Dimensions, Dimensions, bool, Dimensions, SymInt>;
  Kept kept() const {
    return {stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups};
  }
  static Geometry of(const Kept& kept) {
    return std::apply([](const auto&... settings) { return Geometry{settings...}; }, kept);
  }
};

// The shape in which a value for each channel meets a tensor.
std::vector<int64_t> channels_first(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim(), 1);
  shape[1] = -1;
  return shape;
}

// The gradient of the weight of a convolution whose groups have one channel in and one out.
struct DepthwiseGradWeight {
  static constexpr auto schema =
      "_depthwise_grad_weight(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor";
  const Tensor &grad_output, &input, &weight;
  SymIntArrayRef stride, padding, dilation;
  auto tie() const {
    return std::tie(grad_output, input, weight, stride, padding, dilation);
  }

  Tensor cpu() const {
    // One dimension is a row of two.
    const bool is_row = input.dim() == 3;
    const auto with_height = [&](const Tensor& t) { return is_row ? t.unsqueeze(2) : t; };
    const auto of_both = [&](SymIntArrayRef setting, int64_t of_row) -> std::array<int64_t, 2> {
      return {is_row ? of_row : setting.front().expect_int(), setting.back().expect_int()};
    };
    const ConvolutionGeometry geometry{of_both(stride, 1), of_both(padding, 0), of_both(dilation, 1)};
    const Tensor image = with_height(to_opmath(input)), gradient = with_height(to_opmath(grad_output));
    const Tensor kernel = with_height(weight);
    std::vector<int64_t> shape{image.size(0), image.size(1)};
    for (const int64_t i : {0, 1}) {
      const int64_t step = geometry.stride[i], margin = geometry.padding[i], spread = geometry.dilation[i];
      const int64_t taps = kernel.size(2 + i);
      const int64_t last = image.size(2 + i) + 2 * margin - spread * (taps - 1) - 1;
      TORCH_CHECK_VALUE(
          step > 0 && margin >= 0 && spread > 0 && taps > 0 && last >= 0,
          "convolution_backward: expected the kernel to fit in the padded input, got weight ", weight.sizes(),
          " and input ", input.sizes(), " with stride ", stride, ", padding ", padding, ", dilation ",
          dilation);
      shape.push_back(last / step + 1);
    }
    TORCH_CHECK_VALUE(
        gradient.sizes() == shape, "convolution_backward: expected grad_output to have the output's shape (",
        at::IntArrayRef(shape), "), got ", gradient.sizes());
    const auto format = image.is_contiguous() ? at::MemoryFormat::Contiguous : image.suggest_memory_format();
    return GRADNORM_KERNELS(convolution_kernels)
        .depthwise_grad_weight(
            gradient.contiguous(format), image.contiguous(format), format == at::MemoryFormat::ChannelsLast,
            kernel.sizes().slice(2), geometry)
        .view(weight.sizes())
        .to(weight.scalar_type());
  }
  Tensor meta() const {
    return at::empty_symint(weight.sym_sizes(), weight.options());
  }
};

struct Backward {
  static std::string schema() {
    return Geometry::schema(
        "convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, ",
        ", bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  }
  const Tensor &grad_output, &input, &weight;
  at::OptionalSymIntArrayRef bias_sizes;
  Geometry geometry;
  Mask<3> output_mask;
  auto tie() const {
    return std::tuple_cat(
        std::tie(grad_output, input, weight, bias_sizes), geometry.tie(), std::tie(output_mask));
  }

  void check() const {
    check_floating(name_of<Backward>(), {{"input", input}, {"weight", weight}, {"grad_output", grad_output}});
  }
  TensorTriple by_aten() const {
    const auto& [stride, padding, dilation, transposed, output_padding, groups] = geometry;
    return at::convolution_backward_symint(
        grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups,
        output_mask);
  }
  TensorTriple composite() const {
    check();
    return by_aten();
  }
  // ATen's op, so that dispatch modes such as FLOP counters know it, but for some gradients of the weight.
  TensorTriple any_device() const {
    check();
    if (!output_mask[1] || !is_slow_depthwise()) {
      return by_aten();
    }
    TensorTriple grads;
    if (output_mask[0]) {
      grads = Backward{grad_output, input, weight, std::nullopt, geometry, {true, false, false}}.by_aten();
    }
    const DepthwiseGradWeight grad_weight{grad_output,      input, weight, geometry.stride, geometry.padding,
                                          geometry.dilation};
    std::get<1>(grads) = call(grad_weight);
    if (output_mask[2]) {
      std::get<2>(grads) = grad_output.transpose(0, 1).flatten(1).sum(1);
    }
    return grads;
  }
  TensorTriple autograd() const;
  template <class Derivative>
  TensorTriple recorded(TensorTriple (Backward::*value)() const) const;

  // Whether oneDNN's gradient of a depthwise convolution's weight is slow: where the kernel has more than 9
  // taps it takes 5 to 30 times the time of the forward, and it has no float64. Shapes are checked by the op.
  // Half types are slower still, and gain by float32.
  bool is_slow_depthwise() const {
    const int64_t dims = input.dim() - 2;
    if (!input.is_cpu() || geometry.transposed || (dims != 1 && dims != 2) || weight.dim() != input.dim() ||
        geometry.groups != input.size(1) || weight.size(0) != input.size(1) || weight.size(1) != 1 ||
        input.sym_numel() == 0) {
      return false;
    }
    for (const auto& setting : {geometry.stride, geometry.padding, geometry.dilation}) {
      if (setting.size() != static_cast<size_t>(dims)) {
        return false;
      }
    }
    return input.scalar_type() == at::kDouble || weight[0].numel() > 9;
  }
};

struct Forward {
  static std::string schema() {
    return Geometry::schema("convolution(Tensor input, Tensor weight, Tensor? bias, ", ") -> Tensor");
  }
  const Tensor &input, &weight;
  OptionalTensor bias;
  Geometry geometry;
  auto tie() const {
    return std::tuple_cat(std::tie(input, weight, bias), geometry.tie());
  }

  // ATen's own, differentiable to any order.
  Tensor composite() const {
    check_floating(name_of<Forward>(), {{"input", input}, {"weight", weight}, {"bias", bias}});
    const auto& [stride, padding, dilation, transposed, output_padding, groups] = geometry;
    return at::convolution_symint(
        input, weight, optional(bias), stride, padding, dilation, transposed, output_padding, groups);
  }
  // Right to every order: PyTorch's formula for the third with an output_padding is not. That only lengthens
  // the result, by zeros at the end of what is then cropped by the padding.
  Tensor by_parts() const {
    const auto& [stride, padding, dilation, transposed, output_padding, groups] = geometry;
    const auto is_longer = [](const SymInt& length) { return length != 0; };
    if (!transposed || std::none_of(output_padding.begin(), output_padding.end(), is_longer)) {
      return composite();
    }
    const std::vector<SymInt> none(padding.size(), 0);
    std::vector<SymInt> margins;
    for (size_t i = padding.size(); i-- > 0;) {
      margins.insert(margins.end(), {-padding[i], output_padding[i] - padding[i]});
    }
    const Tensor whole = Forward{input, weight, {}, {stride, none, dilation, true, none, groups}}.composite();
    const Tensor output = at::constant_pad_nd_symint(whole, margins);
    return bias.defined() ? output + bias.view(channels_first(output)) : output;
  }
  Tensor autograd() const;
  Tensor autocast() const {
    return in_lower_precision(input, [&](const auto& cast) {
      return call(Forward{cast(input), cast(weight), cast(bias), geometry});
    });
  }
};

struct DoubleBackward {
  static std::string schema() {
    return Geometry::schema(
        "convolution_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
        "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor weight, ",
        ", bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)");
  }
  OptionalTensor grad_grad_input, grad_grad_weight, grad_grad_bias;
  const Tensor &grad_output, &input, &weight;
  Geometry geometry;
  Mask<3> output_mask;
  auto tie() const {
    return std::tuple_cat(
        std::tie(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight),
        geometry.tie(), std::tie(output_mask));
  }

  TensorTriple implicit() const {
    return bilinear_double_backward(
        *this, [](const Tensor& bias, const Tensor& output) { return bias.view(channels_first(output)); });
  }
  Tensor forward(const Tensor& x, const Tensor& w, const Tensor& b) const {
    return call(Forward{x, w, b, geometry});
  }
  TensorTriple backward(const Tensor& x, const Tensor& w, Mask<2> mask) const {
    return call(Backward{grad_output, x, w, std::nullopt, geometry, {mask[0], mask[1], false}});
  }
};

struct OfBackward {
  using Settings = Geometry::Kept;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const DoubleBackward op{
        grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], Geometry::of(settings), needs};
    return to_list(op.implicit());
  }
};

struct OfOurBackward : OfBackward, BilinearBackwardOperands {
  static constexpr bool reads_shapes = true;
};

// value: our own, or PyTorch's where only its double backward is replaced.
template <class Derivative>
TensorTriple Backward::recorded(TensorTriple (Backward::*value)() const) const {
  return to_tuple<3>(
      record<Derivative>({grad_output, input, weight}, geometry.kept(), [&](variable_list& saved) {
        // An operand that only meets the gradient of a result not asked for is not read again.
        saved = {grad_output, output_mask[1] ? input : Tensor(), output_mask[0] ? weight : Tensor()};
        return to_list((this->*value)(), output_mask);
      }));
}
TensorTriple Backward::autograd() const {
  return needs_composite_even_traced({grad_output, input, weight})
             ? composite()
             : recorded<OfOurBackward>(&Backward::any_device);
}

struct OfForward : BilinearForwardOperands {
  static constexpr bool reads_shapes = true;
  using Settings = Geometry::Kept;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const SymInt channels = grads[0].sym_size(1);
    const auto bias_sizes = needs[2] ? at::OptionalSymIntArrayRef(channels) : std::nullopt;
    const Backward op{grads[0], saved[0], saved[1], bias_sizes, Geometry::of(settings), needs};
    return to_list(call(op));
  }
};

Tensor Forward::autograd() const {
  if (needs_composite_even_traced({input, weight, bias})) {
    return by_parts();
  }
  return record<OfForward>({input, weight, bias}, geometry.kept(), [&](variable_list& saved) {
    saved = {input, weight};
    return variable_list{composite()};
  })[0];
}

const Registration<Forward, Backward, DoubleBackward, DepthwiseGradWeight> registration;

// aten::convolution_backward whose own backward is ours.
struct AtenBackward : Override<AtenBackward> {
  static bool is_covered(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
    for (const Tensor& tensor : {input, weight, grad_output}) {
      if (tensor.layout() != at::kStrided || !at::isFloatingType(tensor.scalar_type()) ||
          tensor.scalar_type() != input.scalar_type() || tensor.device() != input.device()) {
        return false;
      }
    }
    return !needs_composite(grad_output, input, weight);
  }

  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
      at::OptionalSymIntArrayRef bias_sizes, SymIntArrayRef stride, SymIntArrayRef padding,
      SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups,
      Mask<3> output_mask) {
    if (!is_covered(grad_output, input, weight)) {
      return stock(
          keys, grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding,
          groups, output_mask);
    }
    const Geometry geometry{stride, padding, dilation, transposed, output_padding, groups};
    return Backward{grad_output, input, weight, bias_sizes, geometry, output_mask}.recorded<OfBackward>(
        &Backward::by_aten);
  }
};

// Where PyTorch's own backward runs, in transforms: its formula is wrong at third order with an
// output_padding.
struct AtenDoubleBackward : Override<AtenDoubleBackward> {
  using Given = const std::optional<Tensor>&;

  static TensorTriple autograd(
      c10::DispatchKeySet, Given grad_grad_input, Given grad_grad_weight, Given grad_grad_bias,
      const Tensor& grad_output, const Tensor& weight, const Tensor& input, SymIntArrayRef stride,
      SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
      SymInt groups, Mask<3> output_mask) {
    return DoubleBackward{
        grad_grad_input,
        grad_grad_weight,
        grad_grad_bias,
        grad_output,
        input,
        weight,
        {stride, padding, dilation, transposed, output_padding, groups},
        output_mask}
        .implicit();
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  AtenBackward::install(m, "convolution_backward");
  AtenDoubleBackward::install_whole(m, "_convolution_double_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::convolution
