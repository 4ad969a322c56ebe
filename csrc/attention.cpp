// Scaled dot-product attention: schemas, autograd Functions, and the CPU, meta and composite implementations
// of its ops. With S = scale Q K^T + M and P = softmax(S), O = P V.
//
//   backward:  dP = dO V^T, dS = P (dP - delta), delta = rowsum(P dP),
//              dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, dM = dS.
//   double backward, of incoming ddQ, ddK, ddV and ddM:
//              A = scale (ddQ K^T + Q ddK^T) + ddM, alpha = rowsum(P A), B = P (A - alpha),
//              C = A (dP - delta) - alpha dP + dO ddV^T, E = P (C - rowsum(P C)),
//              dO: P ddV + B V, V: B^T dO, Q: scale (E K + dS ddK), K: scale (E^T Q + dS^T ddQ), M: E.
//
// Every op comes in two forms: of query, key and value, and of all three in one tensor, whose gradient is
// then one tensor, too.
#include "cpu/attention.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <array>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::attention {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorQuad = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor value_or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}
OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
template <size_t N>
std::vector<bool> to_vector(const std::array<bool, N>& flags) {
  return std::vector<bool>(flags.begin(), flags.end());
}

// query (..., L, E), key (..., S, E), value (..., S, Ev); attn_mask undefined or broadcast to (..., L, S).
struct Inputs {
  Tensor query, key, value, attn_mask;
  double scale;
};
// Of the first backward, and what comes into the second. Undefined where not wanted, or zero.
struct Gradients {
  Tensor query, key, value, attn_mask;
};
struct Wanted {
  bool query, key, value, attn_mask;
};
struct SecondGradients {
  Tensor grad_output;
  Gradients inputs;
};
struct WantedTwice {
  bool grad_output;
  Wanted inputs;
};

double scale_or_default(const std::optional<double>& scale, const Tensor& query) {
  // The size of a head is a constant of a traced graph, too.
  return scale ? *scale
               : 1 / std::sqrt(static_cast<double>(query.sym_size(-1).guard_int(__FILE__, __LINE__)));
}

std::vector<c10::SymInt> with_last_sizes(
    const Tensor& like, const c10::SymInt& rows, const c10::SymInt& columns) {
  auto sizes = like.sym_sizes().vec();
  sizes[sizes.size() - 2] = rows;
  sizes[sizes.size() - 1] = columns;
  return sizes;
}
std::vector<c10::SymInt> score_sizes(const Tensor& query, const Tensor& key) {
  return with_last_sizes(query, query.sym_size(-2), key.sym_size(-2));
}

// (..., heads, rows, columns) in the memory layout (..., rows, heads, columns), so that the usual
// transpose(1, 2).reshape(batch, rows, heads * columns) is a view.
Tensor empty_with_heads_inside(const Tensor& like, const c10::SymInt& columns) {
  auto sizes = with_last_sizes(like, like.sym_size(-2), columns);
  if (like.dim() < 4) {
    return at::empty_symint(sizes, like.options());
  }
  std::swap(sizes[sizes.size() - 3], sizes[sizes.size() - 2]);
  return at::empty_symint(sizes, like.options()).transpose(-3, -2);
}

void check_shape(
    const char* op, const char* suffix, const char* name, const Tensor& tensor,
    c10::SymIntArrayRef expected) {
  TORCH_CHECK_VALUE(
      tensor.sym_sizes() == expected, op, suffix, ": expected ", name, " to have the shape ", expected,
      ", got ", tensor.sym_sizes());
}

void check_mask(
    const char* op, const char* suffix, const Tensor& attn_mask, const Tensor& query, const Tensor& key) {
  if (!attn_mask.defined()) {
    return;
  }
  check_floating(op, suffix, {{"query", query}, {"attn_mask", attn_mask}}, false);
  const auto scores = score_sizes(query, key);
  const auto sizes = attn_mask.sym_sizes();
  bool broadcasts = sizes.size() <= scores.size();
  for (size_t d = 1; broadcasts && d <= sizes.size(); ++d) {
    const auto& size = sizes[sizes.size() - d];
    broadcasts = size == 1 || size == scores[scores.size() - d];
  }
  TORCH_CHECK_VALUE(
      broadcasts, op, suffix, ": expected attn_mask to broadcast to the shape of the scores (",
      c10::SymIntArrayRef(scores), "), got ", sizes);
}

void check_inputs(const char* op, const char* suffix, const Inputs& in) {
  check_floating(op, suffix, {{"query", in.query}, {"key", in.key}, {"value", in.value}});
  TORCH_CHECK_VALUE(
      in.query.dim() >= 2, op, suffix, ": expected query to have at least 2 dimensions, got ",
      in.query.dim());
  const auto dims = in.query.dim();
  TORCH_CHECK_VALUE(
      in.key.dim() == dims && in.value.dim() == dims, op, suffix,
      ": expected key and value to have as many dimensions as query (", dims, "), got ", in.key.dim(),
      " and ", in.value.dim());
  check_shape(
      op, suffix, "key", in.key, with_last_sizes(in.query, in.key.sym_size(-2), in.query.sym_size(-1)));
  check_shape(
      op, suffix, "value", in.value, with_last_sizes(in.query, in.key.sym_size(-2), in.value.sym_size(-1)));
  check_mask(op, suffix, in.attn_mask, in.query, in.key);
}

void check_like(
    const char* op, const char* suffix, const char* name, const Tensor& tensor, const Tensor& like) {
  if (tensor.defined()) {
    check_floating(op, suffix, {{"query", like}, {name, tensor}});
    check_shape(op, suffix, name, tensor, like.sym_sizes());
  }
}
void check_grad_output(const char* op, const char* suffix, const Tensor& grad_output, const Inputs& in) {
  check_floating(op, suffix, {{"query", in.query}, {"grad_output", grad_output}});
  check_shape(
      op, suffix, "grad_output", grad_output,
      with_last_sizes(in.query, in.query.sym_size(-2), in.value.sym_size(-1)));
}

// The ops of the rows of scores: one kernel each on CUDA.
//   softmax(scale scores + attn_mask), and 0 where nothing is attended to
constexpr auto kSoftmax = "_attention_softmax";
//   P and dS of grad_probabilities dP
constexpr auto kSoftmaxBackward = "_attention_softmax_backward";
//   P, dS, B and E, with A = scale grad_grad_scores + grad_grad_attn_mask; grad_probabilities_sum is dO ddV^T
constexpr auto kSoftmaxDoubleBackward = "_attention_softmax_double_backward";

struct Rows {
  Tensor attn_mask;
  double scale;

