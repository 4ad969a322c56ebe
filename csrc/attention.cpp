// Scaled dot-product attention: its ops, their implementations, and how they are differentiated. With
// S = scale Q K^T + M and P = softmax(S), O = P V.
//
//   backward:  dP = dO V^T, dS = P (dP - delta), delta = rowsum(P dP),
//              dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, dM = dS.
//   double backward, of incoming ddQ, ddK, ddV and ddM:
//              A = scale (ddQ K^T + Q ddK^T) + ddM, alpha = rowsum(P A), B = P (A - alpha),
//              C = A (dP - delta) - alpha dP + dO ddV^T, E = P (C - rowsum(P C)),
//              dO: P ddV + B V, V: B^T dO, Q: scale (E K + dS ddK), K: scale (E^T Q + dS^T ddQ), M: E.
//
// Every op comes in two forms: of query, key and value (Separate), and of all three in one tensor, whose
// gradient is then one tensor, too (Packed). An op of either form makes a Pass of its arguments, compute()
// fills in its results by one of five paths, and the op takes them from there.
#include "cpu/attention.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorUtils.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <map>

#include "op.h"

namespace gradnorm_kernels::attention {
namespace {

using TensorQuad = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr auto kInfinity = std::numeric_limits<double>::infinity();

enum Order : size_t { kForward, kBackward, kDoubleBackward };

struct Wanted {
  bool query = false, key = false, value = false, attn_mask = false, grad_grad_output = false;
};

// A problem of any number of batch dimensions: query (..., L, E), key (..., S, E), value (..., S, Ev), and
// attn_mask broadcast to (..., L, S).
struct Pass : AttentionProblem {
  Order order = kForward;
  Wanted wanted;
  Tensor grad_qkv;  // of which grad_query, grad_key and grad_value are parts, where kernels write them so
};

// How the results of a pass are computed.
enum class Path {
  kComposite,  // plain ATen ops, differentiable to any order
  kRows,       // matrix products, and between them an op for the rows of scores: one kernel on CUDA
  kCpu,        // the CPU kernel
  kCuda,       // CUDA kernels, of windows or of tiles
  kMeta,       // not at all
};

Path path_of(const Pass& pass) {
  if (pass.query.is_cpu()) {
    return Path::kCpu;
  }
  // Kernels hold this many columns of a head. Where the mask has a gradient, they hold a whole window.
  constexpr int64_t window_columns = 64, window_tokens = 64;
  const int64_t most_columns = at::isReducedFloatingType(pass.query.scalar_type()) ? 128 : window_columns;
  const bool mask_has_gradient = pass.wanted.attn_mask || pass.grad_grad_attn_mask.defined();
  const auto columns = pass.query.sym_size(-1).max(pass.value.sym_size(-1));
  const bool is_window = pass.query.sym_size(-2) <= window_tokens && pass.key.sym_size(-2) <= window_tokens &&
                         columns <= window_columns;
  if (!(pass.query.is_cuda() || pass.query.is_meta()) || pass.query.scalar_type() == at::kDouble ||
      columns > most_columns || (mask_has_gradient && !is_window)) {
    return Path::kRows;
  }
  return pass.query.is_meta() ? Path::kMeta : Path::kCuda;
}

std::vector<c10::SymInt> with_last_sizes(const Tensor& like, c10::SymInt rows, c10::SymInt columns) {
  auto sizes = like.sym_sizes().vec();
  sizes[sizes.size() - 2] = rows;
  sizes[sizes.size() - 1] = columns;
  return sizes;
}

// (..., heads, rows, columns) in the memory layout (..., rows, heads, columns), so that the usual
// transpose(1, 2).reshape(batch, rows, heads * columns) is a view.
Tensor empty_with_heads_inside(bool wanted, const Tensor& like, const c10::SymInt& columns) {
  if (!wanted) {
    return Tensor();
  }
  auto sizes = with_last_sizes(like, like.sym_size(-2), columns);
  if (like.dim() < 4) {
    return at::empty_symint(sizes, like.options());
  }
  std::swap(sizes[sizes.size() - 3], sizes[sizes.size() - 2]);
  return at::empty_symint(sizes, like.options()).transpose(-3, -2);
}

// The ops of the rows of scores.

struct Softmax {
  static constexpr auto schema =
      "_attention_softmax(Tensor scores, Tensor? attn_mask, float scale) -> Tensor";
  const Tensor& scores;
  OptionalTensor attn_mask;
  double scale;
  auto tie() const {
    return std::tie(scores, attn_mask, scale);
  }

  // Of scale scores + attn_mask, and 0 where nothing is attended to. In the dtype of arithmetic.
  Tensor probabilities() const {
    const Tensor scaled = to_opmath(scores) * scale;
    if (!attn_mask.defined()) {
      return softmax_by_parts(scaled, -1);
    }
    const Tensor masked = scaled + attn_mask;
    const Tensor nothing = at::eq(masked, -kInfinity).all(-1, true);
    return softmax_by_parts(masked.masked_fill(nothing, 0), -1).masked_fill(nothing, 0);
  }
  Tensor composite() const {
    return probabilities().to(scores.scalar_type());
  }
};

Tensor centred(const Tensor& probabilities, const Tensor& x) {
  return probabilities * (x - (probabilities * x).sum(-1, true));
}

// P and dS of grad_probabilities dP.
struct SoftmaxBackward {
  static constexpr auto schema =
      "_attention_softmax_backward(Tensor grad_probabilities, Tensor scores, Tensor? attn_mask, float scale) "
      "-> (Tensor probabilities, Tensor grad_scores)";
  const Tensor &grad_probabilities, &scores;
  OptionalTensor attn_mask;
  double scale;
  auto tie() const {
    return std::tie(grad_probabilities, scores, attn_mask, scale);
  }

