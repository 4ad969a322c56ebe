// The distances between the points of two sets, as sums of absolute differences (p = 1) or Euclidean (p = 2).
// The forward is ATen's, and on the CPU the first backward; the double backward is ours.
//
// With e = x_i - y_j and d = |e|, the gradient g of d gives x_i the sum over j of g s, where s is the sign of
// e or e / d, and y_j the negative of that over i. With u and v the gradients of these and f = u_i - v_j,
// that of g is <s, f>. For p = 2 it goes on to x_i, as the sum of r (f - <s, f> s) with r = g / d, and to
// y_j. At a distance of 0, s and r are 0.
//
// In many coordinates these sums are fastest as matrix products, which take d for a variable of its own.
#include "cpu/cdist.h"

#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>

#include <limits>

#include "hooks.h"
#include "op.h"

namespace gradnorm_kernels::cdist {
namespace {

constexpr int64_t kManyCoordinates = 32;  // beyond which products are faster

// What every op here is of.
struct Points {
  const char* op;
  const Tensor &x1, &x2;
  double p;

  bool is_covered() const {
    return (p == 1 || p == 2) && x1.dim() >= 2 && x2.dim() >= 2 && x1.sym_size(-1) == x2.sym_size(-1);
  }
  void check() const {
    check_floating(op, {{"x1", x1}, {"x2", x2}});
    TORCH_CHECK_VALUE(
        is_covered(), op,
        ": expected x1 and x2 of at least two dimensions, the last of one size, and p to be ", "1 or 2, got ",
        x1.sym_sizes(), ", ", x2.sym_sizes(), " and ", p);
  }
  c10::SymDimVector output_sizes() const {
    auto sizes = at::infer_size_symdimvector(batch(x1), batch(x2));
    sizes.push_back(x1.sym_size(-2));
    sizes.push_back(x2.sym_size(-2));
    return sizes;
  }
  // Of a derivative, whose operands are expanded.
  void check(const Tensor& grad_output) const {
    check();
    check_floating(op, {{"x1", x1}, {"grad_output", grad_output}});
    TORCH_CHECK_VALUE(
        batch(x1) == batch(x2), op, ": expected x2 to have the batch of x1 (", batch(x1), "), got ",
        batch(x2));
    const auto sizes = output_sizes();
    TORCH_CHECK_VALUE(
        grad_output.sym_sizes() == sizes, op, ": expected grad_output of shape (", sizes, "), got ",
        grad_output.sym_sizes());
  }
  static c10::SymIntArrayRef batch(const Tensor& x) {
    return x.sym_sizes().slice(0, x.dim() - 2);
  }
  // Whether ATen's forward computes squares of distances by a matrix product.
  bool is_by_product(std::optional<int64_t> compute_mode) const {
    const auto mode = compute_mode.value_or(0);
    return p == 2 && (mode == 1 || (mode == 0 && (x1.sym_size(-2) > 25 || x2.sym_size(-2) > 25)));
  }
};

Tensor differences(const Tensor& a, const Tensor& b) {
  return to_opmath(a).unsqueeze(-2) - to_opmath(b).unsqueeze(-3);
}

// 1 / d, and 0 for 0.
Tensor inverse_of(const Tensor& d) {
  return d.masked_fill(d == 0, std::numeric_limits<double>::infinity()).reciprocal();
}

// The sums of w (a_i - b_j), over j, and of their negatives, over i.
TensorPair pull(const Tensor& w, const Tensor& a, const Tensor& b, const Mask<2>& mask) {
  return {
      mask[0] ? a * w.sum(-1, /*keepdim=*/true) - w.matmul(b) : Tensor(),
      mask[1] ? b * w.sum(-2).unsqueeze(-1) - w.mT().matmul(a) : Tensor()};
}

struct DoubleBackward {
  static constexpr auto schema =
      "cdist_double_backward(Tensor? grad_grad_x1, Tensor? grad_grad_x2, Tensor grad_output, Tensor x1, "
      "Tensor x2, float p, bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_x1, Tensor grad_x2)";
  OptionalTensor grad_grad_x1, grad_grad_x2;
  const Tensor &grad_output, &x1, &x2;
  double p;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(grad_grad_x1, grad_grad_x2, grad_output, x1, x2, p, output_mask);
  }
  auto differentiable() const {
    return std::tie(grad_grad_x1, grad_grad_x2, grad_output, x1, x2);
  }