  Tensor softmax(const Tensor& scores) const {
    if (!attn_mask.defined()) {
      return softmax_by_parts(scores * scale, -1);
    }
    const Tensor masked = scores * scale + attn_mask;
    const Tensor nothing = at::eq(masked, -std::numeric_limits<double>::infinity()).all(-1, true);
    return softmax_by_parts(masked.masked_fill(nothing, 0), -1).masked_fill(nothing, 0);
  }
  TensorPair backward(const Tensor& d_probabilities, const Tensor& scores) const {
    const Tensor probabilities = softmax(scores);
    return {probabilities, centred(probabilities, d_probabilities)};
  }
  TensorQuad double_backward(
      const Tensor& dd_scores, const Tensor& grad_grad_attn_mask, const Tensor& d_probabilities_sum,
      const Tensor& d_probabilities, const Tensor& scores) const {
    const auto [probabilities, d_scores] = backward(d_probabilities, scores);
    Tensor a = dd_scores.defined() ? dd_scores * scale : dd_scores;
    if (grad_grad_attn_mask.defined()) {
      a = a.defined() ? a + grad_grad_attn_mask : grad_grad_attn_mask.expand_symint(scores.sym_sizes());
    }
    if (!a.defined()) {
      return {
          probabilities, d_scores, at::zeros_like(probabilities),
          centred(probabilities, d_probabilities_sum)};
    }
    const Tensor alpha = (probabilities * a).sum(-1, true);
    const Tensor delta = (probabilities * d_probabilities).sum(-1, true);
    Tensor slope = a * (d_probabilities - delta) - alpha * d_probabilities;
    if (d_probabilities_sum.defined()) {
      slope = slope + d_probabilities_sum;
    }
    return {probabilities, d_scores, probabilities * (a - alpha), centred(probabilities, slope)};
  }

 private:
  static Tensor centred(const Tensor& probabilities, const Tensor& x) {
    return probabilities * (x - (probabilities * x).sum(-1, true));
  }
};

Tensor widened(const OptionalTensor& tensor) {
  return tensor ? to_opmath(*tensor) : Tensor();
}
Tensor softmax_by_aten(const Tensor& scores, const OptionalTensor& attn_mask, double scale) {
  return Rows{value_or_undefined(attn_mask), scale}.softmax(to_opmath(scores)).to(scores.scalar_type());
}
TensorPair softmax_backward_by_aten(
    const Tensor& grad_probabilities, const Tensor& scores, const OptionalTensor& attn_mask, double scale) {
  const auto [p, ds] =
      Rows{value_or_undefined(attn_mask), scale}.backward(to_opmath(grad_probabilities), to_opmath(scores));
  const auto dtype = scores.scalar_type();
  return {p.to(dtype), ds.to(dtype)};
}
TensorQuad softmax_double_backward_by_aten(
    const OptionalTensor& grad_grad_scores, const OptionalTensor& grad_grad_attn_mask,
    const OptionalTensor& grad_probabilities_sum, const Tensor& grad_probabilities, const Tensor& scores,
    const OptionalTensor& attn_mask, double scale) {
  const auto [p, ds, b, e] = Rows{value_or_undefined(attn_mask), scale}.double_backward(
      widened(grad_grad_scores), value_or_undefined(grad_grad_attn_mask), widened(grad_probabilities_sum),
      to_opmath(grad_probabilities), to_opmath(scores));
  const auto dtype = scores.scalar_type();
  return {p.to(dtype), ds.to(dtype), b.to(dtype), e.to(dtype)};
}

// Matrix products and row operations, by plain ATen ops that are differentiable to any order.
class PlainParts {
 public:
  explicit PlainParts(const Inputs& in) : rows_{in.attn_mask, in.scale}, dtype_(in.query.scalar_type()) {}

  Tensor operand(const Tensor& tensor) const {
    return tensor.defined() ? to_opmath(tensor) : tensor;
  }
  Tensor result(const Tensor& tensor) const {
    return tensor.to(dtype_);
  }
  Tensor scores_of(const Tensor& tensor) const {
    return tensor;
  }
  static Tensor multiply(const Tensor& a, const Tensor& b, double factor) {
    const Tensor product = at::matmul(a, b);
    return factor == 1 ? product : product * factor;
  }
  Tensor softmax(const Tensor& scores) const {
    return rows_.softmax(scores);
  }
  TensorPair backward(const Tensor& d_probabilities, const Tensor& scores) const {
    return rows_.backward(d_probabilities, scores);
  }
  TensorQuad double_backward(
      const Tensor& dd_scores, const Tensor& grad_grad_attn_mask, const Tensor& d_probabilities_sum,
      const Tensor& d_probabilities, const Tensor& scores) const {
    return rows_.double_backward(
        dd_scores, grad_grad_attn_mask, d_probabilities_sum, d_probabilities, scores);
  }

 private:
  Rows rows_;
  at::ScalarType dtype_;
};

template <auto& by_aten>
auto find_row_op(const char* name) {
  return find_op<std::remove_reference_t<decltype(by_aten)>>(std::string("gradnorm_kernels::") + name);
}

// ... by one op each. Those that PyTorch would decompose are called as their parts, which alone are what
// moves memory.
class OpParts {
 public:
  explicit OpParts(const Inputs& in)
      : attn_mask_(if_defined(in.attn_mask)),
        scale_(in.scale),
        batch_(in.query.sizes().slice(0, in.query.dim() - 2).vec()) {}

  // (batch, rows, columns), copied if its strides leave no other way.
  Tensor operand(const Tensor& tensor) const {
    if (!tensor.defined()) {
      return tensor;
    }
    const std::vector<int64_t> sizes{c10::multiply_integers(batch_), tensor.size(-2), tensor.size(-1)};
    const bool is_view = at::detail::computeStride(tensor.sizes(), tensor.strides(), sizes).has_value();
    return (is_view ? tensor : at::clone(tensor, at::MemoryFormat::Contiguous)).view(sizes);
  }
  Tensor result(const Tensor& tensor) const {
    auto sizes = batch_;
    sizes.insert(sizes.end(), {tensor.size(-2), tensor.size(-1)});
    return tensor.view(sizes);
  }
  Tensor scores_of(const Tensor& tensor) const {
    return result(tensor);
  }
  static Tensor multiply(const Tensor& a, const Tensor& b, double factor) {
    return factor == 1 ? at::bmm(a, b) : at::baddbmm(at::empty({1, 1, 1}, a.options()), a, b, 0, factor);
  }
  Tensor softmax(const Tensor& scores) const {
    static const auto op = find_row_op<softmax_by_aten>(kSoftmax);
    return flat(op.call(result(scores), attn_mask_, scale_));
  }
  TensorPair backward(const Tensor& d_probabilities, const Tensor& scores) const {
    static const auto op = find_row_op<softmax_backward_by_aten>(kSoftmaxBackward);
    const auto [p, ds] = op.call(result(d_probabilities), result(scores), attn_mask_, scale_);
    return {flat(p), flat(ds)};
  }
  TensorQuad double_backward(
      const Tensor& dd_scores, const Tensor& grad_grad_attn_mask, const Tensor& d_probabilities_sum,
      const Tensor& d_probabilities, const Tensor& scores) const {
    static const auto op = find_row_op<softmax_double_backward_by_aten>(kSoftmaxDoubleBackward);
    const auto optional = [&](const Tensor& t) {
      return t.defined() ? OptionalTensor(result(t)) : std::nullopt;
    };
    const auto [p, ds, b, e] = op.call(
        optional(dd_scores), if_defined(grad_grad_attn_mask), optional(d_probabilities_sum),
        result(d_probabilities), result(scores), attn_mask_, scale_);
    return {flat(p), flat(ds), flat(b), flat(e)};
  }

 private:
  Tensor flat(const Tensor& scores) const {
    return scores.view({c10::multiply_integers(batch_), scores.size(-2), scores.size(-1)});
  }

  OptionalTensor attn_mask_;
  double scale_;
  std::vector<int64_t> batch_;
};

