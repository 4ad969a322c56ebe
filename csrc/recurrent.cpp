// Recurrent networks: the CPU, meta and composite implementations of a cell's step, how it and a layer's
// recurrence are differentiated, and the overrides of PyTorch's lstm, gru and lstm_cell.
//
// A layer's steps are a_t = x_t + h_{t-1} W^T, with x_t all that does not depend on h, and (h_t, c_t) =
// step(a_t, c_{t-1}). Its backward goes through time once, a product and a step's backward each time;
// gradients of W are one product of all steps. The double backward goes through it twice: forward with the
// gradients of the first backward's results, backward with what these leave at a, h and c.
#include "cpu/recurrent.h"

#include <ATen/autocast_mode.h>

#include "op.h"

namespace gradnorm_kernels::recurrent {
namespace {

std::vector<Tensor> each_gate(const Tensor& gates) {
  return gates.chunk(4, -1);
}

void check_step(
    const char* op, std::initializer_list<NamedTensor> like_gates,
    std::initializer_list<NamedTensor> like_state) {
  check_elementwise(op, like_gates);
  check_elementwise(op, like_state);
  const auto &gates = *like_gates.begin(), &state = *like_state.begin();
  check_floating(op, {gates, state});
  auto sizes = state.tensor.sym_sizes().vec();
  if (!sizes.empty()) {
    sizes.back() *= 4;
  }
  TORCH_CHECK_VALUE(
      !sizes.empty() && gates.tensor.sym_sizes() == sizes, op,
      ": expected gates to have four times the columns of state (", state.tensor.sym_sizes(), "), got ",
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

// The step by plain ops.
template <class Cell>
auto by_parts(const Tensor& gates, const Tensor& state) {
  const auto a = each_gate(to_opmath(gates));
  return typename Cell::template Step<Tensor>(a[0], a[1], a[2], a[3], to_opmath(state));
}

template <class Cell>
struct DoubleBackward {
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  static std::string schema() {
    return std::string(Cell::name) +
           "_double_backward(Tensor grad_grad_gates, Tensor grad_grad_state, Tensor grad_hidden, "
           "Tensor grad_next_state, Tensor gates, Tensor state) -> (Tensor grad_grad_hidden, "
           "Tensor grad_grad_next_state, Tensor grad_gates, Tensor grad_state)";
  }
  const Tensor &grad_grad_gates, &grad_grad_state, &grad_hidden, &grad_next_state, &gates, &state;
  auto tie() const {
    return std::tie(grad_grad_gates, grad_grad_state, grad_hidden, grad_next_state, gates, state);
  }
  auto differentiable() const {
    return tie();
  }

  void check() const {
    check_step(
        name_of<DoubleBackward>(), {{"gates", gates}, {"grad_grad_gates", grad_grad_gates}},
        {{"state", state},
         {"grad_hidden", grad_hidden},
         {"grad_next_state", grad_next_state},
         {"grad_grad_state", grad_grad_state}});
  }
  Result composite() const {
    check();
    const auto v = each_gate(to_opmath(grad_grad_gates));
    const auto grads = by_parts<Cell>(gates, state)
                           .second(
                               {v[0], v[1], v[2], v[3], to_opmath(grad_grad_state)}, to_opmath(grad_hidden),
                               to_opmath(grad_next_state));
    const auto narrow = [&](const Tensor& t) { return t.to(state.scalar_type()); };
    return {
        narrow(grads[0]), narrow(grads[1]), narrow(at::cat({grads[2], grads[3], grads[4], grads[5]}, -1)),
        narrow(grads[6])};
  }
  Result cpu() const {
    const auto results = meta();
    const auto& [of_hidden, of_next, of_gates, of_state] = results;
    auto inputs = with_each_gate({}, grad_grad_gates, {grad_grad_state, grad_hidden, grad_next_state});
    const auto operands = with_each_gate({}, gates, {state});
    inputs.insert(inputs.end(), operands.begin(), operands.end());
    auto iter = step_iterator(with_each_gate({of_hidden, of_next}, of_gates, {of_state}), inputs);
    Cell::kernels().double_backward(iter);
    return results;
  }
  Result meta() const {
    check();
    return {
        empty_contiguous(state), empty_contiguous(state), empty_contiguous(gates), empty_contiguous(state)};
  }
};

template <class Cell>
struct OfBackward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    const Tensor v = or_zeros(grads[0], saved[2]), of_state = or_zeros(grads[1], saved[3]);
    return to_list(call(DoubleBackward<Cell>{v, of_state, saved[0], saved[1], saved[2], saved[3]}));
  }
};

template <class Cell>
struct Backward {
  static std::string schema() {
    return std::string(Cell::name) +
           "_backward(Tensor grad_hidden, Tensor grad_next_state, Tensor gates, Tensor state) -> "
           "(Tensor grad_gates, Tensor grad_state)";
  }
  const Tensor &grad_hidden, &grad_next_state, &gates, &state;
  auto tie() const {
    return std::tie(grad_hidden, grad_next_state, gates, state);
  }

