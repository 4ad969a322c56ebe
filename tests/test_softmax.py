"""Softmax on the CPU: its table, and what is its own: the bias, masks, mixed dtypes, what is saved."""

import gc
import math
import weakref
from dataclasses import dataclass, replace

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
from contract import DTYPES, OPS, Call, Calls, Case, OpContract, Operands, each_dtype, flat, yardstick
from hypothesis import strategies as st

import gradnorm_kernels as gk


@dataclass(frozen=True)
class Softmax(Case):
    name: str
    shape: tuple
    dim: int = -1
    bias: tuple | None = None
    log: bool = False
    names = ("input", "bias")

    @property
    def parameters(self):
        return int(bool(self.bias))  # the gradient of a single value is 0 but for rounding

    @property
    def along_rows(self):
        return self.dim in (-1, len(self.shape) - 1)

    def shapes(self):
        return self.shape, self.bias

    def fused(self, x, bias=None):
        if self.log:
            return gk.functional.log_softmax(x, self.dim)
        return gk.functional.softmax(x, self.dim, bias=bias)

    def stock(self, x, bias=None):
        function = F.log_softmax if self.log else F.softmax
        return function(x if bias is None else x + bias, self.dim)

    def reference(self, x, bias=None):
        if self.log:
            return reference.log_softmax(x, self.dim)
        return reference.softmax(x, self.dim, bias)

    def calls(self, operands):
        """A backward is of any output, not of a softmax's only."""
        (y, bias), v, g = operands.inputs, operands.grad_grads[0], operands.grad_output
        name = "log_softmax" if self.log else "softmax"
        yield Call(name, (y, self.dim, None))
        yield Call(name, (y, self.dim, torch.float64))
        if bias is not None and self.dim == -1:
            yield Call("softmax_with_bias", (y, bias, None))
            yield Call("softmax_with_bias", (y, bias, torch.float64))
        y = y.log_softmax(self.dim) if self.log else y
        yield Call("softmax_backward", (g, y, self.dim, y.dtype, self.log))
        for to_input in (False, True):
            yield Call("softmax_double_backward", (v, g, y, self.dim, to_input, self.log))

    def is_pytorchs(self, call):
        forwards = {"log_softmax"} if self.along_rows else {"log_softmax", "softmax"}
        return call.name in {"softmax_backward", *forwards}

    @property
    def unit(self):
        # The largest exponential of some normal numbers is about ten times their mean.
        return 10 / max(self.shape[self.dim], 10) if self.shape else 1

    def roundings(self, dtype):
        return 4  # which of two errors has the greater maximum is luck

    @property
    def large(self):
        if self.bias is not None:
            return self
        shape, dim = ((300, 512), -1) if self.along_rows else ((20, 64, 120), 1)
        return replace(self, shape=shape, dim=dim)

    def passes(self, switch):
        if self.bias is not None:
            return None
        if switch:
            # Our double backward and, through PyTorch's own graph, the softmax's backward.
            log = "_log" if self.log else ""
            first, double = [f"{log}_softmax_backward_data"], "softmax_double_backward"
            linear = ([double], 5) if self.log else (["softmax_backward"], 3)
            return [([f"{log}_softmax"], 2), (first, 3), ([double, *first], 8), linear]
        first = ["softmax_backward"]
        if self.log:
            double = (["softmax_double_backward"], 5)
            return [(["log_softmax"], 2), (first, 3), double, double]
        return [(["softmax"], 2), (first, 3), (["softmax_double_backward"], 5), (first, 3)]