  void check() const {
    const auto op = name_of<DoubleBackward>();
    Points{op, x1, x2, p}.check(grad_output);
    check_elementwise(op, {{"x1", x1}, {"grad_grad_x1", grad_grad_x1}});
    check_elementwise(op, {{"x2", x2}, {"grad_grad_x2", grad_grad_x2}});
  }
  TensorTriple results(const Tensor& grad_grad_output, const Tensor& grad_x1, const Tensor& grad_x2) const {
    const auto as = [&](const Tensor& t, const Tensor& like, bool wanted) {
      return wanted ? t.reshape_symint(like.sym_sizes()).to(x1.scalar_type()) : Tensor();
    };
    return {
        as(grad_grad_output, grad_output, output_mask[0]), as(grad_x1, x1, output_mask[1]),
        as(grad_x2, x2, output_mask[2])};
  }
  TensorTriple composite() const {
    check();
    const Tensor e = differences(x1, x2);
    const Tensor f = differences(or_zeros(grad_grad_x1, x1), or_zeros(grad_grad_x2, x2));
    if (p == 1) {
      return results((e.detach().sign() * f).sum(-1), zeros_contiguous(x1), zeros_contiguous(x2));
    }
    const Tensor squared = e.square().sum(-1), is_zero = squared == 0;
    const Tensor inverse = squared.masked_fill(is_zero, 1).rsqrt().masked_fill(is_zero, 0);
    const Tensor along = (e * f).sum(-1) * inverse, r = to_opmath(grad_output) * inverse;
    const Tensor sum = r.unsqueeze(-1) * (f - (along * inverse).unsqueeze(-1) * e);
    return results(along, sum.sum(-2), -sum.sum(-3));
  }
  TensorTriple cpu() const {
    check();
    if (grad_output.numel() == 0 || x1.numel() == 0) {
      return composite();
    }
    const auto points = [](const Tensor& t) {
      return to_opmath(t).contiguous().view({-1, t.size(-2), t.size(-1)});
    };
    const auto transposed = [&](const Tensor& t) { return points(t).transpose(1, 2).contiguous(); };
    const Tensor x = points(x1), y = transposed(x2);
    const Tensor g = grad_output.contiguous().view({x.size(0), x.size(1), y.size(2)});
    const Tensor grad_grad_output = empty_contiguous(g, output_mask[0]);
    auto [grad_x1, grad_x2] =
        GRADNORM_KERNELS(cdist_kernels)
            .double_backward(
                grad_grad_output, points(or_zeros(grad_grad_x1, x1)), transposed(or_zeros(grad_grad_x2, x2)),
                g, x, y, p == 2, output_mask[1] || output_mask[2]);
    if (!grad_x1.defined()) {
      return results(grad_grad_output, zeros_contiguous(x1), zeros_contiguous(x2));
    }
    return results(grad_grad_output, grad_x1, grad_x2.transpose(1, 2).contiguous());
  }
  TensorTriple meta() const {
    check();
    return {
        empty_contiguous(grad_output, output_mask[0]), empty_contiguous(x1, output_mask[1]),
        empty_contiguous(x2, output_mask[2])};
  }
};

// Of grad_output, x1, x2 and the distances. Those have a gradient of their own if matrix products are used,
// or somebody wants to see it.
struct OfBackward {
  using Settings = std::tuple<double>;  // p

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const double p = std::get<0>(settings);
    const Tensor &grad_output = saved[0], &x1 = saved[1], &x2 = saved[2], &distances = saved[3];
    const bool watched = distances.grad_fn() && has_hooks(distances);
    if (p == 2 && (x1.sym_size(-1) > kManyCoordinates || watched)) {
      return by_products(grads, saved, needs);
    }
    // Of p = 1, what goes on to the points is zeros.
    const auto wanted = [&](uint32_t i) { return needs[i] && (p == 2 || is_zero_asked_for(i)); };
    auto list = to_list(
        call(DoubleBackward{grads[0], grads[1], grad_output, x1, x2, p, {needs[0], wanted(1), wanted(2)}}));
    list.emplace_back();
    return list;
  }

