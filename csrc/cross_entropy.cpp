// Cross-entropy of logits with classes or probabilities: the CPU, meta and composite implementations of its
// ops, how it is differentiated, and the override of PyTorch's own.
//
// A row x of logits with p = softmax(x) and a target q, whose sum is Q (1 but for probabilities), has the
// loss Q log sum(e^x) - <q, x>, and with g the loss's gradient that of x is h = g (Q p - q). With v the
// gradient of h, those of g and x are Q <p, v> - <q, v> and g Q p (v - <p, v>). Nothing but x and the target
// is kept, and of classes no pass makes a tensor of x's size but its result. Where a target is
// differentiated, the composite is taken.
#include "cpu/cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>

#include "op.h"

namespace gradnorm_kernels::cross_entropy {
namespace {

// What every op here is of.
struct Problem {
  const char* op;
  const Tensor &input, &target;
  int64_t ignore_index;
  double label_smoothing;

  // Of the classes.
  int64_t dim() const {
    return input.dim() == 1 ? 0 : 1;
  }
  bool has_probabilities() const {
    return target.is_floating_point();
  }
  c10::SymDimVector row_sizes() const {
    c10::SymDimVector sizes(input.sym_sizes());
    sizes.erase(sizes.begin() + dim());
    return sizes;
  }
  Tensor empty_rows() const {
    return at::empty_symint(row_sizes(), input.options());
  }

  void check_rows(const char* name, const Tensor& rows) const {
    TORCH_CHECK_VALUE(
        rows.sym_sizes() == row_sizes(), op, ": expected ", name, " to have the shape of input (",
        input.sym_sizes(), ") without its classes, got ", rows.sym_sizes());
  }
  void check() const {
    check_elementwise(op, {{"input", input}});
    TORCH_CHECK_VALUE(
        input.dim() > 0 && input.sym_size(dim()) > 0, op,
        ": expected input to have at least one class, got the shape ", input.sym_sizes());
    if (has_probabilities()) {
      return check_elementwise(op, {{"input", input}, {"target", target}});
    }
    TORCH_CHECK_TYPE(
        target.scalar_type() == at::kLong, op, ": expected target to be of int64, or of input's dtype, got ",
        target.scalar_type());
    TORCH_CHECK(
        target.layout() == at::kStrided && target.device() == input.device(), op,
        ": expected target to be a strided tensor on the device of input (", input.device(), "), got ",
        target.layout(), " on ", target.device());
    check_rows("target", target);
  }
  void check(const Tensor& grad_output) const {
    check();
    check_floating(op, {{"input", input}, {"grad_output", grad_output}});
    check_rows("grad_output", grad_output);
  }
};

// By plain ops, with the classes still a dimension.
struct Parts {
  Tensor log_p, q, mass;

  explicit Parts(const Problem& of) {
    const auto dim = of.dim();
    log_p = log_softmax_by_parts(to_opmath(of.input), dim);
    const double kept = 1 - of.label_smoothing;
    const at::Scalar shared = c10::SymFloat(of.label_smoothing) / c10::SymFloat(of.input.sym_size(dim));
    if (of.has_probabilities()) {
      q = to_opmath(of.target) * kept + shared;
    } else {
      const Tensor labels = of.target.unsqueeze(dim), ignored = labels == of.ignore_index;
      const Tensor classes = at::zeros_like(log_p).scatter(dim, labels.masked_fill(ignored, 0), kept);
      q = (classes + shared).masked_fill(ignored, 0);
    }
    mass = q.sum(dim, /*keepdim=*/true);
  }
};

struct DoubleBackward {
  static constexpr auto schema =
      "cross_entropy_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, "
      "Tensor target, int ignore_index, float label_smoothing) -> (Tensor grad_grad_output, Tensor "
      "grad_input)";
  const Tensor &grad_grad_input, &grad_output, &input, &target;
  int64_t ignore_index;
  double label_smoothing;
  auto tie() const {
    return std::tie(grad_grad_input, grad_output, input, target, ignore_index, label_smoothing);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, input, target);
  }

