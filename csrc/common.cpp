#include "common.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <atomic>

namespace gradnorm_kernels {

namespace {

using c10::impl::TorchDispatchModeKey;

bool has_mode(TorchDispatchModeKey key) {
  return c10::impl::TorchDispatchModeTLS::get_mode(key).has_value();
}

bool has_tangent(const Tensor& tensor) {
  constexpr uint64_t outermost_level = 0;
  return tensor._fw_grad(outermost_level).defined();
}

bool has_no_kernels(const Tensor& tensor) {
  return tensor.is_nested() || has_tangent(tensor);
}

}  // namespace

// Included in the thread's dispatch keys as long as any torch.func transform is active.
bool is_in_torch_func() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_transforming() {
  return is_in_torch_func() || has_mode(TorchDispatchModeKey::PROXY);
}

bool is_tracing() {
  return has_mode(TorchDispatchModeKey::PROXY) || has_mode(TorchDispatchModeKey::FAKE);
}

bool is_foreign(const Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Python) || has_no_kernels(tensor);
}

bool is_forward_mode(at::TensorList tensors) {
  if (std::none_of(tensors.begin(), tensors.end(), &has_tangent) ||
      std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.is_nested(); })) {
    return false;
  }
  // A level of torch.func is of one transform, and its tensors have what that one gives them.
  return !is_in_torch_func() || !torch::autograd::compute_requires_grad(tensors);
}

bool needs_composite_even_traced(at::TensorList tensors) {
  return is_in_torch_func() ||
         std::any_of(tensors.begin(), tensors.end(), is_tracing() ? &has_no_kernels : &is_foreign);
}

namespace {

bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

}  // namespace

bool is_differentiated_by_transform(std::initializer_list<Tensor> tensors) {
  bool is_dual = false, requires_grad = false;
  for (const auto& tensor : tensors) {
    if (!tensor.defined()) {
      continue;
    }
    if (!is_supported_dtype(tensor.scalar_type()) || tensor.is_nested() || tensor.layout() != at::kStrided) {
      return false;
    }
    is_dual |= has_tangent(tensor);
    requires_grad |= torch::autograd::compute_requires_grad(tensor);
  }
  return is_dual || (requires_grad && is_transforming());
}

void check_floating(const char* op, std::initializer_list<NamedTensor> tensors, bool same_dtype) {
  const auto& first = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) {
      continue;
    }
    const auto dtype = tensor.scalar_type();
    TORCH_CHECK_TYPE(
        is_supported_dtype(dtype), op, ": expected ", name,
        " to be float16, bfloat16, float32 or float64, got ", dtype);
    TORCH_CHECK(
        tensor.layout() == at::kStrided, op, ": expected ", name, " to be a strided tensor, got ",
        tensor.layout());
    TORCH_CHECK_TYPE(
        !same_dtype || dtype == first.tensor.scalar_type(), op, ": expected ", name, " to have the dtype of ",
        first.name, " (", first.tensor.scalar_type(), "), got ", dtype);
    TORCH_CHECK(
        tensor.device() == first.tensor.device(), op, ": expected ", name, " to be on the device of ",
        first.name, " (", first.tensor.device(), "), got ", tensor.device());
  }
}

void check_elementwise(const char* op, std::initializer_list<NamedTensor> tensors) {
  const auto& first = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    if (tensor.is_nested()) {
      return;
    }
  }
  check_floating(op, tensors);
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(
        !tensor.defined() || tensor.sym_sizes() == first.tensor.sym_sizes(), op, ": expected ", name,
        " to have the shape of ", first.name, " (", first.tensor.sym_sizes(), "), got ", tensor.sym_sizes());
  }
}

bool is_elementwise_match(const Tensor& a, const Tensor& b) {
  return is_supported_dtype(a.scalar_type()) && a.scalar_type() == b.scalar_type() &&
         a.layout() == at::kStrided && b.layout() == at::kStrided && a.device() == b.device() &&
         a.sym_sizes() == b.sym_sizes();
}

Tensor to_opmath(const Tensor& tensor) {
  const bool is_half = tensor.defined() && at::isReducedFloatingType(tensor.scalar_type());
  return is_half ? tensor.to(at::kFloat) : tensor;
}

Tensor softmax_by_parts(const Tensor& input, int64_t dim) {
  if (input.is_nested() || input.sym_numel() == 0) {
    return at::softmax(input, dim);
  }
  const Tensor exponentials = (input - input.detach().amax(dim, /*keepdim=*/true)).exp();
  return exponentials / exponentials.sum(dim, /*keepdim=*/true);
}

Tensor log_softmax_by_parts(const Tensor& input, int64_t dim) {
  if (input.is_nested() || input.sym_numel() == 0) {
    return at::log_softmax(input, dim);
  }
  const Tensor shifted = input - input.detach().amax(dim, /*keepdim=*/true);
  return shifted - shifted.exp().sum(dim, /*keepdim=*/true).log();
}

bool is_zero_asked_for(uint32_t i) {
  const auto* asked_for = torch::autograd::get_current_graph_task_exec_info();
  if (asked_for && !asked_for->empty()) {
    return true;
  }
  const auto node = torch::autograd::get_current_node();
  const auto* operand = node ? node->next_edge(i).function.get() : nullptr;
  // Relu saves its output, not its input.
  if (operand && operand->name() == "ReluBackward0") {
    operand = operand->next_edge(0).function.get();
  }
  const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(operand);
  return leaf && !leaf->variable.grad().defined();
}

namespace {

std::atomic<bool> is_switched_on = false;

}  // namespace

bool is_fused_double_backward_enabled() {
  return is_switched_on.load(std::memory_order_relaxed);
}

torch::Library& AtenAutograd::library(c10::DispatchKey key) {
  return libraries_.try_emplace(key, torch::Library::IMPL, "aten", key, __FILE__, __LINE__).first->second;
}

StockOverride::StockOverride(Install install) {
  // Never destroyed at exit, when the dispatcher may already be gone.
  static auto* aten = new AtenAutograd();
  install(*aten);
}

StockKernel::StockKernel(const std::string& op, const std::string& overload)
    : op_(c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), overload.c_str())),
      kernel_(op_.getComputedKernelForDispatchKey(c10::DispatchKey::AutogradCPU)) {}

TORCH_LIBRARY(gradnorm_kernels, m) {
  m.def("set_fused_double_backward(bool enabled) -> ()", [](bool enabled) { is_switched_on = enabled; });
  m.def("is_fused_double_backward_enabled() -> bool", is_fused_double_backward_enabled);
}

}  // namespace gradnorm_kernels
