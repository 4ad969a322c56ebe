"""The Triton kernels of softmax, run against float64."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from harness import in_every_dtype, meta, normal, on_every_device
from torch import Tensor

import gradnorm_kernels as gk

softmax: Any = importlib.import_module("gradnorm_kernels.kernels.softmax")


# Scores and biases of batch 64 at 224 x 224: windows of 49 in Swin-B's first stage, 197 tokens in ViT-B.
SWIN_SCORES, SWIN_BIAS = (64, 64, 4, 49, 49), (64, 4, 49, 49)
VIT_SCORES = (64, 12, 197, 197)


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """The models' shapes, and the longest rows of a tile, rows beyond it, and rows across the memory, whose
    numbers wide accesses divide or not."""
    for name, shape, dim in (
        ("swin", SWIN_SCORES, 4),
        ("vit", VIT_SCORES, 3),
        ("tile", (64, 8192), 1),
        ("looped", (64, 16384), 1),
        ("thousand", (64, 1000), 1),
        ("across", (64, 1000, 49), 1),
        ("across-eights", (64, 1000, 56), 1),
    ):
        x = meta(*shape, dtype=dtype)
        for to_input, log in itertools.product((True, False), repeat=2):
            case = f"{name}-{'input' if to_input else 'output'}{'-log' if log else ''}"
            yield case, softmax.softmax_double_backward, x, x, x, dim, to_input, log
    for name, shape, bias_shape in (("swin", SWIN_SCORES, SWIN_BIAS), ("looped", (64, 16384), (16384,))):
        yield name, softmax.softmax_with_bias, meta(*shape, dtype=dtype), meta(*bias_shape, dtype=dtype)


WIDE = [f"{name}-{of}" for name in ("tile", "thousand", "across-eights") for of in ("input", "output")]
test_compiles_without_spills = harness.compilation_test(calls, wide=WIDE)


def double_backward(*args: Any) -> tuple[Tensor, Tensor]:
    return harness.implementation(softmax, *args).softmax_double_backward(*args)


def with_bias(*args: Any) -> Tensor:
    return harness.implementation(softmax, *args).softmax_with_bias(*args)


def derived(v: Tensor, g: Tensor, y: Tensor, dim: int, to_input: bool, log: bool = False) -> list[Tensor]:
    """The double backward, by autograd of the backward y (g - sum(g y)), or g - exp(y) sum(g) of the
    logarithm, in the dtype of the tensors.

    Carried on to the input it is what that backward makes of it."""

    def backward(g: Tensor, y: Tensor) -> Tensor:
        if log:
            return g - y.exp() * g.sum(dim, keepdim=True)
        return y * (g - (g * y).sum(dim, keepdim=True))

    g, y = g.detach().requires_grad_(), y.detach().requires_grad_()
    grad_grad_output, grad_y = torch.autograd.grad(backward(g, y), (g, y), v)
    return [grad_grad_output, backward(grad_y, y.detach()) if to_input else grad_y]


# Shape and dimension.
ROWS = [
    ((3, 5, 49), 2),  # Swin's rows, several in a tile, and a tile that is partly filled
    ((2, 197), -1),  # ViT's
    ((4, 64), 1),  # whole 16-byte accesses
    ((2, 8192), 1),  # the longest row of a tile, except in float64
    ((2, 8193), 1),  # beyond it
    ((3, 50, 37), 1),  # across the memory, within a block of columns
    ((2, 133, 2, 3), 1),  # and in several
    ((70, 3), 0),
    ((1,), 0),  # Triton compiles a size of 1 as a constant
    ((5, 1), 1),
    ((), 0),
    ((0, 4), 1),
    ((4, 0), 1),
]
# Shape, and the bias's shape.
BIASES = [
    ((2, 3, 4, 49, 49), (3, 4, 49, 49)),  # Swin's, with the mask in the bias
    ((2, 3, 4, 7, 7), (1, 4, 7, 7)),
    ((2, 3, 4, 7, 16), (3, 1, 7, 16)),
    ((2, 3, 4, 5, 16), (2, 1, 4, 1, 16)),  # more dimensions than the kernel has
    ((5, 33), (33,)),
    ((5, 33), (5, 1)),
    ((5, 33), ()),
    ((2, 8192), (8192,)),
    ((2, 8193), (2, 8193)),
    ((3, 1), (1,)),
    ((0, 4), (4,)),
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize("log", [False, True], ids=["", "log"])
@pytest.mark.parametrize(("shape", "dim"), ROWS, ids=str)
def test_double_backward(
    shape: tuple[int, ...], dim: int, log: bool, to_input: bool, dtype: torch.dtype, device: str
) -> None:
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    y = x.log_softmax(dim) if log else x.softmax(dim)
    ours = harness.untouched(double_backward, v, g, y, dim, to_input, log)
    assert all(result.is_contiguous() for result in ours)
    truth = derived(*harness.in_double((v, g, y)), dim, to_input, log)
    # A row's sums are larger than what is left of them.
    allowed = harness.units(dtype, 4, floor=8 * torch.finfo(dtype).eps) if log else harness.units(dtype, 2)
    harness.assert_accurate(ours, truth, allowed, derived(v, g, y, dim, to_input, log))


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "bias_shape"), BIASES, ids=str)
def test_with_bias(
    shape: tuple[int, ...], bias_shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, bias = (normal(*size, dtype=dtype, device=device) for size in (shape, bias_shape))
    (ours,) = harness.untouched(lambda *args: [with_bias(*args)], x, bias)
    assert ours.is_contiguous()
    truth = reference.softmax(x.double(), -1, bias.double()) if x.numel() else x.double()
    harness.assert_accurate([ours], [truth], harness.units(dtype, 2), [(x + bias).softmax(-1)])


@on_every_device
def test_strided_operands_give_the_same_bits(device: str) -> None:
    v, g, x = (normal(6, 4, 10, dtype=torch.float32, device=device) for _ in range(3))
    bias = normal(4, 10, dtype=torch.float32, device=device)
    y = x.softmax(-1)

    expected = double_backward(v, g, y, -1, True)
    assert all(map(torch.equal, double_backward(*map(harness.strided, (v, g, y)), -1, True), expected))
    assert torch.equal(with_bias(harness.strided(x), harness.strided(bias)), with_bias(x, bias))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype, device: str) -> None:
    """A half type in and float32 out, as in a region of autocast."""
    v = normal(3, 49, dtype=dtype, device=device)
    g = normal(3, 49, dtype=torch.float32, device=device)
    y = normal(3, 49, dtype=torch.float32, device=device).softmax(-1)
    for to_input in (True, False):
        grad_grad_output, grad = double_backward(v, g, y, -1, to_input)
        assert (grad_grad_output.dtype, grad.dtype) == (torch.float32, dtype if to_input else torch.float32)
        truth = derived(*harness.in_double((v, g, y)), -1, to_input)
        torch.testing.assert_close(grad_grad_output.double(), truth[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), truth[1], rtol=2e-2, atol=1e-3)
    bias = normal(49, dtype=torch.float32, device=device)
    for result in (None, torch.float64):
        output = with_bias(v, bias, result)
        assert output.dtype == (result or torch.float32)
        truth = (v.double() + bias.double()).softmax(-1)
        torch.testing.assert_close(output.double(), truth, rtol=1e-12 if result else 1e-5, atol=1e-14)


@on_every_device
@pytest.mark.parametrize("n", [49, 8200])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_masks_and_nan(n: int, device: str) -> None:
    x = normal(6, n, dtype=torch.float32, device=device)
    mask = torch.zeros_like(x)
    mask[0] = -math.inf
    mask[1, 1:] = -math.inf
    mask[2, :-1] = -math.inf  # longer than a block
    mask[3, 0] = -math.inf
    x[4, n // 2] = math.nan
    x[5, n - 1] = math.inf
    y = with_bias(x, mask)
    torch.testing.assert_close(y, (x + mask).softmax(-1), equal_nan=True)
    v, g = torch.ones_like(x), torch.ones_like(x)
    for result in double_backward(v, g, y, -1, True):
        assert torch.equal(result.isnan(), y.isnan())


@pytest.mark.gpu
def test_through_autograd() -> None:
    def run(function: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 49, 49, device="cuda", requires_grad=True)
        bias = torch.randn(3, 4, 49, 49, device="cuda", requires_grad=True)
        output = function(x, bias)
        (grad,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return output, grad, *torch.autograd.grad(grad.square().sum() + output.sum(), (x, bias))

    def fused(x: Tensor, bias: Tensor) -> Tensor:
        return gk.functional.softmax(x, -1, bias=bias)

    def stock(x: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(x + bias, -1)

    for first, second, wanted in zip(run(fused), run(fused), run(stock), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, wanted)
    with gk.set_fused_double_backward(True):
        for result, wanted in zip(run(stock), run(stock), strict=True):
            torch.testing.assert_close(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_float32_as_stock(dtype: torch.dtype) -> None:
    x = torch.randn(5, 49, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(49, device="cuda", requires_grad=True)

    def run(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype):
            output = function(*inputs)
        (grad,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return output, grad, torch.autograd.grad(grad.float().square().sum(), x)[0]

    pairs = [
        (run(lambda x: gk.functional.softmax(x, -1), x), run(lambda x: torch.softmax(x, -1), x)),
        (
            run(lambda x, b: gk.functional.softmax(x, -1, bias=b), x, bias),
            run(lambda x, b: torch.softmax(x + b, -1), x, bias),
        ),
    ]
    for ours, stock in pairs:
        for a, b in zip(ours, stock, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    rows, n = 2**25 + 1, 64
    harness.skip_without_memory(6 * rows * n * torch.bfloat16.itemsize)
    x = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda").normal_()
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    for call in (lambda x: (with_bias(x, bias),), lambda x: double_backward(x, x, x, -1, True)):
        harness.assert_same_in_parts(call, (0, rows // 2 - 3, rows - 6), 6, x)


@on_every_device
def test_bad_input(device: str) -> None:
    x = torch.ones(4, 3, device=device)
    far = x.to("meta")
    forward, double_backward = softmax.softmax_with_bias, softmax.softmax_double_backward
    harness.assert_rejected(
        (ValueError, "expected bias to broadcast", forward, x, x[:, :2]),
        (ValueError, "expected bias to broadcast", forward, x, x[None]),
        (TypeError, "expected bias", forward, x, x.bool()),
        (TypeError, "expected input", forward, x.int(), x),
        (RuntimeError, "input .* got meta", forward, far, x),
        (ValueError, "grad_output", double_backward, x, x[:3], x, -1, True),
        (TypeError, "grad_grad_input", double_backward, x.int(), x, x, -1, True),
        (RuntimeError, "grad_output .* got meta", double_backward, x, far, x, -1, True),
        (IndexError, "Dimension out of range", double_backward, x, x, x, 2, True),
    )
