// PyTorch's own ops whose backward has no derivative there, under the switch. Forward and first backward are
// PyTorch's kernels; what the first backward records is differentiated by plain ops, which are right to every
// order.
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "op.h"

namespace gradnorm_kernels::missing {
namespace {

// Under these the forward is plain ops. In a traced graph it stays the one op that it is.
bool is_plain(std::initializer_list<Tensor> tensors) {
  return is_differentiated_by_transform(tensors) &&
         needs_composite_even_traced(at::TensorList(tensors.begin(), tensors.size()));
}
// Whether the backward that is called is to be differentiated itself.
bool is_recorded(const Tensor& grad_output, const Tensor& input) {
  const variable_list tensors{grad_output, input};
  return is_elementwise_match(input, input) && torch::autograd::compute_requires_grad(tensors) &&
         !needs_composite_even_traced(tensors);
}

// The gradients of grad_output and input, where the gradient of forward(input), of plain ops, is itself
// differentiated. Where they are not to be differentiated in turn, no graph of them is made.
template <class Forward>
variable_list differentiate_twice(
    const Forward& forward, const Tensor& grad_output, const Tensor& input, const Tensor& grad_grad_input,
    Needs needs) {
  const bool create_graph = c10::GradMode::is_enabled();
  const c10::AutoGradMode enabled(true);
  // Without the hooks of the tensor itself, which are not to hear of this.
  const auto variable = [&](const Tensor& tensor) {
    return create_graph && tensor.requires_grad() ? tensor.view_as(tensor) : tensor.detach().requires_grad_();
  };
  const Tensor g = variable(grad_output), x = variable(input);
  const auto backward =
      torch::autograd::grad({forward(x)}, {x}, {g}, /*retain_graph=*/true, /*create_graph=*/true);
  auto gradients = torch::autograd::grad(
      backward, {g, x}, {grad_grad_input}, create_graph, create_graph, /*allow_unused=*/true);
  if (!gradients[1].defined() && needs[1] && is_zero_asked_for(1)) {
    gradients[1] = at::zeros_like(input);
  }
  return gradients;
}

enum BagMode : int64_t { kSum, kMean, kMax };

// How embedding_bag puts indices into bags.
struct Bags {
  const Tensor &indices, &offsets;
  int64_t padding_idx;

