#include "activation.h"

#include "elementwise.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace activation {
namespace {

// An activation that lacks the function of a pass is not asked for it.

void forward(at::TensorIteratorBase& iter, const Activation& any) {
  std::visit(
      [&](const auto& act) {
        if constexpr (has_f<decltype(act)>) {
          elementwise<1, 1>(iter, [act](const auto& in) { return std::array{act.f(in[0])}; });
        }
      },
      any);
}

void backward(at::TensorIteratorBase& iter, const Activation& any) {
  std::visit(
      [&](const auto& act) {
        elementwise<1, 2>(iter, [act](const auto& in) {
          const auto& [grad_output, operand] = in;
          return std::array{act.df(grad_output, operand)};
        });
      },
      any);
}

void double_backward(at::TensorIteratorBase& iter, const Activation& any) {
  std::visit(
      [&](const auto& act) {
        if constexpr (has_d2f<decltype(act)>) {
          elementwise<2, 3>(iter, [act](const auto& in) {
            const auto& [v, g, operand] = in;
            return std::array{act.df(v, operand), act.d2f(v, g, operand)};
          });
        }
      },
      any);
}

void triple_backward(at::TensorIteratorBase& iter, const Activation& any) {
  std::visit(
      [&](const auto& act) {
        if constexpr (has_d2f<decltype(act)>) {
          elementwise<3, 5>(iter, [act](const auto& in) {
            const auto& [a, b, v, g, operand] = in;
            return std::array{
                act.df(a, operand) + act.d2f(b, g, operand), act.d2f(b, v, operand),
                act.d2f(a, v, operand) + act.d3f(b, v, g, operand)};
          });
        }
      },
      any);
}

}  // namespace
}  // namespace activation

const ActivationKernels activation_kernels{
    activation::forward, activation::backward, activation::double_backward, activation::triple_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