  TensorPair composite() const {
    const Tensor p = Softmax{scores, attn_mask, scale}.probabilities();
    const Tensor ds = centred(p, to_opmath(grad_probabilities));
    return {p.to(scores.scalar_type()), ds.to(scores.scalar_type())};
  }
};

// P, dS, B and E, with A = scale grad_grad_scores + grad_grad_attn_mask; grad_probabilities_sum is dO ddV^T.
struct SoftmaxDoubleBackward {
  static constexpr auto schema =
      "_attention_softmax_double_backward(Tensor? grad_grad_scores, Tensor? grad_grad_attn_mask, "
      "Tensor? grad_probabilities_sum, Tensor grad_probabilities, Tensor scores, Tensor? attn_mask, "
      "float scale) -> (Tensor probabilities, Tensor grad_scores, Tensor grad_grad_probabilities, "
      "Tensor second_grad_scores)";
  OptionalTensor grad_grad_scores, grad_grad_attn_mask, grad_probabilities_sum;
  const Tensor &grad_probabilities, &scores;
  OptionalTensor attn_mask;
  double scale;
  auto tie() const {
    return std::tie(
        grad_grad_scores, grad_grad_attn_mask, grad_probabilities_sum, grad_probabilities, scores, attn_mask,
        scale);
  }

  TensorQuad composite() const {
    const Tensor p = Softmax{scores, attn_mask, scale}.probabilities(), dp = to_opmath(grad_probabilities);
    const Tensor ds = centred(p, dp);
    Tensor a, alpha, c;
    if (grad_grad_scores.defined()) {
      a = to_opmath(grad_grad_scores) * scale;
    }
    if (grad_grad_attn_mask.defined()) {
      a = a.defined() ? a + grad_grad_attn_mask : grad_grad_attn_mask.expand_symint(scores.sym_sizes());
    }
    if (a.defined()) {
      alpha = (p * a).sum(-1, true);
      const Tensor delta = (p * dp).sum(-1, true);
      c = a * (dp - delta) - alpha * dp;
    }
    if (grad_probabilities_sum.defined()) {
      c = plus(c, to_opmath(grad_probabilities_sum));
    }
    const Tensor b = a.defined() ? p * (a - alpha) : at::zeros_like(p);
    const auto dtype = scores.scalar_type();
    return {p.to(dtype), ds.to(dtype), b.to(dtype), centred(p, c).to(dtype)};
  }
};

// Matrix products and row ops. Undefined is zero.
class Decomposed {
 public:
  Decomposed(Pass& pass, Path path) : p(pass), plain(path == Path::kComposite) {
    if (!plain) {
      batch = p.query.sizes().slice(0, p.query.dim() - 2).vec();
    }
  }

  void forward() const {
    const Tensor scores = times(operand(p.query), transposed(operand(p.key)));
    const Tensor probabilities = rows(Softmax{with_batch(scores), p.attn_mask, p.scale});
    p.output = result(times(probabilities, operand(p.value)));
  }

  void backward() const {
    const Tensor query = operand(p.query), key = operand(p.key), d_output = operand(p.grad_output);
    const Tensor scores = times(query, transposed(key));
    const Tensor d_probabilities = times(d_output, transposed(operand(p.value)));
    const auto [probabilities, d_scores] =
        rows(SoftmaxBackward{with_batch(d_probabilities), with_batch(scores), p.attn_mask, p.scale});
    if (p.wanted.query) {
      p.grad_query = result(times(d_scores, key, p.scale));
    }
    if (p.wanted.key) {
      p.grad_key = result(times(transposed(d_scores), query, p.scale));
    }
    if (p.wanted.value) {
      p.grad_value = result(times(transposed(probabilities), d_output));
    }
    if (p.wanted.attn_mask) {
      p.grad_attn_mask = to_mask(d_scores);
    }
  }

  // The double backward's gradient of grad_output alone, by plain ops.
  void tangent() const {
    const Tensor query = operand(p.query), key = operand(p.key), value = operand(p.value);
    const Tensor dd_query = operand(p.grad_grad_query), dd_key = operand(p.grad_grad_key);
    const Tensor scores = times(query, transposed(key));
    const Tensor probabilities = Softmax{scores, p.attn_mask, p.scale}.probabilities();
    const Tensor a = plus(
        plus(times(dd_query, transposed(key), p.scale), times(query, transposed(dd_key), p.scale)),
        p.grad_grad_attn_mask);
    const Tensor b = a.defined() ? centred(probabilities, a) : at::zeros_like(probabilities);
    p.grad_grad_output = result(plus(times(probabilities, operand(p.grad_grad_value)), times(b, value)));
  }

  void double_backward() const {
    const auto& wanted = p.wanted;
    if (plain && wanted.grad_grad_output &&
        !(wanted.query || wanted.key || wanted.value || wanted.attn_mask)) {
      return tangent();
    }
    const Tensor query = operand(p.query), key = operand(p.key), value = operand(p.value);
    const Tensor dd_query = operand(p.grad_grad_query), dd_key = operand(p.grad_grad_key);
    const Tensor dd_value = operand(p.grad_grad_value), d_output = operand(p.grad_output);
    const Tensor scores = times(query, transposed(key));
    const Tensor d_probabilities = times(d_output, transposed(value));
    const Tensor d_probabilities_sum = times(d_output, transposed(dd_value));
    const Tensor dd_scores = plus(times(dd_query, transposed(key)), times(query, transposed(dd_key)));
    const auto [probabilities, d_scores, dd_probabilities, second] = rows(
        SoftmaxDoubleBackward{
            with_batch(dd_scores), p.grad_grad_attn_mask, with_batch(d_probabilities_sum),
            with_batch(d_probabilities), with_batch(scores), p.attn_mask, p.scale});
    if (p.wanted.grad_grad_output) {
      p.grad_grad_output = result(plus(times(probabilities, dd_value), times(dd_probabilities, value)));
    }
    if (p.wanted.query) {
      p.grad_query = result(plus(times(second, key, p.scale), times(d_scores, dd_key, p.scale)));
    }
    if (p.wanted.key) {
      p.grad_key = result(
          plus(times(transposed(second), query, p.scale), times(transposed(d_scores), dd_query, p.scale)));
    }
    if (p.wanted.value) {
      p.grad_value = result(times(transposed(dd_probabilities), d_output));
    }
    if (p.wanted.attn_mask) {
      p.grad_attn_mask = to_mask(second);
    }
  }

