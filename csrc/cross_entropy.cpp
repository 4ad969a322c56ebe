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

#include "op.h"

namespace gradnorm_kernels::cross_entropy {
namespace {

// What every op here is of, after the gradients that it is given.
struct Problem {
  using Settings = std::tuple<int64_t, double>;
  static constexpr auto schema = "Tensor input, Tensor target, int ignore_index, float label_smoothing";
  const Tensor &input, &target;
  int64_t ignore_index;
  double label_smoothing;
  auto tie() const {
    return std::tie(input, target, ignore_index, label_smoothing);
  }
  static Problem of(const Tensor& input, const Tensor& target, const Settings& settings) {
    return {input, target, std::get<0>(settings), std::get<1>(settings)};
  }
  Settings settings() const {
    return {ignore_index, label_smoothing};
  }

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
  Tensor narrow(const Tensor& result) const {
    return result.to(input.scalar_type());
  }

  void check_rows(const char* op, const char* name, const Tensor& rows) const {
    TORCH_CHECK_VALUE(
        rows.sym_sizes() == row_sizes(), op, ": expected ", name, " to have the shape of input (",
        input.sym_sizes(), ") without its classes, got ", rows.sym_sizes());
  }
  void check(const char* op) const {
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
    check_rows(op, "target", target);
  }
  void check(const char* op, const Tensor& grad_output) const {
    check(op);
    check_floating(op, {{"input", input}, {"grad_output", grad_output}});
    check_rows(op, "grad_output", grad_output);
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

// As the kernels take it.
struct Contiguous {
  Tensor input, target;
  CrossEntropy problem;
  explicit Contiguous(const Problem& of)
      : input(of.input.contiguous()),
        target(of.target.contiguous()),
        problem{input, target, of.dim(), of.ignore_index, of.label_smoothing} {}
};

struct DoubleBackward {
  static std::string schema() {
    return std::string("cross_entropy_double_backward(Tensor grad_grad_input, Tensor grad_output, ") +
           Problem::schema + ") -> (Tensor grad_grad_output, Tensor grad_input)";
  }
  const Tensor &grad_grad_input, &grad_output;
  Problem of;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_grad_input, grad_output), of.tie());
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, of.input, of.target);
  }

  void check() const {
    const auto* const op = name_of<DoubleBackward>();
    of.check(op, grad_output);
    check_elementwise(op, {{"input", of.input}, {"grad_grad_input", grad_grad_input}});
  }
  TensorPair composite() const {
    check();
    const auto dim = of.dim();
    const Parts parts(of);
    const Tensor v = to_opmath(grad_grad_input), g = to_opmath(grad_output).unsqueeze(dim);
    const Tensor p = parts.log_p.exp(), mean = (p * v).sum(dim, /*keepdim=*/true);
    return {
        of.narrow((parts.mass * mean).squeeze(dim) - (parts.q * v).sum(dim)),
        of.narrow(g * parts.mass * p * (v - mean))};
  }
  TensorPair cpu() const {
    const auto results = meta();
    GRADNORM_KERNELS(cross_entropy_kernels)
        .double_backward(
            std::get<0>(results), std::get<1>(results), grad_grad_input.contiguous(),
            grad_output.contiguous(), Contiguous(of).problem);
    return results;
  }
  TensorPair meta() const {
    check();
    return {of.empty_rows(), empty_contiguous(of.input)};
  }
};

struct OfBackward {
  using Settings = Problem::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    return to_list(call(DoubleBackward{grads[0], saved[0], Problem::of(saved[1], saved[2], settings)}));
  }
};

struct Backward {
  static std::string schema() {
    return std::string("cross_entropy_backward(Tensor grad_output, ") + Problem::schema + ") -> Tensor";
  }
  const Tensor& grad_output;
  Problem of;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_output), of.tie());
  }

  Tensor composite() const {
    of.check(name_of<Backward>(), grad_output);
    const Parts parts(of);
    const Tensor g = to_opmath(grad_output).unsqueeze(of.dim());
    return of.narrow(g * (parts.mass * parts.log_p.exp() - parts.q));
  }
  Tensor cpu() const {
    const Tensor grad_input = meta();
    GRADNORM_KERNELS(cross_entropy_kernels)
        .backward(grad_input, grad_output.contiguous(), Contiguous(of).problem);
    return grad_input;
  }
  Tensor meta() const {
    of.check(name_of<Backward>(), grad_output);
    return empty_contiguous(of.input);
  }
  Tensor autograd() const {
    if (needs_composite(grad_output, of.input, of.target) || of.target.requires_grad()) {
      return composite();
    }
    return record<OfBackward>({grad_output, of.input}, of.settings(), [&](variable_list& saved) {
      saved = {grad_output, of.input, of.target};
      return variable_list{call(*this)};
    })[0];
  }
};

struct OfForward {
  using Settings = Problem::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    return {call(Backward{grads[0], Problem::of(saved[0], saved[1], settings)})};
  }
};

// Of every row.
struct Forward {
  static std::string schema() {
    return std::string("cross_entropy(") + Problem::schema + ") -> Tensor";
  }
  Problem of;
  auto tie() const {
    return of.tie();
  }

  Tensor composite() const {
    of.check(name_of<Forward>());
    const Parts parts(of);
    // A logit of -inf that is none of the target's.
    const Tensor log_p = of.has_probabilities() ? parts.log_p : parts.log_p.masked_fill(parts.q == 0, 0);
    return of.narrow((parts.q * log_p).sum(of.dim()).neg());
  }
  Tensor cpu() const {
    const Tensor output = meta();
    GRADNORM_KERNELS(cross_entropy_kernels).forward(output, Contiguous(of).problem);
    return output;
  }
  Tensor meta() const {
    of.check(name_of<Forward>());
    return of.empty_rows();
  }
  Tensor autograd() const {
    if (needs_composite(of.input, of.target) || of.target.requires_grad()) {
      return composite();
    }
    return record<OfForward>({of.input}, of.settings(), [&](variable_list& saved) {
      saved = {of.input, of.target};
      return variable_list{call(*this)};
    })[0];
  }
  // PyTorch's own is computed in float32 in a region of autocast.
  Tensor autocast() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto wide = [](const Tensor& t) { return t.is_floating_point() ? to_opmath(t) : t; };
    return call(Forward{wide(of.input), wide(of.target), of.ignore_index, of.label_smoothing});
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
    const Problem of{input, target, ignore_index, label_smoothing};
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
