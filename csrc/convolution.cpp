// Convolutions of any dimension, transposed ones too: ATen's forward and backward, and a double backward of
// three convolutions at most. PyTorch's own takes one for every group.
#include "cpu/convolution.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::convolution {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

constexpr auto kName = "convolution";

std::vector<SymInt> owned(SymIntArrayRef values) {
  return values.vec();
}
SymInt owned(SymInt value) {
  return value;
}
bool owned(bool value) {
  return value;
}

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Whether oneDNN's gradient of a depthwise convolution's weight is slow: where the kernel has more than 9
// taps it takes 5 to 30 times the time of the forward, and it has no float64. Shapes are checked by the op.
// Half types are slower still, and gain by float32.
bool is_slow_depthwise(
    const Tensor& input, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
    SymIntArrayRef dilation, bool transposed, const SymInt& groups) {
  const int64_t dims = input.dim() - 2;
  if (!input.is_cpu() || transposed || (dims != 1 && dims != 2) || weight.dim() != input.dim() ||
      groups != input.size(1) || weight.size(0) != input.size(1) || weight.size(1) != 1 ||
      input.numel() == 0) {
    return false;
  }
  for (const SymIntArrayRef& setting : {stride, padding, dilation}) {
    if (setting.size() != static_cast<size_t>(dims)) {
      return false;
    }
  }
  return input.scalar_type() == at::kDouble || weight[0].numel() > 9;
}

Tensor call_depthwise_grad_weight(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation) {
  static const auto op =
      find_op<decltype(call_depthwise_grad_weight)>("gradnorm_kernels::_depthwise_grad_weight");
  return op.call(grad_output, input, weight, stride, padding, dilation);
}