  void check() const {
    check_step(
        name_of<Backward>(), {{"gates", gates}},
        {{"state", state}, {"grad_hidden", grad_hidden}, {"grad_next_state", grad_next_state}});
  }
  TensorPair composite() const {
    check();
    const auto grads =
        by_parts<Cell>(gates, state).gradients(to_opmath(grad_hidden), to_opmath(grad_next_state));
    return {
        at::cat({grads[0], grads[1], grads[2], grads[3]}, -1).to(state.scalar_type()),
        grads[4].to(state.scalar_type())};
  }
  TensorPair cpu() const {
    const auto results = meta();
    auto iter = step_iterator(
        with_each_gate({}, std::get<0>(results), {std::get<1>(results)}),
        with_each_gate({grad_hidden, grad_next_state}, gates, {state}));
    Cell::kernels().backward(iter);
    return results;
  }
  TensorPair meta() const {
    check();
    return {empty_contiguous(gates), empty_contiguous(state)};
  }
  TensorPair autograd() const {
    if (needs_composite(grad_hidden, grad_next_state, gates, state)) {
      return composite();
    }
    return to_tuple<2>(
        record<OfBackward<Cell>>({grad_hidden, grad_next_state, gates, state}, {}, [&](variable_list& saved) {
          saved = {grad_hidden, grad_next_state, gates, state};
          return to_list(call(*this));
        }));
  }
};

template <class Cell>
struct OfForward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs, const Settings&) {
    const Tensor grad_hidden = or_zeros(grads[0], saved[1]), grad_next = or_zeros(grads[1], saved[1]);
    return to_list(call(Backward<Cell>{grad_hidden, grad_next, saved[0], saved[1]}));
  }
};

// h and c of a step.
template <class Cell>
struct Forward {
  static std::string schema() {
    return std::string(Cell::name) + "(Tensor gates, Tensor state) -> (Tensor hidden, Tensor next_state)";
  }
  const Tensor &gates, &state;
  auto tie() const {
    return std::tie(gates, state);
  }

  void check() const {
    check_step(name_of<Forward>(), {{"gates", gates}}, {{"state", state}});
  }
  TensorPair composite() const {
    check();
    const auto values = by_parts<Cell>(gates, state).values();
    return {values[0].to(state.scalar_type()), values[1].to(state.scalar_type())};
  }
  TensorPair cpu() const {
    const auto results = meta();
    auto iter =
        step_iterator({std::get<0>(results), std::get<1>(results)}, with_each_gate({}, gates, {state}));
    Cell::kernels().forward(iter);
    return results;
  }
  TensorPair meta() const {
    check();
    return {empty_contiguous(state), empty_contiguous(state)};
  }
  TensorPair autograd() const {
    if (needs_composite(gates, state)) {
      return composite();
    }
    return to_tuple<2>(record<OfForward<Cell>>({gates, state}, {}, [&](variable_list& saved) {
      saved = {gates, state};
      return to_list(call(*this));
    }));
  }
  // Where gates come from products of a lower precision.
  TensorPair autocast() const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto wider = at::promote_types(gates.scalar_type(), state.scalar_type());
    return call(Forward<Cell>{gates.to(wider), state.to(wider)});
  }
};

