"""Layer normalisation on the CPU: its table, and what is its own."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from contract import (
    LAYOUTS,
    OPS,
    Call,
    Calls,
    Case,
    OpContract,
    by_function,
    channels_last,
    each_dtype,
    flat,
    yardstick,
)
from hypothesis import strategies as st
from reference import layer_norm, rms_norm

import gradnorm_kernels as gk

EPS = 1e-5


@dataclass(frozen=True)
class LayerNorm(Case):
    """An input's shape, and how it is normalised."""

    name: str
    shape: tuple
    # Of the last dimensions; None for the channels of NCHW.
    ndim: int | None = 1
    weight: bool = True
    bias: bool = True
    names = ("input", "weight", "bias")

    @property
    def normalized_shape(self):
        return self.shape[1:2] if self.ndim is None else self.shape[-self.ndim :]

    def shapes(self):
        of = self.normalized_shape
        return self.shape, of if self.weight else None, of if self.bias else None

    def permuted(self, function, x, *args):
        """Where function is for the last dimensions."""
        if self.ndim is not None:
            return function(x, self.normalized_shape, *args)
        return function(x.permute(0, 2, 3, 1), self.normalized_shape, *args).permute(0, 3, 1, 2)

    def fused(self, x, weight, bias):
        if self.ndim is None:
            return gk.functional.layer_norm_2d(x, weight, bias, EPS)
        return gk.functional.layer_norm(x, self.normalized_shape, weight, bias, EPS)

    def stock(self, x, weight, bias):
        return self.permuted(F.layer_norm, x, weight, bias, EPS)

    def reference(self, x, weight, bias):
        return self.permuted(layer_norm, x, weight, bias, EPS)

    def statistics(self, x):
        dims = (1,) if self.ndim is None else tuple(range(-self.ndim, 0))
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        return mean, (variance + EPS).rsqrt()

    def calls(self, operands):
        x, w, b = operands.inputs
        g, statistics = operands.grad_output, self.statistics(x)
        if self.ndim is None:
            yield Call("layer_norm_2d", (x, w, b, EPS))
            yield Call("layer_norm_2d_backward", (g, x, *statistics, w, [True] * 3))
        else:
            yield Call("layer_norm", (x, self.normalized_shape, w, b, EPS))
        mask = [True, True, w is not None]
        yield Call("layer_norm_double_backward", (*operands.grad_grads, g, x, *statistics, w, mask))

    @property
    def parameters(self):
        # What PyTorch mixes: not a bias alone, and of one column it overflows.
        return 2 if (self.weight or not self.bias) and self.normalized_shape != (1,) else 0

    def roundings(self, dtype):
        if self.normalized_shape == (1,):
            return 1000  # its rstd is over 300, and multiplies what is exactly 0 for stock
        return 10 if dtype.itemsize >= 4 else 0  # sums are rounded in another order than stock's

    def same_bits(self, operands):
        return self.ndim is not None or operands.inputs[0].stride(1) != 1  # else rows' kernels

    @property
    def large(self):
        shapes = {None: (4, 128, 32, 32), 1: (512, 512), 2: (512, 16, 32)}
        return replace(self, shape=shapes[self.ndim])

    def passes(self, switch):
        forward, backward = "native_layer_norm", "native_layer_norm_backward"
        if self.ndim is None:
            forward, backward = "layer_norm_2d", "layer_norm_2d_backward"
        double = "layer_norm_double_backward"
        if 0 in self.shape or (switch and self.ndim is None):  # stock copies NCHW
            return None
        return [([forward], 2), ([backward], 3), ([double], 5), ([double], 4)]


CASES = [
    LayerNorm("odd row", (6, 7)),  # less than a vector
    LayerNorm("one column", (40, 1)),
    LayerNorm("two dimensions", (2, 3, 5, 8), ndim=2),
    LayerNorm("chunks", (150, 96)),  # three chunks of rows, and whole vectors
    LayerNorm("long row", (2, 8195)),  # several blocks of a row, and a remainder
    LayerNorm("no bias", (5, 33), bias=False),
    LayerNorm("no weight", (5, 33), weight=False),
    LayerNorm("no parameters", (5, 33), weight=False, bias=False),
    LayerNorm("no rows", (0, 4)),
    LayerNorm("no rows of two dimensions", (3, 0, 5), ndim=2),
    LayerNorm("channels", (2, 12, 3, 3), ndim=None),
    LayerNorm("channels, tiles", (3, 70, 11, 13), ndim=None),  # 143 positions: a tile of 128 and a rest
    LayerNorm("channels, chunks", (20, 6, 8, 8), ndim=None),  # more than 16 tiles
    LayerNorm("one channel", (2, 1, 3, 5), ndim=None),
    LayerNorm("channels, no bias", (2, 9, 4, 4), ndim=None, bias=False),
    LayerNorm("channels, no parameters", (2, 9, 4, 4), ndim=None, weight=False, bias=False),
    LayerNorm("no images", (0, 3, 4, 4), ndim=None),
    LayerNorm("no pixels", (2, 3, 0, 4), ndim=None),
    LayerNorm("no channels", (2, 0, 3, 4), ndim=None),
    LayerNorm("small", (4, 3)),
    LayerNorm("small, bare", (2, 2, 3), ndim=2, weight=False, bias=False),
    LayerNorm("small, channels", (2, 3, 1, 2), ndim=None),
    LayerNorm("small, channels, no bias", (1, 4, 2, 2), ndim=None, bias=False),
]