 private:
  // In the dtype of arithmetic or, for row ops, as (batch, rows, columns), copied if its strides leave no
  // other way.
  Tensor operand(const Tensor& tensor) const {
    if (!tensor.defined() || plain) {
      return to_opmath(tensor);
    }
    const bool is_view =
        at::detail::computeStride(tensor.sizes(), tensor.strides(), flat_sizes(tensor)).has_value();
    return flat(is_view ? tensor : at::clone(tensor, at::MemoryFormat::Contiguous));
  }
  std::vector<int64_t> flat_sizes(const Tensor& tensor) const {
    return {c10::multiply_integers(batch), tensor.size(-2), tensor.size(-1)};
  }
  Tensor flat(const Tensor& tensor) const {
    return tensor.view(flat_sizes(tensor));
  }
  template <class... Tensors>
  std::tuple<Tensors...> flat(const std::tuple<Tensors...>& tensors) const {
    return std::apply([&](const auto&... t) { return std::make_tuple(flat(t)...); }, tensors);
  }
  Tensor with_batch(const Tensor& tensor) const {
    if (!tensor.defined() || plain) {
      return tensor;
    }
    auto sizes = batch;
    sizes.insert(sizes.end(), {tensor.size(-2), tensor.size(-1)});
    return tensor.view(sizes);
  }

  // Products that PyTorch would decompose are called as their parts, which alone are what moves memory.
  Tensor times(const Tensor& a, const Tensor& b, double factor = 1) const {
    if (!a.defined() || !b.defined()) {
      return Tensor();
    }
    if (plain) {
      const Tensor product = at::matmul(a, b);
      return factor == 1 ? product : product * factor;
    }
    return factor == 1 ? at::bmm(a, b) : at::baddbmm(at::empty({1, 1, 1}, a.options()), a, b, 0, factor);
  }
  static Tensor transposed(const Tensor& matrix) {
    return matrix.defined() ? matrix.transpose(-2, -1) : matrix;
  }
  template <class RowOp>
  auto rows(const RowOp& op) const -> decltype(op.composite()) {
    return plain ? op.composite() : flat(call(op));
  }
  Tensor result(const Tensor& tensor) const {
    return plain ? tensor.to(p.query.scalar_type()) : with_batch(tensor);
  }
  Tensor to_mask(const Tensor& scores) const {
    return at::sum_to(with_batch(scores), p.attn_mask.sym_sizes()).to(p.attn_mask.scalar_type());
  }

  Pass& p;
  bool plain;
  std::vector<int64_t> batch;
};

// Ops that gradnorm_kernels/kernels alone implements, of the tensors of an AttentionProblem.

struct KernelForward {
  static constexpr auto schema =
      "_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float scale, "
      "Tensor(a!) output) -> ()";
  const Tensor &query, &key, &value;
  OptionalTensor attn_mask;
  double scale;
  const Tensor& output;
  auto tie() const {
    return std::tie(query, key, value, attn_mask, scale, output);
  }
};

struct KernelBackward {
  static constexpr auto schema =
      "_attention_bwd(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "float scale, Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
      "Tensor(d!)? grad_attn_mask) -> ()";
  const Tensor &grad_output, &query, &key, &value;
  OptionalTensor attn_mask;
  double scale;
  OptionalTensor grad_query, grad_key, grad_value, grad_attn_mask;
  auto tie() const {
    return std::tie(
        grad_output, query, key, value, attn_mask, scale, grad_query, grad_key, grad_value, grad_attn_mask);
  }
};

struct KernelDoubleBackward {
  static constexpr auto schema =
      "_attention_bwd_bwd(Tensor? grad_grad_query, Tensor? grad_grad_key, Tensor? grad_grad_value, "
      "Tensor? grad_grad_attn_mask, Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, float scale, Tensor(a!)? grad_grad_output, Tensor(b!)? grad_query, "
      "Tensor(c!)? grad_key, Tensor(d!)? grad_value, Tensor(e!)? grad_attn_mask) -> ()";
  OptionalTensor grad_grad_query, grad_grad_key, grad_grad_value, grad_grad_attn_mask;
  const Tensor &grad_output, &query, &key, &value;
  OptionalTensor attn_mask;
  double scale;
  OptionalTensor grad_grad_output, grad_query, grad_key, grad_value, grad_attn_mask;
  auto tie() const {
    return std::tie(
        grad_grad_query, grad_grad_key, grad_grad_value, grad_grad_attn_mask, grad_output, query, key, value,
        attn_mask, scale, grad_grad_output, grad_query, grad_key, grad_value, grad_attn_mask);
  }
};

constexpr AttentionKernels cuda_kernels{
    [](const AttentionProblem& p) {
      call(KernelForward{p.query, p.key, p.value, p.attn_mask, p.scale, p.output});
    },
    [](const AttentionProblem& p) {
      call(
          KernelBackward{
              p.grad_output, p.query, p.key, p.value, p.attn_mask, p.scale, p.grad_query, p.grad_key,
              p.grad_value, p.grad_attn_mask});
    },
    [](const AttentionProblem& p) {
      call(
          KernelDoubleBackward{
              p.grad_grad_query, p.grad_grad_key, p.grad_grad_value, p.grad_grad_attn_mask, p.grad_output,
              p.query, p.key, p.value, p.attn_mask, p.scale, p.grad_grad_output, p.grad_query, p.grad_key,
              p.grad_value, p.grad_attn_mask});
    }};

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
Tensor mask_to_problem(const Tensor& mask, const Pass& pass) {
  Tensor own = mask.to(at::toOpMathType(pass.query.scalar_type()));
  while (own.dim() < pass.query.dim()) {
    own = own.unsqueeze(0);
  }
  const auto keys = pass.key.size(-2);
  // Its columns become contiguous before it is broadcast over the batch.
  std::vector<int64_t> sizes(own.dim(), -1);
  sizes.back() = keys;
  own = own.expand(sizes);
  own = own.stride(-1) == 1 ? own : own.contiguous();
  sizes = pass.query.sizes().vec();
  sizes.back() = keys;
  return to_problem(own.expand(sizes));
}

// The gradient of the mask: partial sums, whose order does not depend on the number of threads.
struct MaskSums {
  std::vector<int64_t> sizes;  // of their total
  Tensor padded;

