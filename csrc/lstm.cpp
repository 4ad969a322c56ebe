// LSTMs: the CPU, meta and composite implementations of a cell's step, how it and a layer's recurrence are
// differentiated, and the overrides of PyTorch's lstm and lstm_cell.
//
// A layer's steps are a_t = x_t + h_{t-1} W^T, with x_t all that does not depend on h, and (h_t, c_t) =
// cell(a_t, c_{t-1}). Its backward goes through time once, a product and a cell's backward a step; gradients
// of W are one product of all steps. The double backward goes through it twice: forward with the gradients of
// the first backward's results, backward with what these leave at a, h and c.
#include "cpu/lstm.h"

#include <ATen/autocast_mode.h>

#include "op.h"

namespace gradnorm_kernels::lstm {
namespace {

std::vector<Tensor> each_gate(const Tensor& gates) {
  return gates.chunk(4, -1);
}

void check_step(
    const char* op, std::initializer_list<NamedTensor> like_gates,
    std::initializer_list<NamedTensor> like_cell) {
  check_elementwise(op, like_gates);
  check_elementwise(op, like_cell);
  const auto &gates = *like_gates.begin(), &cell = *like_cell.begin();
  check_floating(op, {gates, cell});
  auto sizes = cell.tensor.sym_sizes().vec();
  if (!sizes.empty()) {
    sizes.back() *= 4;
  }
  TORCH_CHECK_VALUE(
      !sizes.empty() && gates.tensor.sym_sizes() == sizes, op,
      ": expected gates to have four times the columns of cell (", cell.tensor.sym_sizes(), "), got ",
      gates.tensor.sym_sizes());
}

std::vector<Tensor> with_each_gate(
    std::initializer_list<Tensor> before, const Tensor& gates, std::initializer_list<Tensor> after) {
  std::vector<Tensor> tensors(before);
  for (const auto& gate : each_gate(gates)) {
    tensors.push_back(gate);
  }
  tensors.insert(tensors.end(), after);
  return tensors;
}

// Over outputs that are there, and inputs.
at::TensorIterator step_iterator(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs) {
  at::TensorIteratorConfig config;
  for (const auto& output : outputs) {
    config.add_owned_output(output);
  }
  for (const auto& input : inputs) {
    config.add_owned_const_input(input);
  }
  return config.resize_outputs(false).build();
}

Tensor new_like(const Tensor& tensor) {
  return at::empty_like(tensor, LEGACY_CONTIGUOUS_MEMORY_FORMAT);
}
Tensor or_zeros(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad : at::zeros_like(like);
}

// Formulas by plain ops.
struct Parts : LstmStep<Tensor> {
  Parts(const Tensor& gates, const Tensor& cell) : Parts(each_gate(to_opmath(gates)), to_opmath(cell)) {}

 private:
  Parts(const std::vector<Tensor>& a, const Tensor& cell) : LstmStep(a[0], a[1], a[2], a[3], cell) {}
};

struct DoubleBackward {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  static constexpr auto schema =
      "lstm_cell_double_backward(Tensor grad_grad_gates, Tensor grad_grad_cell, Tensor grad_hidden, "
      "Tensor grad_next_cell, Tensor gates, Tensor cell) -> (Tensor grad_grad_hidden, "
      "Tensor grad_grad_next_cell, Tensor grad_gates, Tensor grad_cell)";
  const Tensor &grad_grad_gates, &grad_grad_cell, &grad_hidden, &grad_next_cell, &gates, &cell;
  auto tie() const {
    return std::tie(grad_grad_gates, grad_grad_cell, grad_hidden, grad_next_cell, gates, cell);
  }
  auto differentiable() const {
    return tie();
  }