CASES = [
    Softmax("windows", (6, 3, 2, 49, 49), bias=(3, 2, 49, 49)),  # Swin's, with the mask in the bias
    Softmax("tokens", (4, 3, 197, 197)),  # ViT's
    Softmax("heads", (5, 3, 17, 17), bias=(1, 3, 17, 17)),
    Softmax("intricate bias", (2, 3, 4, 5, 16), bias=(2, 1, 4, 1, 16)),
    Softmax("bias of rows", (7, 33), bias=(33,)),
    # One for all elements of a row, which changes nothing and has no gradient.
    Softmax("bias of a row", (7, 33), bias=(7, 1)),
    Softmax("bias of one", (7, 33), bias=()),
    Softmax("bias across", (3, 50, 7), dim=1, bias=(50, 1)),
    Softmax("short", (700, 3), dim=1),
    Softmax("long", (3, 9001)),
    # A vector across neighbouring rows, whole and partly filled.
    Softmax("across", (3, 50, 71), dim=1),
    Softmax("channels", (2, 3, 4, 5), dim=1),
    Softmax("first of all", (33, 5), dim=0),
    Softmax("one column", (33, 1), dim=0),
    Softmax("rows of one", (5, 1)),
    Softmax("scalar", (), dim=0),
    Softmax("no rows", (0, 4)),
    Softmax("no columns", (4, 0)),
    Softmax("no columns, bias", (4, 0), bias=(0,)),
    Softmax("small", (2, 5)),
    Softmax("small, across", (2, 3, 2), dim=1),
    Softmax("small, bias", (2, 3, 4), bias=(3, 4)),
    Softmax("logarithm, tokens", (4, 3, 197, 197), log=True),
    Softmax("logarithm, long", (3, 9001), log=True),
    Softmax("logarithm, across", (3, 50, 71), dim=1, log=True),
    Softmax("logarithm, scalar", (), dim=0, log=True),
    Softmax("logarithm, no columns", (4, 0), log=True),
    Softmax("logarithm, small", (2, 3, 2), dim=-2, log=True),
    Softmax("small, bias across", (2, 3, 2), dim=-2, bias=(3, 1)),
]