// The mathematics in these parts.
template <class Parts>
struct Decomposed {
  static Tensor forward(const Inputs& in) {
    const Parts parts(in);
    const Tensor probabilities =
        parts.softmax(times(parts, parts.operand(in.query), transposed(parts.operand(in.key))));
    return parts.result(times(parts, probabilities, parts.operand(in.value)));
  }

  static Gradients backward(const Tensor& grad_output, const Inputs& in, const Wanted& wanted) {
    const Parts parts(in);
    const Tensor query = parts.operand(in.query), key = parts.operand(in.key);
    const Tensor d_output = parts.operand(grad_output);
    const auto [probabilities, d_scores] = parts.backward(
        times(parts, d_output, transposed(parts.operand(in.value))), times(parts, query, transposed(key)));
    Gradients grads;
    if (wanted.query) {
      grads.query = parts.result(times(parts, d_scores, key, in.scale));
    }
    if (wanted.key) {
      grads.key = parts.result(times(parts, transposed(d_scores), query, in.scale));
    }
    if (wanted.value) {
      grads.value = parts.result(times(parts, transposed(probabilities), d_output));
    }
    if (wanted.attn_mask) {
      grads.attn_mask = to_mask(parts, d_scores, in.attn_mask);
    }
    return grads;
  }

  static SecondGradients double_backward(
      const Gradients& grad_grads, const Tensor& grad_output, const Inputs& in, const WantedTwice& wanted) {
    const Parts parts(in);
    const Tensor query = parts.operand(in.query), key = parts.operand(in.key),
                 value = parts.operand(in.value);
    const Tensor d_output = parts.operand(grad_output);
    const Tensor dd_query = parts.operand(grad_grads.query), dd_key = parts.operand(grad_grads.key);
    const Tensor dd_value = parts.operand(grad_grads.value);
    const auto [probabilities, d_scores, dd_probabilities, second] = parts.double_backward(
        plus(times(parts, dd_query, transposed(key)), times(parts, query, transposed(dd_key))),
        grad_grads.attn_mask, times(parts, d_output, transposed(dd_value)),
        times(parts, d_output, transposed(value)), times(parts, query, transposed(key)));
    SecondGradients grads;
    if (wanted.grad_output) {
      grads.grad_output =
          parts.result(plus(times(parts, probabilities, dd_value), times(parts, dd_probabilities, value)));
    }
    if (wanted.inputs.query) {
      grads.inputs.query =
          parts.result(plus(times(parts, second, key, in.scale), times(parts, d_scores, dd_key, in.scale)));
    }
    if (wanted.inputs.key) {
      grads.inputs.key = parts.result(plus(
          times(parts, transposed(second), query, in.scale),
          times(parts, transposed(d_scores), dd_query, in.scale)));
    }
    if (wanted.inputs.value) {
      grads.inputs.value = parts.result(times(parts, transposed(dd_probabilities), d_output));
    }
    if (wanted.inputs.attn_mask) {
      grads.inputs.attn_mask = to_mask(parts, second, in.attn_mask);
    }
    return grads;
  }

 private:
  // Undefined is zero.
  static Tensor transposed(const Tensor& matrix) {
    return matrix.defined() ? matrix.transpose(-2, -1) : matrix;
  }
  static Tensor times(const Parts& parts, const Tensor& a, const Tensor& b, double factor = 1) {
    return a.defined() && b.defined() ? parts.multiply(a, b, factor) : Tensor();
  }
  static Tensor plus(const Tensor& a, const Tensor& b) {
    return !a.defined() ? b : !b.defined() ? a : a + b;
  }
  static Tensor to_mask(const Parts& parts, const Tensor& scores, const Tensor& attn_mask) {
    return at::sum_to(parts.scores_of(scores), attn_mask.sym_sizes()).to(attn_mask.scalar_type());
  }
};

using Composite = Decomposed<PlainParts>;
using Unfused = Decomposed<OpParts>;

// Where an op is several on this device. Decomposed where autograd calls it, they are seen by whoever counts
// or records ops.
bool is_unfused(const Inputs& in, bool mask_has_gradient) {
  if (in.query.is_cpu()) {
    return false;
  }
  // Kernels hold this many columns of a head. Where the mask has a gradient, they hold a whole window.
  constexpr int64_t columns = 64, window_tokens = 64;
  const auto is_long = [&] {
    return in.query.sym_size(-2) > window_tokens || in.key.sym_size(-2) > window_tokens;
  };
  return !(in.query.is_cuda() || in.query.is_meta()) || in.query.scalar_type() == at::kDouble ||
         in.query.sym_size(-1) > columns || in.value.sym_size(-1) > columns ||
         (mask_has_gradient && is_long());
}

// On the CPU.

// As AttentionProblem wants it.
Tensor to_problem(const Tensor& tensor) {
  if (!tensor.defined()) {
    return tensor;
  }
  constexpr int64_t dims = 5;
  Tensor batch = tensor.dim() > dims ? tensor.flatten(0, tensor.dim() - dims) : tensor;
  while (batch.dim() < dims) {
    batch = batch.unsqueeze(0);
  }
  return batch.stride(-1) == 1 ? batch : batch.contiguous();
}
// The mask with the dimensions of a problem, of size 1 where it is broadcast over a batch dimension.
Tensor mask_to_problem(const Tensor& mask, const Inputs& in) {
  Tensor own = mask.to(at::toOpMathType(in.query.scalar_type()));
  while (own.dim() < in.query.dim()) {
    own = own.unsqueeze(0);
  }
  auto sizes = own.sizes().vec();
  sizes[sizes.size() - 2] = in.query.size(-2);
  sizes[sizes.size() - 1] = in.key.size(-2);
  // Of several leading dimensions all are broadcast, or none.
  const auto leading = sizes.begin() + std::max<int64_t>(0, in.query.dim() - 4);
  if (std::any_of(sizes.begin(), leading, [](int64_t size) { return size != 1; })) {
    std::copy(in.query.sizes().begin(), in.query.sizes().begin() + (leading - sizes.begin()), sizes.begin());
  }
  if (own.size(-1) != sizes.back()) {
    own = own.expand(sizes).contiguous();
  }
  return to_problem(own.expand(sizes));
}
Tensor broadcast_batch(const Tensor& mask, const Tensor& query) {
  auto sizes = mask.sizes().vec();
  std::copy_n(query.sizes().begin(), 3, sizes.begin());
  return mask.expand(sizes);
}

// The gradient of the mask: partial sums, whose order does not depend on the number of threads. There are
// about as many as tasks, where the batch is large enough; columns pads the rows of a sum.
class MaskSums {
 public:
  MaskSums(bool wanted, AttentionProblem& p, const Tensor& mask, int64_t tasks, int64_t columns) {
    if (!wanted) {
      return;
    }
    sizes_ = mask.sizes().vec();
    int64_t tiles = 1, repeats = 1;
    bool leading = true;
    for (int d = 0; d < 3; ++d) {
      leading = leading && mask.size(d) == 1;
      sizes_[d] = leading ? 1 : p.query.size(d);
      (leading ? repeats : tiles) *= p.query.size(d);
    }
    const int64_t parts =
        std::clamp<int64_t>(tasks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(repeats, 1));
    p.grad_attn_mask = at::empty({parts, tiles, mask.size(3), columns}, mask.options());
    sums_ = p.grad_attn_mask.narrow(-1, 0, mask.size(4));
  }
  Tensor total(const Inputs& in) const {
    if (!sums_.defined()) {
      return sums_;
    }
    const Tensor total = sums_.size(0) == 1 ? sums_.select(0, 0) : sums_.sum(0);
    // The leading dimensions that the problem has as one.
    auto sizes = sizes_;
    const auto extra = in.query.dim() - static_cast<int64_t>(sizes.size());
    if (extra > 0) {
      sizes.insert(sizes.begin(), extra, 1);
      if (sizes_[0] != 1) {
        std::copy_n(in.query.sizes().begin(), extra + 1, sizes.begin());
      }
    } else {
      sizes.erase(sizes.begin(), sizes.begin() - extra);
    }
    return at::sum_to(total.view(sizes), in.attn_mask.sizes()).to(in.attn_mask.scalar_type());
  }

