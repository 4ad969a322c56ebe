"""The Triton kernel of cross-entropy, run against float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from harness import in_every_dtype, meta, normal, on_every_device
from torch import Tensor

cross_entropy: Any = importlib.import_module("gradnorm_kernels.kernels.cross_entropy")


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """ImageNet's classes, a language model's tokens, a segmentation's pixels."""
    for name, shape, smoothing in (
        ("images", (1024, 1000), 0.1),
        ("tokens", (512, 32000), 0.0),
        ("pixels", (8, 150, 128, 128), 0.0),
    ):
        x, g = meta(*shape, dtype=dtype), meta(*shape[:1], *shape[2:], dtype=dtype)
        for kind, t in (("classes", meta(*g.shape, dtype=torch.int64)), ("probabilities", x)):
            case, settings = f"{name}-{kind}", (-100, smoothing)
            yield case, cross_entropy.cross_entropy, x, t, *settings
            yield case, cross_entropy.cross_entropy_backward, g, x, t, *settings
            yield case, cross_entropy.cross_entropy_double_backward, x, g, x, t, *settings


test_compiles_without_spills = harness.compilation_test(calls)


def run(v: Tensor, g: Tensor, x: Tensor, t: Tensor, smoothing: float) -> list[Tensor]:
    """The losses; the gradient; the double backward's two."""
    ops = harness.implementation(cross_entropy, x)
    settings = (-100, smoothing)
    return [
        ops.cross_entropy(x, t, *settings),
        ops.cross_entropy_backward(g, x, t, *settings),
        *ops.cross_entropy_double_backward(v, g, x, t, *settings),
    ]


def derived(v: Tensor, g: Tensor, x: Tensor, t: Tensor, smoothing: float) -> list[Tensor]:
    def losses(x: Tensor) -> Tensor:
        return reference.cross_entropy(x, t, None, smoothing, "none")

    return [result for order in reference.all_orders(losses, (x,), g, (v,)) for result in order]


SHAPES = [
    (3, 49),  # several rows in a tile that is partly filled
    (2, 8193),  # beyond the longest row of a tile
    (3, 50, 37),  # across the memory, within a block of columns
    (2, 133, 2, 3),  # and in several
    (33,),
    (5, 1),
    (0, 4),
]


def operands(shape: tuple[int, ...], soft: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    dim = min(len(shape), 2) - 1
    v, x = (normal(*shape, dtype=dtype, device=device) for _ in range(2))
    rows = x.sum(dim).shape
    g = normal(*rows, dtype=dtype, device=device)
    if soft:
        return [v, g, x, normal(*shape, dtype=dtype, device=device).abs()]
    t = torch.randint(shape[dim], rows, device=device)
    return [v, g, x, torch.where(torch.rand(rows, device=device) < 0.3, -100, t)]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(
    shape: tuple[int, ...], soft: bool, smoothing: float, dtype: torch.dtype, device: str
) -> None:
    v, g, x, t = operands(shape, soft, dtype, device)
    ours = harness.untouched(lambda *args: run(*args, smoothing), v, g, x, t)
    assert all(result.is_contiguous() for result in ours)
    truth = derived(*harness.in_double((v, g, x)), t.double() if soft else t, smoothing)
    # A row's sums are larger than what is left of them.
    allowed = harness.units(dtype, 4, floor=16 * torch.finfo(dtype).eps)
    harness.assert_accurate(ours, truth, allowed, derived(v, g, x, t, smoothing))


@on_every_device
def test_strided_operands_give_the_same_bits(device: str) -> None:
    v, g, x, t = operands((6, 10, 4), True, torch.float32, device)
    expected = run(v, g, x, t, 0.1)
    assert all(map(torch.equal, run(*map(harness.strided, (v, g, x, t)), 0.1), expected))


@on_every_device
@pytest.mark.parametrize("n", [49, 8200])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_masks_nan_and_classes_that_are_not_there(n: int, device: str) -> None:
    v, g, x, _ = operands((7, n), False, torch.float32, device)
    t = torch.full((7,), n // 2, device=device)
    x[0] = -math.inf
    x[1, : n // 2] = -math.inf  # longer than a block
    x[2, n // 2] = -math.inf
    x[3, n - 1] = math.nan
    t[4], t[5] = n, -1
    loss, *gradients = run(v, g, x, t, 0.0)
    torch.testing.assert_close(loss[:4], reference_loss(x, t)[:4], equal_nan=True)
    assert loss.isnan().tolist() == [True, False, False, True, True, True, False]
    for result in gradients:
        assert result.view(7, -1).isnan().all(1).tolist() == [True, False, False, True, True, True, False]


def reference_loss(x: Tensor, t: Tensor) -> Tensor:
    return -x.log_softmax(1)[:, t[0]]


@on_every_device
def test_bad_input(device: str) -> None:
    x, g = torch.ones(4, 3, device=device), torch.ones(4, device=device)
    t = torch.zeros(4, dtype=torch.int64, device=device)
    settings = (-100, 0.0)
    forward, backward = cross_entropy.cross_entropy, cross_entropy.cross_entropy_backward
    double_backward = cross_entropy.cross_entropy_double_backward
    harness.assert_rejected(
        (TypeError, "expected input", forward, x.int(), t, *settings),
        (TypeError, "expected target", forward, x, t.int(), *settings),
        (ValueError, "expected target", forward, x, t[:3], *settings),
        (ValueError, "at least one class", forward, x[:, :0], t, *settings),
        (ValueError, "expected grad_output", backward, x, x, t, *settings),
        (TypeError, "expected grad_output", backward, g.double(), x, t, *settings),
        (RuntimeError, "grad_output .* got meta", backward, g.to("meta"), x, t, *settings),
        (ValueError, "expected grad_grad_input", double_backward, g, g, x, t, *settings),
    )
