"""Batch normalisation on the CPU: its table, and what is its own."""

import math
from dataclasses import astuple, dataclass

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import (
    OPS,
    Call,
    Case,
    OpContract,
    assert_close,
    channels_last,
    each_dtype,
    flat,
    penalised_gradients,
    strides,
)
from hypothesis import strategies as st

import gradnorm_kernels as gk

EPS = 1e-3


@dataclass(frozen=True)
class BatchNorm(Case):
    shape: tuple[int, ...]
    training: bool
    affine: bool = True
    channels_last: bool = False
    names = ("input", "weight", "bias")
    constants = ("running_mean", "running_var")
    parameters = 2

    def __str__(self):
        words = ["x".join(map(str, self.shape)), "train" if self.training else "eval"]
        return "-".join(words + ["plain"] * (not self.affine) + ["channels_last"] * self.channels_last)

    def shapes(self):
        of_channels = self.shape[1:2] if self.affine else None
        return self.shape, of_channels, of_channels

    def running(self, like):
        """Mean and variance, of values that every dtype represents."""
        channels = torch.arange(self.shape[1], dtype=like.dtype, device=like.device)
        return (channels % 7 - 3) / 4, (channels % 5 + 2) / 4

    def bound(self, function, x, weight, bias):
        running = (None, None) if self.training else self.running(x if weight is None else weight)
        return function(x, *running, weight, bias, self.training, eps=EPS)

    def fused(self, x, weight, bias):
        return self.bound(gk.functional.batch_norm, x, weight, bias)

    def stock(self, x, weight, bias):
        return self.bound(F.batch_norm, x, weight, bias)

    def reference(self, x, weight, bias):
        return self.bound(reference.batch_norm, x, weight, bias)

    def roundings(self, dtype):
        # PyTorch's statistics of channels_last add up many values one after the other.
        many = self.training and math.prod(self.shape) > 1000 * self.shape[1]
        return 16 if many and dtype == torch.float32 else 0

    def same_bits(self, operands):
        return False

    def statistics(self, x, weight):
        """The running ones, then those that the forward saves."""
        if not self.training:
            return *self.running(x), None, None
        variance, mean = torch.var_mean(x.detach().double(), [0, *range(2, x.ndim)], correction=0)
        dtype = (x if weight is None else weight).dtype
        return None, None, mean.to(dtype), (variance + EPS).rsqrt().to(dtype)

    def calls(self, operands):
        (x, w, b), g = operands.inputs, operands.grad_output
        yield Call("batch_norm", (x, w, b, *self.running(x), self.training, 0.1, EPS))
        tail = (x, w, *self.statistics(x, w), self.training, EPS)
        yield Call("batch_norm_backward", (g, *tail, [True, w is not None, b is not None]))
        yield Call("batch_norm_double_backward", (*operands.grad_grads, g, *tail))

    def is_pytorchs(self, call):
        return call.name == "batch_norm" or (self.training and call.name == "batch_norm_backward")

    @property
    def large(self):
        shape = {2: (4096, 33), 3: (64, 4, 512), 4: (64, 4, 32, 32), 5: (64, 4, 8, 8, 16)}[len(self.shape)]
        return BatchNorm(shape, self.training, self.affine, self.channels_last)

    def passes(self, switch):
        """In training each pass but the forward's output is read twice."""
        if 0 in self.shape:
            return None
        first, double = ["batch_norm_backward"], ["batch_norm_double_backward"]
        stock = ["native_batch_norm_backward"]
        if self.training:
            return [(None, 2), (stock, 3), (double, 5), (stock, 3)]
        # Without a weight the double backward is linear in grad_grad_input alone.
        second = (double, 3) if self.affine else (first, 2)
        return [(None, 2), (stock, 3) if switch else (first, 2), second, (first, 2)]