 private:
  Tensor sums_;
  std::vector<int64_t> sizes_;
};

AttentionProblem to_problem(const Inputs& in, Tensor& mask) {
  AttentionProblem p;
  p.query = to_problem(in.query);
  p.key = to_problem(in.key);
  p.value = to_problem(in.value);
  if (in.attn_mask.defined()) {
    mask = mask_to_problem(in.attn_mask, in);
    p.attn_mask = broadcast_batch(mask, p.query);
  }
  p.scale = in.scale;
  return p;
}

// Each pass writes its results into tensors that it is given, but for the mask's gradient, which it returns.
template <class Device>
struct OnProblems {
  static void forward(const Inputs& in, const Tensor& output) {
    Tensor mask;
    auto p = to_problem(in, mask);
    p.output = to_problem(output);
    if (output.numel() > 0) {
      Device::forward(p);
    }
  }

  static Tensor backward(
      const Tensor& grad_output, const Inputs& in, const Gradients& grads, bool mask_wanted) {
    Tensor mask;
    auto p = to_problem(in, mask);
    p.grad_output = to_problem(grad_output);
    set_targets(p, grads);
    const MaskSums sums(mask_wanted, p, mask, Device::kTasks, Device::sum_columns(p));
    Device::backward(p);
    return sums.total(in);
  }

  static Tensor double_backward(
      const Gradients& grad_grads, const Tensor& grad_output, const Inputs& in, const SecondGradients& grads,
      bool mask_wanted) {
    Tensor mask;
    auto p = to_problem(in, mask);
    p.grad_output = to_problem(grad_output);
    p.grad_grad_query = to_problem(grad_grads.query);
    p.grad_grad_key = to_problem(grad_grads.key);
    p.grad_grad_value = to_problem(grad_grads.value);
    if (grad_grads.attn_mask.defined()) {
      p.grad_grad_attn_mask = broadcast_batch(mask_to_problem(grad_grads.attn_mask, in), p.query);
    }
    p.grad_grad_output = to_problem(grads.grad_output);
    set_targets(p, grads.inputs);
    const MaskSums sums(mask_wanted, p, mask, Device::kTasks, Device::sum_columns(p));
    Device::double_backward(p);
    return sums.total(in);
  }

 private:
  static void set_targets(AttentionProblem& p, const Gradients& grads) {
    p.grad_query = to_problem(grads.query);
    p.grad_key = to_problem(grads.key);
    p.grad_value = to_problem(grads.value);
  }
};

struct Cpu {
  // Enough for many threads.
  static constexpr int64_t kTasks = 64;

  static int64_t sum_columns(const AttentionProblem& p) {
    return p.key.size(3);
  }
  static void forward(const AttentionProblem& p) {
    GRADNORM_KERNELS(attention_kernels).forward(p);
  }
  static void backward(const AttentionProblem& p) {
    GRADNORM_KERNELS(attention_kernels).backward(p);
  }
  static void double_backward(const AttentionProblem& p) {
    GRADNORM_KERNELS(attention_kernels).double_backward(p);
  }
};

// Ops of which gradnorm_kernels/kernels/attention.py has the only implementation.
constexpr auto kKernelForward = "_attention_fwd";
constexpr auto kKernelBackward = "_attention_bwd";
constexpr auto kKernelDoubleBackward = "_attention_bwd_bwd";

template <class Signature>
auto find_kernel_op(const char* name) {
  return find_op<Signature>(std::string("gradnorm_kernels::") + name);
}

struct Cuda {
  // Enough for many multiprocessors.
  static constexpr int64_t kTasks = 2048;

  static int64_t sum_columns(const AttentionProblem& p) {
    int64_t columns = 16;
    while (columns < p.key.size(3)) {
      columns *= 2;
    }
    return columns;
  }
  static void forward(const AttentionProblem& p) {
    static const auto op = find_kernel_op<void(
        const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, const Tensor&)>(
        kKernelForward);
    op.call(p.query, p.key, p.value, if_defined(p.attn_mask), p.scale, p.output);
  }
  static void backward(const AttentionProblem& p) {
    static const auto op = find_kernel_op<void(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&)>(
        kKernelBackward);
    op.call(
        p.grad_output, p.query, p.key, p.value, if_defined(p.attn_mask), p.scale, if_defined(p.grad_query),
        if_defined(p.grad_key), if_defined(p.grad_value), if_defined(p.grad_attn_mask));
  }
  static void double_backward(const AttentionProblem& p) {
    static const auto op = find_kernel_op<void(
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&)>(kKernelDoubleBackward);
    op.call(
        if_defined(p.grad_grad_query), if_defined(p.grad_grad_key), if_defined(p.grad_grad_value),
        if_defined(p.grad_grad_attn_mask), p.grad_output, p.query, p.key, p.value, if_defined(p.attn_mask),
        p.scale, if_defined(p.grad_grad_output), if_defined(p.grad_query), if_defined(p.grad_key),
        if_defined(p.grad_value), if_defined(p.grad_attn_mask));
  }
};

// On meta tensors the results are all there is.
struct NoKernels {
  static void forward(const Inputs&, const Tensor&) {}
  static Tensor backward(const Tensor&, const Inputs& in, const Gradients&, bool mask_wanted) {
    return mask_wanted ? at::empty_symint(in.attn_mask.sym_sizes(), in.attn_mask.options()) : Tensor();
  }
  static Tensor double_backward(
      const Gradients&, const Tensor&, const Inputs& in, const SecondGradients&, bool mask_wanted) {
    return mask_wanted ? at::empty_symint(in.attn_mask.sym_sizes(), in.attn_mask.options()) : Tensor();
  }
};

// An op of query, key and value.
struct Separate {
  static constexpr auto name = "scaled_dot_product_attention";
  static constexpr size_t operands = 3;