  // There are about as many sums as tasks, where the batch is large enough; columns pads their rows.
  MaskSums(const Pass& pass, int64_t tasks, int64_t columns) : sizes(pass.query.sizes().vec()) {
    const Tensor& mask = pass.attn_mask;
    const auto batch = sizes.size() - 2, missing = sizes.size() - mask.dim();
    sizes.back() = pass.key.size(-2);
    // Dimensions that the mask is broadcast over: of those that the problem has as one, all or none.
    size_t leading = 0;
    while (leading < batch && (leading < missing || mask.size(leading - missing) == 1)) {
      ++leading;
    }
    leading = leading + 2 < batch ? 0 : leading;
    const auto repeats = c10::multiply_integers(sizes.begin(), sizes.begin() + leading);
    const auto tiles = c10::multiply_integers(sizes.begin() + leading, sizes.begin() + batch);
    std::fill_n(sizes.begin(), leading, 1);
    const int64_t parts =
        std::clamp<int64_t>(tasks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(repeats, 1));
    padded = at::empty(
        {parts, tiles, sizes[batch], columns},
        mask.options().dtype(at::toOpMathType(pass.query.scalar_type())));
  }
  Tensor total(const Tensor& mask) const {
    const Tensor sums = padded.narrow(-1, 0, sizes.back());
    const Tensor total = sums.size(0) == 1 ? sums.select(0, 0) : sums.sum(0);
    return at::sum_to(total.view(sizes), mask.sizes()).to(mask.scalar_type());
  }
};

// Kernels write into the results that are there, but for the mask's gradient.
void run_kernels(Pass& pass, Path path) {
  if (pass.order == kForward && pass.output.numel() == 0) {
    return;
  }
  AttentionProblem p = pass;
  for (auto* tensor :
       {&p.query, &p.key, &p.value, &p.grad_output, &p.grad_grad_query, &p.grad_grad_key, &p.grad_grad_value,
        &p.output, &p.grad_grad_output, &p.grad_query, &p.grad_key, &p.grad_value}) {
    *tensor = to_problem(*tensor);
  }
  for (auto* mask : {&p.attn_mask, &p.grad_grad_attn_mask}) {
    if (mask->defined()) {
      *mask = mask_to_problem(*mask, pass);
    }
  }
  const bool on_cpu = path == Path::kCpu;
  std::optional<MaskSums> mask_sums;
  if (pass.wanted.attn_mask) {
    const int64_t keys = p.key.size(3), padded = std::bit_ceil(static_cast<uint64_t>(keys));
    // Tasks enough for many threads or multiprocessors.
    mask_sums.emplace(pass, on_cpu ? 64 : 2048, on_cpu ? keys : std::max<int64_t>(padded, 16));
    p.grad_attn_mask = mask_sums->padded;
  }
  const auto& kernels = on_cpu ? GRADNORM_KERNELS(attention_kernels) : cuda_kernels;
  const std::array by_order{kernels.forward, kernels.backward, kernels.double_backward};
  by_order[pass.order](p);
  if (mask_sums) {
    pass.grad_attn_mask = mask_sums->total(pass.attn_mask);
  }
}

void compute(Pass& pass, Path path) {
  static constexpr std::array decomposed{
      &Decomposed::forward, &Decomposed::backward, &Decomposed::double_backward};
  switch (path) {
    case Path::kComposite:
    case Path::kRows:
      return (Decomposed(pass, path).*decomposed[pass.order])();
    case Path::kCpu:
    case Path::kCuda:
      return run_kernels(pass, path);
    case Path::kMeta:
      if (pass.wanted.attn_mask) {
        pass.grad_attn_mask = at::empty_symint(pass.attn_mask.sym_sizes(), pass.attn_mask.options());
      }
  }
}

// The boundary. A form is what an op takes, or gives, for query, key and value, with T = const Tensor& for
// operands and OptionalTensor for gradients that come in. All ops name what they take as the operands are
// named.

// Of the schema: each name with this type and prefix before it.
std::string listed(at::ArrayRef<const char*> names, const std::string& type_and_prefix) {
  std::string list;
  for (const std::string name : names) {
    list += (list.empty() ? "" : ", ") + type_and_prefix + name;
  }
  return list;
}

void check_shape(const char* op, const std::string& name, const Tensor& tensor, c10::SymIntArrayRef shape) {
  TORCH_CHECK_VALUE(
      !tensor.defined() || tensor.sym_sizes() == shape, op, ": expected ", name, " to have the shape ", shape,
      ", got ", tensor.sym_sizes());
}

template <class T>
struct Separate {
  static constexpr auto name = "scaled_dot_product_attention";
  static constexpr std::array names{"query", "key", "value"};
  T query, key, value;