Tensor depthwise_grad_weight(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  // One dimension is a row of two.
  const bool is_row = input.dim() == 3;
  const auto with_height = [&](const Tensor& t) { return is_row ? t.unsqueeze(2) : t; };
  const auto of_both = [&](at::IntArrayRef setting, int64_t of_row) -> std::array<int64_t, 2> {
    return {is_row ? of_row : setting.front(), setting.back()};
  };
  const ConvolutionGeometry geometry{of_both(stride, 1), of_both(padding, 0), of_both(dilation, 1)};
  const Tensor image = with_height(to_opmath(input)), gradient = with_height(to_opmath(grad_output));
  const Tensor kernel = with_height(weight);
  std::vector<int64_t> shape{image.size(0), image.size(1)};
  for (const int64_t i : {0, 1}) {
    const auto [step, margin, spread] =
        std::tie(geometry.stride[i], geometry.padding[i], geometry.dilation[i]);
    const int64_t taps = kernel.size(2 + i), last = image.size(2 + i) + 2 * margin - spread * (taps - 1) - 1;
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

Tensor depthwise_grad_weight_meta(
    const Tensor&, const Tensor&, const Tensor& weight, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef) {
  return at::empty_symint(weight.sym_sizes(), weight.options());
}

// Settings are what every op takes after its tensors: see Ops below.
template <class... Settings>
struct ConvolutionOps {
  using Saved = std::tuple<decltype(owned(std::declval<Settings>()))...>;
  using ForwardSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, Settings...);
  using BackwardSignature = TensorTriple(
      const Tensor&, const Tensor&, const Tensor&, at::OptionalSymIntArrayRef, Settings..., Mask);

  static Tensor call_forward(
      const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Settings... settings) {
    static const auto op = find_op<ForwardSignature>("gradnorm_kernels::convolution");
    return op.call(input, weight, bias, settings...);
  }
  static TensorTriple call_backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight,
      at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
    static const auto op = find_op<BackwardSignature>("gradnorm_kernels::convolution_backward");
    return op.call(grad_output, input, weight, bias_sizes, settings..., output_mask);
  }

  static void check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    check_floating(kName, "", {{"input", input}, {"weight", weight}});
    if (bias) {
      check_floating(kName, "", {{"input", input}, {"bias", *bias}});
    }
  }
  static void check(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
    check_floating(kName, "_backward", {{"input", input}, {"weight", weight}, {"grad_output", grad_output}});
  }

  // ATen's own, differentiable to any order.
  struct Composite {
    static Tensor forward(
        const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Settings... settings) {
      check(input, weight, bias);
      return at::convolution_symint(input, weight, bias, settings...);
    }
    static TensorTriple backward(
        const Tensor& grad_output, const Tensor& input, const Tensor& weight,
        at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
      check(grad_output, input, weight);
      return at::convolution_backward_symint(
          grad_output, input, weight, bias_sizes, settings..., output_mask);
    }
  };

  // ATen's op, so that dispatch modes such as FLOP counters know it, but for some gradients of the weight.
  static TensorTriple backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight,
      at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
    check(grad_output, input, weight);
    const auto [stride, padding, dilation, transposed, output_padding, groups] = std::tie(settings...);
    if (!output_mask[1] || !is_slow_depthwise(input, weight, stride, padding, dilation, transposed, groups)) {
      return at::convolution_backward_symint(
          grad_output, input, weight, bias_sizes, settings..., output_mask);
    }
    TensorTriple grads;
    if (output_mask[0]) {
      grads = at::convolution_backward_symint(
          grad_output, input, weight, std::nullopt, settings..., {true, false, false});
    }
    std::get<1>(grads) = call_depthwise_grad_weight(grad_output, input, weight, stride, padding, dilation);
    if (output_mask[2]) {
      std::get<2>(grads) = grad_output.transpose(0, 1).flatten(1).sum(1);
    }
    return grads;
  }

  // With O = conv(X, W) + b, the backward of a gradient G of O is X' = conv^T(G, W), W' = corr(X, G) and
  // b' = sum G: bilinear in G and (X, W). So the gradients V of X', U of W' and u of b' give
  //     G: conv(V, W) + conv(X, U) + u,    X: conv^T(G, U),    W: corr(V, G),
  // where the last two are one backward, of a convolution of V by U. An operand that no defined
  // gradient meets may be undefined.
  static TensorTriple double_backward(
      const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const Tensor& grad_output, const Tensor& input,
      const Tensor& weight, Settings... settings, Mask output_mask) {
    const auto [wants_grad_grad_output, wants_grad_input, wants_grad_weight] = output_mask;
    Tensor grad_grad_output, grad_input, grad_weight;
    if (wants_grad_grad_output) {
      // The first convolution adds the bias's term as its own bias.
      OptionalTensor bias = grad_grad_bias;
      if (grad_grad_input) {
        grad_grad_output = call_forward(*grad_grad_input, weight, bias, settings...);
        bias.reset();
      }
      if (grad_grad_weight) {
        const Tensor term = call_forward(input, *grad_grad_weight, bias, settings...);
        grad_grad_output = grad_grad_output.defined() ? grad_grad_output + term : term;
        bias.reset();
      }
      if (bias) {
        std::vector<int64_t> channels(grad_output.dim(), 1);
        channels[1] = -1;
        grad_grad_output = at::zeros_like(grad_output) + bias->view(channels);
      }
    }
    const bool has_grad_input = wants_grad_input && grad_grad_weight;
    const bool has_grad_weight = wants_grad_weight && grad_grad_input;
    if (has_grad_input || has_grad_weight) {
      // Where a gradient is undefined, the operand it belongs to stands in for its shape.
      std::tie(grad_input, grad_weight, std::ignore) = call_backward(
          grad_output, grad_grad_input.value_or(input), grad_grad_weight.value_or(weight), std::nullopt,
          settings..., {has_grad_input, has_grad_weight, false});
    }
    return {grad_grad_output, grad_input, grad_weight};
  }

  struct Autograd {
    static Tensor forward(
        const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Settings... settings) {
      if (needs_composite({input, weight, bias.value_or(input)})) {
        return Composite::forward(input, weight, bias, settings...);
      }
      check(input, weight, bias);
      if (!torch::autograd::compute_requires_grad(input, weight, bias)) {
        at::AutoDispatchBelowADInplaceOrView guard;
        return at::convolution_symint(input, weight, bias, settings...);
      }
      return Forward::apply(input, weight, bias, Saved(owned(settings)...));
    }
    static TensorTriple backward(
        const Tensor& grad_output, const Tensor& input, const Tensor& weight,
        at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
      if (needs_composite({grad_output, input, weight})) {
        return Composite::backward(grad_output, input, weight, bias_sizes, settings..., output_mask);
      }
      check(grad_output, input, weight);
      return record(
          &ConvolutionOps::backward, grad_output, input, weight, bias_sizes, settings..., output_mask);
    }
  };

  static TensorTriple record(
      BackwardSignature* first, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
      at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
    if (!torch::autograd::compute_requires_grad(grad_output, input, weight)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return first(grad_output, input, weight, bias_sizes, settings..., output_mask);
    }
    const auto grads = Backward::apply(
        grad_output, input, weight, bias_sizes, Saved(owned(settings)...), output_mask, first);
    return spread(grads, output_mask);
  }

  // A Function has no undefined outputs: Backward's are the gradients that output_mask asks for.
  static TensorTriple spread(const variable_list& tensors, Mask output_mask) {
    size_t next = 0;
    const auto take = [&](bool present) { return present ? tensors[next++] : Tensor(); };
    return TensorTriple{take(output_mask[0]), take(output_mask[1]), take(output_mask[2])};
  }

  static Saved saved(AutogradContext* ctx) {
    return ctx->saved_data["settings"].to<Saved>();
  }

  struct Forward : torch::autograd::Function<Forward> {
    static Tensor forward(
        AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
        const Saved& settings) {
      ctx->save_for_backward({input, weight});
      ctx->saved_data["settings"] = settings;
      ctx->saved_data["has_bias"] = bias.has_value();
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::apply(
          [&](const auto&... s) { return at::convolution_symint(input, weight, bias, s...); }, settings);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
      const Tensor& grad_output = grad_outputs[0];
      if (!grad_output.defined()) {
        return {Tensor(), Tensor(), Tensor(), Tensor()};
      }
      const auto variables = ctx->get_saved_variables();
      const Mask output_mask{
          ctx->needs_input_grad(0), ctx->needs_input_grad(1),
          ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)};
      const SymInt channels = grad_output.sym_size(1);
      auto [grad_input, grad_weight, grad_bias] = std::apply(
          [&](const auto&... s) {
            return call_backward(
                grad_output, variables[0], variables[1],
                output_mask[2] ? at::OptionalSymIntArrayRef(channels) : std::nullopt, s..., output_mask);
          },
          saved(ctx));
      return {grad_input, grad_weight, grad_bias, Tensor()};
    }
  };

  // first computes the gradients: our own op, or PyTorch's where only its double backward is replaced.
  struct Backward : torch::autograd::Function<Backward> {
    static variable_list forward(
        AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
        at::OptionalSymIntArrayRef bias_sizes, const Saved& settings, Mask output_mask,
        BackwardSignature* first) {
      // An operand that only meets the gradient of a result not asked for is not read again.
      ctx->save_for_backward(
          {grad_output, output_mask[1] ? input : Tensor(), output_mask[0] ? weight : Tensor()});
      ctx->saved_data["settings"] = settings;
      ctx->saved_data["output_mask"] = output_mask;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      const auto [grad_input, grad_weight, grad_bias] = std::apply(
          [&](const auto&... s) { return first(grad_output, input, weight, bias_sizes, s..., output_mask); },
          settings);
      // Some of ATen's implementations return more than they were asked for.
      variable_list grads;
      if (output_mask[0]) {
        grads.push_back(grad_input);
      }
      if (output_mask[1]) {
        grads.push_back(grad_weight);
      }
      if (output_mask[2]) {
        grads.push_back(grad_bias);
      }
      return grads;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      const auto variables = ctx->get_saved_variables();
      const auto [grad_grad_input, grad_grad_weight, grad_grad_bias] =
          spread(grads, ctx->saved_data["output_mask"].to<Mask>());
      auto [grad_grad_output, grad_input, grad_weight] = std::apply(
          [&](const auto&... s) {
            return double_backward(
                if_defined(grad_grad_input), if_defined(grad_grad_weight), if_defined(grad_grad_bias),
                variables[0], variables[1], variables[2], s...,
                {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
          },
          saved(ctx));
      return {grad_grad_output, grad_input, grad_weight, Tensor(), Tensor(), Tensor(), Tensor()};
    }
  };

  // The dtypes that ATen's convolution has in an autocast region.
  template <c10::DeviceType device>
  static auto autocast() {
    using namespace at::autocast;
    return &WrapFunction<
        CastPolicy::lower_precision_fp, device, ForwardSignature, ForwardSignature,
        &call_forward>::type::call;
  }

  // aten::convolution_backward whose own backward is ours.
  struct AtenBackward {
    static StockKernel& stock() {
      static StockKernel kernel("aten::convolution_backward");
      return kernel;
    }

    static bool is_covered(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
      for (const Tensor& tensor : {input, weight, grad_output}) {
        if (tensor.layout() != at::kStrided || !at::isFloatingType(tensor.scalar_type()) ||
            tensor.scalar_type() != input.scalar_type() || tensor.device() != input.device()) {
          return false;
        }
      }
      return true;
    }

    static TensorTriple autograd(
        c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
        at::OptionalSymIntArrayRef bias_sizes, Settings... settings, Mask output_mask) {
      if (needs_composite({grad_output, input, weight}) || !is_covered(grad_output, input, weight)) {
        return stock().template call<TensorTriple>(
            keys, grad_output, input, weight, bias_sizes, settings..., output_mask);
      }
      return record(
          &at::convolution_backward_symint, grad_output, input, weight, bias_sizes, settings..., output_mask);
    }

    static void install(torch::Library& aten_autograd) {
      stock();
      aten_autograd.impl("convolution_backward", &autograd);
    }
  };
};

// stride, padding, dilation, transposed, output_padding, groups
using Ops = ConvolutionOps<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, SymIntArrayRef, SymInt>;

const StockOverride convolution_override(&Ops::AtenBackward::install);

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  const std::string settings =
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
      "SymInt groups";
  m.def(("convolution(Tensor input, Tensor weight, Tensor? bias, " + settings + ") -> Tensor").c_str());
  m.def(("convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, " +
         settings + ", bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)")
            .c_str());
  m.def(("convolution_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
         "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor weight, " +
         settings +
         ", bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)")
            .c_str());
  m.def(
      "_depthwise_grad_weight(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  m.impl("convolution", &Ops::Autograd::forward);
  m.impl("convolution_backward", &Ops::Autograd::backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  m.impl("convolution", &Ops::Composite::forward);
  m.impl("convolution_backward", &Ops::Composite::backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  m.impl("convolution", &Ops::Composite::forward);
  m.impl("convolution_backward", &Ops::backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  m.impl("_depthwise_grad_weight", &depthwise_grad_weight);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  m.impl("_depthwise_grad_weight", &depthwise_grad_weight_meta);
}

// Two calls of the other ops, wherever it is called.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeImplicitAutograd, m) {
  m.impl("convolution_double_backward", &Ops::double_backward);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCPU, m) {
  m.impl("convolution", Ops::autocast<at::kCPU>());
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  m.impl("convolution", Ops::autocast<at::kCUDA>());
}

}  // namespace
}  // namespace gradnorm_kernels::convolution