  static Inputs inputs(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    return {tensors[0], tensors[1], tensors[2], attn_mask, scale_or_default(scale, tensors[0])};
  }
  static Gradients gradients(at::TensorList tensors, const Tensor& attn_mask) {
    return {tensors[0], tensors[1], tensors[2], attn_mask};
  }
  static const Tensor& to_heads(const Tensor& output) {
    return output;
  }
  static const Tensor& from_heads(const Tensor& output) {
    return output;
  }
  static variable_list from_gradients(const Gradients& grads) {
    return {grads.query, grads.key, grads.value};
  }
  static Wanted wanted(const std::vector<bool>& mask) {
    return {mask[0], mask[1], mask[2], mask[3]};
  }
  static variable_list empty_gradients(at::TensorList tensors, const Wanted& wanted) {
    const auto empty = [](bool is_wanted, const Tensor& like) {
      return is_wanted ? empty_with_heads_inside(like, like.sym_size(-1)) : Tensor();
    };
    return {empty(wanted.query, tensors[0]), empty(wanted.key, tensors[1]), empty(wanted.value, tensors[2])};
  }
  static Tensor empty_output(const Inputs& in) {
    return empty_with_heads_inside(in.query, in.value.sym_size(-1));
  }
  static void check(const char* suffix, at::TensorList tensors, const Tensor& attn_mask) {
    check_inputs(name, suffix, {tensors[0], tensors[1], tensors[2], attn_mask, 0});
  }
};

// An op of one tensor (..., tokens, 3, heads, columns), as a linear layer makes it. Its output is
// (..., tokens, heads, columns).
struct Packed {
  static constexpr auto name = "qkv_attention";
  static constexpr size_t operands = 1;

  static Tensor part(const Tensor& qkv, int64_t index) {
    return to_heads(qkv.select(-3, index));
  }
  static Inputs inputs(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    const auto& qkv = tensors[0];
    return {part(qkv, 0), part(qkv, 1), part(qkv, 2), attn_mask, scale_or_default(scale, qkv)};
  }
  static Gradients gradients(at::TensorList tensors, const Tensor& attn_mask) {
    const auto& qkv = tensors[0];
    if (!qkv.defined()) {
      return {Tensor(), Tensor(), Tensor(), attn_mask};
    }
    return {part(qkv, 0), part(qkv, 1), part(qkv, 2), attn_mask};
  }
  static Tensor to_heads(const Tensor& output) {
    return output.defined() ? output.transpose(-3, -2) : output;
  }
  static Tensor from_heads(const Tensor& output) {
    return to_heads(output);
  }
  static variable_list from_gradients(const Gradients& grads) {
    if (!grads.query.defined()) {
      return {Tensor()};
    }
    return {at::stack({from_heads(grads.query), from_heads(grads.key), from_heads(grads.value)}, -3)};
  }
  static Wanted wanted(const std::vector<bool>& mask) {
    return {mask[0], mask[0], mask[0], mask[1]};
  }
  static variable_list empty_gradients(at::TensorList tensors, const Wanted& wanted) {
    return {wanted.query ? at::empty_symint(tensors[0].sym_sizes(), tensors[0].options()) : Tensor()};
  }
  static Tensor empty_output(const Inputs& in) {
    return at::empty_symint(from_heads(in.query).sym_sizes(), in.query.options());
  }
  static void check(const char* suffix, at::TensorList tensors, const Tensor& attn_mask) {
    const auto& qkv = tensors[0];
    check_floating(name, suffix, {{"qkv", qkv}});
    TORCH_CHECK_VALUE(
        qkv.dim() >= 4 && qkv.sym_size(-3) == 3, name, suffix,
        ": expected qkv to be (..., tokens, 3, heads, columns), got ", qkv.sym_sizes());
    check_mask(name, suffix, attn_mask, part(qkv, 0), part(qkv, 1));
  }
};

// The three ops of a form. Lists hold the tensors of the form, and the mask or its gradient behind them.

template <class Form>
void check_backward(
    const char* suffix, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask) {
  Form::check(suffix, tensors, attn_mask);
  check_grad_output(Form::name, suffix, Form::to_heads(grad_output), Form::inputs(tensors, attn_mask, 1.0));
}
template <class Form>
void check_double_backward(
    at::TensorList grad_grads, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask) {
  constexpr auto suffix = "_double_backward";
  check_backward<Form>(suffix, grad_output, tensors, attn_mask);
  static constexpr std::array names{"grad_grad_query", "grad_grad_key", "grad_grad_value"};
  for (size_t i = 0; i < Form::operands; ++i) {
    check_like(
        Form::name, suffix, Form::operands == 1 ? "grad_grad_qkv" : names[i], grad_grads[i], tensors[i]);
  }
  const Tensor& grad_grad_mask = grad_grads[Form::operands];
  if (grad_grad_mask.defined()) {
    TORCH_CHECK_VALUE(
        attn_mask.defined(), Form::name, suffix, ": expected no grad_grad_attn_mask without attn_mask");
    check_shape(Form::name, suffix, "grad_grad_attn_mask", grad_grad_mask, attn_mask.sym_sizes());
  }
}

template <class Form>
variable_list to_list(const Gradients& grads) {
  auto list = Form::from_gradients(grads);
  list.push_back(grads.attn_mask);
  return list;
}
template <class Form>
WantedTwice wanted_twice(const std::vector<bool>& mask) {
  return {mask[0], Form::wanted(std::vector<bool>(mask.begin() + 1, mask.end()))};
}

// By kernels that write into the tensors they are given.
template <class Form, class Kernels>
struct Direct {
  static Tensor forward(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    Form::check("", tensors, attn_mask);
    const auto in = Form::inputs(tensors, attn_mask, scale);
    const Tensor output = Form::empty_output(in);
    Kernels::forward(in, Form::to_heads(output));
    return output;
  }

  static variable_list backward(
      const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    check_backward<Form>("_backward", grad_output, tensors, attn_mask);
    const auto in = Form::inputs(tensors, attn_mask, scale);
    const auto wanted = Form::wanted(output_mask);
    auto grads = Form::empty_gradients(tensors, wanted);
    const auto mask_grad = Kernels::backward(
        Form::to_heads(grad_output), in, Form::gradients(grads, Tensor()), wanted.attn_mask);
    grads.push_back(mask_grad);
    return grads;
  }

  static variable_list double_backward(
      at::TensorList grad_grads, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    check_double_backward<Form>(grad_grads, grad_output, tensors, attn_mask);
    const auto in = Form::inputs(tensors, attn_mask, scale);
    const auto wanted = wanted_twice<Form>(output_mask);
    const Tensor grad_grad_output = wanted.grad_output ? Form::empty_output(in) : Tensor();
    const auto grads = Form::empty_gradients(tensors, wanted.inputs);
    const auto mask_grad = Kernels::double_backward(
        Form::gradients(grad_grads, grad_grads[Form::operands]), Form::to_heads(grad_output), in,
        {Form::to_heads(grad_grad_output), Form::gradients(grads, Tensor())}, wanted.inputs.attn_mask);
    variable_list results{grad_grad_output};
    results.insert(results.end(), grads.begin(), grads.end());
    results.push_back(mask_grad);
    return results;
  }
};

// By matrix products and row operations.
template <class Form, class Mathematics>
struct ByParts {
  static Tensor forward(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    Form::check("", tensors, attn_mask);
    return Form::from_heads(Mathematics::forward(Form::inputs(tensors, attn_mask, scale)));
  }

  static variable_list backward(
      const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    check_backward<Form>("_backward", grad_output, tensors, attn_mask);
    return to_list<Form>(Mathematics::backward(
        Form::to_heads(grad_output), Form::inputs(tensors, attn_mask, scale), Form::wanted(output_mask)));
  }