  void check() const {
    check_step(
        name_of<DoubleBackward>(), {{"gates", gates}, {"grad_grad_gates", grad_grad_gates}},
        {{"cell", cell},
         {"grad_hidden", grad_hidden},
         {"grad_next_cell", grad_next_cell},
         {"grad_grad_cell", grad_grad_cell}});
  }
  Result composite() const {
    check();
    const auto v = each_gate(to_opmath(grad_grad_gates));
    const auto grads = Parts(gates, cell)
                           .second(
                               {v[0], v[1], v[2], v[3], to_opmath(grad_grad_cell)}, to_opmath(grad_hidden),
                               to_opmath(grad_next_cell));
    const auto narrow = [&](const Tensor& t) { return t.to(cell.scalar_type()); };
    return {
        narrow(grads[0]), narrow(grads[1]), narrow(at::cat({grads[2], grads[3], grads[4], grads[5]}, -1)),
        narrow(grads[6])};
  }
  Result cpu() const {
    const auto results = meta();
    const auto& [of_hidden, of_next, of_gates, of_cell] = results;
    auto inputs = with_each_gate({}, grad_grad_gates, {grad_grad_cell, grad_hidden, grad_next_cell});
    const auto operands = with_each_gate({}, gates, {cell});
    inputs.insert(inputs.end(), operands.begin(), operands.end());
    auto iter = step_iterator(with_each_gate({of_hidden, of_next}, of_gates, {of_cell}), inputs);
    GRADNORM_KERNELS(lstm_kernels).double_backward(iter);
    return results;
  }
  Result meta() const {
    check();
    return {new_like(cell), new_like(cell), new_like(gates), new_like(cell)};
  }
};

struct OfBackward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    const Tensor v = or_zeros(grads[0], saved[2]), of_cell = or_zeros(grads[1], saved[3]);
    return to_list(call(DoubleBackward{v, of_cell, saved[0], saved[1], saved[2], saved[3]}));
  }
};

struct Backward {
  static constexpr auto schema =
      "lstm_cell_backward(Tensor grad_hidden, Tensor grad_next_cell, Tensor gates, Tensor cell) -> "
      "(Tensor grad_gates, Tensor grad_cell)";
  const Tensor &grad_hidden, &grad_next_cell, &gates, &cell;
  auto tie() const {
    return std::tie(grad_hidden, grad_next_cell, gates, cell);
  }

  void check() const {
    check_step(
        name_of<Backward>(), {{"gates", gates}},
        {{"cell", cell}, {"grad_hidden", grad_hidden}, {"grad_next_cell", grad_next_cell}});
  }
  TensorPair composite() const {
    check();
    const auto grads = Parts(gates, cell).gradients(to_opmath(grad_hidden), to_opmath(grad_next_cell));
    return {
        at::cat({grads[0], grads[1], grads[2], grads[3]}, -1).to(cell.scalar_type()),
        grads[4].to(cell.scalar_type())};
  }
  TensorPair cpu() const {
    const auto results = meta();
    auto iter = step_iterator(
        with_each_gate({}, std::get<0>(results), {std::get<1>(results)}),
        with_each_gate({grad_hidden, grad_next_cell}, gates, {cell}));
    GRADNORM_KERNELS(lstm_kernels).backward(iter);
    return results;
  }
  TensorPair meta() const {
    check();
    return {new_like(gates), new_like(cell)};
  }
  TensorPair autograd() const {
    if (needs_composite(grad_hidden, grad_next_cell, gates, cell)) {
      return composite();
    }
    return to_tuple<2>(
        record<OfBackward>({grad_hidden, grad_next_cell, gates, cell}, {}, [&](variable_list& saved) {
          saved = {grad_hidden, grad_next_cell, gates, cell};
          return to_list(call(*this));
        }));
  }
};

struct OfForward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    const Tensor grad_hidden = or_zeros(grads[0], saved[1]), grad_next = or_zeros(grads[1], saved[1]);
    return to_list(call(Backward{grad_hidden, grad_next, saved[0], saved[1]}));
  }
};

// h and c of a step.
struct Forward {
  static constexpr auto schema = "lstm_cell(Tensor gates, Tensor cell) -> (Tensor hidden, Tensor next_cell)";
  const Tensor &gates, &cell;
  auto tie() const {
    return std::tie(gates, cell);
  }