  // The sum of each bag's rows of weight, each times its weight in `scales` where that is defined.
  Tensor sum(const Tensor& weight, const Tensor& scales, const c10::SymInt& count) const {
    return std::get<0>(at::_embedding_bag(
        weight, indices, offsets, /*scale_grad_by_freq=*/false, kSum, /*sparse=*/false, optional(scales),
        /*include_last_offset=*/offsets.sym_size(0) != count, padding_idx));
  }
};

// Of each index, the inverse of how often it occurs.
Tensor inverse_frequencies(const Tensor& indices, const Tensor& like) {
  const Tensor ones = at::ones_like(indices, like.options());
  return at::zeros_symint({like.sym_size(0)}, like.options())
      .index_add(0, indices, ones)
      .index_select(0, indices)
      .reciprocal();
}

struct OfBagBackward {
  using Settings = std::tuple<bool, int64_t, int64_t>;  // scale_grad_by_freq, mode, padding_idx

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto& [scale_grad_by_freq, mode, padding_idx] = settings;
    const Tensor &v = grads[0], &grad = saved[0], &weights = saved[1], &indices = saved[2],
                 &offsets = saved[3], &offset2bag = saved[4], &bag_size = saved[5], &largest = saved[6];
    const Bags bags{indices, offsets, padding_idx};
    if (mode == kMax) {
      return {v.gather(0, largest.clamp_min(0)).masked_fill(bag_size.unsqueeze(1) == 0, 0), Tensor()};
    }
    const Tensor inverse = scale_grad_by_freq ? inverse_frequencies(indices, v) : Tensor();
    Tensor of_grad, of_weights;
    if (needs[0]) {
      const Tensor scales = !inverse.defined() ? weights : weights.defined() ? weights * inverse : inverse;
      of_grad = bags.sum(v, scales, grad.sym_size(0));
      if (mode == kMean) {
        of_grad = of_grad / bag_size.clamp_min(1).unsqueeze(1);
      }
    }
    if (needs[1]) {
      of_weights = at::_embedding_bag_per_sample_weights_backward(
          grad, v, indices, offsets, offset2bag, kSum, padding_idx);
      of_weights = inverse.defined() ? of_weights * inverse : of_weights;
    }
    return {of_grad, of_weights};
  }
};

struct AtenBagBackward : Override<AtenBagBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad, const Tensor& indices, const Tensor& offsets,
      const Tensor& offset2bag, const Tensor& bag_size, const Tensor& maximum_indices,
      c10::SymInt num_weights, bool scale_grad_by_freq, int64_t mode, bool sparse,
      const std::optional<Tensor>& per_sample_weights, int64_t padding_idx) {
    const OptionalTensor weights(per_sample_weights);
    if (sparse || !is_recorded(weights.defined() ? weights : grad, grad)) {
      return stock(
          keys, grad, indices, offsets, offset2bag, bag_size, maximum_indices, num_weights,
          scale_grad_by_freq, mode, sparse, per_sample_weights, padding_idx);
    }
    return record<OfBagBackward>(
        {grad, weights}, {scale_grad_by_freq, mode, padding_idx}, [&](variable_list& saved) {
          saved = {grad, weights, indices, offsets, offset2bag, bag_size, maximum_indices};
          return variable_list{at::_embedding_bag_backward_symint(
              grad, indices, offsets, offset2bag, bag_size, maximum_indices, num_weights, scale_grad_by_freq,
              mode, sparse, per_sample_weights, padding_idx)};
        })[0];
  }
};

struct OfBagWeightsBackward {
  using Settings = std::tuple<int64_t>;  // padding_idx

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto padding_idx = std::get<0>(settings);
    const Tensor &v = grads[0], &grad = saved[0], &weight = saved[1], &indices = saved[2],
                 &offsets = saved[3], &offset2bag = saved[4];
    const Tensor unread = at::empty({0}, indices.options());
    return {
        needs[0] ? Bags{indices, offsets, padding_idx}.sum(weight, v, grad.sym_size(0)) : Tensor(),
        needs[1] ? at::_embedding_bag_backward_symint(
                       grad, indices, offsets, offset2bag, unread, unread, weight.sym_size(0),
                       /*scale_grad_by_freq=*/false, kSum, /*sparse=*/false, v, padding_idx)
                 : Tensor()};
  }
};

struct AtenBagWeightsBackward : Override<AtenBagWeightsBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad, const Tensor& weight, const Tensor& indices,
      const Tensor& offsets, const Tensor& offset2bag, int64_t mode, int64_t padding_idx) {
    if (!is_recorded(grad, weight)) {
      return stock(keys, grad, weight, indices, offsets, offset2bag, mode, padding_idx);
    }
    return record<OfBagWeightsBackward>({grad, weight}, {padding_idx}, [&](variable_list& saved) {
      saved = {grad, weight, indices, offsets, offset2bag};
      return variable_list{at::_embedding_bag_per_sample_weights_backward(
          grad, weight, indices, offsets, offset2bag, mode, padding_idx)};
    })[0];
  }
};

