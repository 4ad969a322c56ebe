// The library without Python: the ops, their autograd Functions, and the switch for PyTorch's own gelu.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <iostream>
#include <string_view>

namespace {

using torch::Tensor;

Tensor fused_gelu(const Tensor& input, std::string_view approximate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradnorm_kernels::gelu", "")
                             .typed<Tensor(const Tensor&, std::string_view)>();
  return op.call(input, approximate);
}

void set_fused_double_backward(bool enabled) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradnorm_kernels::set_fused_double_backward", "")
                             .typed<void(bool)>();
  op.call(enabled);
}

// The gradient of |df/dx| summed, which differentiates the backward.
template <class Function>
Tensor penalty_gradient(const Function& function) {
  torch::manual_seed(0);
  const Tensor x = torch::randn({7, 33}, torch::requires_grad());
  const auto first = torch::autograd::grad({function(x).square().sum()}, {x}, {}, true, true)[0];
  return torch::autograd::grad({first.abs().sum()}, {x})[0];
}

}  // namespace

int main() {
  for (const std::string_view approximate : {"none", "tanh"}) {
    const auto stock = [&](const Tensor& x) { return torch::gelu(x, approximate); };
    const auto fused = [&](const Tensor& x) { return fused_gelu(x, approximate); };
    const Tensor expected = penalty_gradient(stock);
    TORCH_CHECK(torch::allclose(penalty_gradient(fused), expected, 1e-4, 1e-5), approximate);
    set_fused_double_backward(true);
    TORCH_CHECK(torch::allclose(penalty_gradient(stock), expected, 1e-4, 1e-5), approximate);
    set_fused_double_backward(false);
    TORCH_CHECK(torch::equal(penalty_gradient(stock), expected), approximate);
  }
  std::cout << "1 passed, 0 failed\n";
}