  static Separate from(const Tensor* tensors) {
    return {tensors[0], tensors[1], tensors[2]};
  }
  auto tie() const {
    return std::tie(query, key, value);
  }
  void check(const char* op) const {
    check_floating(op, {{"query", query}, {"key", key}, {"value", value}});
    const auto dims = query.dim();
    TORCH_CHECK_VALUE(dims >= 2, op, ": expected query to have at least 2 dimensions, got ", dims);
    TORCH_CHECK_VALUE(
        key.dim() == dims && value.dim() == dims, op,
        ": expected key and value to have as many dimensions as query (", dims, "), got ", key.dim(), " and ",
        value.dim());
    check_shape(op, "key", key, with_last_sizes(query, key.sym_size(-2), query.sym_size(-1)));
    check_shape(op, "value", value, with_last_sizes(query, key.sym_size(-2), value.sym_size(-1)));
  }
  TensorTriple heads() const {
    return {query, key, value};
  }

  // Between (..., heads, rows, columns) and what the op has for it.
  static Tensor exchanged(const Tensor& output) {
    return output;
  }
  static Wanted wanted(const bool* mask) {
    return {mask[0], mask[1], mask[2], mask[3]};
  }
  // The gradients of the operands.
  void allocate(Pass& pass) const {
    const auto empty = [](bool is_wanted, const Tensor& like) {
      return empty_with_heads_inside(is_wanted, like, like.sym_size(-1));
    };
    pass.grad_query = empty(pass.wanted.query, query);
    pass.grad_key = empty(pass.wanted.key, key);
    pass.grad_value = empty(pass.wanted.value, value);
  }
  static TensorTriple gradients(const Pass& pass) {
    return {pass.grad_query, pass.grad_key, pass.grad_value};
  }
};

// qkv (..., tokens, 3, heads, columns), as a linear layer makes it. The output is (..., tokens, heads,
// columns).
template <class T>
struct Packed {
  static constexpr auto name = "qkv_attention";
  static constexpr std::array names{"qkv"};
  T qkv;

  static Packed from(const Tensor* tensors) {
    return {tensors[0]};
  }
  auto tie() const {
    return std::tie(qkv);
  }
  void check(const char* op) const {
    check_floating(op, {{"qkv", qkv}});
    TORCH_CHECK_VALUE(
        qkv.dim() >= 4 && qkv.sym_size(-3) == 3, op,
        ": expected qkv to be (..., tokens, 3, heads, columns), got ", qkv.sym_sizes());
  }
  TensorTriple heads() const {
    if (!qkv.defined()) {
      return {};
    }
    const auto part = [&](int64_t index) { return exchanged(qkv.select(-3, index)); };
    return {part(0), part(1), part(2)};
  }

  static Tensor exchanged(const Tensor& output) {
    return output.defined() ? output.transpose(-3, -2) : output;
  }
  static Wanted wanted(const bool* mask) {
    return {mask[0], mask[0], mask[0], mask[1]};
  }
  void allocate(Pass& pass) const {
    if (pass.wanted.query) {
      pass.grad_qkv = at::empty_symint(qkv.sym_sizes(), qkv.options());
      std::tie(pass.grad_query, pass.grad_key, pass.grad_value) = Packed<Tensor>{pass.grad_qkv}.heads();
    }
  }
  static std::tuple<Tensor> gradients(const Pass& pass) {
    if (pass.grad_qkv.defined() || !pass.grad_query.defined()) {
      return {pass.grad_qkv};
    }
    return {
        at::stack({exchanged(pass.grad_query), exchanged(pass.grad_key), exchanged(pass.grad_value)}, -3)};
  }
};

// The arguments of the three ops of a form.

template <class Arguments>
struct Op;
template <template <class> class Form>
struct Backward;
template <template <class> class Form>
struct DoubleBackward;
template <template <class> class Form>
struct Jvp;

using Settings = std::tuple<std::optional<double>>;  // the scale

template <template <class> class Form>
struct Forward {
  using Operands = Form<const Tensor&>;
  using InForwardMode = Jvp<Form>;
  static std::string schema() {
    return Operands::name + ("(" + listed(Operands::names, "Tensor ")) +
           ", Tensor? attn_mask=None, *, float? scale=None) -> Tensor";
  }
  Operands operands;
  OptionalTensor attn_mask;
  std::optional<double> scale;
  auto tie() const {
    return std::tuple_cat(operands.tie(), std::tie(attn_mask, scale));
  }

  Pass pass(const char* op = name_of<Forward>()) const {
    operands.check(op);
    Pass pass;
    std::tie(pass.query, pass.key, pass.value) = operands.heads();
    pass.attn_mask = attn_mask;
    check_mask(op, pass);
    // The size of a head is a constant of a traced graph, too.
    pass.scale = scale ? *scale : 1 / std::sqrt(pass.query.sym_size(-1).guard_int(__FILE__, __LINE__));
    return pass;
  }
  static Tensor results(const Pass& pass) {
    return Operands::exchanged(pass.output);
  }
  static std::vector<c10::SymInt> output_sizes(const Pass& pass) {
    auto sizes = Operands::exchanged(pass.query).sym_sizes().vec();
    sizes.back() = pass.value.sym_size(-1);
    return sizes;
  }

  struct Derivative {
    using Settings = attention::Settings;
    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
      return to_list(call(
          Op<Backward<Form>>{
              {grads[0], Operands::from(saved.data()), saved.back(), std::get<0>(settings), needs}}));
    }
  };