struct AtenBag : Override<AtenBag> {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Result autograd(
      c10::DispatchKeySet keys, const Tensor& weight, const Tensor& indices, const Tensor& offsets,
      bool scale_grad_by_freq, int64_t mode, bool sparse, const std::optional<Tensor>& per_sample_weights,
      bool include_last_offset, int64_t padding_idx) {
    const OptionalTensor weights(per_sample_weights);
    if (scale_grad_by_freq || sparse || !is_plain({weight, weights})) {
      return stock(
          keys, weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights,
          include_last_offset, padding_idx);
    }
    auto result = at::_embedding_bag(
        weight.detach(), indices, offsets, scale_grad_by_freq, mode, sparse,
        weights.defined() ? optional(weights.detach()) : std::nullopt, include_last_offset, padding_idx);
    const auto& [values, offset2bag, bag_size, largest] = result;
    const Tensor counts = bag_size.unsqueeze(1);
    if (mode == kMax) {
      std::get<0>(result) = weight.gather(0, largest.clamp_min(0)).masked_fill(counts == 0, 0);
      return result;
    }
    const Tensor bags = at::searchsorted(
                            offsets, at::arange(indices.sym_size(0), offsets.options()), /*out_int32=*/false,
                            /*right=*/true) -
                        1;
    Tensor rows = weight.index_select(0, indices);
    rows = weights.defined() ? rows * weights.unsqueeze(1) : rows;
    rows = rows.masked_fill((indices == padding_idx).unsqueeze(1), 0);
    const Tensor sums = at::zeros_like(values).index_add(0, bags, rows);
    std::get<0>(result) = mode == kMean ? sums / counts.clamp_min(1) : sums;
    return result;
  }
};

struct MultiMargin {
  double p, margin;
  int64_t reduction;

  Tensor loss(const Tensor& input, const Tensor& target, const Tensor& weight) const {
    const auto classes = input.dim() == 0 ? 1 : input.sym_size(-1);
    const Tensor x = input.reshape_symint({-1, classes}), y = target.reshape({-1, 1});
    const Tensor z = margin - x.gather(1, y) + x;
    const Tensor is_counted = (z > 0).scatter(1, y, 0);
    Tensor terms = (p == 1 ? z : z * z).masked_fill(is_counted.logical_not(), 0);
    if (weight.defined()) {
      terms = terms * weight.index_select(0, y.flatten()).unsqueeze(1);
    }
    const Tensor losses = terms.sum(1) / classes;
    return reduction == at::Reduction::None  ? losses.reshape_symint(target.sym_sizes())
           : reduction == at::Reduction::Sum ? losses.sum()
                                             : losses.mean();
  }
};

struct OfMultiMarginBackward {
  using Settings = std::tuple<double, double, int64_t>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto of = std::make_from_tuple<MultiMargin>(settings);
    return differentiate_twice(
        [&](const Tensor& x) { return of.loss(x, saved[2], saved[3]); }, saved[0], saved[1], grads[0], needs);
  }
};

struct AtenMultiMarginBackward : Override<AtenMultiMarginBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& target,
      const at::Scalar& p, const at::Scalar& margin, const std::optional<Tensor>& weight, int64_t reduction) {
    if (!is_recorded(grad_output, self)) {
      return stock(keys, grad_output, self, target, p, margin, weight, reduction);
    }
    return record<OfMultiMarginBackward>(
        {grad_output, self}, {p.toDouble(), margin.toDouble(), reduction}, [&](variable_list& saved) {
          saved = {grad_output, self, target, OptionalTensor(weight)};
          return variable_list{
              at::multi_margin_loss_backward(grad_output, self, target, p, margin, weight, reduction)};
        })[0];
  }
};

struct AtenMultiMargin : Override<AtenMultiMargin> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& self, const Tensor& target, const at::Scalar& p,
      const at::Scalar& margin, const std::optional<Tensor>& weight, int64_t reduction) {
    return is_plain({self}) ? MultiMargin{p.toDouble(), margin.toDouble(), reduction}.loss(
                                  self, target, OptionalTensor(weight))
                            : stock(keys, self, target, p, margin, weight, reduction);
  }
};

