"""Batch normalisation on the CPU: its table, and what is its own."""

from dataclasses import dataclass

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import OPS, Call, Case, OpContract, assert_close, each_dtype, flat
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
    parameters = 2

    def __str__(self):
        words = ["x".join(map(str, self.shape)), "train" if self.training else "eval"]
        return "-".join(words + ["plain"] * (not self.affine) + ["channels_last"] * self.channels_last)

    @property
    def wrong_transforms(self):
        return self.training and "PyTorch's third order and nested forward mode are wrong (#186779, #196700)"

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

    def same_bits(self, operands):
        return False

    def statistics(self, x):
        """The running ones, then those that the forward saves."""
        if not self.training:
            return *self.running(x), None, None
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        variance, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        return None, None, mean, (variance + EPS).rsqrt()

    def calls(self, operands):
        (x, w, b), g = operands.inputs, operands.grad_output
        yield Call("batch_norm", (x, w, b, *self.running(x), self.training, 0.1, EPS))
        tail = (x, w, *self.statistics(x), self.training, EPS)
        yield Call("batch_norm_backward", (g, *tail, [True, w is not None, b is not None]))
        yield Call("batch_norm_double_backward", (*operands.grad_grads, g, *tail))

    @property
    def large(self):
        shape = {2: (4096, 33), 3: (64, 4, 512), 4: (64, 4, 32, 32), 5: (64, 4, 8, 8, 16)}[len(self.shape)]
        return BatchNorm(shape, self.training, self.affine, self.channels_last)

    def passes(self, switch):
        """In training each pass but the forward's output is read twice."""
        if 0 in self.shape:
            return None
        first, double = "native_batch_norm_backward", "batch_norm_double_backward"
        if self.training:
            return [(None, 2), ([first], 3), ([double], 5), ([first], 3)]
        first = "native_batch_norm_backward" if switch else "batch_norm_backward"
        return [(None, None), ([first], 3 if switch else 2), ([double], 3), (["batch_norm_backward"], 2)]


# Channels that do not fill a vector; rows of less than one vector, and of some and a remainder; several
# chunks of rows, and of a row; no element.
SHAPES = [
    (6, 5),
    (4, 3, 7),
    (3, 2, 3, 2),
    (3, 19, 7, 11),
    (700, 33),
    (2, 2, 40, 50),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]
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
    traced = ("4x3x7-train", "4x3x7-eval", "3x2x3x2-train")
    kernels = (
        "3x19x7x11-train",
        "3x19x7x11-eval",
        "3x19x7x11-train-channels_last",
        "3x19x7x11-eval-channels_last",
    )
    # Another shape may be right, and PyTorch's own forward has its own words for a mixture of dtypes.
    accepted = (
        ("batch_norm", "input", "shape"),
        ("batch_norm", "input", "dtype"),
        *(("", name, "dtype") for name in ("weight", "bias", "running_mean", "running_var", "save_mean")),
        *(("", name, "dtype") for name in ("save_invstd", "grad_grad_weight", "grad_grad_bias")),
    )
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
    random_cases = st.builds(
        BatchNorm,
        st.tuples(st.integers(8, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
        *[st.booleans()] * 3,
    )

    def check_strides(self, case, operands, results):
        assert flat(results)[0].stride() == case.stock(*operands.inputs).stride()

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
@pytest.mark.parametrize("case", CASES[:10], ids=str)
def test_strided_running_statistics(case, switch):
    """Of which ATen's own kernels on the CPU get some gradients wrong."""

    class Strided(BatchNorm):
        def running(self, like):
            return [torch.stack([t, t.cos()], -1)[:, 0] for t in super().running(like)]

    strided = Strided(case.shape, case.training)
    operands = case.draw()
    with gk.set_fused_double_backward(switch):
        ours = operands.orders(strided.stock if switch else strided.fused)
    assert_close(ours, operands.orders(case.reference))


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