# Channels that do not fill a vector; rows of less than one vector, and of some and a remainder; several
# chunks of rows, and of a row; no element.
SHAPES = [(6, 5), (4, 3, 7), (3, 2, 3, 2), (3, 19, 7, 11), (700, 33), (2, 2, 40, 50)]
SHAPES += [(0, 3, 4, 4), (2, 3, 0, 4)]
STATISTICS = ("running_mean", "running_var", "save_mean", "save_invstd")
MODES = [True, False]
CASES = [
    *(BatchNorm(shape, training) for shape in SHAPES for training in MODES),
    *(BatchNorm((3, 19, 7, 11), training, channels_last=True) for training in MODES),
    *(BatchNorm((3, 19, 7, 11), training, affine=False) for training in MODES),
    *(BatchNorm((4, 3, 4), training, affine=False) for training in MODES),
    BatchNorm((2, 20, 2, 3, 5), True, channels_last=True),
    BatchNorm((2, 20, 2, 3, 5), False),
]


class TestBatchNorm(OpContract):
    cases = CASES
    traced = ("4x3x7-train", "3x2x3x2-eval")
    kernels = tuple(f"3x19x7x11-{way}{end}" for way in ("train", "eval") for end in ("", "-channels_last"))
    schemas = """
        batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,
            Tensor(b!)? running_var, bool training, float momentum, float eps) -> Tensor;
        batch_norm_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean,
            Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool training, float eps,
            bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias,
            Tensor grad_output, Tensor? input, Tensor? weight, Tensor? running_mean, Tensor? running_var,
            Tensor? save_mean, Tensor? save_invstd, bool training, float eps)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)
    """
    # Another shape of input is one, and so is float64 or an error of PyTorch's own.
    accepted = (
        ("batch_norm", "", "dtype"),
        ("batch_norm", "input", "shape"),
        *(("", name, "dtype") for name in ("weight", *STATISTICS, "grad_grad_weight", "grad_grad_bias")),
    )
    random_cases = st.builds(
        BatchNorm,
        st.tuples(st.integers(8, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
        *[st.booleans()] * 3,
    )

    def check_strides(self, case, operands, results):
        x, g, v = operands.inputs[0], operands.grad_output, operands.grad_grads[0]
        assert strides(results[0][0]) == strides(case.stock(*operands.inputs))
        dense = torch.empty(x.shape)
        if strides(x) == strides(g) == strides(v) in (strides(dense), strides(channels_last(dense))):
            assert all(strides(t) == strides(x) for t in flat(results) if t.shape == x.shape)

    def test_any_strides(self, case, layout, ours):
        if layout == "expanded" and len(case.shape) == 2:
            pytest.skip("all values of a channel would be the same one")
        super().test_any_strides(case, layout, ours)

    def bad(self):
        good = {
            "input": torch.randn(4, 3),
            "running_mean": torch.zeros(3),
            "running_var": torch.ones(3),
            "weight": torch.ones(3),
            "bias": torch.zeros(3),
        }
        for arguments, error, name in (
            ({"input": torch.randn(3)}, ValueError, "input"),
            ({"input": torch.randn(1, 3), "training": True}, ValueError, "input"),
            ({"running_mean": None}, ValueError, "running_mean"),
            ({"running_var": None, "training": True}, ValueError, "running_var"),
            ({"running_mean": torch.zeros(3, requires_grad=True)}, ValueError, "running_mean"),
        ):
            call = lambda a=arguments: gk.functional.batch_norm(**(good | a))  # noqa: E731
            yield call, error, f"batch_norm: expected .*{name}"
        x, c = torch.randn(4, 3), torch.ones(3)
        statistics, mask = (c, c, c, c, False, EPS), [True, True, True]
        backward, double = OPS.batch_norm_backward, OPS.batch_norm_double_backward
        no_input = "_backward: expected input to be given"
        yield lambda: backward(x, None, c, *statistics, mask), ValueError, no_input
        no_input = "_double_backward: expected input to be given"
        yield lambda: double(x, c, c, x, None, c, *statistics), ValueError, no_input
        no_mean = "_backward: expected save_mean to be given where training is True"
        yield lambda: backward(x, x, c, c, c, None, None, True, EPS, mask), ValueError, no_mean


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not case.training], ids=str)
def test_strided_running_statistics(case, switch):
    """Of which ATen's own kernels on the CPU get some gradients wrong."""

    class Strided(BatchNorm):
        def running(self, like):
            return [torch.stack([t, t.cos()], -1)[:, 0] for t in super().running(like)]

    strided = Strided(*astuple(case))
    operands = case.draw()
    with gk.set_fused_double_backward(switch):
        ours = operands.orders(strided.stock if switch else strided.fused)
    assert_close(ours, operands.orders(case.reference))