  Problem checked() const {
    const Problem of{name_of<DoubleBackward>(), input, target, ignore_index, label_smoothing};
    of.check(grad_output);
    check_elementwise(of.op, {{"input", input}, {"grad_grad_input", grad_grad_input}});
    return of;
  }
  TensorPair composite() const {
    const auto of = checked();
    const auto dim = of.dim();
    const Parts parts(of);
    const Tensor v = to_opmath(grad_grad_input), g = to_opmath(grad_output).unsqueeze(dim);
    const Tensor p = parts.log_p.exp(), mean = (p * v).sum(dim, /*keepdim=*/true);
    return {
        ((parts.mass * mean).squeeze(dim) - (parts.q * v).sum(dim)).to(input.scalar_type()),
        (g * parts.mass * p * (v - mean)).to(input.scalar_type())};
  }
  TensorPair cpu() const {
    const auto of = checked();
    const Tensor x = input.contiguous(), t = target.contiguous();
    const Tensor grad_grad_output = of.empty_rows(), grad_input = at::empty_like(x);
    GRADNORM_KERNELS(cross_entropy_kernels)
        .double_backward(
            grad_grad_output, grad_input, grad_grad_input.contiguous(), grad_output.contiguous(),
            {x, t, of.dim(), ignore_index, label_smoothing});
    return {grad_grad_output, grad_input};
  }
  TensorPair meta() const {
    return {checked().empty_rows(), at::empty_like(input, LEGACY_CONTIGUOUS_MEMORY_FORMAT)};
  }
};

using Settings = std::tuple<int64_t, double>;  // ignore_index, label_smoothing

struct OfBackward {
  using Settings = cross_entropy::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [ignore_index, label_smoothing] = settings;
    return to_list(
        call(DoubleBackward{grads[0], saved[0], saved[1], saved[2], ignore_index, label_smoothing}));
  }
};

struct Backward {
  static constexpr auto schema =
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, int ignore_index, "
      "float label_smoothing) -> Tensor";
  const Tensor &grad_output, &input, &target;
  int64_t ignore_index;
  double label_smoothing;
  auto tie() const {
    return std::tie(grad_output, input, target, ignore_index, label_smoothing);
  }

  Problem checked() const {
    const Problem of{name_of<Backward>(), input, target, ignore_index, label_smoothing};
    of.check(grad_output);
    return of;
  }
  Tensor composite() const {
    const auto of = checked();
    const Parts parts(of);
    const Tensor g = to_opmath(grad_output).unsqueeze(of.dim());
    return (g * (parts.mass * parts.log_p.exp() - parts.q)).to(input.scalar_type());
  }
  Tensor cpu() const {
    const auto of = checked();
    const Tensor x = input.contiguous(), t = target.contiguous(), grad_input = at::empty_like(x);
    GRADNORM_KERNELS(cross_entropy_kernels)
        .backward(grad_input, grad_output.contiguous(), {x, t, of.dim(), ignore_index, label_smoothing});
    return grad_input;
  }
  Tensor meta() const {
    checked();
    return at::empty_like(input, LEGACY_CONTIGUOUS_MEMORY_FORMAT);
  }
  Tensor autograd() const {
    if (needs_composite(grad_output, input, target) || target.requires_grad()) {
      return composite();
    }
    const Settings settings{ignore_index, label_smoothing};
    return record<OfBackward>({grad_output, input}, settings, [&](variable_list& saved) {
      saved = {grad_output, input, target};
      return variable_list{call(*this)};
    })[0];
  }
};

struct OfForward {
  using Settings = cross_entropy::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [ignore_index, label_smoothing] = settings;
    return {call(Backward{grads[0], saved[0], saved[1], ignore_index, label_smoothing})};
  }
};

// Of every row.
struct Forward {
  static constexpr auto schema =
      "cross_entropy(Tensor input, Tensor target, int ignore_index, float label_smoothing) -> Tensor";
  const Tensor &input, &target;
  int64_t ignore_index;
  double label_smoothing;
  auto tie() const {
    return std::tie(input, target, ignore_index, label_smoothing);
  }

  Problem checked() const {
    const Problem of{name_of<Forward>(), input, target, ignore_index, label_smoothing};
    of.check();
    return of;
  }
  Tensor composite() const {
    const auto of = checked();
    const Parts parts(of);
    // A logit of -inf that is none of the target's.
    const Tensor log_p = of.has_probabilities() ? parts.log_p : parts.log_p.masked_fill(parts.q == 0, 0);
    return (parts.q * log_p).sum(of.dim()).neg().to(input.scalar_type());
  }
  Tensor cpu() const {
    const auto of = checked();
    const Tensor x = input.contiguous(), t = target.contiguous(), output = of.empty_rows();
    GRADNORM_KERNELS(cross_entropy_kernels).forward(output, {x, t, of.dim(), ignore_index, label_smoothing});
    return output;
  }
  Tensor meta() const {
    return checked().empty_rows();
  }
  Tensor autograd() const {
    if (needs_composite(input, target) || target.requires_grad()) {
      return composite();
    }
    return record<OfForward>({input}, {ignore_index, label_smoothing}, [&](variable_list& saved) {
      saved = {input, target};
      return variable_list{call(*this)};
    })[0];
  }
  // PyTorch's own is computed in float32 in a region of autocast.
  Tensor autocast() const {
    const auto device = input.device().type();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const auto wide = [](const Tensor& t) { return t.is_floating_point() ? to_opmath(t) : t; };
    return call(Forward{wide(input), wide(target), ignore_index, label_smoothing});
  }
};