  void check() const {
    check_step(name_of<Forward>(), {{"gates", gates}}, {{"cell", cell}});
  }
  TensorPair composite() const {
    check();
    const auto values = Parts(gates, cell).values();
    return {values[0].to(cell.scalar_type()), values[1].to(cell.scalar_type())};
  }
  TensorPair cpu() const {
    const auto results = meta();
    auto iter =
        step_iterator({std::get<0>(results), std::get<1>(results)}, with_each_gate({}, gates, {cell}));
    GRADNORM_KERNELS(lstm_kernels).forward(iter);
    return results;
  }
  TensorPair meta() const {
    check();
    return {new_like(cell), new_like(cell)};
  }
  TensorPair autograd() const {
    if (needs_composite(gates, cell)) {
      return composite();
    }
    return to_tuple<2>(record<OfForward>({gates, cell}, {}, [&](variable_list& saved) {
      saved = {gates, cell};
      return to_list(call(*this));
    }));
  }
  // Where gates come from products of a lower precision.
  TensorPair autocast() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto wider = at::promote_types(gates.scalar_type(), cell.scalar_type());
    return call(Forward{gates.to(wider), cell.to(wider)});
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// A layer's steps: a, and what h and c were before each; all of shape (T, B, ...).
struct Steps {
  Tensor gates, hidden, cell;

  // The output is every h but the first.
  static Steps of(const Tensor& gates, const Tensor& cell, const Tensor& first_hidden, const Tensor& output) {
    const Tensor others = output.narrow(0, 0, output.size(0) - 1);
    return {gates, at::cat({first_hidden.unsqueeze(0), others}), cell};
  }
  int64_t count() const {
    return gates.size(0);
  }
};

Tensor zeros_like_step(const Tensor& sequence) {
  return at::zeros_symint(sequence.sym_sizes().slice(1), sequence.options());
}
// Of (T, B, m) and (T, B, n): the (m, n) sum of all steps' products.
Tensor product_of_steps(const Tensor& a, const Tensor& b) {
  return at::mm(a.flatten(0, 1).t(), b.flatten(0, 1));
}
Tensor sum(const Tensor& a, const Tensor& b) {
  return a.defined() && b.defined() ? a + b : a.defined() ? a : b;
}

// The gates and cells of a layer's steps, its output, and the last h and c; differentiable as far as the cell
// is.
struct Run {
  Tensor gates, cells, output, hidden, cell;

  Run(const Tensor& input, const Tensor& first_hidden, const Tensor& first_cell, const Tensor& weight)
      : hidden(first_hidden), cell(first_cell) {
    std::vector<Tensor> of_gates, of_cell, of_hidden;
    for (const auto& x : input.unbind()) {
      of_cell.push_back(cell);
      of_gates.push_back(at::addmm(x, hidden, weight.t()));
      std::tie(hidden, cell) = call(Forward{of_gates.back(), cell});
      of_hidden.push_back(hidden);
    }
    gates = at::stack(of_gates);
    cells = at::stack(of_cell);
    output = at::stack(of_hidden);
  }
};

// The gradients of a layer's a, and of its first h and c. Undefined ones of its results are 0.
struct BackwardRun {
  Tensor gates, first_hidden, first_cell;
  Tensor hidden, cell;  // those that each step was given, (T, B, H)

  // One that was kept.
  BackwardRun(const Tensor& gates, const Tensor& hidden, const Tensor& cell)
      : gates(gates), hidden(hidden), cell(cell) {}
  BackwardRun(
      const Tensor& grad_output, const Tensor& grad_hidden, const Tensor& grad_cell, const Steps& steps,
      const Tensor& weight) {
    std::vector<Tensor> of_gates(steps.count()), of_hidden(steps.count()), of_cell(steps.count());
    const Tensor zeros = zeros_like_step(steps.cell);
    Tensor dh = grad_hidden, dc = grad_cell.defined() ? grad_cell : zeros;
    for (int64_t t = steps.count(); t-- > 0;) {
      dh = sum(dh, grad_output.defined() ? grad_output[t] : Tensor());
      of_hidden[t] = dh = dh.defined() ? dh : zeros;
      of_cell[t] = dc;
      std::tie(of_gates[t], dc) = call(Backward{dh, dc, steps.gates[t], steps.cell[t]});
      dh = at::mm(of_gates[t], weight);
    }
    gates = at::stack(of_gates);
    first_hidden = dh;
    first_cell = dc;
    hidden = at::stack(of_hidden);
    cell = at::stack(of_cell);
  }
};

// The gradients of all that the gradients of a layer are functions of, with those of the latter: v of the
// gates', first h's, first c's and weight's.
struct DoubleBackwardRun {
  Tensor output, hidden, cell;  // what the first backward was given
  Tensor gates, first_hidden, first_cell, of_weight;