@st.composite
def random_cases(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shape[-1] = draw(st.integers(1, 70))
    kept = draw(st.lists(st.booleans(), max_size=len(shape)))
    tail = shape[len(shape) - len(kept) :]
    bias = tuple(n if keep else 1 for n, keep in zip(tail, kept, strict=True))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    bias, log = draw(st.sampled_from([(bias, False), (None, False), (None, True)]))
    return Softmax("", tuple(shape), dim, bias, log)


class TestSoftmax(OpContract):
    cases = CASES
    traced = ("small, across", "small, bias", "logarithm, small")
    kernels = (
        "logarithm, long",
        "logarithm, across",
        "heads",
        "intricate bias",
        "bias of one",
        "short",
        "long",
        "across",
        "first of all",
        "scalar",
    )
    outlived = 3
    random_cases = random_cases()
    accepted = (
        # Any shape and device, and what dtype=float64 makes a float64 of.
        *(
            (name, "input", broken)
            for name in ("softmax", "log_softmax")
            for broken in ("dtype", "shape", "device", "integers", "complex")
        ),
        # As bias may have another dtype than input, and input than output.
        ("softmax_with_bias", "", "dtype"),
        ("softmax_double_backward", "grad_grad_input", "dtype"),
    )
    schemas = """
        softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor;
        log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor;
        softmax_with_bias(Tensor input, Tensor bias, ScalarType? dtype=None) -> Tensor;
        softmax_backward(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype,
            bool log=False) -> Tensor;
        softmax_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor output, int dim,
            bool to_input, bool log=False) -> (Tensor grad_grad_output, Tensor grad)
    """

    def bad(self):
        x = torch.randn(4, 3)
        for dtype in (torch.int64, torch.complex64):
            yield lambda dtype=dtype: OPS.softmax(x.to(dtype), -1), TypeError, "softmax: expected input to be"
        shapes = r"bias to broadcast to input's shape \(\[4, 3\]\), got \[2, 4, 3\]"
        yield lambda: gk.functional.softmax(x, -1, bias=torch.randn(2, 4, 3)), ValueError, shapes
        for call in (
            lambda: gk.functional.softmax(x, 2),
            lambda: gk.functional.softmax(x, -3),
            lambda: OPS.softmax_backward(x, x, 2, x.dtype),
            lambda: OPS.softmax_double_backward(x, x, x, -3, True),
            lambda: OPS.softmax_double_backward(*[x.to("meta")] * 3, -3, True),
        ):
            yield call, IndexError, "Dimension out of range"

    def check_kernels(self):
        super().check_kernels()
        for dtype in DTYPES:
            test_masks_and_nan(dtype, 49)
            with gk.set_fused_double_backward(True):  # The kernel whose gradient is of the output.
                for case in (case for case in CASES if case.name in self.kernels):
                    self.check_accuracy(case, case.draw(dtype), contract.by_switch)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_large_gradients_that_nearly_cancel(offset):
    """A constant along the row changes nothing: it must not cost the others' digits."""
    case = Softmax("rows", (40, 49))
    operands = case.draw(torch.float32)
    x, v = operands.inputs[0], operands.grad_grads[0]
    operands = Operands([20 * x, None], operands.grad_output - offset, [v + offset, None])
    exact = flat(operands.map(torch.Tensor.double).orders(case.reference))
    ours = flat(operands.orders(case.fused))
    contract.assert_no_worse_than_stock(case, ours, yardstick(case, operands), exact)


@each_dtype
@pytest.mark.parametrize("n", [3, 49, 64])
def test_masks_and_nan(dtype, n):
    x = torch.randn(6, n).to(dtype)
    mask = torch.zeros(6, n, dtype=dtype)
    mask[0] = -math.inf
    mask[1, 1:] = -math.inf
    mask[2, -1] = mask[3, 0] = -math.inf
    x[4, n // 2] = math.nan
    x[5, n - 1] = math.inf
    ones = torch.ones_like(x)
    case, operands = Softmax("", (6, n)), Operands([x, mask], ones, [ones, ones])
    exact = flat(operands.map(torch.Tensor.double).orders(case.stock))
    ours = flat(operands.orders(case.fused))
    without = flat(Operands([x + mask, None], ones, [ones, None]).orders(case.fused))
    for result, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(result.double(), wanted, equal_nan=True, rtol=0.02, atol=0.02)
    assert torch.equal(ours[0].isnan().all(-1), torch.tensor([True, False, False, False, True, True]))
    for a, b in ((ours[0], without[0]), (ours[1], without[1])):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert (ours[0][1:4][mask[1:4] == -math.inf] == 0).all()


def test_large_scores_do_not_overflow():
    x = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3e38, -2e38], [0.0, -200.0, -87.5]])
    assert torch.equal(gk.functional.softmax(x, -1)[:2], F.softmax(x, -1)[:2])
    torch.testing.assert_close(gk.functional.softmax(x, -1), F.softmax(x, -1), rtol=1e-5, atol=0)


D, S, B, H = DTYPES