// The backward is linear in the gradient, and of the input takes only which pairs are within the margin.
struct OfMultilabelMarginBackward {
  using Settings = std::tuple<int64_t>;  // reduction

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const Tensor &grad_output = saved[0], &input = saved[1];
    Tensor of_grad_output;
    if (needs[0]) {
      const Tensor slopes = at::multilabel_margin_loss_backward(
          at::ones_like(grad_output), input, saved[2], std::get<0>(settings), saved[3]);
      const Tensor products = grads[0] * slopes;
      of_grad_output = grad_output.dim() == 0 ? products.sum() : products.sum(1);
    }
    return {of_grad_output, needs[1] && is_zero_asked_for(1) ? at::zeros_like(input) : Tensor()};
  }
};

struct AtenMultilabelMarginBackward : Override<AtenMultilabelMarginBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& target,
      int64_t reduction, const Tensor& is_target) {
    if (!is_recorded(grad_output, self)) {
      return stock(keys, grad_output, self, target, reduction, is_target);
    }
    return record<OfMultilabelMarginBackward>({grad_output, self}, {reduction}, [&](variable_list& saved) {
      saved = {grad_output, self.detach(), target, is_target};
      return variable_list{
          at::multilabel_margin_loss_backward(grad_output, self, target, reduction, is_target)};
    })[0];
  }
};

struct AtenMultilabelMargin : Override<AtenMultilabelMargin> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& self, const Tensor& target, int64_t reduction) {
    if (!is_plain({self})) {
      return stock(keys, self, target, reduction);
    }
    const auto [value, is_target] = at::multilabel_margin_loss_forward(self.detach(), target, reduction);
    const auto classes = self.dim() == 0 ? 1 : self.sym_size(-1);
    const Tensor x = self.reshape_symint({-1, classes}), labels = target.reshape_symint({-1, classes});
    // Labels end at the first that is -1.
    const Tensor is_label = (labels >= 0).cumprod(1).to(at::kBool);
    const Tensor z = 1 - x.gather(1, labels.clamp_min(0)).unsqueeze(2) + x.unsqueeze(1);
    const Tensor is_other = is_target.reshape_symint({-1, 1, classes}) == 0;
    const Tensor is_counted = is_label.unsqueeze(2).logical_and(is_other).logical_and(z > 0);
    const Tensor losses = z.masked_fill(is_counted.logical_not(), 0).sum({1, 2}) / classes;
    return {
        reduction == at::Reduction::None  ? losses.reshape_symint(value.sym_sizes())
        : reduction == at::Reduction::Sum ? losses.sum()
                                          : losses.mean(),
        is_target};
  }
};

struct Segments {
  const Tensor &lengths, &offsets;  // one of them
  std::string_view reduce;
  int64_t axis;
  std::optional<double> initial;

  std::optional<at::Scalar> start() const {
    return initial ? std::optional<at::Scalar>(*initial) : std::nullopt;
  }

  // Of all the segments side by side, each filled up to the length of the longest.
  Tensor by_parts(const Tensor& data) const {
    const Tensor sizes = lengths.defined() ? lengths : offsets.diff();
    const Tensor starts =
        lengths.defined() ? lengths.cumsum(-1) - lengths : offsets.narrow(-1, 0, sizes.size(-1));
    const auto dim = sizes.dim() - 1, longest = std::max<int64_t>(1, sizes.max().item<int64_t>());
    const Tensor steps = at::arange(longest, sizes.options());
    const auto with_inner = [&](Tensor tensor) {
      for (auto i = dim + 1; i < data.dim(); ++i) {
        tensor = tensor.unsqueeze(-1);
      }
      return tensor;
    };
    const Tensor places = (starts.unsqueeze(-1) + steps).clamp(0, data.size(dim) - 1).flatten(-2);
    auto shape = data.sizes().vec();
    shape[dim] = places.size(-1);
    const Tensor is_outside = with_inner(steps >= sizes.unsqueeze(-1)), length = with_inner(sizes);
    const auto filled = [&](double with) {
      return data.gather(dim, with_inner(places.to(at::kLong)).expand(shape))
          .unflatten(dim, {sizes.size(-1), longest})
          .masked_fill(is_outside, with);
    };
    constexpr auto inf = std::numeric_limits<double>::infinity();
    if (reduce == "max") {
      return filled(-inf).amax(dim + 1).clamp_min(initial.value_or(-inf));
    }
    if (reduce == "min") {
      return filled(inf).amin(dim + 1).clamp_max(initial.value_or(inf));
    }
    if (reduce == "prod") {
      return filled(1).prod(dim + 1) * initial.value_or(1);
    }
    const Tensor sums = filled(0).sum(dim + 1) + initial.value_or(0);
    const auto nan = std::numeric_limits<double>::quiet_NaN();
    return reduce == "sum" ? sums
                           : (sums / length.clamp_min(1)).masked_fill(length == 0, initial.value_or(nan));
  }
};

