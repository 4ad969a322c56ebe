"""The Triton kernels of softmax, run against float64."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET, GPUTarget, compile_for, in_every_dtype, normal, on_every_device, triton
from torch import Tensor

import gradnorm_kernels as gk

softmax: Any = importlib.import_module("gradnorm_kernels.kernels.softmax")


def ops(device: str) -> Any:
    """Through the dispatcher on a GPU, without it in the interpreter."""
    return softmax if device == "cpu" else torch.ops.gradnorm_kernels


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


def assert_as_accurate_as_stock(ours: Tensor, stock: Tensor, truth: Tensor) -> None:
    """The error is at most twice stock's and two units in the last place."""
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (stock.dtype, truth.shape, True)
    if ours.numel():
        # A few elements say little of a maximum, and the interpreter truncates what it stores as bfloat16.
        tiny = 2 * torch.finfo(ours.dtype).eps * truth.abs().max().item()
        error = (ours.double() - truth).abs().max().item()
        stock_error = (stock.double() - truth).abs().max().item()
        assert error <= 2 * stock_error + tiny, f"{error} against {stock_error}"


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize(("shape", "dim"), ROWS, ids=str)
def test_double_backward(
    shape: tuple[int, ...], dim: int, to_input: bool, dtype: torch.dtype, device: str
) -> None:
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    y = x.softmax(dim)
    originals = [t.clone() for t in (v, g, y)]
    ours = ops(device).softmax_double_backward(v, g, y, dim, to_input)
    assert all(map(torch.equal, (v, g, y), originals)), "an input was written to"
    stock = gk.reference.softmax_double_backward(v, g, y, dim, to_input)
    truth = gk.reference.softmax_double_backward(v.double(), g.double(), y.double(), dim, to_input)
    for results in zip(ours, stock, truth, strict=True):
        assert_as_accurate_as_stock(*results)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "bias_shape"), BIASES, ids=str)
def test_with_bias(
    shape: tuple[int, ...], bias_shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, bias = normal(*shape, dtype=dtype, device=device), normal(*bias_shape, dtype=dtype, device=device)
    ours = ops(device).softmax_with_bias(x, bias)
    assert_as_accurate_as_stock(ours, (x + bias).softmax(-1), (x.double() + bias.double()).softmax(-1))


@on_every_device
def test_strided_operands_give_the_same_bits(device: str) -> None:
    v, g, x = (normal(6, 4, 10, dtype=torch.float32, device=device) for _ in range(3))
    bias = normal(4, 10, dtype=torch.float32, device=device)
    y = x.softmax(-1)

    def strided(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    expected = ops(device).softmax_double_backward(v, g, y, -1, True)
    results = ops(device).softmax_double_backward(strided(v), strided(g), strided(y), -1, True)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(
        ops(device).softmax_with_bias(strided(x), strided(bias)), ops(device).softmax_with_bias(x, bias)
    )


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype, device: str) -> None:
    """A half type in and float32 out, as in a region of autocast."""
    v = normal(3, 49, dtype=dtype, device=device)
    g = normal(3, 49, dtype=torch.float32, device=device)
    y = normal(3, 49, dtype=torch.float32, device=device).softmax(-1)
    for to_input in (True, False):
        grad_grad_output, grad = ops(device).softmax_double_backward(v, g, y, -1, to_input)
        assert (grad_grad_output.dtype, grad.dtype) == (torch.float32, dtype if to_input else torch.float32)
        truth = gk.reference.softmax_double_backward(v.double(), g.double(), y.double(), -1, to_input)
        torch.testing.assert_close(grad_grad_output.double(), truth[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), truth[1], rtol=2e-2, atol=1e-3)
    bias = normal(49, dtype=torch.float32, device=device)
    for result in (None, torch.float64):
        output = ops(device).softmax_with_bias(v, bias, result)
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
    y = ops(device).softmax_with_bias(x, mask)
    torch.testing.assert_close(y, (x + mask).softmax(-1), equal_nan=True)
    v, g = torch.ones_like(x), torch.ones_like(x)
    for result in ops(device).softmax_double_backward(v, g, y, -1, True):
        assert torch.equal(result.isnan(), y.isnan())


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
def test_launch_compiles_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own call, up to the point where a GPU would be needed."""
    launched = []

    def warm_up(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(run(kernel, *args, **kwargs | {"warmup": True}))

    run = triton.runtime.JITFunction.run
    absent_gpu = SimpleNamespace(
        # Not the number of a GPU that may be there: Triton caches what it compiles under it.
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.JITFunction, "run", warm_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", absent_gpu)
    for dtype, to_input in ((torch.float32, True), (torch.bfloat16, False)):
        # A smaller batch is compiled alike.
        scores = torch.zeros(2, *softmax.SWIN_SCORES[1:], dtype=dtype)
        softmax.softmax_double_backward(scores, scores, scores, -1, to_input)
        softmax.softmax_with_bias(scores, torch.zeros(softmax.SWIN_BIAS, dtype=dtype))

    listed = [compile_for(s, 90).asm["ptx"] for s in softmax.specializations() if "-swin-" in s.name]
    assert sorted(kernel.asm["ptx"] for kernel in launched) == sorted(listed)
    assert len(listed) == 4


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
    needed = 6 * rows * n * torch.bfloat16.itemsize
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, {free >> 30} GiB are free")
    x = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda").normal_()
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    calls = (
        lambda x: (torch.ops.gradnorm_kernels.softmax_with_bias(x, bias),),
        lambda x: torch.ops.gradnorm_kernels.softmax_double_backward(x, x, x, -1, True),
    )
    for call in calls:
        whole = call(x)
        # An address that wrapped around would leave one of these places unwritten or wrong.
        for start in (0, rows // 2 - 3, rows - 6):
            for result, part in zip(whole, call(x[start : start + 6].clone()), strict=True):
                assert torch.equal(result[start : start + 6], part)
        del whole


@on_every_device
def test_bad_input(device: str) -> None:
    """What the launcher or the Meta kernel says, without the Autograd key in front of them."""
    x = torch.ones(4, 3, device=device)
    with pytest.raises(ValueError, match="expected bias to broadcast"):
        softmax.softmax_with_bias(x, x[:, :2])
    with pytest.raises(ValueError, match="expected bias to broadcast"):
        softmax.softmax_with_bias(x, x[None])
    with pytest.raises(TypeError, match="expected bias"):
        softmax.softmax_with_bias(x, x.bool())
    with pytest.raises(TypeError, match="expected input"):
        softmax.softmax_with_bias(x.int(), x)
    with pytest.raises(RuntimeError, match=r"input .* got meta"):
        softmax.softmax_with_bias(x.to("meta"), x)
    with pytest.raises(ValueError, match="grad_output"):
        softmax.softmax_double_backward(x, x[:3], x, -1, True)
    with pytest.raises(TypeError, match="grad_grad_input"):
        softmax.softmax_double_backward(x.int(), x, x, -1, True)
    with pytest.raises(RuntimeError, match=r"grad_output .* got meta"):
        softmax.softmax_double_backward(x, x.to("meta"), x, -1, True)
    with pytest.raises(IndexError, match="Dimension out of range"):
        softmax.softmax_double_backward(x, x, x, 2, True)