// As at::cross_entropy_loss: the rows' losses, weighted and reduced.
struct Loss {
  static constexpr auto schema =
      "cross_entropy_loss(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> Tensor";
  const Tensor &input, &target;
  OptionalTensor weight;
  int64_t reduction, ignore_index;
  double label_smoothing;
  auto tie() const {
    return std::tie(input, target, weight, reduction, ignore_index, label_smoothing);
  }

  // Else it is PyTorch's own, which also raises what there is to raise.
  bool is_covered() const {
    if (input.is_nested() || !is_elementwise_match(input, input) || input.dim() == 0 ||
        !(0 <= label_smoothing && label_smoothing <= 1)) {
      return false;
    }
    const Problem of{"", input, target, ignore_index, label_smoothing};
    const auto classes = input.sym_size(of.dim());
    const bool is_weighted = weight.defined();
    return classes > 0 &&
           (of.has_probabilities()
                ? is_elementwise_match(input, target)
                : target.scalar_type() == at::kLong && target.layout() == at::kStrided &&
                      target.device() == input.device() && target.sym_sizes() == of.row_sizes() &&
                      !(is_weighted && (label_smoothing > 0 || weight.requires_grad()))) &&
           (!is_weighted || (is_elementwise_match(weight, weight) && weight.device() == input.device() &&
                             weight.scalar_type() == input.scalar_type() && weight.dim() == 1 &&
                             weight.sym_size(0) == classes));
  }
  Tensor value() const {
    const bool has_probabilities = target.is_floating_point();
    if (!weight.defined()) {
      const Tensor losses = call(Forward{input, target, ignore_index, label_smoothing});
      const bool counts = reduction == at::Reduction::Mean && !has_probabilities;
      return reduced(losses, counts ? (target != ignore_index).sum() : Tensor());
    }
    if (has_probabilities) {
      auto shape = std::vector<int64_t>(input.dim(), 1);
      shape[input.dim() == 1 ? 0 : 1] = -1;
      const at::Scalar shared = c10::SymFloat(label_smoothing) / c10::SymFloat(weight.sym_size(0));
      const Tensor weighted = (target * (1 - label_smoothing) + shared) * weight.view(shape);
      return Loss{input, weighted, Tensor(), reduction, ignore_index, /*label_smoothing=*/0}.value();
    }
    const Tensor losses = call(Forward{input, target, ignore_index, label_smoothing});
    const Tensor counted = target != ignore_index, weights = weight.take(target * counted) * counted;
    return reduced(losses * weights, reduction == at::Reduction::Mean ? weights.sum() : Tensor());
  }
  // Not through a sum of a half type, which may be too large for it where the mean is not. The mean is over
  // the rows, unless there is a count.
  Tensor reduced(const Tensor& losses, const Tensor& count) const {
    const auto wide = at::toOpMathType(losses.scalar_type());
    if (reduction == at::Reduction::None) {
      return losses;
    }
    const bool is_sum = reduction == at::Reduction::Sum;
    const Tensor result = is_sum            ? losses.sum(wide)
                          : count.defined() ? losses.sum(wide) / count
                                            : losses.mean(wide);
    return result.to(losses.scalar_type());
  }
  // It only calls others, at every key: what is batched by torch.func would not come through implicit().
  Tensor autograd() const {
    return composite();
  }
  Tensor composite() const {
    return is_covered() ? value()
                        : at::cross_entropy_loss_symint(
                              input, target, optional(weight), reduction, ignore_index, label_smoothing);
  }
};

const Registration<Loss, Forward, Backward, DoubleBackward> registration;

struct AtenCrossEntropy : Override<AtenCrossEntropy> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& self, const Tensor& target, const std::optional<Tensor>& weight,
      int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
    const auto ignored = ignore_index.maybe_as_int();
    const OptionalTensor w(weight);
    if (!ignored || needs_composite(self, target, w)) {
      return stock(keys, self, target, weight, reduction, ignore_index, label_smoothing);
    }
    const Loss loss{self, target, w, reduction, *ignored, label_smoothing};
    return loss.is_covered() ? loss.value()
                             : stock(keys, self, target, weight, reduction, ignore_index, label_smoothing);
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenCrossEntropy::install_whole(aten, "cross_entropy_loss");
});

}  // namespace
}  // namespace gradnorm_kernels::cross_entropy