  static variable_list double_backward(
      at::TensorList grad_grads, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    check_double_backward<Form>(grad_grads, grad_output, tensors, attn_mask);
    const auto wanted = wanted_twice<Form>(output_mask);
    const auto grads = Mathematics::double_backward(
        Form::gradients(grad_grads, grad_grads[Form::operands]), Form::to_heads(grad_output),
        Form::inputs(tensors, attn_mask, scale), {wanted.grad_output, wanted.inputs});
    variable_list results{Form::from_heads(grads.grad_output)};
    const auto inputs = to_list<Form>(grads.inputs);
    results.insert(results.end(), inputs.begin(), inputs.end());
    return results;
  }
};

// The ops as the dispatcher knows them, and calls of them.
template <class Form>
struct Ops;

template <>
struct Ops<Separate> {
  template <class Kernels>
  static Tensor forward(
      const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
      std::optional<double> scale) {
    return Kernels::forward({query, key, value}, value_or_undefined(attn_mask), scale);
  }
  template <class Kernels>
  static TensorQuad backward(
      const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
      const OptionalTensor& attn_mask, std::optional<double> scale, std::array<bool, 4> output_mask) {
    auto grads = Kernels::backward(
        grad_output, {query, key, value}, value_or_undefined(attn_mask), scale, to_vector(output_mask));
    return {grads[0], grads[1], grads[2], grads[3]};
  }
  template <class Kernels>
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
      const OptionalTensor& grad_grad_query, const OptionalTensor& grad_grad_key,
      const OptionalTensor& grad_grad_value, const OptionalTensor& grad_grad_attn_mask,
      const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
      const OptionalTensor& attn_mask, std::optional<double> scale, std::array<bool, 5> output_mask) {
    auto grads = Kernels::double_backward(
        {value_or_undefined(grad_grad_query), value_or_undefined(grad_grad_key),
         value_or_undefined(grad_grad_value), value_or_undefined(grad_grad_attn_mask)},
        grad_output, {query, key, value}, value_or_undefined(attn_mask), scale, to_vector(output_mask));
    return {grads[0], grads[1], grads[2], grads[3], grads[4]};
  }

  static void define(torch::Library& m) {
    m.def(
        "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, "
        "float? scale=None) -> Tensor");
    m.def(
        "scaled_dot_product_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
        "Tensor? attn_mask=None, *, float? scale=None, bool[4] output_mask) -> (Tensor grad_query, Tensor "
        "grad_key, "
        "Tensor grad_value, Tensor grad_attn_mask)");
    m.def(
        "scaled_dot_product_attention_double_backward(Tensor? grad_grad_query, Tensor? grad_grad_key, "
        "Tensor? grad_grad_value, Tensor? grad_grad_attn_mask, Tensor grad_output, Tensor query, Tensor key, "
        "Tensor value, Tensor? attn_mask=None, *, float? scale=None, bool[5] output_mask) -> "
        "(Tensor grad_grad_output, Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor "
        "grad_attn_mask)");
  }
};

template <>
struct Ops<Packed> {
  template <class Kernels>
  static Tensor forward(const Tensor& qkv, const OptionalTensor& attn_mask, std::optional<double> scale) {
    return Kernels::forward({qkv}, value_or_undefined(attn_mask), scale);
  }
  template <class Kernels>
  static TensorPair backward(
      const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& attn_mask,
      std::optional<double> scale, std::array<bool, 2> output_mask) {
    auto grads =
        Kernels::backward(grad_output, {qkv}, value_or_undefined(attn_mask), scale, to_vector(output_mask));
    return {grads[0], grads[1]};
  }
  template <class Kernels>
  static std::tuple<Tensor, Tensor, Tensor> double_backward(
      const OptionalTensor& grad_grad_qkv, const OptionalTensor& grad_grad_attn_mask,
      const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& attn_mask,
      std::optional<double> scale, std::array<bool, 3> output_mask) {
    auto grads = Kernels::double_backward(
        {value_or_undefined(grad_grad_qkv), value_or_undefined(grad_grad_attn_mask)}, grad_output, {qkv},
        value_or_undefined(attn_mask), scale, to_vector(output_mask));
    return {grads[0], grads[1], grads[2]};
  }

  static void define(torch::Library& m) {
    m.def("qkv_attention(Tensor qkv, Tensor? attn_mask=None, *, float? scale=None) -> Tensor");
    m.def(
        "qkv_attention_backward(Tensor grad_output, Tensor qkv, Tensor? attn_mask=None, *, float? "
        "scale=None, "
        "bool[2] output_mask) -> (Tensor grad_qkv, Tensor grad_attn_mask)");
    m.def(
        "qkv_attention_double_backward(Tensor? grad_grad_qkv, Tensor? grad_grad_attn_mask, Tensor "
        "grad_output, "
        "Tensor qkv, Tensor? attn_mask=None, *, float? scale=None, bool[3] output_mask) -> "
        "(Tensor grad_grad_output, Tensor grad_qkv, Tensor grad_attn_mask)");
  }
};

template <class Form>
struct Calls;
template <>
struct Calls<Separate> {
  static Tensor forward(at::TensorList t, const Tensor& attn_mask, const std::optional<double>& scale) {
    static const auto op =
        find_op<decltype(Ops<Separate>::forward<void>)>("gradnorm_kernels::scaled_dot_product_attention");
    return op.call(t[0], t[1], t[2], if_defined(attn_mask), scale);
  }
  static variable_list backward(
      const Tensor& grad_output, at::TensorList t, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& mask) {
    static const auto op = find_op<decltype(Ops<Separate>::backward<void>)>(
        "gradnorm_kernels::scaled_dot_product_attention_backward");
    auto [query, key, value, grad_mask] = op.call(
        grad_output, t[0], t[1], t[2], if_defined(attn_mask), scale, {mask[0], mask[1], mask[2], mask[3]});
    return {query, key, value, grad_mask};
  }
  static variable_list double_backward(
      at::TensorList g, const Tensor& grad_output, at::TensorList t, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& mask) {
    static const auto op = find_op<decltype(Ops<Separate>::double_backward<void>)>(
        "gradnorm_kernels::scaled_dot_product_attention_double_backward");
    auto [grad_grad_output, query, key, value, grad_mask] = op.call(
        if_defined(g[0]), if_defined(g[1]), if_defined(g[2]), if_defined(g[3]), grad_output, t[0], t[1], t[2],
        if_defined(attn_mask), scale, {mask[0], mask[1], mask[2], mask[3], mask[4]});
    return {grad_grad_output, query, key, value, grad_mask};
  }
};
template <>
struct Calls<Packed> {
  static Tensor forward(at::TensorList t, const Tensor& attn_mask, const std::optional<double>& scale) {
    static const auto op = find_op<decltype(Ops<Packed>::forward<void>)>("gradnorm_kernels::qkv_attention");
    return op.call(t[0], if_defined(attn_mask), scale);
  }
  static variable_list backward(
      const Tensor& grad_output, at::TensorList t, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& mask) {
    static const auto op =
        find_op<decltype(Ops<Packed>::backward<void>)>("gradnorm_kernels::qkv_attention_backward");
    auto [grad, grad_mask] = op.call(grad_output, t[0], if_defined(attn_mask), scale, {mask[0], mask[1]});
    return {grad, grad_mask};
  }
  static variable_list double_backward(
      at::TensorList g, const Tensor& grad_output, at::TensorList t, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& mask) {
    static const auto op = find_op<decltype(Ops<Packed>::double_backward<void>)>(
        "gradnorm_kernels::qkv_attention_double_backward");
    auto [grad_grad_output, grad, grad_mask] = op.call(
        if_defined(g[0]), if_defined(g[1]), grad_output, t[0], if_defined(attn_mask), scale,
        {mask[0], mask[1], mask[2]});
    return {grad_grad_output, grad, grad_mask};
  }
};