  DoubleBackwardRun(
      const Tensor& v_gates, const Tensor& v_hidden, const Tensor& v_cell, const Tensor& v_weight,
      const Steps& steps, const BackwardRun& first, const Tensor& weight, bool needs_weight) {
    const auto count = steps.count();
    const Tensor zeros = zeros_like_step(steps.cell);
    // Of the gradients of a, before what each step leaves for the next.
    Tensor v = v_gates;
    if (v_weight.defined()) {
      v = sum(v, at::matmul(steps.hidden, v_weight.t()));
    }
    std::vector<Tensor> from_hidden(count), of_hidden(count), of_gates(count), of_cell(count);
    Tensor p = v_hidden.defined() ? v_hidden : zeros, q = v_cell.defined() ? v_cell : zeros;
    for (int64_t t = 0; t < count; ++t) {
      const Tensor at_gates = v.defined() ? at::addmm(v[t], p, weight.t()) : at::mm(p, weight.t());
      from_hidden[t] = p;
      std::tie(p, q, of_gates[t], of_cell[t]) =
          call(DoubleBackward{at_gates, q, first.hidden[t], first.cell[t], steps.gates[t], steps.cell[t]});
      of_hidden[t] = p;
    }
    output = at::stack(of_hidden);
    hidden = p;
    cell = q;

    const Tensor through_weight = v_weight.defined() ? at::matmul(first.gates, v_weight) : Tensor();
    Tensor dh, dc = zeros;
    for (int64_t t = count; t-- > 0;) {
      if (dh.defined()) {
        Tensor through_time;
        std::tie(through_time, dc) = call(Backward{dh, dc, steps.gates[t], steps.cell[t]});
        of_gates[t] = of_gates[t] + through_time;
      }
      dc = dc + of_cell[t];
      dh = through_weight.defined() ? at::addmm(through_weight[t], of_gates[t], weight)
                                    : at::mm(of_gates[t], weight);
    }
    gates = at::stack(of_gates);
    first_hidden = dh;
    first_cell = dc;
    if (needs_weight) {
      of_weight =
          product_of_steps(gates, steps.hidden) + product_of_steps(first.gates, at::stack(from_hidden));
    }
  }
};

// What was the first operand of the node that is being differentiated, where only its place in the graph
// matters.
Tensor in_place_of_first(const Tensor& value) {
  Tensor tensor = value;
  torch::autograd::impl::set_gradient_edge(tensor, torch::autograd::get_current_node()->next_edge(0));
  return tensor;
}

struct OfLayerBackward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    Steps steps{saved[0], saved[1], saved[2]};
    const Tensor &weight = saved[3], &first_hidden = saved[4], &first_cell = saved[5];
    const auto run = [&](const BackwardRun& first) -> variable_list {
      const DoubleBackwardRun r(
          grads[0], grads[1], grads[2], grads[3], steps, first, weight, /*needs_weight=*/needs[6]);
      return {r.gates, r.output, r.hidden, r.cell, r.first_hidden, r.first_cell, r.of_weight};
    };
    if (!c10::GradMode::is_enabled()) {
      return run(BackwardRun(saved[9], saved[10], saved[11]));
    }
    Tensor input;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      input = steps.gates - at::matmul(steps.hidden, weight.t());
    }
    const Run again(in_place_of_first(input), first_hidden, first_cell, weight);
    steps = Steps::of(again.gates, again.cells, first_hidden, again.output);
    return run(BackwardRun(saved[6], saved[7], saved[8], steps, weight));
  }
};

struct OfLayer {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    const Tensor &weight = saved[3], &first_hidden = saved[4], &first_cell = saved[5];
    Tensor input;
    if (c10::GradMode::is_enabled()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      input = in_place_of_first(at::empty({1}, saved[0].options()).expand_symint(saved[0].sym_sizes()));
    }
    return record<OfLayerBackward>(
        {input, grads[0], grads[1], grads[2], first_hidden, first_cell, weight}, {},
        [&](variable_list& kept) -> variable_list {
          const auto steps = Steps::of(saved[0], saved[2], first_hidden, saved[1]);
          const BackwardRun run(grads[0], grads[1], grads[2], steps, weight);
          kept = saved;
          kept[1] = steps.hidden;
          kept.insert(kept.end(), {grads[0], grads[1], grads[2], run.gates, run.hidden, run.cell});
          return {
              run.gates, run.first_hidden, run.first_cell,
              needs[3] ? product_of_steps(run.gates, steps.hidden) : Tensor()};
        });
  }
};