 private:
  static void check_mask(const char* op, const Pass& pass) {
    if (!pass.attn_mask.defined()) {
      return;
    }
    check_floating(
        op, {{Operands::names[0], pass.query}, {"attn_mask", pass.attn_mask}}, /*same_dtype=*/false);
    const auto scores = with_last_sizes(pass.query, pass.query.sym_size(-2), pass.key.sym_size(-2));
    const auto sizes = pass.attn_mask.sym_sizes();
    TORCH_CHECK_VALUE(
        at::is_expandable_to(sizes, scores), op,
        ": expected attn_mask to broadcast to the shape of the scores (", c10::SymIntArrayRef(scores),
        "), got ", sizes);
  }
};

template <template <class> class Form>
struct Backward {
  using Operands = Form<const Tensor&>;
  static constexpr size_t count = Operands::names.size() + 1;
  static std::string schema() {
    return Operands::name + ("_backward(Tensor grad_output, " + listed(Operands::names, "Tensor ")) +
           ", Tensor? attn_mask=None, *, float? scale=None, bool[" + std::to_string(count) +
           "] output_mask) -> (" + listed(Operands::names, "Tensor grad_") + ", Tensor grad_attn_mask)";
  }
  const Tensor& grad_output;
  Operands operands;
  OptionalTensor attn_mask;
  std::optional<double> scale;
  Mask<count> output_mask;
  auto tie() const {
    return std::tuple_cat(std::tie(grad_output), operands.tie(), std::tie(attn_mask, scale, output_mask));
  }

  Pass pass(const char* op = name_of<Backward>()) const {
    Pass pass = Forward<Form>{operands, attn_mask, scale}.pass(op);
    pass.order = kBackward;
    check_floating(op, {{Operands::names[0], pass.query}, {"grad_output", grad_output}});
    check_shape(op, "grad_output", grad_output, Forward<Form>::output_sizes(pass));
    pass.grad_output = Operands::exchanged(grad_output);
    pass.wanted = Operands::wanted(output_mask.data());
    TORCH_CHECK_VALUE(
        attn_mask.defined() || !pass.wanted.attn_mask, op,
        ": expected attn_mask, whose gradient output_mask asks for");
    return pass;
  }
  static auto results(const Pass& pass) {
    return std::tuple_cat(Operands::gradients(pass), std::tuple(pass.grad_attn_mask));
  }

  struct Derivative {
    using Settings = attention::Settings;
    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
      return to_list(call(
          Op<DoubleBackward<Form>>{
              {Form<OptionalTensor>::from(grads.data()), grads.back(), saved[0], Operands::from(&saved[1]),
               saved.back(), std::get<0>(settings), needs}}));
    }
  };
};

template <template <class> class Form>
struct DoubleBackward {
  using Operands = Form<const Tensor&>;
  static constexpr size_t count = Operands::names.size() + 2;
  static std::string schema() {
    return Operands::name + ("_double_backward(" + listed(Operands::names, "Tensor? grad_grad_")) +
           ", Tensor? grad_grad_attn_mask, Tensor grad_output, " + listed(Operands::names, "Tensor ") +
           ", Tensor? attn_mask=None, *, float? scale=None, bool[" + std::to_string(count) +
           "] output_mask) -> (Tensor grad_grad_output, " + listed(Operands::names, "Tensor grad_") +
           ", Tensor grad_attn_mask)";
  }
  Form<OptionalTensor> grad_grads;
  OptionalTensor grad_grad_attn_mask;
  const Tensor& grad_output;
  Operands operands;
  OptionalTensor attn_mask;
  std::optional<double> scale;
  Mask<count> output_mask;
  auto tie() const {
    return std::tuple_cat(
        grad_grads.tie(), std::tie(grad_grad_attn_mask, grad_output), operands.tie(),
        std::tie(attn_mask, scale, output_mask));
  }

  // prefix: of the names of what is linear in the gradients of the operands.
  Pass pass(const char* op = name_of<DoubleBackward>(), const std::string& prefix = "grad_grad_") const {
    Mask<count - 1> of_backward;
    std::copy(output_mask.begin() + 1, output_mask.end(), of_backward.begin());
    Pass pass = Backward<Form>{grad_output, operands, attn_mask, scale, of_backward}.pass(op);
    pass.order = kDoubleBackward;
    pass.wanted.grad_grad_output = output_mask[0];
    const auto grads = to_list(grad_grads.tie()), likes = to_list(operands.tie());
    for (size_t i = 0; i < grads.size(); ++i) {
      const auto name = prefix + Operands::names[i];
      check_floating(op, {{Operands::names[i], likes[i]}, {name.c_str(), grads[i]}});
      check_shape(op, name, grads[i], likes[i].sym_sizes());
    }
    std::tie(pass.grad_grad_query, pass.grad_grad_key, pass.grad_grad_value) = grad_grads.heads();
    if (grad_grad_attn_mask.defined()) {
      const auto name = prefix + "attn_mask";
      TORCH_CHECK_VALUE(attn_mask.defined(), op, ": expected no ", name, " without attn_mask");
      check_floating(
          op, {{"attn_mask", attn_mask}, {name.c_str(), grad_grad_attn_mask}}, /*same_dtype=*/false);
      check_shape(op, name, grad_grad_attn_mask, attn_mask.sym_sizes());
      pass.grad_grad_attn_mask = grad_grad_attn_mask;
    }
    return pass;
  }
  static auto results(const Pass& pass) {
    return std::tuple_cat(
        std::tuple(Operands::exchanged(pass.grad_grad_output)), Backward<Form>::results(pass));
  }
};

// The output's tangent, which is linear in those of the operands as the gradient is in that of the output:
// the double backward's gradient of grad_output, whatever that is.
template <template <class> class Form>
struct Jvp {
  using Operands = Form<const Tensor&>;
  static std::string schema() {
    return Operands::name + ("_jvp(" + listed(Operands::names, "Tensor? tangent_")) +
           ", Tensor? tangent_attn_mask, " + listed(Operands::names, "Tensor ") +
           ", Tensor? attn_mask=None, *, float? scale=None) -> Tensor";
  }
  Form<OptionalTensor> tangents;
  OptionalTensor tangent_attn_mask;
  Operands operands;
  OptionalTensor attn_mask;
  std::optional<double> scale;
  auto tie() const {
    return std::tuple_cat(
        tangents.tie(), std::tie(tangent_attn_mask), operands.tie(), std::tie(attn_mask, scale));
  }

