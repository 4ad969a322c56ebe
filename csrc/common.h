// What every op family shares below op.h: when to take the composite, how bad input is reported, and how
// PyTorch's own ops are replaced. setup.py compiles the families as one file, so each keeps its own names in
// a namespace.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <initializer_list>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace gradnorm_kernels {

using at::Tensor;

// True where an autograd Function or a kernel of ours would raise or be silently incomplete, and plain ATen
// ops are right: inside torch.func transforms and while a graph is traced for a compiler, which fuses plain
// ops with their neighbours,
bool is_transforming();
// for nested tensors and tensor subclasses that implement ATen's ops (DTensor), and under forward-mode AD.
bool is_foreign(const Tensor& tensor);

// Whether PyTorch's own op is about to be differentiated in one of these ways, in which its formulas, that
// take saved statistics for constants, are wrong, or of which it has none.
bool is_differentiated_by_transform(std::initializer_list<Tensor> tensors);

template <class... Tensors>
bool needs_composite(const Tensors&... tensors) {
  return is_transforming() || (is_foreign(tensors) || ...);
}

// Whether what runs is forward-mode AD of these tensors, of which some have tangents, and no other transform.
bool is_forward_mode(at::TensorList tensors);
// In torch.func.jvp, below which other levels may differentiate.
bool is_in_torch_func();

// Of ops that no compiler makes faster ones of: they stay as they are in a traced graph.
bool needs_composite_even_traced(at::TensorList tensors);
// While a graph is traced, or shapes are computed for one.
bool is_tracing();

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// The checks raise, naming the op and the argument. Undefined tensors pass.

// Unless all are strided float16, bfloat16, float32 or float64 tensors on the first one's device and, if
// asked for, of its dtype.
void check_floating(const char* op, std::initializer_list<NamedTensor> tensors, bool same_dtype = true);
// Unless all pass check_floating and share the first one's shape. Nested tensors, whose shapes only ATen's
// ops know, are left to these.
void check_elementwise(const char* op, std::initializer_list<NamedTensor> tensors);

// float32 for float16 and bfloat16: the dtype arithmetic is done in. An undefined tensor stays one.
Tensor to_opmath(const Tensor& tensor);

// at::softmax of a tensor in its arithmetic type, from ops with derivatives of every kind: the gradient of
// at::softmax's own forward-mode derivative raises, because that changes in place what it needs.
Tensor softmax_by_parts(const Tensor& input, int64_t dim);
Tensor log_softmax_by_parts(const Tensor& input, int64_t dim);

// True for tensors that pass check_elementwise together.
bool is_elementwise_match(const Tensor& a, const Tensor& b);

// An op of any namespace, for a typed call through the dispatcher.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>();
}

// Whether set_fused_double_backward is on: for the whole process, since backward passes have threads of their
// own.
bool is_fused_double_backward_enabled();

// PyTorch's own implementation of an op at the Autograd key, held from before ours replaces it.
class StockKernel {
 public:
  explicit StockKernel(const std::string& op, const std::string& overload = "");

  // Of exactly the op's own types. What changes its first argument in place returns that.
  template <class Return, class... Args, class Kernel = c10::SafeKernelFunction>
  Return call(c10::DispatchKeySet keys, Args... args) const {
    const Kernel& kernel = kernel_;
    if constexpr (requires { kernel.kernelFunction(); }) {
      return kernel.kernelFunction().template call<Return, Args...>(op_, keys, std::forward<Args>(args)...);
    } else {  // torch before 2.14
      torch::jit::Stack stack{c10::IValue(args)...};
      call_boxed(keys, stack);
      if constexpr (std::is_lvalue_reference_v<Return>) {
        return std::get<0>(std::forward_as_tuple(args...));
      } else {
        return c10::impl::PopResult<Return>::call(stack);
      }
    }
  }
  void call_boxed(c10::DispatchKeySet keys, torch::jit::Stack& stack) const {
    kernel_.callBoxed(op_, keys, &stack);
  }

 private:
  c10::OperatorHandle op_;
  c10::SafeKernelFunction kernel_;
};

// Whether someone would miss a gradient that is 0 and not there: that of the running node's i-th operand.
// autograd.grad raises where it finds none, and a leaf's grad would stay None. Else what comes before has
// less to do without it.
bool is_zero_asked_for(uint32_t i);

// Registrations at the Autograd key of PyTorch's own ops.
class AtenAutograd {
 public:
  template <class Kernel>
  void impl(const std::string& op, Kernel&& kernel) {
    library(c10::DispatchKey::Autograd).impl(op.c_str(), std::forward<Kernel>(kernel));
  }
  // For an op that PyTorch takes to pieces above autograd, before which only a device's own key comes.
  template <class Kernel>
  void impl_whole(const std::string& op, const Kernel& kernel) {
    for (const auto key :
         {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutogradMeta}) {
      library(key).impl(op.c_str(), kernel);
    }
  }

 private:
  torch::Library& library(c10::DispatchKey key);

  std::map<c10::DispatchKey, torch::Library> libraries_;
};

// A family's registrations at PyTorch's own ops. They are made once, when the library is loaded: the
// dispatcher's tables must not change while other threads read them.
struct StockOverride {
  using Install = void (*)(AtenAutograd& aten);
  explicit StockOverride(Install install);
};

}  // namespace gradnorm_kernels
