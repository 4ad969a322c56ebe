#include "gated.h"

#include "elementwise.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace gated {
namespace {

void forward(at::TensorIteratorBase& iter, const Gate& any) {
  std::visit(
      [&](const auto& act) {
        elementwise<1, 2>(iter, [act](const auto& in) {
          const auto& [gate, value] = in;
          return std::array{act.f(gate) * value};
        });
      },
      any);
}

void backward(at::TensorIteratorBase& iter, const Gate& any) {
  std::visit(
      [&](const auto& act) {
        elementwise<2, 3>(iter, [act](const auto& in) {
          const auto& [g, gate, value] = in;
          return std::array{act.df(g * value, gate), g * act.f(gate)};
        });
      },
      any);
}

void double_backward(at::TensorIteratorBase& iter, const Gate& any) {
  std::visit(
      [&](const auto& act) {
        elementwise<3, 5>(iter, [act](const auto& in) {
          const auto& [v, u, g, gate, value] = in;
          return std::array{
              act.df(v * value, gate) + u * act.f(gate), act.d2f(v, g * value, gate) + act.df(u * g, gate),
              act.df(v * g, gate)};
        });
      },
      any);
}

}  // namespace
}  // namespace gated

const GatedKernels gated_kernels{gated::forward, gated::backward, gated::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