  Pass pass(const char* op = name_of<Jvp>()) const {
    const Pass forward = Forward<Form>{operands, attn_mask, scale}.pass(op);
    const Tensor unread =
        at::zeros({}, forward.query.options()).expand_symint(Forward<Form>::output_sizes(forward));
    const DoubleBackward<Form> linear{tangents, tangent_attn_mask, unread, operands, attn_mask, scale,
                                      {true}};
    return linear.pass(op, "tangent_");
  }
  static Tensor results(const Pass& pass) {
    return Operands::exchanged(pass.grad_grad_output);
  }

  // With w the gradient of the tangent, <w, J t> is <J^T w, t>: of the tangents the gradient is the backward
  // of w, and of the operands that of their own double backward.
  struct Derivative {
    using Settings = attention::Settings;
    static constexpr size_t count = Operands::names.size() + 1;
    static variable_list backward(
        const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
      const auto tangents = Form<OptionalTensor>::from(saved.data());
      const auto operands = Operands::from(&saved[count]);
      const auto scale = std::get<0>(settings);
      variable_list gradients(2 * count);
      const Mask<count> of_tangents = needs;
      if (std::ranges::count(of_tangents, true)) {
        const auto results =
            to_list(call(Op<Backward<Form>>{{grads[0], operands, saved.back(), scale, of_tangents}}));
        std::copy(results.begin(), results.end(), gradients.begin());
      }
      Mask<count + 1> of_operands{};
      for (size_t i = 0; i < count; ++i) {
        of_operands[i + 1] = needs[count + i];
      }
      if (std::ranges::count(of_operands, true)) {
        const auto results = to_list(call(
            Op<DoubleBackward<Form>>{
                {tangents, saved[count - 1], grads[0], operands, saved.back(), scale, of_operands}}));
        std::copy(results.begin() + 1, results.end(), gradients.begin() + count);
      }
      return gradients;
    }
  };
};

// An op of these arguments. Its implementations are the same for all.
template <class Arguments>
struct Op : Arguments {
  using Result = decltype(Arguments::results(std::declval<Pass>()));
  static constexpr bool is_forward = requires { typename Arguments::InForwardMode; };

  Result composite() const {
    return by(Path::kComposite);
  }
  // A device without a kernel of ours.
  Result any_device() const {
    return by(Path::kRows);
  }
  Result cpu() const {
    return by(Path::kCpu);
  }
  Result cuda() const {
    Pass pass = this->pass();
    return by(path_of(pass), pass);
  }
  Result meta() const {
    return by(Path::kMeta);
  }
  Result autograd() const {
    const auto tensors = this->tensors();
    if constexpr (is_forward) {
      if (is_forward_mode(tensors)) {
        return dual(tensors);
      }
    }
    if (needs_composite_even_traced(tensors)) {
      return composite();
    }
    if constexpr (!requires { typename Arguments::Derivative; }) {
      if (torch::autograd::compute_requires_grad(tensors)) {
        return composite();
      }
      at::AutoDispatchBelowADInplaceOrView guard;
      return whole_or_parts();
    } else {
      const auto results =
          record<typename Arguments::Derivative>(tensors, {this->scale}, [&](variable_list& saved) {
            saved = tensors;
            return to_list(whole_or_parts());
          });
      if constexpr (std::is_same_v<Result, Tensor>) {
        return results[0];
      } else {
        return to_tuple<std::tuple_size_v<Result>>(results);
      }
    }
  }
  // All operands in one dtype, as for PyTorch's own op. The mask may stay as it is.
  Result autocast() const
    requires is_forward
  {
    const auto device = std::get<0>(this->tie()).device().type();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    auto cast = to_list(this->operands.tie());
    for (auto& tensor : cast) {
      tensor = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
    }
    return call(Op{{Arguments::Operands::from(cast.data()), this->attn_mask, this->scale}});
  }

 private:
  Result by(Path path) const {
    return by(path, this->pass());
  }
  Result by(Path path, Pass pass) const {
    if (path >= Path::kCpu) {
      const auto columns = pass.value.sym_size(-1);
      pass.output = empty_with_heads_inside(is_forward, pass.query, columns);
      pass.grad_grad_output = empty_with_heads_inside(pass.wanted.grad_grad_output, pass.query, columns);
      this->operands.allocate(pass);
    }
    compute(pass, path);
    return Arguments::results(pass);
  }
  // Of an output with its tangent, each of one op.
  Tensor dual(const variable_list& tensors) const {
    variable_list primals(tensors.size()), tangents(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].defined()) {
        std::tie(primals[i], tangents[i]) = at::_unpack_dual(tensors[i], /*level=*/0);
      }
    }
    const auto operands = Arguments::Operands::from(primals.data());
    using Tangents = decltype(Arguments::InForwardMode::tangents);
    Tensor output, tangent;
    {
      // Within torch.func the level that is running has nothing more to do with them.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (is_in_torch_func()) {
        guard.emplace();
      }
      output = call(Op{{operands, primals.back(), this->scale}});
      tangent = call(
          Op<typename Arguments::InForwardMode>{
              {Tangents::from(tangents.data()), tangents.back(), operands, primals.back(), this->scale}});
    }
    return at::_make_dual(output, tangent, /*level=*/0);
  }
  // Where this is several ops, they are called from autograd, seen by whoever counts or records ops.
  Result whole_or_parts() const {
    Pass pass = this->pass();
    return path_of(pass) == Path::kRows ? by(Path::kRows, std::move(pass)) : call(*this);
  }
  // All are differentiable.
  variable_list tensors() const {
    variable_list list;
    const auto add = [&](const auto& argument) {
      if constexpr (std::is_convertible_v<decltype(argument), Tensor>) {
        list.push_back(argument);
      }
    };
    std::apply([&](const auto&... arguments) { (add(arguments), ...); }, this->tie());
    return list;
  }
};