@st.composite
def random_cases(draw):
    ndim = draw(st.sampled_from([None, 1, 2]))
    # A row of two or three nearly equal values would make rstd, and every error, large.
    sizes = [(1, 3), (4, 80), (1, 12), (1, 12)] if ndim is None else [(1, 200), *[(4, 40)] * ndim]
    shape = tuple(draw(st.integers(*size)) for size in sizes)
    return LayerNorm("", shape, ndim, draw(st.booleans()), draw(st.booleans()))


class TestLayerNorm(OpContract):
    cases = CASES
    traced = ("no bias", "channels")
    kernels = ("chunks", "odd row", "channels, tiles")
    random_cases = random_cases()
    # Dtypes that the ops take, or that PyTorch's own forward refuses by itself.
    accepted = (
        ("layer_norm", "", "dtype"),
        ("layer_norm_2d", "input", "dtype"),
        *(
            ("", name, "dtype")
            for name in ("mean", "rstd", "weight", "bias", "grad_grad_weight", "grad_grad_bias")
        ),
    )
    schemas = """
        layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None,
            float eps=1.0000000000000001e-05) -> Tensor;
        layer_norm_2d(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=9.9999999999999995e-07)
            -> (Tensor output, Tensor mean, Tensor rstd);
        layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight,
            bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        layer_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias,
            Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)
    """

    def bad(self):
        x, mean, apart = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(1, 3, 1)
        double = OPS.layer_norm_double_backward
        without = (None, None, x, x)
        yield lambda: gk.functional.layer_norm(x, ()), ValueError, "expected normalized_shape"
        ends = r"input to end in normalized_shape \(\[3\]\)"
        yield lambda: gk.functional.layer_norm(x, (3,)), ValueError, ends
        yield lambda: gk.functional.layer_norm_2d(x), ValueError, r"input to be of shape \(N, C, H, W\)"
        of_weight = lambda: double(x, *without, mean, mean, None, [True] * 3)  # noqa: E731
        yield of_weight, ValueError, "expected weight, whose gradient"
        not_adjacent = lambda: double(x, *without, apart, apart, None, [True, True, False])  # noqa: E731
        yield not_adjacent, ValueError, r"expected mean .* adjacent"

    def check_strides(self, case, operands, results):
        x = operands.inputs[0]
        for t in (t for t in flat(results) if t.shape == x.shape):
            kept = case.ndim is None and x.is_contiguous(memory_format=torch.channels_last)
            assert t.is_contiguous(memory_format=torch.channels_last) if kept else t.is_contiguous()


@dataclass(frozen=True)
class RmsNorm(LayerNorm):
    """Layer normalisation's rows, without a mean and a bias."""

    bias: bool = False
    names = ("input", "weight")
    parameters = 1

    def shapes(self):
        return super().shapes()[:2]

    def fused(self, x, weight):
        return gk.functional.rms_norm(x, self.normalized_shape, weight, EPS)

    def stock(self, x, weight):
        return F.rms_norm(x, self.normalized_shape, weight, EPS)

    def reference(self, x, weight):
        return rms_norm(x, self.normalized_shape, weight, EPS)

    def calls(self, operands):
        x, w = operands.inputs
        g, (v, u) = operands.grad_output, operands.grad_grads
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        rstd = (wide.square().mean(tuple(range(-self.ndim, 0)), keepdim=True) + EPS).rsqrt()
        yield Call("rms_norm", (x, self.normalized_shape, w, EPS))
        yield Call("rms_norm_backward", (g, x, rstd, w, [True, w is not None]))
        yield Call("rms_norm_double_backward", (v, u, g, x, rstd, w, [True, True, w is not None]))

    def passes(self, switch):
        ops = ["rms_norm", "rms_norm_backward", *["rms_norm_double_backward"] * 2]
        return None if 0 in self.shape else [([op], n) for op, n in zip(ops, (2, 3, 5, 4), strict=True)]