 private:
  static variable_list by_products(const variable_list& grads, const variable_list& saved, Needs needs) {
    const Tensor g = to_opmath(saved[0]), x = to_opmath(saved[1]), y = to_opmath(saved[2]);
    const Tensor u = to_opmath(or_zeros(grads[0], saved[1]));
    const Tensor v = to_opmath(or_zeros(grads[1], saved[2]));
    const Tensor inverse = inverse_of(to_opmath(saved[3]));
    // <e, u_i - v_j> of all pairs as one product.
    const Tensor x_u = (x * u).sum(-1, /*keepdim=*/true), y_v = (y * v).sum(-1, /*keepdim=*/true);
    const Tensor left = at::cat({-x, -u, x_u, at::ones_like(x_u)}, -1);
    const Tensor right = at::cat({v, y, at::ones_like(y_v), y_v}, -1);
    const Tensor along = left.matmul(right.mT()) * inverse, r = g * inverse;
    const auto [grad_x1, grad_x2] = pull(r, u, v, {needs[1], needs[2]});
    variable_list list{along, grad_x1, grad_x2, needs[3] ? (r * along).neg() : Tensor()};
    for (auto& t : list) {
      t = t.defined() ? t.to(saved[0].scalar_type()) : t;
    }
    return list;
  }
};

struct Backward {
  static constexpr auto schema =
      "cdist_backward(Tensor grad_output, Tensor x1, Tensor x2, Tensor output, float p, bool by_product, "
      "bool[2] output_mask) -> (Tensor grad_x1, Tensor grad_x2)";
  const Tensor &grad_output, &x1, &x2, &output;
  double p;
  bool by_product;
  Mask<2> output_mask;
  auto tie() const {
    return std::tie(grad_output, x1, x2, output, p, by_product, output_mask);
  }

  void check() const {
    const auto op = name_of<Backward>();
    Points{op, x1, x2, p}.check(grad_output);
    check_elementwise(op, {{"grad_output", grad_output}, {"output", output}});
  }
  TensorPair results(const TensorPair& gradients) const {
    const auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(x1.scalar_type()) : t; };
    return {narrow(std::get<0>(gradients)), narrow(std::get<1>(gradients))};
  }
  TensorPair composite() const {
    check();
    const Tensor g = to_opmath(grad_output);
    if (p == 2) {
      return results(pull(g * inverse_of(to_opmath(output)), to_opmath(x1), to_opmath(x2), output_mask));
    }
    const Tensor sum = g.unsqueeze(-1) * differences(x1, x2).detach().sign();
    return results({output_mask[0] ? sum.sum(-2) : Tensor(), output_mask[1] ? -sum.sum(-3) : Tensor()});
  }
  // With the bits of PyTorch's.
  TensorPair any_device() const {
    check();
    const Tensor g = to_opmath(grad_output), d = to_opmath(output);
    const Tensor x = to_opmath(x1).contiguous(), y = to_opmath(x2).contiguous();
    if (by_product) {
      return results(pull((g / d).masked_fill_(d == 0, 0), x, y, output_mask));
    }
    const auto of = [&](const Tensor& g, const Tensor& x, const Tensor& y, const Tensor& d, bool wanted) {
      return wanted ? at::_cdist_backward(g.contiguous(), x, y, p, d.contiguous()) : Tensor();
    };
    return results({of(g, x, y, d, output_mask[0]), of(g.mT(), y, x, d.mT(), output_mask[1])});
  }
  TensorPair meta() const {
    check();
    return {empty_contiguous(x1, output_mask[0]), empty_contiguous(x2, output_mask[1])};
  }
  TensorPair autograd() const {
    if (needs_composite(grad_output, x1, x2, output)) {
      return composite();
    }
    return to_tuple<2>(record<OfBackward>({grad_output, x1, x2, output}, {p}, [&](variable_list& saved) {
      saved = {grad_output, x1, x2, output};
      return to_list(call(*this));
    }));
  }
};

