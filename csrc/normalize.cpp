// Division by the Euclidean norm, and that norm: the CPU, meta and composite implementations of their ops,
// how they are differentiated, and the overrides of PyTorch's own.
//
// A row x of the norm n is y = r x with r = 1 / max(n, eps). Let P a = a - <a, y> y, which y leaves of a
// derivative. The gradient of x is h = r P g and, with v the gradient of h, those of g and x are r P v and
// -r^2 (<v, P g> y + <g, y> P v + <v, y> P g). In a row shorter than eps, r is a constant: there P a = a, and
// the last one is 0.
//
// The norm itself has the gradient h = g y, whose own are <v, y> and g r P v. A row of zeros, at which it has
// no derivative, gets zeros: r is 0 there.
#include "cpu/normalize.h"

#include <ATen/ExpandUtils.h>
#include <ATen/WrapDimUtilsMulti.h>

#include "hooks.h"
#include "normalization.h"

namespace gradnorm_kernels::normalize {
namespace {

// By plain ops, with the rows along dim. eps is 0 for the norm.
struct Parts {
  int64_t dim;
  Tensor is_short, r, y;

  Parts(const Tensor& input, int64_t dim, double eps) : dim(dim) {
    const Tensor x = to_opmath(input), norm = length(x.detach());
    is_short = eps > 0 ? norm < eps : norm == 0;
    const Tensor long_rows = length(x.masked_fill(is_short, 1)).reciprocal();
    r = long_rows.masked_fill(is_short, eps > 0 ? 1 / eps : 0);
    y = x * r;
  }
  Tensor length(const Tensor& x) const {
    return x.square().sum(dim, /*keepdim=*/true).sqrt();
  }
  Tensor dot(const Tensor& a, const Tensor& b) const {
    return (a * b).sum(dim, /*keepdim=*/true).masked_fill(is_short, 0);
  }
  Tensor project(const Tensor& a) const {
    return a - y * dot(a, y);
  }
};

void check(
    const char* op, const Tensor& input, int64_t dim, double eps,
    std::initializer_list<NamedTensor> tensors) {
  check_elementwise(op, {{"input", input}});
  at::maybe_wrap_dim(dim, input.dim());
  TORCH_CHECK_VALUE(eps > 0, op, ": expected eps to be positive, got ", eps);
  for (const auto& [name, tensor] : tensors) {
    check_elementwise(op, {{"input", input}, {name, tensor}});
  }
}

struct DoubleBackward {
  static constexpr auto schema =
      "normalize_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, int dim, "
      "float eps) -> (Tensor grad_grad_output, Tensor grad_input)";
  const Tensor &grad_grad_input, &grad_output, &input;
  int64_t dim;
  double eps;
  auto tie() const {
    return std::tie(grad_grad_input, grad_output, input, dim, eps);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, input);
  }

  void check() const {
    normalize::check(
        name_of<DoubleBackward>(), input, dim, eps,
        {{"grad_output", grad_output}, {"grad_grad_input", grad_grad_input}});
  }
  TensorPair composite() const {
    check();
    const Parts row(input, dim, eps);
    const Tensor v = to_opmath(grad_grad_input), g = to_opmath(grad_output);
    const Tensor v_projected = row.project(v), g_projected = row.project(g);
    const Tensor sum =
        row.y * row.dot(v, g_projected) + v_projected * row.dot(g, row.y) + g_projected * row.dot(v, row.y);
    return {(row.r * v_projected).to(input.scalar_type()), (sum * row.r * -row.r).to(input.scalar_type())};
  }
  TensorPair cpu() const {
    check();
    const Tensor grad_grad_output = empty_contiguous(input), grad_input = empty_contiguous(input);
    GRADNORM_KERNELS(normalize_kernels)
        .double_backward(
            grad_grad_output, grad_input, grad_grad_input.contiguous(), grad_output.contiguous(),
            input.contiguous(), at::maybe_wrap_dim(dim, input.dim()), eps);
    return {grad_grad_output, grad_input};
  }
  TensorPair meta() const {
    check();
    return {empty_contiguous(input), empty_contiguous(input)};
  }
};

using Settings = std::tuple<int64_t, double>;  // dim, eps

struct OfBackward {
  using Settings = normalize::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings);
};