const Registration<
    Op<Forward<Separate>>, Op<Backward<Separate>>, Op<DoubleBackward<Separate>>, Op<Jvp<Separate>>,
    Op<Forward<Packed>>, Op<Backward<Packed>>, Op<DoubleBackward<Packed>>, Op<Jvp<Packed>>, KernelForward,
    KernelBackward, KernelDoubleBackward, Softmax, SoftmaxBackward, SoftmaxDoubleBackward>
    registration;

// PyTorch's fused attention, which it cannot differentiate twice, nor under torch.func and in forward mode.
// Whatever ours does not cover stays PyTorch's. The arguments' names differ from op to op and between
// releases.
struct AttentionArguments : AtenArguments {
  using AtenArguments::AtenArguments;
  std::optional<double> scale() const {
    return get({"scale"}).toOptional<double>();
  }
  bool has_dropout() const {
    return get({"dropout_p"}).toDouble() > 0;
  }
  Tensor attn_mask(const Tensor& query, const Tensor& key) const {
    const Tensor mask = tensor({"attn_mask", "attn_bias"});
    if (!get({"is_causal"}).toBool()) {
      return mask;
    }
    const Tensor causal =
        at::full_symint({query.sym_size(-2), key.sym_size(-2)}, -kInfinity, query.options()).triu(1);
    return mask.defined() ? mask + causal : causal;
  }
};

// In grouped-query attention, (N, heads, L, E) and fewer heads of keys and values.
int64_t queries_of_each_key(const Tensor& query, const Tensor& key) {
  if (query.dim() != 4 || key.dim() != 4 || key.size(1) == 0) {
    return 1;
  }
  const auto heads = query.size(1), shared = key.size(1);
  return heads % shared == 0 ? heads / shared : 1;
}
Tensor repeat_heads(const Tensor& tensor, int64_t times) {
  return times > 1 ? tensor.repeat_interleave(times, 1) : tensor;
}

struct AtenAttention : BoxedOverride<AtenAttention> {
  static void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const AttentionArguments arguments(op, *stack);
    const Tensor query = arguments.tensor({"query"}), key = arguments.tensor({"key"}),
                 value = arguments.tensor({"value"});
    const Tensor attn_mask = arguments.tensor({"attn_mask", "attn_bias"});
    if (arguments.has_dropout() || !is_differentiated_by_transform({query, key, value, attn_mask})) {
      stock(op, keys, stack);
      return;
    }
    const auto times = queries_of_each_key(query, key);
    const Tensor k = repeat_heads(key, times), v = repeat_heads(value, times);
    const Tensor output =
        Op<Forward<Separate>>{{{query, k, v}, arguments.attn_mask(query, key), arguments.scale()}}.autograd();
    // What else it returns is of use to its own backward alone.
    for (auto argument = stack->end() - arguments.values.size(); argument != stack->end(); ++argument) {
      if (argument->isTensor() && argument->toTensor().defined()) {
        *argument = argument->toTensor().detach();
      }
    }
    op.callBoxed(stack);
    (*stack)[stack->size() - op.schema().returns().size()] = output;
  }
};

struct AtenAttentionBackward : BoxedOverride<AtenAttentionBackward> {
  static void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const AttentionArguments arguments(op, *stack);
    const Tensor grad_output = arguments.tensor({"grad_out", "grad_out_"});
    const Tensor query = arguments.tensor({"query"});
    Tensor key = arguments.tensor({"key"}), value = arguments.tensor({"value"});
    Tensor attn_mask = arguments.tensor({"attn_mask", "attn_bias"});
    const bool is_plain =
        !torch::autograd::compute_requires_grad(grad_output, query, key, value, attn_mask) ||
        needs_composite(grad_output, query, key, value, attn_mask) || arguments.has_dropout();
    const auto queries = is_plain ? 1 : queries_of_each_key(query, key);
    key = repeat_heads(key, queries);
    value = repeat_heads(value, queries);
    if (is_plain || !covers({grad_output, {query, key, value}, attn_mask})) {
      stock(op, keys, stack);
      return;
    }
    attn_mask = arguments.attn_mask(query, key);
    const auto scale = arguments.scale();
    // Not all of these ops return a gradient of the mask.
    const auto count = arguments.schema.returns().size();
    if (queries > 1) {
      torch::jit::drop(*stack, arguments.values.size());
      const auto of_mask = attn_mask.defined() && attn_mask.requires_grad();
      auto [grad_query, grad_key, grad_value, grad_mask] = call(
          Op<Backward<Separate>>{
              {grad_output, {query, key, value}, attn_mask, scale, {true, true, true, of_mask}}});
      const auto summed = [&](const Tensor& grad) { return grad.unflatten(1, {-1, queries}).sum(2); };
      const variable_list grads{grad_query, summed(grad_key), summed(grad_value), grad_mask};
      stack->insert(stack->end(), grads.begin(), grads.begin() + count);
      return;
    }
    // The value is PyTorch's, its derivative ours.
    const auto grads = record<Backward<Separate>::Derivative>(
        {grad_output, query, key, value, attn_mask}, {scale}, [&](variable_list& saved) {
          saved = {grad_output, query, key, value, attn_mask};
          op.callBoxed(stack);
          variable_list results;
          for (const auto& result : torch::jit::pop(*stack, count)) {
            results.push_back(result.toTensor());
          }
          results.resize(Backward<Separate>::count);
          return results;
        });
    stack->insert(stack->end(), grads.begin(), grads.begin() + count);
  }

  static bool covers(const Backward<Separate>& backward) try {
    backward.pass();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  for (const std::string kernels :
       {"flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"}) {
    AtenAttention::install(aten, "_scaled_dot_product_" + kernels);
    AtenAttentionBackward::install(aten, "_scaled_dot_product_" + kernels + "_backward");
  }
});

}  // namespace
}  // namespace gradnorm_kernels::attention