template <class Cell>
using Ops = Registration<Forward<Cell>, Backward<Cell>, DoubleBackward<Cell>>;

struct Lstm {
  static constexpr auto name = "lstm_step";
  template <class V>
  using Step = LstmStep<V>;
  static const RecurrentKernels& kernels() {
    return GRADNORM_KERNELS(lstm_kernels);
  }
};
const Ops<Lstm> lstm_ops;

struct Gru {
  static constexpr auto name = "gru_step";
  template <class V>
  using Step = GruStep<V>;
  static const RecurrentKernels& kernels() {
    return GRADNORM_KERNELS(gru_kernels);
  }
};
const Ops<Gru> gru_ops;

// A layer's steps: a, and what h and c, the state, were before each; all of shape (T, B, ...).
struct Steps {
  Tensor gates, hidden, state;

  // The output is every h but the first.
  static Steps of(
      const Tensor& gates, const Tensor& state, const Tensor& first_hidden, const Tensor& output) {
    const Tensor others = output.narrow(0, 0, output.size(0) - 1);
    return {gates, at::cat({first_hidden.unsqueeze(0), others}), state};
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

// What a layer's steps were given, its output, and the last h and c; differentiable as far as the step
// is.
template <class Cell>
struct Run {
  Tensor gates, states, output, hidden, state;

  Run(const Tensor& input, const Tensor& first_hidden, const Tensor& first_state, const Tensor& weight)
      : hidden(first_hidden), state(first_state) {
    std::vector<Tensor> of_gates, of_state, of_hidden;
    for (const auto& x : input.unbind()) {
      of_state.push_back(state);
      of_gates.push_back(at::addmm(x, hidden, weight.t()));
      std::tie(hidden, state) = call(Forward<Cell>{of_gates.back(), state});
      of_hidden.push_back(hidden);
    }
    gates = at::stack(of_gates);
    states = at::stack(of_state);
    output = at::stack(of_hidden);
  }
};

// The gradients of a layer's a, and of its first h and c. Undefined ones of its results are 0.
template <class Cell>
struct BackwardRun {
  Tensor gates, first_hidden, first_state;
  Tensor hidden, state;  // those that each step was given, (T, B, H)

  // One that was kept.
  BackwardRun(const Tensor& gates, const Tensor& hidden, const Tensor& state)
      : gates(gates), hidden(hidden), state(state) {}
  BackwardRun(
      const Tensor& grad_output, const Tensor& grad_hidden, const Tensor& grad_state, const Steps& steps,
      const Tensor& weight) {
    std::vector<Tensor> of_gates(steps.count()), of_hidden(steps.count()), of_state(steps.count());
    const Tensor zeros = zeros_like_step(steps.state);
    Tensor dh = grad_hidden, dc = grad_state.defined() ? grad_state : zeros;
    for (int64_t t = steps.count(); t-- > 0;) {
      dh = plus(dh, grad_output.defined() ? grad_output[t] : Tensor());
      of_hidden[t] = dh = dh.defined() ? dh : zeros;
      of_state[t] = dc;
      std::tie(of_gates[t], dc) = call(Backward<Cell>{dh, dc, steps.gates[t], steps.state[t]});
      dh = at::mm(of_gates[t], weight);
    }
    gates = at::stack(of_gates);
    first_hidden = dh;
    first_state = dc;
    hidden = at::stack(of_hidden);
    state = at::stack(of_state);
  }
};

// The gradients of all that the gradients of a layer are functions of, with those of the latter: v of the
// gates', first h's, first c's and weight's.
template <class Cell>
struct DoubleBackwardRun {
  Tensor output, hidden, state;  // what the first backward was given
  Tensor gates, first_hidden, first_state, of_weight;

  DoubleBackwardRun(
      const Tensor& v_gates, const Tensor& v_hidden, const Tensor& v_state, const Tensor& v_weight,
      const Steps& steps, const BackwardRun<Cell>& first, const Tensor& weight, bool needs_weight) {
    const auto count = steps.count();
    const Tensor zeros = zeros_like_step(steps.state);
    // Of the gradients of a, before what each step leaves for the next.
    Tensor v = v_gates;
    if (v_weight.defined()) {
      v = plus(v, at::matmul(steps.hidden, v_weight.t()));
    }
    std::vector<Tensor> from_hidden(count), of_hidden(count), of_gates(count), of_state(count);
    Tensor p = v_hidden.defined() ? v_hidden : zeros, q = v_state.defined() ? v_state : zeros;
    for (int64_t t = 0; t < count; ++t) {
      const Tensor at_gates = v.defined() ? at::addmm(v[t], p, weight.t()) : at::mm(p, weight.t());
      from_hidden[t] = p;
      std::tie(p, q, of_gates[t], of_state[t]) = call(
          DoubleBackward<Cell>{at_gates, q, first.hidden[t], first.state[t], steps.gates[t], steps.state[t]});
      of_hidden[t] = p;
    }
    output = at::stack(of_hidden);
    hidden = p;
    state = q;

    const Tensor through_weight = v_weight.defined() ? at::matmul(first.gates, v_weight) : Tensor();
    Tensor dh, dc = zeros;
    for (int64_t t = count; t-- > 0;) {
      if (dh.defined()) {
        Tensor through_time;
        std::tie(through_time, dc) = call(Backward<Cell>{dh, dc, steps.gates[t], steps.state[t]});
        of_gates[t] = of_gates[t] + through_time;
      }
      dc = dc + of_state[t];
      dh = through_weight.defined() ? at::addmm(through_weight[t], of_gates[t], weight)
                                    : at::mm(of_gates[t], weight);
    }
    gates = at::stack(of_gates);
    first_hidden = dh;
    first_state = dc;
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

template <class Cell>
struct OfLayerBackward {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    Steps steps{saved[0], saved[1], saved[2]};
    const Tensor &weight = saved[3], &first_hidden = saved[4], &first_state = saved[5];
    const auto run = [&](const BackwardRun<Cell>& first) -> variable_list {
      const DoubleBackwardRun<Cell> r(
          grads[0], grads[1], grads[2], grads[3], steps, first, weight, /*needs_weight=*/needs[6]);
      return {r.gates, r.output, r.hidden, r.state, r.first_hidden, r.first_state, r.of_weight};
    };
    if (!c10::GradMode::is_enabled()) {
      return run(BackwardRun<Cell>(saved[9], saved[10], saved[11]));
    }
    Tensor input;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      input = steps.gates - at::matmul(steps.hidden, weight.t());
    }
    const Run<Cell> again(in_place_of_first(input), first_hidden, first_state, weight);
    steps = Steps::of(again.gates, again.states, first_hidden, again.output);
    return run(BackwardRun<Cell>(saved[6], saved[7], saved[8], steps, weight));
  }
};

// The gradients of a layer's input, first h, first c and weight. run: the gates, outputs and states of its
// forward; input may be anything that has its place in the graph.
template <class Cell>
variable_list layer_backward(
    const variable_list& grads, const Tensor& input, const variable_list& run, const Tensor& weight,
    const Tensor& first_hidden, const Tensor& first_state, bool needs_weight) {
  return record<OfLayerBackward<Cell>>(
      {input, grads[0], grads[1], grads[2], first_hidden, first_state, weight}, {},
      [&](variable_list& saved) -> variable_list {
        const auto steps = Steps::of(run[0], run[2], first_hidden, run[1]);
        const BackwardRun<Cell> first(grads[0], grads[1], grads[2], steps, weight);
        saved = {steps.gates, steps.hidden, steps.state, weight,      first_hidden, first_state,
                 grads[0],    grads[1],     grads[2],    first.gates, first.hidden, first.state};
        return {
            first.gates, first.first_hidden, first.first_state,
            needs_weight ? product_of_steps(first.gates, steps.hidden) : Tensor()};
      });
}

template <class Cell>
struct OfLayer {
  using Settings = std::tuple<>;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings&) {
    const auto &gates = saved[0], &weight = saved[3], &first_hidden = saved[4], &first_state = saved[5];
    Tensor input;
    if (c10::GradMode::is_enabled()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      input = in_place_of_first(at::empty({1}, gates.options()).expand_symint(gates.sym_sizes()));
    }
    return layer_backward<Cell>(grads, input, saved, weight, first_hidden, first_state, needs[3]);
  }
};

// The output (T, B, H) and the last h and c, of what does not depend on h, (T, B, 4H).
template <class Cell>
TensorTriple layer(
    const Tensor& input, const Tensor& first_hidden, const Tensor& first_state, const Tensor& weight) {
  return to_tuple<3>(record<OfLayer<Cell>>(
      {input, first_hidden, first_state, weight}, {}, [&](variable_list& saved) -> variable_list {
        const Run<Cell> run(input, first_hidden, first_state, weight);
        saved = {run.gates, run.output, run.states, weight, first_hidden, first_state};
        return {run.output, run.hidden, run.state};
      }));
}

// Whether ours are about to be differentiated, and can be.
bool is_covered_step(const Tensor& input, at::TensorList hx, at::TensorList params) {
  const auto is_like_input = [&](const Tensor& t) {
    return t.defined() && t.scalar_type() == input.scalar_type() && t.device() == input.device() &&
           is_elementwise_match(t, t) && !needs_composite(t);
  };
  return is_like_input(input) && std::all_of(hx.begin(), hx.end(), is_like_input) &&
         std::all_of(params.begin(), params.end(), is_like_input) &&
         hx.front().sym_sizes() == hx.back().sym_sizes() &&
         torch::autograd::compute_requires_grad(input, hx, params) &&
         !at::autocast::is_autocast_enabled(input.device().type());
}

// PyTorch's arguments of a network of several layers, in one direction or two. hx are the first h and, of an
// LSTM, the first c.
struct Network {
  const Tensor& input;
  at::TensorList hx, params;
  bool has_biases;
  int64_t num_layers;
  double dropout;
  bool train, bidirectional, batch_first;