struct Backward {
  static constexpr auto schema =
      "normalize_backward(Tensor grad_output, Tensor input, int dim, float eps) -> Tensor";
  const Tensor &grad_output, &input;
  int64_t dim;
  double eps;
  auto tie() const {
    return std::tie(grad_output, input, dim, eps);
  }

  void check() const {
    normalize::check(name_of<Backward>(), input, dim, eps, {{"grad_output", grad_output}});
  }
  Tensor composite() const {
    check();
    const Parts row(input, dim, eps);
    return (row.r * row.project(to_opmath(grad_output))).to(input.scalar_type());
  }
  Tensor cpu() const {
    check();
    const Tensor grad_input = empty_contiguous(input);
    GRADNORM_KERNELS(normalize_kernels)
        .backward(
            grad_input, grad_output.contiguous(), input.contiguous(), at::maybe_wrap_dim(dim, input.dim()),
            eps);
    return grad_input;
  }
  Tensor meta() const {
    check();
    return empty_contiguous(input);
  }
  Tensor autograd() const {
    if (needs_composite(grad_output, input)) {
      return composite();
    }
    return record<OfBackward>({grad_output, input}, {dim, eps}, [&](variable_list& saved) {
      saved = {grad_output, input};
      return variable_list{call(*this)};
    })[0];
  }
};

variable_list OfBackward::backward(
    const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
  const auto [dim, eps] = settings;
  if (!needs[1]) {
    return {call(Backward{grads[0], saved[1], dim, eps})};
  }
  return to_list(call(DoubleBackward{grads[0], saved[0], saved[1], dim, eps}));
}

struct OfForward {
  using Settings = normalize::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [dim, eps] = settings;
    return {call(Backward{grads[0], saved[0], dim, eps})};
  }
};

struct Forward {
  static constexpr auto schema = "normalize(Tensor input, int dim, float eps) -> Tensor";
  const Tensor& input;
  int64_t dim;
  double eps;
  auto tie() const {
    return std::tie(input, dim, eps);
  }

  void check() const {
    normalize::check(name_of<Forward>(), input, dim, eps, {});
  }
  Tensor composite() const {
    check();
    return Parts(input, dim, eps).y.to(input.scalar_type());
  }
  Tensor cpu() const {
    check();
    const Tensor output = empty_contiguous(input);
    GRADNORM_KERNELS(normalize_kernels)
        .forward(output, input.contiguous(), at::maybe_wrap_dim(dim, input.dim()), eps);
    return output;
  }
  Tensor meta() const {
    check();
    return empty_contiguous(input);
  }
  Tensor autograd() const {
    if (needs_composite(input)) {
      return composite();
    }
    return record<OfForward>({input}, {dim, eps}, [&](variable_list& saved) {
      saved = {input};
      return variable_list{call(*this)};
    })[0];
  }
  // PyTorch's own norm is float32 in a region of autocast for CUDA.
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(Forward{autocast_to_float(input), dim, eps});
  }
};

// Of the norm. grad_output and its gradient have the shape of input with 1 in the place of dim.
struct NormDoubleBackward {
  static constexpr auto schema =
      "vector_norm_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, int dim) -> "
      "(Tensor grad_grad_output, Tensor grad_input)";
  const Tensor &grad_grad_input, &grad_output, &input;
  int64_t dim;
  auto tie() const {
    return std::tie(grad_grad_input, grad_output, input, dim);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_output, input);
  }

  void check() const {
    const auto op = name_of<NormDoubleBackward>();
    check_elementwise(op, {{"input", input}, {"grad_grad_input", grad_grad_input}});
    check_floating(op, {{"input", input}, {"grad_output", grad_output}});
    c10::SymDimVector sizes(input.sym_sizes());
    const auto along = at::maybe_wrap_dim(dim, input.dim());
    if (input.dim() > 0) {
      sizes[along] = 1;
    }
    TORCH_CHECK_VALUE(
        grad_output.sym_sizes() == sizes, op, ": expected grad_output to have the shape ", sizes, ", got ",
        grad_output.sym_sizes());
  }
  TensorPair composite() const {
    check();
    const Parts row(input, dim, /*eps=*/0);
    const Tensor v = to_opmath(grad_grad_input), along_y = row.dot(v, row.y);
    return {
        along_y.to(input.scalar_type()),
        (to_opmath(grad_output) * row.r * (v - row.y * along_y)).to(input.scalar_type())};
  }
  TensorPair cpu() const {
    check();
    // The sum of no elements is 0.
    const Tensor grad_grad_output = at::zeros(grad_output.sizes(), input.options());
    const Tensor grad_input = empty_contiguous(input);
    const auto along = at::maybe_wrap_dim(dim, input.dim());
    GRADNORM_KERNELS(normalize_kernels)
        .norm_double_backward(
            grad_grad_output.squeeze(along), grad_input, grad_grad_input.contiguous(),
            grad_output.contiguous().squeeze(along), input.contiguous(), along);
    return {grad_grad_output, grad_input};
  }
  TensorPair meta() const {
    check();
    return {empty_contiguous(grad_output), empty_contiguous(input)};
  }
};