// The output (T, B, H) and the last h and c, of what does not depend on h, (T, B, 4H).
TensorTriple layer(
    const Tensor& input, const Tensor& first_hidden, const Tensor& first_cell, const Tensor& weight) {
  return to_tuple<3>(record<OfLayer>(
      {input, first_hidden, first_cell, weight}, {}, [&](variable_list& saved) -> variable_list {
        const Run run(input, first_hidden, first_cell, weight);
        saved = {run.gates, run.output, run.cells, weight, first_hidden, first_cell};
        return {run.output, run.hidden, run.cell};
      }));
}

// Whether ours are about to be differentiated, and can be.
bool is_covered(const Tensor& input, at::TensorList hx, at::TensorList params) {
  const auto is_like_input = [&](const Tensor& t) {
    return t.defined() && t.scalar_type() == input.scalar_type() && t.device() == input.device() &&
           is_elementwise_match(t, t) && !needs_composite(t);
  };
  return hx.size() == 2 && hx[0].sym_sizes() == hx[1].sym_sizes() && is_like_input(input) &&
         std::all_of(hx.begin(), hx.end(), is_like_input) &&
         std::all_of(params.begin(), params.end(), is_like_input) &&
         torch::autograd::compute_requires_grad(input, hx, params) &&
         !at::autocast::is_autocast_enabled(input.device().type());
}

struct AtenLstm : Override<AtenLstm> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, at::TensorList hx, at::TensorList params,
      bool has_biases, int64_t num_layers, double dropout, bool train, bool bidirectional, bool batch_first) {
    const int64_t directions = bidirectional ? 2 : 1, each = has_biases ? 4 : 2;
    if (!is_covered(input, hx, params) || input.dim() != 3 || input.sym_numel() == 0 || hx[0].dim() != 3 ||
        num_layers < 1 || hx[0].sym_size(0) != num_layers * directions ||
        hx[0].sym_size(1) != input.sym_size(batch_first ? 0 : 1) ||
        // Of projections there is one more.
        static_cast<int64_t>(params.size()) != num_layers * directions * each) {
      return stock(
          keys, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first);
    }
    Tensor x = batch_first ? input.transpose(0, 1) : input;
    std::vector<Tensor> hidden, cell;
    for (int64_t i = 0; i < num_layers; ++i) {
      std::vector<Tensor> outputs;
      for (int64_t direction = 0; direction < directions; ++direction) {
        const auto place = i * directions + direction;
        const auto p = params.slice(place * each, each);
        const auto bias = has_biases ? std::optional<Tensor>(p[2] + p[3]) : std::nullopt;
        const auto ordered = [&](const Tensor& t) { return direction ? t.flip(0) : t; };
        const auto [output, h, c] =
            layer(at::linear(ordered(x), p[0], bias), hx[0][place], hx[1][place], p[1]);
        outputs.push_back(ordered(output));
        hidden.push_back(h);
        cell.push_back(c);
      }
      x = bidirectional ? at::cat(outputs, -1) : outputs[0];
      if (dropout > 0 && train && i + 1 < num_layers) {
        x = at::dropout(x, dropout, train);
      }
    }
    return {batch_first ? x.transpose(0, 1) : x, at::stack(hidden), at::stack(cell)};
  }
};

struct AtenLstmCell : Override<AtenLstmCell> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& input, at::TensorList hx, const Tensor& w_ih,
      const Tensor& w_hh, const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh) {
    std::vector<Tensor> params{w_ih, w_hh};
    for (const auto& bias : {b_ih, b_hh}) {
      if (bias && bias->defined()) {
        params.push_back(*bias);
      }
    }
    if (!is_covered(input, hx, params) || input.dim() != 2 || hx[0].dim() != 2) {
      return stock(keys, input, hx, w_ih, w_hh, b_ih, b_hh);
    }
    return call(Forward{at::linear(input, w_ih, b_ih) + at::linear(hx[0], w_hh, b_hh), hx[1]});
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenLstm::install_whole(aten, "lstm.input");
  AtenLstmCell::install_whole(aten, "lstm_cell");
});

}  // namespace
}  // namespace gradnorm_kernels::lstm