  int64_t directions() const {
    return bidirectional ? 2 : 1;
  }
  // For each layer and direction: weights of the input and of h, and their biases.
  int64_t params_each() const {
    return has_biases ? 4 : 2;
  }
  // LSTMs with projections have one more for each.
  bool is_covered() const {
    return is_covered_step(input, hx, params) && input.dim() == 3 && input.sym_numel() > 0 &&
           hx[0].dim() == 3 && num_layers > 0 && hx[0].sym_size(0) == num_layers * directions() &&
           hx[0].sym_size(1) == input.sym_size(batch_first ? 0 : 1) &&
           static_cast<int64_t>(params.size()) == num_layers * directions() * params_each();
  }

  // layer(x, place, params) gives the output and the last h and c of one layer in one direction, of x
  // (T, B, input).
  template <class Layer>
  TensorTriple run(const Layer& layer) const {
    Tensor x = batch_first ? input.transpose(0, 1) : input;
    std::vector<Tensor> hidden, state;
    for (int64_t i = 0; i < num_layers; ++i) {
      std::vector<Tensor> outputs;
      for (int64_t direction = 0; direction < directions(); ++direction) {
        const auto place = i * directions() + direction;
        const auto ordered = [&](const Tensor& t) { return direction ? t.flip(0) : t; };
        const auto [output, h, c] =
            layer(ordered(x), place, params.slice(place * params_each(), params_each()));
        outputs.push_back(ordered(output));
        hidden.push_back(h);
        state.push_back(c);
      }
      x = bidirectional ? at::cat(outputs, -1) : outputs[0];
      if (dropout > 0 && train && i + 1 < num_layers) {
        x = at::dropout(x, dropout, train);
      }
    }
    return {batch_first ? x.transpose(0, 1) : x, at::stack(hidden), at::stack(state)};
  }
  // What of a layer does not depend on h.
  Tensor of_input(const Tensor& x, at::TensorList p) const {
    return at::linear(x, p[0], has_biases ? std::optional<Tensor>(p[2] + p[3]) : std::nullopt);
  }
};

// oneDNN's LSTM, which ATen takes for a layer in one direction: its forward and first backward, and ours
// where the latter is differentiated.
struct OneDnn {
  const Tensor &input, &w_ih, &w_hh, &b_ih,
      &b_hh;  // input (T, B, input); biases that are none may be anything
  const Tensor &hx, &cx;
  bool reverse;
  at::IntArrayRef batch_sizes;  // of packed sequences
  int64_t mode, hidden_size, num_layers;
  bool has_biases, bidirectional, batch_first, train;