// As at::linalg_vector_norm takes them: none are all. Sorted.
std::vector<int64_t> reduced_dims(const Tensor& input, at::OptionalIntArrayRef dim) {
  const auto chosen = at::dim_list_to_bitset(dim && !dim->empty() ? dim : std::nullopt, input.dim());
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < input.dim(); ++i) {
    if (chosen[i]) {
      dims.push_back(i);
    }
  }
  return dims;
}

// Of grad_output, of the shape of input with 1 in the place of the dimensions from first to last, input and
// the norm itself, past which its gradient goes to input.
struct OfNormBackward {
  using Settings = std::tuple<int64_t, int64_t>;  // first, last

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [first, last] = settings;
    const Tensor &grad_output = saved[0], &input = saved[1], &norm = saved[2];
    // One dimension stands for those.
    const auto as_one = [first = first, last = last](const Tensor& t) {
      c10::SymDimVector sizes(t.sym_sizes());
      for (auto dim = last; dim > first; --dim) {
        sizes[first] *= sizes[dim];
        sizes.erase(sizes.begin() + dim);
      }
      return t.reshape_symint(sizes);
    };
    const Tensor v = as_one(grads[0]), g = as_one(grad_output), x = as_one(input);
    if (has_hooks(norm)) {
      const Tensor n = norm.reshape_symint(g.sym_sizes()), is_zero = n == 0;
      const Tensor r = n.masked_fill(is_zero, 1).reciprocal().masked_fill(is_zero, 0);
      const Tensor along_y = (v * x).sum(first, /*keepdim=*/true) * r;
      return {
          along_y.reshape_symint(grad_output.sym_sizes()), (g * r * v).reshape_symint(input.sym_sizes()),
          (-g * r * along_y).reshape_symint(norm.sym_sizes())};
    }
    const auto [grad_grad_output, grad_input] = call(NormDoubleBackward{v, g, x, first});
    return {
        grad_grad_output.reshape_symint(grad_output.sym_sizes()),
        grad_input.reshape_symint(input.sym_sizes()), Tensor()};
  }
};

struct OfNorm {
  using Settings = std::tuple<std::vector<int64_t>, bool>;  // dims, keepdim

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto& [dims, keepdim] = settings;
    const Tensor &input = saved[0], &norm = saved[1];
    Tensor grad = grads[0], divisor = norm;
    if (!keepdim) {
      for (const auto dim : dims) {
        grad = grad.unsqueeze(dim);
        divisor = divisor.unsqueeze(dim);
      }
    }
    const auto value = [&] {
      // With the bits of PyTorch's, which divides by the norm of zeros and then fills in 0.
      const Tensor is_zero = divisor == 0;
      return grad.masked_fill(is_zero, 0) * (input / divisor.masked_fill(is_zero, 1));
    };
    const int64_t first = dims.empty() ? 0 : dims.front(), last = dims.empty() ? 0 : dims.back();
    const bool are_adjacent = last - first < std::max<int64_t>(1, dims.size());
    if (needs_composite(grad, input) || !are_adjacent) {
      return {value()};
    }
    return record<OfNormBackward>({grad, input, norm}, {first, last}, [&](variable_list& to_save) {
      to_save = {grad, input, norm};
      return variable_list{value()};
    });
  }
};