# Of the input, the bias and the result.
@pytest.mark.parametrize("dtypes", [(S, B, None), (B, B, S), (S, S, D), (D, S, S), (H, B, None)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_mixed_dtypes(dtypes, biased):
    x_dtype, b_dtype, dtype = dtypes
    result = dtype or (torch.promote_types(x_dtype, b_dtype) if biased else x_dtype)
    case = Softmax("", (5, 3, 17, 17), bias=(3, 17, 17) if biased else None)
    drawn = case.draw(x_dtype, b_dtype)
    operands = Operands(drawn.inputs, drawn.grad_output.to(result), drawn.grad_grads)
    # Where both are given, PyTorch would round the sum to its dtype first.
    ours = operands.orders(lambda x, b: gk.functional.softmax(x, -1, dtype=dtype, bias=b))
    stock = operands.orders(lambda x, b: F.softmax(x.to(result) if b is None else x.to(result) + b, -1))
    exact = operands.map(torch.Tensor.double).orders(case.reference)
    floor = torch.finfo(result).eps
    contract.assert_no_worse_than_stock(case, flat(ours), flat(stock), flat(exact), floor=floor)


def test_the_bias_is_reduced_once_and_only_where_it_is_wanted():
    x, g = (torch.randn(6, 3, 5, requires_grad=True) for _ in range(2))
    bias = torch.randn(3, 5, requires_grad=True)
    v = torch.randn(6, 3, 5)
    with Calls() as forward:
        output = gk.functional.softmax(x, -1, bias=bias)
    with Calls() as backward:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with Calls() as step:
        # Both the loss and its gradient depend on the scores.
        torch.autograd.grad((grad_input, output), (g, x, bias), (v, v))
    # The backward needs to know that there is a bias, and no more of it: an empty tensor stands for it.
    assert forward.names == ["softmax_with_bias"]
    assert forward.elements == 2 * x.numel() + bias.numel() + 1
    assert backward.names == ["softmax_backward"]
    assert sorted(step.names) == ["add", "softmax_backward", "softmax_double_backward", "sum"]


def test_only_the_output_is_saved():
    x = torch.randn(4, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    for extra in ({}, {"bias": bias}):
        scores = x * 2
        freed = weakref.ref(scores)
        output = gk.functional.softmax(scores, -1, **extra)
        wanted = torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
        # Not needed any more, and so free to be overwritten.
        scores.detach().zero_()
        del scores
        gc.collect()
        assert freed() is None
        assert torch.equal(torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0], wanted)
        output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("retained", [False, True])
def test_what_else_gradients_go_to(retained):
    """Past the softmax: an accumulator, a view's base, one of several outputs. Or its output, if asked."""
    x = torch.randn(4, 5, dtype=torch.float64)
    for prepare in (
        lambda x: x,
        lambda x: x.view(5, 4).t(),
        lambda x: x.unbind(0)[1],
        lambda x: x[1:].clone().mul_(2),
    ):

        def gradients(function, prepare=prepare):
            leaf = x.clone().requires_grad_()
            scores = prepare(leaf)
            output = function(scores, -1)
            if retained:
                output.retain_grad()
            (gradient,) = torch.autograd.grad(output.square().sum(), scores, create_graph=True)
            (gradient.square().sum() + output.sin().sum()).backward()
            return [t.grad for t in (leaf, output) if t.is_leaf or retained]

        contract.assert_close(gradients(gk.functional.softmax), gradients(F.softmax))


def test_half_in_float_out_as_on_cuda():
    """PyTorch's CUDA kernel reads float16 and writes float32; gradients go back to float16."""
    x = torch.empty(3, 5, device="meta", dtype=torch.float16)
    y, g = (torch.empty(3, 5, device="meta") for _ in range(2))
    grad_grad_output, grad = OPS.softmax_double_backward(x, g, y, -1, True)
    assert (grad_grad_output.dtype, grad.dtype) == (torch.float32, torch.float16)
    _, grad = OPS.softmax_double_backward(x, g, y, -1, False)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("op", ["softmax", "softmax_with_bias"])
def test_autocast_on_cuda_makes_it_float32(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gradnorm_kernels::{op}", "AutocastCUDA")


def test_arguments_of_stock():
    x = torch.randn(2, 3, 4)
    assert torch.equal(gk.functional.softmax(x, 1, 3, torch.float64), F.softmax(x, 1, 3, torch.float64))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        assert torch.equal(gk.functional.softmax(x), F.softmax(x, 0))
    whole = torch.arange(6).view(2, 3)
    torch.testing.assert_close(
        gk.functional.softmax(whole, -1, dtype=torch.float32), F.softmax(whole, -1, dtype=torch.float32)
    )
    scalar = torch.tensor(2.0)
    assert (
        gk.functional.softmax(scalar, 0, bias=scalar) == gk.functional.softmax(scalar, -1, bias=scalar) == 1
    )


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    # Just past 2^31, so that a 32-bit index of the last elements would wrap around.
    x = torch.zeros(2**26 + 1, 32, dtype=torch.bfloat16)
    x[-1, 0] = 5
    output = gk.functional.softmax(x, -1)
    torch.testing.assert_close(output[-1], F.softmax(x[-1], -1))
    assert (output[:-1] == 1 / 32).all()
