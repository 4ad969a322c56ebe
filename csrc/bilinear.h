// What a convolution and a linear layer share: products P(X, W) of an input and a weight, linear in each,
// with a bias.
#pragma once

#include <ATen/autocast_mode.h>

#include "op.h"

namespace gradnorm_kernels {

// compute(cast) in the dtype that ATen's products on the input's device have in an autocast region.
template <class Compute>
Tensor in_lower_precision(const Tensor& input, const Compute& compute) {
  using namespace at::autocast;
  const auto device = input.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = get_lower_precision_fp_from_device_type(device);
  return compute([&](const Tensor& tensor) { return cached_cast(dtype, tensor, device); });
}

// With O = P(X, W) + b, the backward of a gradient G of O is X' = P^T(G, W), W' = P^T(X, G) and b' = sum G:
// bilinear in G and (X, W). So the gradients V of X', U of W' and u of b' give
//     G: P(V, W) + P(X, U) + u,    X: P^T(G, U),    W: P^T(V, G),
// where the last two are one backward, of a product of V and U.
//
// op: a double backward. Its forward(x, w, bias) is P, its backward(x, w, mask) that of a product of these.
// An operand that no defined gradient meets may be undefined. broadcast(bias, output): the bias as it meets
// the output.
template <class DoubleBackward, class Broadcast>
TensorTriple bilinear_double_backward(const DoubleBackward& op, const Broadcast& broadcast) {
  const Tensor &v = op.grad_grad_input, &u = op.grad_grad_weight;
  TensorTriple grads;
  auto& [grad_grad_output, grad_input, grad_weight] = grads;
  if (op.output_mask[0]) {
    // The first product adds the bias's term as its own bias.
    OptionalTensor bias = op.grad_grad_bias;
    if (v.defined()) {
      grad_grad_output = op.forward(v, op.weight, bias);
      bias.reset();
    }
    if (u.defined()) {
      const Tensor term = op.forward(op.input, u, bias);
      grad_grad_output = grad_grad_output.defined() ? grad_grad_output + term : term;
      bias.reset();
    }
    if (bias.defined()) {
      grad_grad_output = at::zeros_like(op.grad_output) + broadcast(bias, op.grad_output);
    }
  }
  const Mask<2> mask{op.output_mask[1] && u.defined(), op.output_mask[2] && v.defined()};
  if (mask[0] || mask[1]) {
    // Where a gradient is undefined, the operand it belongs to stands in for its shape.
    std::tie(grad_input, grad_weight, std::ignore) =
        op.backward(v.defined() ? v : op.input, u.defined() ? u : op.weight, mask);
  }
  return grads;
}

// Which saved operands are made again where they can be (record in op.h), and are read. The forward saves
// (input, weight),
struct BilinearForwardOperands {
  static constexpr auto if_changed = kIfChanged;
  static constexpr std::array made_again{0};
  static bool is_read(size_t, Needs needs) {
    return needs[1];
  }
};
// and the backward (grad_output, input, weight), of which the first meets the gradient of either other, and
// these meet the gradient of grad_output.
struct BilinearBackwardOperands {
  static constexpr auto if_changed = kIfChanged;
  static constexpr std::array made_again{0, 1};
  static bool is_read(size_t place, Needs needs) {
    return place == 0 ? needs[1] || needs[2] : needs[0];
  }
};

}  // namespace gradnorm_kernels