class TestRmsNorm(OpContract):
    check_strides = TestLayerNorm.check_strides
    cases = [
        RmsNorm(case.name, case.shape, case.ndim, case.weight)
        for case in CASES
        if case.ndim is not None and case.bias
    ] + [RmsNorm("small, bare", (2, 2, 3), ndim=2, weight=False)]
    traced = ("chunks", "two dimensions")
    kernels = ("chunks", "odd row", "no weight")
    accepted = (
        ("rms_norm", "", "dtype"),
        *(("", name, "dtype") for name in ("rstd", "weight", "grad_grad_weight")),
    )
    # Under the switch they are ours: PyTorch's are chains of ops.
    test_switch_keeps_the_forward_and_the_first_backward = None
    schemas = """
        rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None)
            -> (Tensor output, Tensor rstd);
        rms_norm_backward(Tensor grad_output, Tensor input, Tensor rstd, Tensor? weight, bool[2] output_mask)
            -> (Tensor grad_input, Tensor grad_weight);
        rms_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, Tensor grad_output,
            Tensor input, Tensor rstd, Tensor? weight, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)
    """

    def bad(self):
        ends = r"input to end in normalized_shape \(\[3\]\)"
        yield lambda: gk.functional.rms_norm(torch.randn(2, 4), (3,)), ValueError, ends

    def test_inference_mode_and_meta_tensors(self, case):
        super().test_inference_mode_and_meta_tensors(case, by_function)

    def test_rstd_can_be_differentiated(self):
        """Also that of PyTorch's own, which has an output of this kind, under the switch."""
        x, w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4).double()
        for op in (OPS.rms_norm, torch.ops.aten._fused_rms_norm):
            with gk.set_fused_double_backward(True):
                torch.autograd.gradgradcheck(lambda x, op=op: op(x, [4], w, EPS), x)


@each_dtype
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 8, 1, 1)], ids=str)
def test_channels_last_gives_stocks_bits(dtype, shape):
    case = LayerNorm("", shape, ndim=None)
    operands = case.draw(dtype).map(channels_last)
    ours = flat(operands.orders(case.fused))
    with gk.set_fused_double_backward(True):
        stock = flat(operands.orders(case.stock))
    assert all(map(torch.equal, ours, stock))


def test_as_many_channels_as_there_are():
    case = LayerNorm("", (1, 4100, 2, 3), ndim=None)
    operands = case.draw()
    for a, s in zip(flat(operands.orders(case.fused)), yardstick(case, operands), strict=True):
        torch.testing.assert_close(a, s)


def test_statistics_have_no_gradient():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    output, mean, rstd = OPS.layer_norm_2d(x)
    assert output.requires_grad and not mean.requires_grad and not rstd.requires_grad


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case.shape], ids=str)
def test_strided_input_is_copied_once(case):
    """And saved as it is then: PyTorch's own op would copy it again in each pass."""
    operands = case.draw(torch.float32)
    operands.inputs[0] = LAYOUTS["sliced"](operands.inputs[0])
    x, g, v = (
        operands.inputs[0].requires_grad_(),
        operands.grad_output.requires_grad_(),
        operands.grad_grads[0],
    )
    with Calls() as calls:
        (grad_input,) = torch.autograd.grad(case.fused(x, *operands.inputs[1:]), x, g, create_graph=True)
        torch.autograd.grad(grad_input, (g, x), v)
    assert calls.names.count("clone") == (x.shape[0] * x.shape[-1] > 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**25 + 1, 64), (2**16 + 1, 64, 16, 32)], ids=["rows", "channels"])
def test_more_than_2_to_the_31_elements(shape):
    """An address that wrapped around would leave the last rows unwritten."""
    x = torch.zeros(shape, dtype=torch.bfloat16)
    x[-1].normal_()
    x[0].normal_()
    mean = torch.zeros(
        [1 if d == (1 if len(shape) == 4 else -1) % x.dim() else s for d, s in enumerate(shape)]
    )
    mean = mean.bfloat16()

    def double_backward(x, mean):
        rstd = torch.ones_like(mean)
        return OPS.layer_norm_double_backward(x, None, None, x, x, mean, rstd, None, [True, False, False])[0]

    result = double_backward(x, mean)
    for part in (slice(0, 1), slice(-1, None)):
        assert torch.equal(result[part], double_backward(x[part].clone(), mean[part].clone()))
    assert result[1:-1].count_nonzero() == 0
