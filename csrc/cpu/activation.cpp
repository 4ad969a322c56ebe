#include "activation.h"

#include "elementwise.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace {

void forward(at::TensorIteratorBase& iter, const Activation& activation) {
  std::visit(
      [&](const auto& act) {
        elementwise<1, 1>(iter, [&](const auto& in) { return std::array{act.f(in[0])}; });
      },
      activation);
}

void backward(at::TensorIteratorBase& iter, const Activation& activation) {
  std::visit(
      [&](const auto& act) {
        elementwise<1, 2>(iter, [&](const auto& in) {
          const auto& [grad_output, input] = in;
          return std::array{grad_output * act.df(input)};
        });
      },
      activation);
}

void double_backward(at::TensorIteratorBase& iter, const Activation& activation) {
  std::visit(
      [&](const auto& act) {
        elementwise<2, 3>(iter, [&](const auto& in) {
          const auto& [grad_grad_input, grad_output, input] = in;
          // f'' before the other gradient: where it is 0, two large gradients cannot make inf * 0.
          return std::array{grad_grad_input * act.df(input), grad_grad_input * act.d2f(input) * grad_output};
        });
      },
      activation);
}

}  // namespace

const ActivationKernels activation_kernels{forward, backward, double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