  // As it is kept between the passes.
  using Settings = std::tuple<bool, int64_t, int64_t, int64_t, bool, bool, bool, bool>;
  Settings settings() const {
    return {reverse, mode, hidden_size, num_layers, has_biases, bidirectional, batch_first, train};
  }
  static OneDnn of(const variable_list& saved, const Settings& settings) {
    const auto& [reverse, mode, hidden_size, num_layers, has_biases, bidirectional, batch_first, train] =
        settings;
    return {saved[0], saved[1], saved[2],    saved[3],   saved[4],   saved[5],      saved[6],    reverse,
            {},       mode,     hidden_size, num_layers, has_biases, bidirectional, batch_first, train};
  }

  Tensor ordered(const Tensor& sequence) const {
    return reverse && sequence.defined() ? sequence.flip(0) : sequence;
  }
  auto forward() const {
    const c10::AutoGradMode with_workspace(true);
    return at::mkldnn_rnn_layer(
        input, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers,
        has_biases, bidirectional, batch_first, train);
  }
  // results: the forward's, the last of them oneDNN's workspace.
  variable_list backward(const variable_list& grads, at::TensorList results) const {
    return to_list(
        at::mkldnn_rnn_layer_backward(
            input, w_ih, w_hh, b_ih, b_hh, hx, cx, results[0], results[1], results[2], optional(grads[0]),
            optional(grads[1]), optional(grads[2]), reverse, mode, hidden_size, num_layers, has_biases, train,
            bidirectional, batch_sizes, batch_first, results[3]));
  }
  variable_list differentiable_backward(const variable_list& grads, Needs needs) const {
    const Tensor x = ordered(input);
    const Tensor sums = at::linear(x, w_ih, has_biases ? std::optional<Tensor>(b_ih + b_hh) : std::nullopt);
    variable_list again;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      const Run<Lstm> run(sums, hx, cx, w_hh);
      again = {run.gates, run.output, run.states};
    }
    const auto of =
        layer_backward<Lstm>({ordered(grads[0]), grads[1], grads[2]}, sums, again, w_hh, hx, cx, needs[2]);
    const Tensor of_bias = has_biases ? of[0].sum({0, 1}) : Tensor();
    return {
        ordered(at::matmul(of[0], w_ih)),
        needs[1] ? product_of_steps(of[0], x) : Tensor(),
        of[3],
        of_bias,
        of_bias,
        of[1],
        of[2]};
  }
};