struct OfSegmentBackward {
  using Settings = std::tuple<std::string, int64_t, std::optional<double>>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto& [reduce, axis, initial] = settings;
    const Tensor &grad = saved[0], &data = saved[1], &output = saved[2];
    const Segments segments{saved[3], saved[4], reduce, axis, initial};
    if (reduce == "prod") {
      return differentiate_twice(
          [&](const Tensor& x) { return segments.by_parts(x); }, grad, data, grads[0], needs);
    }
    Tensor of_grad;
    if (needs[0]) {
      // PyTorch shares the gradient among equal maxima if it is positive, else gives it to each.
      const Tensor signs = at::where(grad.detach() < 0, -1, 1).to(grad.scalar_type());
      const Tensor slopes = at::_segment_reduce_backward(
          signs, output, data.detach(), reduce, optional(saved[3]), optional(saved[4]), axis,
          segments.start());
      of_grad = at::segment_reduce(
                    grads[0] * slopes, "sum", optional(saved[3]), std::nullopt, optional(saved[4]), axis,
                    /*unsafe=*/true) *
                signs;
    }
    return {of_grad, needs[1] && is_zero_asked_for(1) ? at::zeros_like(data) : Tensor()};
  }
};

struct AtenSegmentBackward : Override<AtenSegmentBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad, const Tensor& output, const Tensor& data,
      std::string_view reduce, const std::optional<Tensor>& lengths, const std::optional<Tensor>& offsets,
      int64_t axis, const std::optional<at::Scalar>& initial) {
    if (!is_recorded(grad, data) || data.sym_numel() == 0) {
      return stock(keys, grad, output, data, reduce, lengths, offsets, axis, initial);
    }
    const OfSegmentBackward::Settings settings{
        std::string(reduce), axis, initial ? std::optional(initial->toDouble()) : std::nullopt};
    // The output is a function of the data.
    return record<OfSegmentBackward>({grad, data}, settings, [&](variable_list& saved) {
      saved = {grad, data, output.detach(), OptionalTensor(lengths), OptionalTensor(offsets)};
      return variable_list{
          at::_segment_reduce_backward(grad, output, data, reduce, lengths, offsets, axis, initial)};
    })[0];
  }
};

struct AtenSegment : Override<AtenSegment> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& data, std::string_view reduce,
      const std::optional<Tensor>& lengths, const std::optional<Tensor>& indices,
      const std::optional<Tensor>& offsets, int64_t axis, bool unsafe,
      const std::optional<at::Scalar>& initial) {
    if (!is_plain({data}) || indices || lengths.has_value() == offsets.has_value() || data.sym_numel() == 0) {
      return stock(keys, data, reduce, lengths, indices, offsets, axis, unsafe, initial);
    }
    return Segments{
        OptionalTensor(lengths), OptionalTensor(offsets), reduce, axis,
        initial ? std::optional(initial->toDouble()) : std::nullopt}
        .by_parts(data);
  }
};

// Of a state that no path reaches: its logarithm of a probability is this and not -inf, beside which
// derivatives of logsumexp are NaN.
constexpr double kUnreached = -1e30;

