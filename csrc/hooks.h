// For nodes whose gradients go past a tensor, where nobody looks at that.
#pragma once

#include <torch/csrc/autograd/graph_task.h>

#include "common.h"

namespace gradnorm_kernels {

// True if somebody wants the gradient of this very tensor: by a hook, retain_grad or autograd.grad.
inline bool has_hooks(const Tensor& tensor) {
  const auto& node = tensor.grad_fn();
  if (!node->pre_hooks().empty() || !node->tensor_pre_hooks().empty() ||
      !node->retains_grad_hooks().empty() || !node->post_hooks().empty()) {
    return true;
  }
  const auto* execution = torch::autograd::get_current_graph_task_exec_info();
  if (!execution) {
    return false;
  }
  const auto found = execution->find(node.get());
  return found != execution->end() && found->second.captures_;
}

}  // namespace gradnorm_kernels
