// Division by the Euclidean norm, that norm, and weight normalisation: the CPU, meta and composite
// implementations of their ops, how they are differentiated, and the overrides of PyTorch's own.
//
// A row x of the norm n is y = r x with r = 1 / max(n, eps). Let P a = a - <a, y> y, which y leaves of a
// derivative. The gradient of x is h = r P g and, with v the gradient of h, those of g and x are r P v and
// -r^2 (<v, P g> y + <g, y> P v + <v, y> P g). In a row shorter than eps, r is a constant: there P a = a, and
// the last one is 0.
//
// The norm itself has the gradient h = g y, whose own are <v, y> and g r P v. A row of zeros, at which it has
// no derivative, gets zeros: r is 0 there.
//
// Weight normalisation gives a row the length s: s y, of which the gradients of x and s are s r P g and <g,
// y>. With v and t the gradients of these two, those of g, x and s are s r P v + t y, t r P g with s times
// the gradient of x above, and r <v, P g>.
#include "cpu/normalize.h"

#include <ATen/ExpandUtils.h>
#include <ATen/WrapDimUtilsMulti.h>

#include "hooks.h"
#include "normalization.h"

namespace gradnorm_kernels::normalize {
namespace {

// In place of eps, where no row is short: one of zeros has no direction, and NaN for all derivatives.
constexpr double kNoneIsShort = -1;

// By plain ops, with the rows along dim. eps is 0 for the norm.
struct Parts {
  int64_t dim;
  Tensor is_short, r, y;

  Parts(const Tensor& input, int64_t dim, double eps) : dim(dim) {
    const Tensor x = to_opmath(input), norm = length(x.detach());
    is_short = eps == 0 ? norm == 0 : norm < eps;
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

// Of weight normalisation: v as a matrix whose rows lie along a dimension, and what has an element a row as
// that is, with size 1 there.
struct Weights {
  const char* op;
  const Tensor &v, &g;
  int64_t dim;  // in v, which the lengths are kept for: the first or the last

  int64_t along() const {
    return dim == 0 ? 1 : 0;
  }
  Tensor matrix(const Tensor& t) const {
    c10::SymInt others = 1;
    for (int64_t k = 0; k < t.dim(); ++k) {
      others *= k == dim ? 1 : t.sym_size(k);
    }
    return dim == 0 ? t.reshape_symint({t.sym_size(dim), others})
                    : t.reshape_symint({others, t.sym_size(dim)});
  }
  void check(std::initializer_list<NamedTensor> like_v, std::initializer_list<NamedTensor> like_g) const {
    check_floating(op, {{"v", v}, {"g", g}});
    TORCH_CHECK_VALUE(
        v.dim() > 0 && (dim == 0 || dim == v.dim() - 1), op, ": expected dim to be the first or the last of ",
        "v, got ", dim, " of ", v.sym_sizes());
    c10::SymDimVector sizes(v.dim(), 1);
    sizes[dim] = v.sym_size(dim);
    TORCH_CHECK_VALUE(
        g.sym_sizes() == sizes, op, ": expected g to be as long as v along dim and 1 elsewhere (", sizes,
        "), got ", g.sym_sizes());
    for (const auto& tensor : like_v) {
      check_elementwise(op, {{"v", v}, tensor});
    }
    for (const auto& tensor : like_g) {
      check_elementwise(op, {{"g", g}, tensor});
    }
  }
};

struct WeightNormDoubleBackward {
  static constexpr auto schema =
      "weight_norm_double_backward(Tensor? grad_grad_v, Tensor? grad_grad_g, Tensor grad_output, Tensor v, "
      "Tensor g, int dim) -> (Tensor grad_grad_output, Tensor grad_v, Tensor grad_g)";
  OptionalTensor grad_grad_v, grad_grad_g;
  const Tensor &grad_output, &v, &g;
  int64_t dim;
  auto tie() const {
    return std::tie(grad_grad_v, grad_grad_g, grad_output, v, g, dim);
  }
  auto differentiable() const {
    return std::tie(grad_grad_v, grad_grad_g, grad_output, v, g);
  }

  Weights checked() const {
    const Weights of{name_of<WeightNormDoubleBackward>(), v, g, dim};
    of.check({{"grad_output", grad_output}, {"grad_grad_v", grad_grad_v}}, {{"grad_grad_g", grad_grad_g}});
    return of;
  }
  TensorTriple composite() const {
    const Weights of = checked();
    const Parts row(of.matrix(v), of.along(), kNoneIsShort);
    const auto matrix = [&](const Tensor& t, const Tensor& like) {
      return to_opmath(of.matrix(or_zeros(t, like)));
    };
    const Tensor u = matrix(grad_grad_v, v), t = matrix(grad_grad_g, g);
    const Tensor a = matrix(grad_output, v), s = matrix(g, g);
    const Tensor u_projected = row.project(u), a_projected = row.project(a),
                 along_u = row.dot(u, a_projected);
    const Tensor sum = row.y * along_u + u_projected * row.dot(a, row.y) + a_projected * row.dot(u, row.y);
    const auto as = [](const Tensor& like, const Tensor& result) {
      return result.reshape_symint(like.sym_sizes()).to(like.scalar_type());
    };
    return {
        as(v, s * row.r * u_projected + t * row.y), as(v, row.r * (t * a_projected - s * row.r * sum)),
        as(g, row.r * along_u)};
  }
  TensorTriple cpu() const {
    const Weights of = checked();
    const auto [grad_grad_output, grad_v, grad_g] = meta();
    const auto matrix = [&](const Tensor& t, const Tensor& like) {
      return of.matrix(or_zeros(t, like).contiguous());
    };
    const auto by_row = [&](const Tensor& t) { return matrix(t, g).squeeze(of.along()); };
    // The sum of no elements is 0.
    if (v.numel() == 0) {
      grad_g.zero_();
    }
    GRADNORM_KERNELS(normalize_kernels)
        .weight_norm_double_backward(
            of.matrix(grad_grad_output), of.matrix(grad_v), by_row(grad_g), matrix(grad_grad_v, v),
            matrix(grad_output, v), by_row(grad_grad_g), by_row(g), matrix(v, v), of.along());
    return {grad_grad_output, grad_v, grad_g};
  }
  TensorTriple meta() const {
    checked();
    return {empty_contiguous(v), empty_contiguous(v), empty_contiguous(g)};
  }
};

struct OfWeightNormBackward {
  using Settings = std::tuple<int64_t>;  // dim

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    const auto [dim] = settings;
    return to_list(call(WeightNormDoubleBackward{grads[0], grads[1], saved[0], saved[1], saved[2], dim}));
  }
};

// The gradients of v and g. norms are those that PyTorch's forward returned.
TensorPair weight_norm_backward(
    const Tensor& grad_output, const Tensor& v, const Tensor& g, const Tensor& norms, int64_t dim) {
  if (needs_composite(grad_output, v, g) || v.scalar_type() != g.scalar_type() || v.sym_numel() == 0) {
    const Weights of{"weight_norm", v, g, dim};
    const Parts row(of.matrix(v), of.along(), kNoneIsShort);
    const Tensor a = to_opmath(of.matrix(grad_output));
    const Tensor grad_v = to_opmath(of.matrix(g)) * row.r * row.project(a);
    return {
        grad_v.reshape_symint(v.sym_sizes()).to(v.scalar_type()),
        row.dot(a, row.y).reshape_symint(g.sym_sizes()).to(g.scalar_type())};
  }
  return to_tuple<2>(record<OfWeightNormBackward>({grad_output, v, g}, {dim}, [&](variable_list& saved) {
    saved = {grad_output, v, g};
    return to_list(
        at::_weight_norm_interface_backward(
            grad_output.contiguous(), v.contiguous(), g.contiguous(), norms, dim));
  }));
}

struct OfWeightNorm {
  using Settings = std::tuple<int64_t>;  // dim

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings& settings) {
    return to_list(weight_norm_backward(grads[0], saved[0], saved[1], saved[2], std::get<0>(settings)));
  }
};

struct WeightNorm {
  static constexpr auto schema = "weight_norm(Tensor v, Tensor g, int dim) -> Tensor";
  const Tensor &v, &g;
  int64_t dim;
  auto tie() const {
    return std::tie(v, g, dim);
  }