struct Ctc {
  const Tensor &targets, &input_lengths, &target_lengths;
  int64_t blank;
  bool zero_infinity;

  // The losses, and the forward variables of Graves et al. (2006) as logarithms. The gradient of the losses
  // is PyTorch's, which is that of scores whose log_softmax log_probs is: it has exp(log_probs) in it. In
  // float64, since the logarithms grow with the number of frames, and their differences do not.
  TensorPair by_parts(const Tensor& given) const {
    const Tensor log_probs = given.to(at::kDouble);
    const auto frames = log_probs.size(0), batch = log_probs.size(1);
    const Tensor input_length = input_lengths.to(log_probs.device(), at::kLong).reshape({-1, 1});
    const Tensor length = target_lengths.to(log_probs.device(), at::kLong).reshape({-1, 1});
    const auto integers = length.options();
    // The labels with blanks between and around them.
    const Tensor targets = padded_targets(length);
    const Tensor is_target = at::arange(targets.size(1), integers) < length;
    const auto states = 2 * targets.size(1) + 1;
    const Tensor blanks = at::full({batch, targets.size(1)}, blank, integers);
    const Tensor labels = at::cat(
        {at::stack({blanks, at::where(is_target, targets, blanks)}, 2).flatten(1),
         at::full({batch, 1}, blank, integers)},
        1);
    const Tensor may_not_skip = at::cat(
        {at::ones({batch, std::min<int64_t>(states, 2)}, integers.dtype(at::kBool)),
         labels.slice(1, 2) == labels.slice(1, 0, std::max<int64_t>(states - 2, 0))},
        1);
    const Tensor emitted = log_probs.gather(2, labels.expand({frames, batch, states}));

    Tensor alpha = emitted[0].masked_fill(at::arange(states, integers) > 1, kUnreached);
    std::vector<Tensor> alphas{alpha};
    for (int64_t t = 1; t < frames; ++t) {
      const Tensor before = at::constant_pad_nd(alpha, {2, 0}, kUnreached);
      const Tensor skipped = before.slice(1, 0, states).masked_fill(may_not_skip, kUnreached);
      const Tensor reached = at::stack({alpha, before.slice(1, 1, states + 1), skipped}).logsumexp(0);
      alpha = at::where(input_length > t, reached + emitted[t], alpha);
      alphas.push_back(alpha);
    }
    const Tensor last = 2 * length;
    const Tensor at_label = alpha.gather(1, (last - 1).clamp_min(0)).masked_fill(length == 0, kUnreached);
    const Tensor at_end = at::cat({alpha.gather(1, last), at_label}, 1).logsumexp(1, /*keepdim=*/true);
    const Tensor without_frames = at::where(length == 0, 0.0, kUnreached).to(at::kDouble);
    const Tensor log_likelihood = at::where(input_length == 0, without_frames, at_end).squeeze(1);

    const Tensor is_frame = at::arange(frames, integers).unsqueeze(1) < input_length.squeeze(1);
    const Tensor total = (log_probs.exp() * is_frame.unsqueeze(2)).sum({0, 2});
    const Tensor losses = total - total.detach() - log_likelihood;
    const Tensor is_impossible = log_likelihood.detach() < kUnreached / 2;
    constexpr auto inf = std::numeric_limits<double>::infinity();
    const Tensor log_alpha = at::stack(alphas, 1).detach();
    const Tensor result = zero_infinity ? losses.masked_fill(is_impossible, inf)
                                        : losses * at::ones_like(losses).masked_fill(is_impossible, inf);
    return {
        result.to(given.scalar_type()),
        log_alpha.masked_fill(log_alpha < kUnreached / 2, -inf).to(given.scalar_type())};
  }