// Whole, where kernels cover it, or in parts.
template <class Form, class Whole>
struct WholeOrParts {
  using Parts = ByParts<Form, Unfused>;

  static Tensor forward(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Form::check("", tensors, attn_mask);
    return unfused(tensors, false) ? Parts::forward(tensors, attn_mask, scale)
                                   : Whole::forward(tensors, attn_mask, scale);
  }
  static variable_list backward(
      const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    check_backward<Form>("_backward", grad_output, tensors, attn_mask);
    return unfused(tensors, wanted.back()) ? Parts::backward(grad_output, tensors, attn_mask, scale, wanted)
                                           : Whole::backward(grad_output, tensors, attn_mask, scale, wanted);
  }
  static variable_list double_backward(
      at::TensorList grad_grads, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    check_double_backward<Form>(grad_grads, grad_output, tensors, attn_mask);
    return unfused(tensors, wanted.back() || grad_grads[Form::operands].defined())
               ? Parts::double_backward(grad_grads, grad_output, tensors, attn_mask, scale, wanted)
               : Whole::double_backward(grad_grads, grad_output, tensors, attn_mask, scale, wanted);
  }

 private:
  static bool unfused(at::TensorList tensors, bool mask_has_gradient) {
    return is_unfused(Form::inputs(tensors, Tensor(), 1.0), mask_has_gradient);
  }
};
template <class Form>
using Fused = WholeOrParts<Form, Calls<Form>>;

