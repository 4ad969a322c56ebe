// PyTorch's own losses under the switch whose second derivative is there a long chain of ops. Values and
// first backward are PyTorch's kernels; what the first backward records is differentiated by the few ops that
// it takes, of which each is differentiated in turn.
#include <ATen/ExpandUtils.h>
#include <torch/csrc/autograd/autograd.h>

#include "op.h"

namespace gradnorm_kernels::losses {
namespace {

bool is_recorded(const Tensor& grad_output, const Tensor& input, const Tensor& target) {
  return is_elementwise_match(input, target) &&
         torch::autograd::compute_requires_grad(grad_output, input, target) &&
         !needs_composite(grad_output, input, target);
}

// Of each element's loss, in what they are reduced to.
Tensor scaled(const Tensor& grad_output, const Tensor& input, int64_t reduction) {
  return reduction == at::Reduction::Mean ? grad_output / input.sym_numel() : grad_output;
}

// The gradient of grad_output, of what its backward makes of grad_grad_input in its place.
Tensor reduced(const Tensor& grad_grad_output, const Tensor& grad_output) {
  return at::sum_to(grad_grad_output, grad_output.sym_sizes());
}

// Of d = input - target: quadratic within the limit, linear outside.
struct SmoothL1 {
  static constexpr auto backward = &at::smooth_l1_loss_backward;
  static double curvature(double limit) {
    return limit == 0 ? 0 : 1 / limit;
  }
};
struct Huber {
  static constexpr auto backward = &at::huber_loss_backward;
  static double curvature(double) {
    return 1;
  }
};

template <class Loss>
struct OfClippedBackward {
  using Settings = std::tuple<int64_t, double>;  // reduction, limit

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto& [reduction, limit] = settings;
    const Tensor &v = grads[0], &grad_output = saved[0], &input = saved[1], &target = saved[2];
    Tensor of_input;
    if (needs[1] || needs[2]) {
      const Tensor within = at::hardtanh_backward(v, (input - target).detach(), -limit, limit);
      of_input = within * (scaled(grad_output, input, reduction) * Loss::curvature(limit));
    }
    return {
        needs[0] ? reduced(Loss::backward(v, input, target, reduction, limit), grad_output) : Tensor(),
        needs[1] ? of_input : Tensor(), needs[2] ? -of_input : Tensor()};
  }
};

template <class Loss>
struct AtenClippedBackward : Override<AtenClippedBackward<Loss>> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& target,
      int64_t reduction, double limit) {
    if (!is_recorded(grad_output, self, target)) {
      return AtenClippedBackward::stock(keys, grad_output, self, target, reduction, limit);
    }
    return record<OfClippedBackward<Loss>>(
        {grad_output, self, target}, {reduction, limit}, [&](variable_list& saved) {
          saved = {grad_output, self, target};
          return variable_list{Loss::backward(grad_output, self, target, reduction, limit)};
        })[0];
  }
};

// log(1 + exp(-y x)), of targets y that are not differentiated.
struct OfSoftMarginBackward {
  using Settings = std::tuple<int64_t>;  // reduction

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto reduction = std::get<0>(settings);
    const Tensor &v = grads[0], &grad_output = saved[0], &input = saved[1], &target = saved[2];
    Tensor of_input;
    if (needs[1]) {
      const Tensor slope = at::sigmoid_backward(v, at::sigmoid(input * target));
      of_input = slope * (target * target) * scaled(grad_output, input, reduction);
    }
    return {
        needs[0] ? reduced(at::soft_margin_loss_backward(v, input, target, reduction), grad_output)
                 : Tensor(),
        of_input};
  }
};

struct AtenSoftMarginBackward : Override<AtenSoftMarginBackward> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& self, const Tensor& target,
      int64_t reduction) {
    if (!is_recorded(grad_output, self, target) || torch::autograd::compute_requires_grad(target)) {
      return stock(keys, grad_output, self, target, reduction);
    }
    return record<OfSoftMarginBackward>({grad_output, self}, {reduction}, [&](variable_list& saved) {
      saved = {grad_output, self, target};
      return variable_list{at::soft_margin_loss_backward(grad_output, self, target, reduction)};
    })[0];
  }
};

// The backward g p of y = logsumexp(x), with p = softmax(x). With the gradient v of it,
//     g: t = sum(v p),    x: g p (v - t).
struct OfLogsumexpBackward {
  using Settings = std::tuple<int64_t>;  // dim, in grad_output of size 1

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto dim = std::get<0>(settings);
    const Tensor &v = grads[0], &grad_output = saved[0], &input = saved[1];
    const Tensor p = at::_softmax(input, dim, /*half_to_float=*/false);
    return {
        needs[0] ? (v * p).sum(dim, /*keepdim=*/true) : Tensor(),
        needs[1] ? at::_softmax_backward_data(v, p, dim, input.scalar_type()) * grad_output : Tensor()};
  }
};

struct OfLogsumexp {
  using Settings = std::tuple<int64_t, bool>;  // dim, keepdim

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto& [dim, keepdim] = settings;
    const Tensor &input = saved[0], grad_output = keepdim ? grads[0] : grads[0].unsqueeze(dim);
    return record<OfLogsumexpBackward>({grad_output, input}, {dim}, [&](variable_list& kept) {
      kept = {grad_output, input};
      return variable_list{at::_softmax(input, dim, /*half_to_float=*/false) * grad_output};
    });
  }
};

struct AtenLogsumexp : Override<AtenLogsumexp> {
  static Tensor autograd(c10::DispatchKeySet keys, const Tensor& self, at::IntArrayRef dim, bool keepdim) {
    if (dim.size() != 1 || self.dim() == 0 || !is_elementwise_match(self, self) ||
        !torch::autograd::compute_requires_grad(self) || needs_composite(self)) {
      return stock(keys, self, dim, keepdim);
    }
    const auto wrapped = at::maybe_wrap_dim(dim[0], self.dim());
    return record<OfLogsumexp>({self}, {wrapped, keepdim}, [&](variable_list& saved) {
      saved = {self};
      return variable_list{at::logsumexp(self, dim, keepdim)};
    })[0];
  }
};

const StockOverride override_aten([](AtenAutograd& m) {
  AtenClippedBackward<SmoothL1>::install(m, "smooth_l1_loss_backward");
  AtenClippedBackward<Huber>::install(m, "huber_loss_backward");
  AtenSoftMarginBackward::install(m, "soft_margin_loss_backward");
  AtenLogsumexp::install(m, "logsumexp");
});

}  // namespace
}  // namespace gradnorm_kernels::losses