struct OfOneDnn {
  using Settings = OneDnn::Settings;
  static constexpr size_t differentiable_results = 3;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto layer = OneDnn::of(saved, settings);
    return c10::GradMode::is_enabled() ? layer.differentiable_backward(grads, needs)
                                       : layer.backward(grads, at::TensorList(saved).slice(7));
  }
};

struct AtenOneDnn : Override<AtenOneDnn> {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> autograd(
      c10::DispatchKeySet keys, const Tensor& input, const Tensor& w_ih, const Tensor& w_hh,
      const Tensor& b_ih, const Tensor& b_hh, const Tensor& hx, const Tensor& cx, bool reverse,
      at::IntArrayRef batch_sizes, int64_t mode, int64_t hidden_size, int64_t num_layers, bool has_biases,
      bool bidirectional, bool batch_first, bool train) {
    constexpr int64_t lstm = 2;
    if (mode != lstm || !batch_sizes.empty() || !is_covered_step(input, {hx, cx}, {w_ih, w_hh, b_ih, b_hh})) {
      return stock(
          keys, input, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers,
          has_biases, bidirectional, batch_first, train);
    }
    const OneDnn layer{input,      w_ih,          w_hh,        b_ih, b_hh,        hx,
                       cx,         reverse,       batch_sizes, mode, hidden_size, num_layers,
                       has_biases, bidirectional, batch_first, train};
    const auto bias = [&](const Tensor& b) { return has_biases ? b : Tensor(); };
    return to_tuple<4>(record<OfOneDnn>(
        {input, w_ih, w_hh, bias(b_ih), bias(b_hh), hx, cx}, layer.settings(), [&](variable_list& saved) {
          const auto results = to_list(layer.forward());
          saved = {input, w_ih, w_hh, b_ih, b_hh, hx, cx};
          saved.insert(saved.end(), results.begin(), results.end());
          return results;
        }));
  }
};