variable_list defined(std::initializer_list<at::TensorList> lists) {
  variable_list tensors;
  for (const auto& list : lists) {
    std::copy_if(
        list.begin(), list.end(), std::back_inserter(tensors), [](const Tensor& t) { return t.defined(); });
  }
  return tensors;
}
bool requires_grad(const variable_list& tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

template <class Form>
struct Autograd {
  static constexpr size_t operands = Form::operands;

  static Tensor forward(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    const auto all = defined({tensors, {attn_mask}});
    if (needs_composite(all)) {
      return ByParts<Form, Composite>::forward(tensors, attn_mask, scale);
    }
    if (!requires_grad(all)) {
      return Fused<Form>::forward(tensors, attn_mask, scale);
    }
    return Forward::apply(tensors, if_defined(attn_mask), scale);
  }

  static variable_list backward(
      const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    const auto all = defined({{grad_output, attn_mask}, tensors});
    if (needs_composite(all)) {
      return ByParts<Form, Composite>::backward(grad_output, tensors, attn_mask, scale, output_mask);
    }
    const auto first = [&] {
      return Fused<Form>::backward(grad_output, tensors, attn_mask, scale, output_mask);
    };
    return requires_grad(all) ? differentiable_backward(grad_output, tensors, attn_mask, scale, first)
                              : first();
  }

  static variable_list double_backward(
      at::TensorList grad_grads, const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const std::vector<bool>& output_mask) {
    const auto all = defined({grad_grads, {grad_output, attn_mask}, tensors});
    if (needs_composite(all) || requires_grad(all)) {
      return ByParts<Form, Composite>::double_backward(
          grad_grads, grad_output, tensors, attn_mask, scale, output_mask);
    }
    return Fused<Form>::double_backward(grad_grads, grad_output, tensors, attn_mask, scale, output_mask);
  }

  struct Forward : torch::autograd::Function<Forward> {
    static Tensor forward(
        AutogradContext* ctx, at::TensorList tensors, const OptionalTensor& attn_mask,
        const std::optional<double>& scale) {
      variable_list saved(tensors.begin(), tensors.end());
      saved.push_back(value_or_undefined(attn_mask));
      ctx->save_for_backward(saved);
      ctx->saved_data["scale"] = scale;
      ctx->set_materialize_grads(false);
      return Fused<Form>::forward(tensors, value_or_undefined(attn_mask), scale);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
      variable_list grads(operands + 2);
      if (!grad_outputs[0].defined()) {
        return grads;
      }
      const auto saved = ctx->get_saved_variables();
      std::vector<bool> wanted;
      for (size_t i = 0; i <= operands; ++i) {
        wanted.push_back(saved[i].defined() && ctx->needs_input_grad(i));
      }
      auto results = Calls<Form>::backward(
          grad_outputs[0], at::TensorList(saved).slice(0, operands), saved[operands],
          ctx->saved_data["scale"].toOptional<double>(), wanted);
      std::move(results.begin(), results.end(), grads.begin());
      return grads;
    }
  };

  // first computes the value: our own kernel, or PyTorch's where only its double backward is replaced. What
  // it leaves undefined stays so.
  using First = std::function<variable_list()>;
  static variable_list differentiable_backward(
      const Tensor& grad_output, at::TensorList tensors, const Tensor& attn_mask,
      const std::optional<double>& scale, const First& first) {
    Positions positions;
    auto found = Backward::apply(grad_output, tensors, if_defined(attn_mask), scale, first, &positions);
    return spread(found, positions);
  }

  // An autograd Function returns no undefined tensors: where those that it returns belong.
  struct Positions {
    std::vector<int64_t> of_defined;
    int64_t count;
  };
  static variable_list spread(const variable_list& found, const Positions& positions) {
    variable_list all(positions.count);
    for (size_t i = 0; i < found.size(); ++i) {
      all[positions.of_defined[i]] = found[i];
    }
    return all;
  }

  struct Backward : torch::autograd::Function<Backward> {
    static variable_list forward(
        AutogradContext* ctx, const Tensor& grad_output, at::TensorList tensors,
        const OptionalTensor& attn_mask, const std::optional<double>& scale, const First& first,
        Positions* positions) {
      variable_list saved{grad_output};
      saved.insert(saved.end(), tensors.begin(), tensors.end());
      saved.push_back(value_or_undefined(attn_mask));
      ctx->save_for_backward(saved);
      ctx->saved_data["scale"] = scale;
      ctx->set_materialize_grads(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      const auto grads = first();
      positions->count = grads.size();
      for (size_t i = 0; i < grads.size(); ++i) {
        if (grads[i].defined()) {
          positions->of_defined.push_back(i);
        }
      }
      ctx->saved_data["positions"] = positions->of_defined;
      return defined({grads});
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
      variable_list grads(operands + 5);
      if (defined({incoming}).empty()) {
        return grads;
      }
      const auto grad_grads =
          spread(incoming, {ctx->saved_data["positions"].toIntVector(), static_cast<int64_t>(operands + 1)});
      const auto saved = ctx->get_saved_variables();
      std::vector<bool> wanted;
      for (size_t i = 0; i < saved.size(); ++i) {
        wanted.push_back(saved[i].defined() && ctx->needs_input_grad(i));
      }
      auto results = Calls<Form>::double_backward(
          grad_grads, saved[0], at::TensorList(saved).slice(1, operands), saved[operands + 1],
          ctx->saved_data["scale"].toOptional<double>(), wanted);
      std::move(results.begin(), results.end(), grads.begin());
      return grads;
    }
  };
};

// Autocast makes all operands of one dtype, as it does for PyTorch's own op. The mask may stay as it is.
template <class Form>
struct Autocast {
  static Tensor forward(at::TensorList tensors, const Tensor& attn_mask, const std::optional<double>& scale) {
    const auto device = tensors[0].device().type();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const auto dtype = at::autocast::get_autocast_dtype(device);
    variable_list cast;
    for (const auto& tensor : tensors) {
      cast.push_back(at::autocast::cached_cast(dtype, tensor, device));
    }
    return Calls<Form>::forward(cast, attn_mask, scale);
  }
};

// The backwards of PyTorch's fused attention, which it cannot differentiate. Whatever ours does not cover
// stays PyTorch's.
constexpr std::array kStockBackwards{
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward"};

// Boxed, since their schemas differ from op to op and between releases: arguments are found by name.
struct AtenAttentionBackward {
  static const StockKernel& stock(const c10::OperatorHandle& op) {
    static const auto kernels = [] {
      std::map<std::string, StockKernel> kernels;
      for (const auto* name : kStockBackwards) {
        const auto full = std::string("aten::") + name;
        if (c10::Dispatcher::singleton().findSchema({full, ""})) {
          kernels.emplace(full, full.c_str());
        }
      }
      return kernels;
    }();
    return kernels.at(op.operator_name().name);
  }

  static void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    const auto argument = [&](std::initializer_list<const char*> names) {
      for (const auto* name : names) {
        if (const auto index = schema.argumentIndexWithName(name)) {
          return arguments[*index];
        }
      }
      return c10::IValue();
    };
    const auto tensor = [&](std::initializer_list<const char*> names) {
      const auto found = argument(names);
      return found.isTensor() ? found.toTensor() : Tensor();
    };
    const Tensor grad_output = tensor({"grad_out", "grad_out_"});
    const variable_list tensors{tensor({"query"}), tensor({"key"}), tensor({"value"})};
    Tensor attn_mask = tensor({"attn_mask", "attn_bias"});
    const auto all = defined({{grad_output, attn_mask}, tensors});
    if (!requires_grad(all) || needs_composite(all) || argument({"dropout_p"}).toDouble() > 0 ||
        !covers(grad_output, tensors, attn_mask)) {
      stock(op).call_boxed(keys, *stack);
      return;
    }
    if (argument({"is_causal"}).toBool()) {
      const auto& query = tensors[0];
      const Tensor causal = at::full_symint(
                                {query.sym_size(-2), tensors[1].sym_size(-2)},
                                -std::numeric_limits<double>::infinity(), query.options())
                                .triu(1);
      attn_mask = attn_mask.defined() ? attn_mask + causal : causal;
    }
    const auto results = schema.returns().size();
    const auto first = [&] {
      op.callBoxed(stack);
      variable_list grads;
      for (const auto& result : torch::jit::last(*stack, results)) {
        grads.push_back(result.toTensor());
      }
      torch::jit::drop(*stack, results);
      return grads;
    };
    const auto grads = Autograd<Separate>::differentiable_backward(
        grad_output, tensors, attn_mask, argument({"scale"}).toOptional<double>(), first);
    for (const auto& grad : grads) {
      stack->emplace_back(grad);
    }
  }

  static bool covers(const Tensor& grad_output, const variable_list& tensors, const Tensor& attn_mask) {
    try {
      check_backward<Separate>("", grad_output, tensors, attn_mask);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }

  static void install(torch::Library& aten_autograd) {
    for (const auto* name : kStockBackwards) {
      const auto full = std::string("aten::") + name;
      if (const auto op = c10::Dispatcher::singleton().findSchema({full, ""})) {
        stock(*op);
        aten_autograd.impl(name, torch::CppFunction::makeFromBoxedFunction<&autograd>());
      }
    }
  }
};

const StockOverride attention_override(&AtenAttentionBackward::install);

template <template <class> class Kernels>
void implement(torch::Library& m) {
  const auto form = [&](auto form) {
    using Form = decltype(form);
    const std::string name = Form::name;
    m.impl(name.c_str(), &Ops<Form>::template forward<Kernels<Form>>);
    m.impl((name + "_backward").c_str(), &Ops<Form>::template backward<Kernels<Form>>);
    m.impl((name + "_double_backward").c_str(), &Ops<Form>::template double_backward<Kernels<Form>>);
  };
  form(Separate());
  form(Packed());
}
template <class Form>
using OnCpu = Direct<Form, OnProblems<Cpu>>;
template <class Form>
using OnMeta = Direct<Form, NoKernels>;
template <class Form>
using ByAten = ByParts<Form, Composite>;
template <class Form>
using ByRowOps = ByParts<Form, Unfused>;
template <class Form>
using OnCuda = WholeOrParts<Form, Direct<Form, OnProblems<Cuda>>>;

void implement_autocast(torch::Library& m) {
  m.impl(Separate::name, &Ops<Separate>::forward<Autocast<Separate>>);
  m.impl(Packed::name, &Ops<Packed>::forward<Autocast<Packed>>);
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  Ops<Separate>::define(m);
  Ops<Packed>::define(m);
  m.def(
      "_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float scale, "
      "Tensor(a!) output) -> ()");
  m.def(
      "_attention_bwd(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "float scale, Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
      "Tensor(d!)? grad_attn_mask) -> ()");
  m.def(
      "_attention_bwd_bwd(Tensor? grad_grad_query, Tensor? grad_grad_key, Tensor? grad_grad_value, "
      "Tensor? grad_grad_attn_mask, Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, float scale, Tensor(a!)? grad_grad_output, Tensor(b!)? grad_query, "
      "Tensor(c!)? grad_key, Tensor(d!)? grad_value, Tensor(e!)? grad_attn_mask) -> ()");
  m.def("_attention_softmax(Tensor scores, Tensor? attn_mask, float scale) -> Tensor");
  m.def(
      "_attention_softmax_backward(Tensor grad_probabilities, Tensor scores, Tensor? attn_mask, float scale) "
      "-> "
      "(Tensor probabilities, Tensor grad_scores)");
  m.def(
      "_attention_softmax_double_backward(Tensor? grad_grad_scores, Tensor? grad_grad_attn_mask, "
      "Tensor? grad_probabilities_sum, Tensor grad_probabilities, Tensor scores, Tensor? attn_mask, float "
      "scale) -> "
      "(Tensor probabilities, Tensor grad_scores, Tensor grad_grad_probabilities, Tensor "
      "second_grad_scores)");
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CPU, m) {
  implement<OnCpu>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, CUDA, m) {
  implement<OnCuda>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Meta, m) {
  implement<OnMeta>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, Autograd, m) {
  implement<Autograd>(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCPU, m) {
  implement_autocast(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, AutocastCUDA, m) {
  implement_autocast(m);
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, FuncTorchBatched, m) {
  implement<ByAten>(m);
}

// Devices without a kernel of ours.
TORCH_LIBRARY_IMPL(gradnorm_kernels, CompositeExplicitAutograd, m) {
  implement<ByRowOps>(m);
  m.impl(kSoftmax, &softmax_by_aten);
  m.impl(kSoftmaxBackward, &softmax_backward_by_aten);
  m.impl(kSoftmaxDoubleBackward, &softmax_double_backward_by_aten);
}

}  // namespace
}  // namespace gradnorm_kernels::attention
