"""Recurrent networks on the CPU: the table of a cell's step, and PyTorch's own under the switch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import reference
import torch
from contract import OPS, Call, Calls, Case, OpContract, assert_close
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradnorm_kernels as gk


@dataclass(frozen=True)
class Step(Case):
    """What it makes of the output and the next state lies side by side."""

    cell: str
    shape: tuple[int, ...]
    names = ("gates", "state")

    def __str__(self):
        return f"{self.cell} {self.shape}"

    def shapes(self):
        return (*self.shape[:-1], 4 * self.shape[-1]), self.shape

    def fused(self, gates, state):
        return torch.cat(getattr(OPS, f"{self.cell}_step")(gates, state), -1)

    def stock(self, gates, state):
        return torch.cat(reference.recurrent_step(self.cell, gates, state), -1)

    reference = stock

    def calls(self, operands):
        grads = operands.grad_output.chunk(2, -1)
        yield Call(f"{self.cell}_step", tuple(operands.inputs))
        yield Call(f"{self.cell}_step_backward", (*grads, *operands.inputs))
        yield Call(f"{self.cell}_step_double_backward", (*operands.grad_grads, *grads, *operands.inputs))

    def roundings(self, dtype):
        return 2  # of sums of several products

    def same_bits(self, operands):
        return False  # Products and sums are contracted in one way in whole vectors and in another in a rest.

    @property
    def large(self):
        return replace(self, shape=(300, 512))


CASES = [
    *(Step(cell, shape) for cell in ("lstm", "gru") for shape in [(2, 3, 97), (2, 2)]),
    *(Step("lstm", shape) for shape in [(0, 3), (4, 0)]),
]


class TestStep(OpContract):
    cases = CASES
    traced = ("lstm (2, 2)", "gru (2, 2)")
    outlived = 2
    random_cases = st.builds(
        Step,
        st.sampled_from(["lstm", "gru"]),
        st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    )
    schemas = ";".join(
        f"""
        {cell}_step(Tensor gates, Tensor state) -> (Tensor hidden, Tensor next_state);
        {cell}_step_backward(Tensor grad_hidden, Tensor grad_next_state, Tensor gates, Tensor state) ->
            (Tensor grad_gates, Tensor grad_state);
        {cell}_step_double_backward(Tensor grad_grad_gates, Tensor grad_grad_state, Tensor grad_hidden,
            Tensor grad_next_state, Tensor gates, Tensor state) -> (Tensor grad_grad_hidden,
            Tensor grad_grad_next_state, Tensor grad_gates, Tensor grad_state)"""
        for cell in ("lstm", "gru")
    )

    def bad(self):
        gates, state = torch.randn(3, 8), torch.randn(3, 2)
        yield lambda: OPS.lstm_step(gates[:, 1:], state), ValueError, "four times the columns of state"
        yield lambda: OPS.gru_step(gates.double(), state), TypeError, "state to have the dtype of gates"
        yield (
            lambda: OPS.lstm_step_backward(state[:2], state, gates, state),
            ValueError,
            "grad_hidden to have the shape of state",
        )


def gradients(module, inputs, order=2):
    """Of a penalty on the gradients by all inputs, by inputs and parameters; and the outputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    x, *state = leaves
    results = module(x, *([tuple(state)] if len(state) == 2 else state))
    outputs = [results[0], *results[1]] if isinstance(results[1], tuple) else list(results)
    total = sum((k + 1) * t.sin().sum() for k, t in enumerate(outputs))
    wanted = [*leaves, *module.parameters()]
    for _ in range(order - 1):
        first = torch.autograd.grad(total, wanted, create_graph=True)
        total = sum(g.cos().sum() for g in first)
    return [*outputs, *torch.autograd.grad(total, wanted)]


def assert_as_stock(module, inputs, order=2):
    expected = gradients(copy.deepcopy(module), inputs, order)
    with gk.set_fused_double_backward(True):
        assert_close(gradients(module, inputs, order), expected)


NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@each_network
@pytest.mark.parametrize("options", [{"batch_first": True}, {"bias": False}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "state"])
def test_networks(kind, options, bidirectional, has_state):
    network = NETWORKS[kind](3, 4, bidirectional=bidirectional, **options).double()
    batch = 5 if network.batch_first else 2
    shape = network.num_layers * (1 + bidirectional), batch, 4
    states = [draw(*shape) for _ in range(2 if kind == "lstm" else 1)] if has_state else []
    assert_as_stock(network, [draw(5, 2, 3), *states])


@each_network
@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 3)], ids=["one step", "not batched"])
def test_shapes(kind, shape):
    assert_as_stock(NETWORKS[kind](3, 4).double(), [draw(*shape)])


@each_network
@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders(kind, order):
    assert_as_stock(NETWORKS[kind](2, 3).double(), [draw(3, 2, 2)], order)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_onednns_layers(options, order):
    """Float32's, whose forward and first backward stay as they are."""
    lstm = nn.LSTM(3, 4, **options)
    inputs = [draw(5, 2, 3), *(draw(lstm.num_layers * (1 + lstm.bidirectional), 2, 4) for _ in range(2))]
    exact = gradients(copy.deepcopy(lstm).double(), inputs, order)
    with gk.set_fused_double_backward(True), Calls() as calls:
        results = gradients(lstm, [t.float() for t in inputs], order)
    for a, e in zip(results, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * max(e.abs().max().item(), 1))
    assert ("lstm_step" in calls.names) == (order > 1)
    assert {"mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"} <= {*calls.names}