 private:
  Tensor padded_targets(const Tensor& length) const {
    const Tensor all = targets.to(length.device(), at::kLong);
    if (all.dim() == 2) {
      return all;
    }
    const auto longest = length.numel() == 0 ? 0 : length.max().item<int64_t>();
    const Tensor places = length.cumsum(0) - length + at::arange(longest, length.options());
    return all.numel() == 0 ? places : all.take(places.clamp_max(all.numel() - 1));
  }
};

// Its memory is its own: a transform must not take it for a tensor of its level, and a graph may keep it.
Tensor to_tensor(at::IntArrayRef lengths) {
  auto* const copy = new std::vector<int64_t>(lengths.vec());
  return at::from_blob(
      copy->data(), {static_cast<int64_t>(copy->size())}, [copy](void*) { delete copy; }, at::kLong);
}
Tensor to_tensor(const Tensor& lengths) {
  return lengths;
}

struct OfCtcBackward {
  using Settings = std::tuple<int64_t, bool>;  // blank, zero_infinity

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const Ctc of{saved[2], saved[3], saved[4], std::get<0>(settings), std::get<1>(settings)};
    return differentiate_twice(
        [&](const Tensor& x) { return std::get<0>(of.by_parts(x)); }, saved[0], saved[1], grads[0], needs);
  }
};

template <class Lengths>
struct AtenCtcBackward : Override<AtenCtcBackward<Lengths>> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad, const Tensor& log_probs, const Tensor& targets,
      Lengths input_lengths, Lengths target_lengths, const Tensor& neg_log_likelihood,
      const Tensor& log_alpha, int64_t blank, bool zero_infinity) {
    if (!is_recorded(grad, log_probs)) {
      return AtenCtcBackward::stock(
          keys, grad, log_probs, targets, input_lengths, target_lengths, neg_log_likelihood, log_alpha, blank,
          zero_infinity);
    }
    return record<OfCtcBackward>({grad, log_probs}, {blank, zero_infinity}, [&](variable_list& saved) {
      saved = {grad, log_probs, targets, to_tensor(input_lengths), to_tensor(target_lengths)};
      return variable_list{at::_ctc_loss_backward(
          grad, log_probs, targets, input_lengths, target_lengths, neg_log_likelihood, log_alpha, blank,
          zero_infinity)};
    })[0];
  }
};

template <class Lengths>
struct AtenCtc : Override<AtenCtc<Lengths>> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& log_probs, const Tensor& targets, Lengths input_lengths,
      Lengths target_lengths, int64_t blank, bool zero_infinity) {
    if (!is_plain({log_probs}) || log_probs.sym_numel() == 0) {
      return AtenCtc::stock(keys, log_probs, targets, input_lengths, target_lengths, blank, zero_infinity);
    }
    const Tensor of_input = to_tensor(input_lengths), of_target = to_tensor(target_lengths);
    return Ctc{targets, of_input, of_target, blank, zero_infinity}.by_parts(log_probs);
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenBag::install(aten, "_embedding_bag");
  AtenBagBackward::install(aten, "_embedding_bag_backward");
  AtenBagWeightsBackward::install(aten, "_embedding_bag_per_sample_weights_backward");
  AtenMultiMargin::install(aten, "multi_margin_loss");
  AtenMultiMarginBackward::install(aten, "multi_margin_loss_backward");
  AtenMultilabelMargin::install(aten, "multilabel_margin_loss_forward");
  AtenMultilabelMarginBackward::install(aten, "multilabel_margin_loss_backward");
  AtenSegment::install(aten, "segment_reduce");
  AtenSegmentBackward::install(aten, "_segment_reduce_backward");
  AtenCtc<at::IntArrayRef>::install(aten, "_ctc_loss");
  AtenCtc<const Tensor&>::install(aten, "_ctc_loss.Tensor");
  AtenCtcBackward<at::IntArrayRef>::install(aten, "_ctc_loss_backward");
  AtenCtcBackward<const Tensor&>::install(aten, "_ctc_loss_backward.Tensor");
});

}  // namespace
}  // namespace gradnorm_kernels::missing