@each_dtype
@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case.shape], ids=str)
def test_what_is_pytorchs_has_its_bits(case, dtype):
    """All but the derivatives of the evaluation mode, and the second order."""
    operands = case.draw(dtype)
    (output, first, _), (stock_output, stock_first, _) = map(operands.orders, (case.fused, case.stock))
    assert torch.equal(*output, *stock_output)
    assert not case.training or all(map(torch.equal, first, stock_first))


@pytest.mark.parametrize("switch", [False, True])
def test_compiled_step_updates_running_statistics(switch, fresh_dynamo):
    case = BatchNorm((4, 3, 5), True)
    inputs = case.draw().inputs

    def step(running):
        def function(x, w, b):
            norm = F.batch_norm if switch else gk.functional.batch_norm
            return norm(x, *running, w, b, True, eps=EPS)

        return penalised_gradients(function, inputs)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with gk.set_fused_double_backward(switch):
        running, expected = case.running(inputs[0]), case.running(inputs[0])
        assert_close(compiled(running), penalised_gradients(case.reference, inputs))
        step(expected)
    assert_close(running, expected)
    assert not torch.equal(expected[0], case.running(inputs[0])[0])


@each_dtype
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics_are_stocks(dtype, momentum):
    case = BatchNorm((4, 3, 5, 5), True)
    x, w, b = case.draw(dtype).inputs

    def run(function, x, call=lambda function, *args: function(*args)):
        running = [t.clone() for t in case.running(x)]
        for _ in range(3):
            call(function, x, *running, w, b, True, momentum)
        return running

    def transformed(function, x, *args):
        torch.func.grad(lambda x: function(x, *args).sum())(x)

    expected = run(F.batch_norm, x)
    for leaf in (x, x.clone().requires_grad_()):
        assert all(map(torch.equal, run(gk.functional.batch_norm, leaf), expected))
    assert_close(run(gk.functional.batch_norm, x, transformed), expected, rtol=1e-2, atol=1e-3)


def test_updated_statistics_are_not_used_silently():
    """A graph of the evaluation mode, differentiated after a step in training, is an error."""
    case = BatchNorm((4, 3, 5), False)
    x, w, b = case.draw().inputs
    running = case.running(x)
    output = gk.functional.batch_norm(x.requires_grad_(), *running, w, b)
    gk.functional.batch_norm(x, *running, w, b, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_channels():
    x = torch.empty(2, 0, 3, requires_grad=True)
    output = gk.functional.batch_norm(x, None, None, training=True)
    assert output.shape == x.shape == torch.autograd.grad(output.sum(), x)[0].shape
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gk.functional.batch_norm(x[:1, :, :1], None, None, training=True)


def test_switch_leaves_the_rest_to_pytorch():
    """What ours does not cover works while the switch is on, and all is PyTorch's again when it is off."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    with gk.set_fused_double_backward(True):
        norm = torch.nn.BatchNorm1d(3)
        (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        assert "NativeBatchNormBackward" not in grad.grad_fn.name()
        empty = torch.empty(0, 3, 5, requires_grad=True)
        torch.autograd.grad(norm(empty).sum(), empty, create_graph=True)
    (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    assert "NativeBatchNormBackward" in grad.grad_fn.name()