struct OfForward {
  using Settings = std::tuple<double, bool>;  // p, by_product

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [p, by_product] = settings;
    return to_list(call(Backward{grads[0], saved[0], saved[1], saved[2], p, by_product, needs}));
  }
};

struct Forward {
  static constexpr auto schema = "cdist(Tensor x1, Tensor x2, float p, int? compute_mode) -> Tensor";
  const Tensor &x1, &x2;
  double p;
  std::optional<int64_t> compute_mode;
  auto tie() const {
    return std::tie(x1, x2, p, compute_mode);
  }

  Points checked() const {
    const Points of{name_of<Forward>(), x1, x2, p};
    of.check();
    return of;
  }
  Tensor composite() const {
    const auto of = checked();
    if (p == 1) {
      const Tensor e = differences(x1, x2);  // abs has a second derivative, of zeros.
      return (e * e.detach().sign()).sum(-1).to(x1.scalar_type());
    }
    Tensor squared;
    if (of.is_by_product(compute_mode)) {
      const Tensor x = to_opmath(x1), y = to_opmath(x2);
      const auto lengths = x.square().sum(-1, /*keepdim=*/true) + y.square().sum(-1).unsqueeze(-2);
      squared = (lengths - 2 * x.matmul(y.mT())).clamp_min(0);
    } else {
      squared = differences(x1, x2).square().sum(-1);
    }
    const Tensor is_zero = squared.detach() == 0;
    return squared.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0).to(x1.scalar_type());
  }
  Tensor any_device() const {
    checked();
    return at::cdist(to_opmath(x1), to_opmath(x2), p, compute_mode).to(x1.scalar_type());
  }
  Tensor meta() const {
    return at::empty_symint(checked().output_sizes(), x1.options());
  }
  Tensor autograd() const {
    const auto of = checked();
    if (needs_composite(x1, x2) || x1.sym_numel() == 0 || x2.sym_numel() == 0) {
      return composite();
    }
    const auto sizes = of.output_sizes();
    const auto expanded = [&](const Tensor& x) {
      c10::SymDimVector of_x(sizes.begin(), sizes.end() - 2);
      of_x.push_back(x.sym_size(-2));
      of_x.push_back(x.sym_size(-1));
      return x.sym_sizes() == of_x ? x : x.expand_symint(of_x);
    };
    const Tensor a = expanded(x1), b = expanded(x2);
    return record<OfForward>({a, b}, {p, of.is_by_product(compute_mode)}, [&](variable_list& saved) {
      const Tensor output = call(Forward{a, b, p, compute_mode});
      saved = {a, b, output};
      return variable_list{output};
    })[0];
  }
  // PyTorch's own is computed in float32 in a region of autocast.
  Tensor autocast() const {
    const auto device = x1.device().type();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
    return call(Forward{cast(x1), cast(x2), p, compute_mode});
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// PyTorch's own, which has no forward-mode derivative.
struct AtenCdist : Override<AtenCdist> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& x1, const Tensor& x2, double p,
      std::optional<int64_t> compute_mode) {
    const auto is_strided = [](const Tensor& t) { return !t.is_nested() && is_elementwise_match(t, t); };
    const Points of{"cdist", x1, x2, p};
    if (!is_strided(x1) || !is_strided(x2) || x1.scalar_type() != x2.scalar_type() ||
        x1.device() != x2.device() || !of.is_covered()) {
      return stock(keys, x1, x2, p, compute_mode);
    }
    const Forward op{x1, x2, p, compute_mode};
    if (is_differentiated_by_transform({x1, x2})) {
      return op.composite();
    }
    return needs_composite(x1, x2) || !torch::autograd::compute_requires_grad(x1, x2) ||
                   x1.sym_numel() == 0 || x2.sym_numel() == 0
               ? stock(keys, x1, x2, p, compute_mode)
               : op.autograd();
  }
};

const StockOverride override_aten([](AtenAutograd& aten) { AtenCdist::install_whole(aten, "cdist"); });

}  // namespace
}  // namespace gradnorm_kernels::cdist