struct Norm {
  static constexpr auto schema = "vector_norm(Tensor input, int[1]? dim, bool keepdim) -> Tensor";
  const Tensor& input;
  at::OptionalIntArrayRef dim;
  bool keepdim;
  auto tie() const {
    return std::tie(input, dim, keepdim);
  }

  // By ops whose derivatives are 0 in rows of zeros.
  Tensor composite() const {
    check_elementwise(name_of<Norm>(), {{"input", input}});
    const Tensor x = to_opmath(input);
    const Tensor is_zero = x.detach().square().sum(dim, /*keepdim=*/true) == 0;
    const Tensor norm = x.masked_fill(is_zero, 1).square().sum(dim, keepdim).sqrt();
    return norm.masked_fill(is_zero.view_as(norm), 0).to(input.scalar_type());
  }
  Tensor any_device() const {
    check_elementwise(name_of<Norm>(), {{"input", input}});
    return at::linalg_vector_norm(input, 2, dim, keepdim);
  }
  Tensor autograd() const {
    if (needs_composite(input)) {
      return composite();
    }
    return record<OfNorm>({input}, {reduced_dims(input, dim), keepdim}, [&](variable_list& saved) {
      const Tensor norm = call(*this);
      saved = {input, norm};
      return variable_list{norm};
    })[0];
  }
  Tensor autocast_cuda() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    return call(Norm{autocast_to_float(input), dim, keepdim});
  }
};

const Registration<Forward, Backward, DoubleBackward, Norm, NormDoubleBackward> registration;

// PyTorch's own norms; undefined where ours do not cover them.
Tensor euclidean_norm(
    const Tensor& self, const at::Scalar& ord, at::OptionalIntArrayRef dim, bool keepdim,
    at::ScalarType dtype) {
  if (self.is_nested() || !is_elementwise_match(self, self) || ord.isComplex() || ord.toDouble() != 2 ||
      c10::promoteTypes(self.scalar_type(), dtype) != dtype || !c10::isFloatingType(dtype) ||
      !(torch::autograd::compute_requires_grad(self) || self._fw_grad(/*level=*/0).defined())) {
    return Tensor();
  }
  return Norm{self.to(dtype), dim, keepdim}.autograd();
}

struct AtenVectorNorm : Override<AtenVectorNorm> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& self, const at::Scalar& ord, at::OptionalIntArrayRef dim,
      bool keepdim, std::optional<at::ScalarType> dtype) {
    const Tensor norm = euclidean_norm(self, ord, dim, keepdim, dtype.value_or(self.scalar_type()));
    return norm.defined() ? norm : stock(keys, self, ord, dim, keepdim, dtype);
  }
};

// pairwise_distance's.
struct AtenNorm : Override<AtenNorm> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& self, const std::optional<at::Scalar>& p, at::IntArrayRef dim,
      bool keepdim) {
    const Tensor norm = euclidean_norm(self, p.value_or(2), dim, keepdim, self.scalar_type());
    return norm.defined() ? norm : stock(keys, self, p, dim, keepdim);
  }
};

struct AtenCosineSimilarity : Override<AtenCosineSimilarity> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& x1, const Tensor& x2, int64_t dim, double eps) {
    if (needs_composite(x1, x2) || !torch::autograd::compute_requires_grad(x1, x2) || !(eps > 0) ||
        !is_elementwise_match(x1, x1) || !is_elementwise_match(x2, x2) ||
        x1.scalar_type() != x2.scalar_type() || x1.device() != x2.device()) {
      return stock(keys, x1, x2, dim, eps);
    }
    const auto both = at::broadcast_tensors({x1, x2});
    return (call(Forward{both[0], dim, eps}) * call(Forward{both[1], dim, eps})).sum(dim);
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenVectorNorm::install(aten, "linalg_vector_norm");
  AtenNorm::install(aten, "norm.ScalarOpt_dim");
  AtenCosineSimilarity::install_whole(aten, "cosine_similarity");
});

}  // namespace
}  // namespace gradnorm_kernels::normalize
