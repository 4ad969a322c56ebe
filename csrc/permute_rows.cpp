// A permutation of the rows of a tensor: Swin's cyclic shift and window partition as one copy. Linear, so
// that its backward is the inverse permutation, and so on to any order.
#include "op.h"

namespace gradnorm_kernels::permute_rows {
namespace {

struct PermuteRows {
  static constexpr auto schema = "permute_rows(Tensor input, Tensor index, Tensor inverse) -> Tensor";
  const Tensor& input;
  const Tensor& index;
  const Tensor& inverse;
  auto tie() const {
    return std::tie(input, index, inverse);
  }

  void check() const {
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
      TORCH_CHECK(
          tensor.layout() == at::kStrided && tensor.device() == input.device(), "permute_rows: expected ",
          name, " to be a strided tensor on the device of input (", input.device(), "), got ",
          tensor.layout(), " on ", tensor.device());
    }
  }

  Tensor composite() const {
    check();
    return input.index_select(1, index);
  }
  Tensor meta() const {
    check();
    return at::empty_symint(input.sym_sizes(), input.options());
  }
  Tensor autograd() const;
};

struct Derivative {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    return {call(PermuteRows{grads[0], /*index=*/saved[1], /*inverse=*/saved[0]})};
  }
  static constexpr std::array made_again{2};
  static constexpr bool is_saved_for_again = true;
  static bool is_read(size_t, Needs) {
    return false;
  }
  static Tensor again(const variable_list& saved, const Settings&) {
    return call(PermuteRows{/*input=*/saved[2], /*index=*/saved[0], /*inverse=*/saved[1]});
  }
};

Tensor PermuteRows::autograd() const {
  if (needs_composite(input)) {
    return composite();
  }
  return record<Derivative>({input}, {}, [&](variable_list& saved) {
    saved = {index, inverse, input};
    return variable_list{call(*this)};
  })[0];
}

const Registration<PermuteRows> registration;

}  // namespace
}  // namespace gradnorm_kernels::permute_rows