// ATen takes it to pieces. Where these are layers of oneDNN's, it is left to.
struct AtenLstm : Override<AtenLstm> {
  static TensorTriple autograd(
      c10::DispatchKeySet keys, const Tensor& input, at::TensorList hx, at::TensorList params,
      bool has_biases, int64_t num_layers, double dropout, bool train, bool bidirectional, bool batch_first) {
    const Network network{input,   hx,    params,        has_biases, num_layers,
                          dropout, train, bidirectional, batch_first};
    const bool is_oneDnns = input.is_cpu() && input.scalar_type() != at::kDouble &&
                            at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
    if (is_oneDnns || hx.size() != 2 || !network.is_covered()) {
      return stock(
          keys, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first);
    }
    return network.run([&](const Tensor& x, int64_t place, at::TensorList p) {
      return layer<Lstm>(network.of_input(x, p), hx[0][place], hx[1][place], p[1]);
    });
  }
};

// The two sums that make n stay apart: h has no part in the first, and x none in the second but its bias.
struct AtenGru : Override<AtenGru> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& input, const Tensor& hx, at::TensorList params, bool has_biases,
      int64_t num_layers, double dropout, bool train, bool bidirectional, bool batch_first) {
    const Network network{input,   hx,    params,        has_biases, num_layers,
                          dropout, train, bidirectional, batch_first};
    if (!network.is_covered()) {
      return stock(
          keys, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first);
    }
    const auto features = hx.size(-1);
    const Tensor zeros = at::zeros({features}, hx.options());
    const auto of_gates = [&](const Tensor& t) { return t.narrow(0, 0, 2 * features); };
    const auto of_new = [&](const Tensor& t) { return t.narrow(0, 2 * features, features); };
    const auto [output, hidden, state] = network.run([&](const Tensor& x, int64_t place, at::TensorList p) {
      const auto bias =
          has_biases ? std::optional<Tensor>(p[2] + at::cat({of_gates(p[3]), zeros})) : std::nullopt;
      const Tensor of_hidden = has_biases ? of_new(p[3]) : zeros;
      const Tensor sums = at::linear(x, p[0], bias);
      const Tensor all = at::cat({sums, of_hidden.expand({x.size(0), x.size(1), features})}, -1);
      const Tensor weight = at::cat({of_gates(p[1]), zeros.expand({features, features}), of_new(p[1])});
      return layer<Gru>(all, hx[place], hx[place], weight);
    });
    return {output, hidden};
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
    if (hx.size() != 2 || !is_covered_step(input, hx, params) || input.dim() != 2 || hx[0].dim() != 2) {
      return stock(keys, input, hx, w_ih, w_hh, b_ih, b_hh);
    }
    return call(Forward<Lstm>{at::linear(input, w_ih, b_ih) + at::linear(hx[0], w_hh, b_hh), hx[1]});
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenOneDnn::install(aten, "mkldnn_rnn_layer");
  AtenLstm::install_whole(aten, "lstm.input");
  AtenGru::install_whole(aten, "gru.input");
  AtenLstmCell::install_whole(aten, "lstm_cell");
});

}  // namespace
}  // namespace gradnorm_kernels::recurrent