def test_a_cell():
    cell = nn.LSTMCell(3, 4).double()
    assert_as_stock(cell, [draw(2, n) for n in (3, 4, 4)])
    assert_as_stock(nn.LSTMCell(3, 4, bias=False).double(), [draw(2, 3)], order=3)


@pytest.mark.parametrize("wanted", range(3), ids=["output", "hidden", "cell"])
def test_gradients_of_one_result(wanted):
    lstm = nn.LSTM(3, 4).double()
    x = draw(5, 2, 3).requires_grad_()

    def second(switch, needed):
        with gk.set_fused_double_backward(switch):
            output, state = lstm(x)
            (first,) = torch.autograd.grad((output, *state)[wanted].sin().sum(), x, create_graph=True)
            return torch.autograd.grad(first.sin().sum(), needed)

    for needed in ([x], [lstm.weight_hh_l0], list(lstm.parameters())):
        assert_close(second(True, needed), second(False, needed))


def test_a_frozen_input_or_weight():
    lstm = nn.LSTM(3, 4).double()
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.bias_ih_l0.requires_grad_(False)
    x = draw(5, 2, 3)

    def of_parameters(switch, order):
        wanted = [p for p in lstm.parameters() if p.requires_grad]
        with gk.set_fused_double_backward(switch):
            total = lstm(x)[0].sin().sum()
            for _ in range(order - 1):
                total = sum(g.cos().sum() for g in torch.autograd.grad(total, wanted, create_graph=True))
            return torch.autograd.grad(total, wanted)

    for order in (1, 2, 3):
        assert_close(of_parameters(True, order), of_parameters(False, order))


@each_network
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_output_changed_in_place(kind, batch_first, dtype):
    network = NETWORKS[kind](3, 4, batch_first=batch_first).to(dtype)
    x = draw(5, 2, 3).to(dtype).requires_grad_()
    with gk.set_fused_double_backward(True):
        output, state = network(x)
        with torch.no_grad():
            output[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        # Of the last ones nothing is kept.
        output, state = network(x)
        expected = torch.autograd.grad(output.sum(), x, retain_graph=True)
        with torch.no_grad():
            for last in state:
                last.zero_()
        assert_close(torch.autograd.grad(output.sum(), x), expected)


def test_hessian_is_symmetric():
    lstm = nn.LSTM(2, 2).double()

    def loss(weight):
        return torch.func.functional_call(lstm, {"weight_hh_l0": weight}, x)[0].sin().sum()

    x = draw(4, 2, 2)
    with gk.set_fused_double_backward(True):
        hessian = torch.autograd.functional.hessian(loss, lstm.weight_hh_l0.detach()).view(16, 16)
    assert_close(hessian, hessian.mT)
    assert hessian.abs().max() > 1e-3


def test_dropout_draws_what_stock_draws():
    lstm = nn.LSTM(3, 4, num_layers=3, dropout=0.5).double()
    x = draw(5, 2, 3)

    def run(switch):
        torch.manual_seed(1)
        with gk.set_fused_double_backward(switch):
            return gradients(lstm, [x])

    assert_close(run(True), run(False))


@pytest.mark.parametrize(
    "change",
    [
        lambda lstm, x: (nn.LSTM(3, 4, proj_size=2).double(), x),
        lambda lstm, x: (lstm, pack_padded_sequence(x, [5, 3])),
        lambda lstm, x: (lstm.requires_grad_(False), x),
        lambda lstm, x: (lstm, x[:, :0]),
    ],
    ids=["projections", "packed", "no gradient", "empty batch"],
)
def test_others_stay_pytorchs(change):
    lstm, x = change(nn.LSTM(3, 4).double(), draw(5, 2, 3))
    expected = lstm(x)[1]
    with Calls() as calls, gk.set_fused_double_backward(True):
        results = lstm(x)[1]
    assert_close(results, expected)
    assert "lstm_step" not in calls.names


def test_a_cell_under_autocast_stays_pytorchs():
    cell, x = nn.LSTMCell(3, 4), torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), gk.set_fused_double_backward(True), Calls() as calls:
        cell(x)
    assert "lstm_step" not in calls.names


def test_transforms_are_right():
    lstm = nn.LSTM(2, 3).double()
    x = draw(3, 2, 2)

    def loss(x):
        return lstm(x)[0].sin().sum()

    with gk.set_fused_double_backward(True):
        by_func = torch.func.hessian(loss)(x)
        by_autograd = torch.autograd.functional.hessian(loss, x)
    assert_close(by_func, by_autograd)


@each_network
def test_a_step_of_time_is_a_product_and_a_kernel(kind):
    network = NETWORKS[kind](3, 4).double()
    x = draw(16, 2, 3).requires_grad_()

    def counted(run):
        with gk.set_fused_double_backward(True), Calls() as calls:
            result = run()
        return result, {name: calls.names.count(name) for name in {*calls.names, "mm", "addmm"}}

    output, forward = counted(lambda: network(x)[0])
    first, backward = counted(lambda: torch.autograd.grad(output.sum(), x, create_graph=True)[0])
    _, last = counted(
        lambda: torch.autograd.grad(first.square().sum(), network.parameters(), allow_unused=True)
    )
    # Beside them there is what all steps have in common: the input's products and the weights' gradients.
    assert forward[f"{kind}_step"] == 16
    assert forward["addmm"] == 17
    assert backward[f"{kind}_step_backward"] == 16
    assert backward["mm"] == 17
    assert last[f"{kind}_step_double_backward"] == 16
    assert last[f"{kind}_step_backward"] == 15
    assert last["mm"] + last["addmm"] <= 16 + 16 + 5
