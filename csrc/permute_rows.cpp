// A permutation of the rows of a tensor: Swin's cyclic shift and window partition as one copy. Linear, so
// that its backward is the inverse permutation, and so on to any order.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "common.h"

namespace gradnorm_kernels::permute_rows {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& input, const Tensor& index, const Tensor& inverse) {
  TORCH_CHECK_VALUE(
      input.dim() == 3, "permute_rows: expected input of shape (batch, rows, channels), got ",
      input.sym_sizes());
  for (const auto& [name, tensor] : {NamedTensor{"index", index}, NamedTensor{"inverse", inverse}}) {
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == at::kLong, "permute_rows: expected ", name, " to be int64, got ",
        tensor.scalar_type());
    TORCH_CHECK_VALUE(
        tensor.dim() == 1 && tensor.sym_size(0) == input.sym_size(1), "permute_rows: expected ", name,
        " of shape (", input.sym_size(1), "), got ", tensor.sym_sizes());
  }
}

Tensor call(const Tensor& input, const Tensor& index, const Tensor& inverse) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("gradnorm_kernels::permute_rows");
  return op.call(input, index, inverse);
}

Tensor composite(const Tensor& input, const Tensor& index, const Tensor& inverse) {
  check(input, index, inverse);
  return input.index_select(1, index);
}

Tensor meta(const Tensor& input, const Tensor& index, const Tensor& inverse) {
  check(input, index, inverse);
  return at::empty_symint(input.sym_sizes(), input.options());
}

struct PermuteRows : torch::autograd::Function<PermuteRows> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, const Tensor& index, const Tensor& inverse) {
    ctx->save_for_backward({index, inverse});
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(input, index, inverse);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {
      return {Tensor(), Tensor(), Tensor()};
    }
    const auto saved = ctx->get_saved_variables();
    return {call(grads[0], saved[1], saved[0]), Tensor(), Tensor()};
  }
};

Tensor autograd(const Tensor& input, const Tensor& index, const Tensor& inverse) {
  if (needs_composite({input})) {
    return composite(input, index, inverse);
  }
  if (!torch::autograd::compute_requires_grad(input)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(input, index, inverse);
  }
  return PermuteRows::apply(input, index, inverse);
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def("permute_rows(Tensor input, Tensor index, Tensor inverse) -> Tensor");
}
TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  m.impl("permute_rows", meta);
}
TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  m.impl("permute_rows", autograd);
}
TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  m.impl("permute_rows", composite);
}
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  m.impl("permute_rows", composite);
}

}  // namespace
}  // namespace gradnorm_kernels::permute_rows
