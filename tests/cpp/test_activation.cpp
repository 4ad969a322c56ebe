// The library without Python: the ops, their autograd Functions, and the switch for PyTorch's own
// activations.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <functional>
#include <iostream>
#include <string>
#include <string_view>

namespace {

using torch::Tensor;
using Function = std::function<Tensor(const Tensor&)>;

template <class... Params>
Function fused(const std::string& name, Params... params) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow(("gradnorm_kernels::" + name).c_str(), "")
                      .typed<Tensor(const Tensor&, Params...)>();
  return [=](const Tensor& input) { return op.call(input, params...); };
}

void set_fused_double_backward(bool enabled) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradnorm_kernels::set_fused_double_backward", "")
                             .typed<void(bool)>();
  op.call(enabled);
}

// The gradient of |df/dx| summed, which differentiates the backward.
Tensor penalty_gradient(const Function& function) {
  torch::manual_seed(0);
  const Tensor x = torch::randn({7, 33}, torch::requires_grad());
  const auto first = torch::autograd::grad({function(x).square().sum()}, {x}, {}, true, true)[0];
  return torch::autograd::grad({first.abs().sum()}, {x})[0];
}

struct Case {
  const char* name;
  Function stock;
  Function fused;
};

}  // namespace

int main() {
  using std::string_view;
  const Case cases[] = {
      {"gelu", [](const Tensor& x) { return torch::gelu(x); }, fused("gelu", string_view("none"))},
      {"gelu tanh", [](const Tensor& x) { return torch::gelu(x, "tanh"); },
       fused("gelu", string_view("tanh"))},
      {"silu", [](const Tensor& x) { return torch::silu(x); }, fused("silu")},
      {"mish", [](const Tensor& x) { return torch::mish(x); }, fused("mish")},
      {"softplus", [](const Tensor& x) { return torch::softplus(x, 2.0, 3.0); }, fused("softplus", 2.0, 3.0)},
      {"elu", [](const Tensor& x) { return torch::elu(x, 1.5); }, fused("elu", 1.5, 1.0, 1.0)},
      {"tanh", [](const Tensor& x) { return torch::tanh(x); }, fused("tanh")},
      {"sigmoid", [](const Tensor& x) { return torch::sigmoid(x); }, fused("sigmoid")},
      {"relu", [](const Tensor& x) { return torch::relu(x); }, fused("relu")},
      {"relu6", [](const Tensor& x) { return torch::relu6(x); }, fused("relu6")},
      {"leaky_relu", [](const Tensor& x) { return torch::leaky_relu(x, 0.2); }, fused("leaky_relu", 0.2)},
      {"hardswish", [](const Tensor& x) { return torch::hardswish(x); }, fused("hardswish")},
      {"softsign", [](const Tensor& x) { return x / (x.abs() + 1); }, fused("softsign")},
      {"logsigmoid", [](const Tensor& x) { return torch::log_sigmoid(x); }, fused("logsigmoid")},
      {"quick_gelu", [](const Tensor& x) { return x * (x * 1.702).sigmoid(); }, fused("quick_gelu")},
      {"squared_relu", [](const Tensor& x) { return x.relu().square(); }, fused("squared_relu")},
      {"sin", [](const Tensor& x) { return (x * 3).sin(); }, fused("sin", 3.0)},
      {"cos", [](const Tensor& x) { return x.cos(); }, fused("cos", 1.0)},
  };
  int passed = 0;
  for (const auto& [name, stock, fused] : cases) {
    const Tensor expected = penalty_gradient(stock);
    TORCH_CHECK(torch::allclose(penalty_gradient(fused), expected, 1e-4, 1e-5), name);
    set_fused_double_backward(true);
    TORCH_CHECK(torch::allclose(penalty_gradient(stock), expected, 1e-4, 1e-5), name, ", switched");
    set_fused_double_backward(false);
    TORCH_CHECK(torch::equal(penalty_gradient(stock), expected), name, ", switched back");
    ++passed;
  }
  // PyTorch's own has no double backward to compare with.
  const auto hardsigmoid = [](const Tensor& x) { return torch::hardtanh(x, -3.0, 3.0) / 6 + 0.5; };
  TORCH_CHECK(
      torch::allclose(penalty_gradient(fused("hardsigmoid")), penalty_gradient(hardsigmoid), 1e-4, 1e-5));
  std::cout << passed + 1 << " passed, 0 failed\n";
}