  Weights checked() const {
    const Weights of{name_of<WeightNorm>(), v, g, dim};
    of.check({}, {});
    return of;
  }
  Tensor composite() const {
    const Weights of = checked();
    const Tensor y = Parts(of.matrix(v), of.along(), kNoneIsShort).y;
    return (to_opmath(of.matrix(g)) * y).reshape_symint(v.sym_sizes()).to(v.scalar_type());
  }
  TensorPair with_norms() const {
    checked();
    return at::_weight_norm_interface(v.contiguous(), g.contiguous(), dim);
  }
  Tensor any_device() const {
    return v.numel() == 0 ? composite() : std::get<0>(with_norms());
  }
  Tensor meta() const {
    checked();
    return empty_contiguous(v);
  }
  Tensor autograd() const {
    if (needs_composite(v, g) || v.sym_numel() == 0) {
      return composite();
    }
    return record<OfWeightNorm>({v, g}, {dim}, [&](variable_list& saved) {
      const auto [output, norms] = with_norms();
      saved = {v, g, norms};
      return variable_list{output};
    })[0];
  }
};

const Registration<
    Forward, Backward, DoubleBackward, Norm, NormDoubleBackward, WeightNorm, WeightNormDoubleBackward>
    registration;

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

// PyTorch's forward has no forward-mode derivative,
struct AtenWeightNorm : Override<AtenWeightNorm> {
  static TensorPair autograd(c10::DispatchKeySet keys, const Tensor& v, const Tensor& g, int64_t dim) {
    if (!is_differentiated_by_transform({v, g})) {
      return stock(keys, v, g, dim);
    }
    return {WeightNorm{v, g, dim}.composite(), at::norm_except_dim(v, 2, dim)};
  }
};

// and its first derivative takes the norms for constants when it is differentiated.
struct AtenWeightNormBackward : Override<AtenWeightNormBackward> {
  static TensorPair autograd(
      c10::DispatchKeySet, const Tensor& grad_w, const Tensor& saved_v, const Tensor& saved_g,
      const Tensor& saved_norms, int64_t dim) {
    return weight_norm_backward(grad_w, saved_v, saved_g, saved_norms, dim);
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenVectorNorm::install(aten, "linalg_vector_norm");
  AtenNorm::install(aten, "norm.ScalarOpt_dim");
  AtenCosineSimilarity::install_whole(aten, "cosine_similarity");
  AtenWeightNorm::install(aten, "_weight_norm_interface");
  AtenWeightNormBackward::install_whole(aten, "_weight_norm_differentiable_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::normalize
