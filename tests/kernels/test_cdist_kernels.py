"""The Triton kernel of distances between pairs of points, run against float64."""

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

from gradnorm_kernels.kernels import NotCoveredError

cdist: Any = importlib.import_module("gradnorm_kernels.kernels.cdist")


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Atoms, vectors of features, and many of these for p = 1."""
    for p, coordinates in ((2.0, 3), (2.0, 64), (1.0, 3), (1.0, 512)):
        x, y = (meta(4, n, coordinates, dtype=dtype) for n in (256, 512))
        g = meta(4, 256, 512, dtype=dtype)
        name = f"{p:.0f}-{coordinates}"
        yield f"{name}-first", cdist.cdist_backward, g, x, y, g, p, False, [True] * 2
        yield f"{name}-second", cdist.cdist_double_backward, x, y, g, x, y, p, [True] * 3


test_compiles_without_spills = harness.compilation_test(calls)

# The points' shapes, and how many coincide.
POINTS = [
    ((2, 5, 3), (2, 43, 3), 0),  # several blocks of columns
    ((70, 2), (3, 2), 3),  # and of rows
    ((2, 2, 3, 17), (2, 2, 5, 17), 2),
    ((9, 64), (6, 64), 0),
    ((4, 130), (3, 130), 1),  # blocks of coordinates, if p is 1
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(("first", "second", "coincide"), POINTS, ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_values(first: Any, second: Any, coincide: int, p: float, dtype: torch.dtype, device: str) -> None:
    u, x = (normal(*first, dtype=dtype, device=device) for _ in range(2))
    v, y = (normal(*second, dtype=dtype, device=device) for _ in range(2))
    x[..., :coincide, :] = y[..., :coincide, :]
    g = normal(*first[:-1], second[-2], dtype=dtype, device=device)
    output = reference.cdist(x, y, p)
    ops = harness.implementation(cdist, x)

    def derivatives(u: Any, v: Any, g: Tensor, x: Tensor, y: Tensor, mask: list[bool]) -> list[Any]:
        first_order = ops.cdist_backward(g, x, y, output, p, False, mask[1:])
        return [*first_order, *ops.cdist_double_backward(u, v, g, x, y, p, mask)]

    if p == 2 and first[-1] > cdist.MOST_COORDINATES:
        if harness.INTERPRET:
            with pytest.raises(NotCoveredError):
                derivatives(u, v, g, x, y, [True] * 3)
        return
    ours = harness.untouched(lambda *args: derivatives(*args, [True] * 3), u, v, g, x, y)
    U, V, G, X, Y = harness.in_double((u, v, g, x, y))  # noqa: N806
    orders = reference.all_orders(lambda x, y: reference.cdist(x, y, p), (X, Y), G, (U, V))
    truth = [*orders[1], *orders[2]]
    harness.assert_accurate(ours, truth, harness.units(dtype, 8, floor=8 * torch.finfo(dtype).eps))
    for mask in harness.each_mask(3):
        masked = derivatives(u, v, g, x, y, mask)
        for result, whole, asked in zip(masked, ours, [*mask[1:], *mask], strict=True):
            assert torch.equal(result, whole) if asked else result is None, mask
    only_v = derivatives(None, v, g, x, y, [True] * 3)
    only_u = derivatives(u, None, g, x, y, [True] * 3)
    for whole, a, b in zip(ours[2:], only_u[2:], only_v[2:], strict=True):
        rough = 8 * torch.finfo(dtype).eps * max(1, whole.abs().max().item())
        torch.testing.assert_close(a.double() + b.double(), whole.double(), rtol=0, atol=rough)


@on_every_device
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_strided_operands_give_the_same_bits(device: str) -> None:
    u, v, x, y = (normal(6, 4, 6, dtype=torch.float32, device=device) for _ in range(4))
    g = normal(6, 4, 4, dtype=torch.float32, device=device)
    run = harness.implementation(cdist, x).cdist_double_backward
    expected = run(u, v, g, x, y, 2.0, [True] * 3)
    assert all(map(torch.equal, run(*map(harness.strided, (u, v, g, x, y)), 2.0, [True] * 3), expected))


@on_every_device
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_nan_stays_with_its_point(device: str) -> None:
    u, x = (normal(20, 3, dtype=torch.float32, device=device) for _ in range(2))
    v, y = (normal(5, 3, dtype=torch.float32, device=device) for _ in range(2))
    g = normal(20, 5, dtype=torch.float32, device=device)
    x[7, 1] = math.nan
    to_g, to_x, to_y = harness.implementation(cdist, x).cdist_double_backward(u, v, g, x, y, 2.0, [True] * 3)
    assert to_g.isnan().any(1).nonzero().tolist() == to_x.isnan().any(1).nonzero().tolist() == [[7]]
    assert to_y.isnan().all()


@on_every_device
def test_bad_input(device: str) -> None:
    x, y, g = (torch.ones(*shape, device=device) for shape in ((4, 3), (5, 3), (4, 5)))
    both, all_three = [True] * 2, [True] * 3
    backward, double_backward = cdist.cdist_backward, cdist.cdist_double_backward
    harness.assert_rejected(
        (TypeError, "expected x1", backward, g, x.int(), y, g, 2.0, False, both),
        (ValueError, "expected x1 and x2", backward, g, x, y, g, 3.0, False, both),
        (ValueError, "expected grad_output", backward, g[:3], x, y, g, 2.0, False, both),
        (ValueError, "expected output", backward, g, x, y, g[:3], 2.0, False, both),
        (TypeError, "expected x2", backward, g, x, y.double(), g, 2.0, False, both),
        (RuntimeError, "grad_output .* got meta", backward, g.to("meta"), x, y, g, 2.0, False, both),
        (ValueError, "expected grad_grad_x1", double_backward, y, y, g, x, y, 2.0, all_three),
        (ValueError, "expected x2 to have the batch", double_backward, x, y, g, x, y[None], 2.0, all_three),
    )
