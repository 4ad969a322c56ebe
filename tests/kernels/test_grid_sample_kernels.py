"""The Triton kernel of grid sampling's double backward, run against float64."""

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

from gradnorm_kernels.kernels import composite

grid_sample: Any = importlib.import_module("gradnorm_kernels.kernels.grid_sample")
PADDINGS = ("zeros", "border", "reflection")


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for name, image, padding in (
        ("image", (8, 64, 56, 56), 0),
        ("volume", (2, 16, 24, 24, 24), 0),
        ("mirrored volume", (2, 16, 24, 24, 24), 2),
    ):
        x, grid = (
            meta(*image, dtype=dtype),
            meta(image[0], *image[2:], len(image) - 2, dtype=dtype),
        )
        settings = 0, padding, False, [True] * 3
        for kind, v in (("both", x), ("of the grid", None)):
            case = f"{name}-{kind}"
            yield case, grid_sample.grid_sample_double_backward, v, grid, x, x, grid, *settings


test_compiles_without_spills = harness.compilation_test(calls)


def run(*args: Any) -> Any:
    return harness.implementation(grid_sample, *args).grid_sample_double_backward(*args)


def operands(shape: Any, points: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    """v, u, g, input and grid, whose coordinates every dtype holds."""
    like_grid = (shape[0], *points, len(points))
    sizes = shape, like_grid, (*shape[:2], *points), shape, like_grid
    v, u, g, x, grid = (normal(*size, dtype=dtype, device=device) for size in sizes)
    return [v, u, g, x, (((4 * grid.double()).floor() + 0.5) / 4).to(dtype)]


def derived(v: Tensor, u: Tensor, g: Tensor, x: Tensor, grid: Tensor, padding: int, align: bool) -> Any:
    def sample(x: Tensor, grid: Tensor) -> Tensor:
        return reference.grid_sample(x, grid, "bilinear", PADDINGS[padding], align)

    return reference.all_orders(sample, (x, grid), g, (v, u))[2]


SHAPES = [
    ((2, 2, 5, 4), (3, 43)),  # in two blocks
    ((2, 2, 3, 4, 5), (2, 3, 4)),
    ((1, 1, 1, 3, 1), (2, 2, 2)),
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("padding", "align_corners"), [(0, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_values(shape: Any, padding: int, align_corners: bool, dtype: torch.dtype, device: str) -> None:
    tensors = operands(*shape, dtype, device)
    before = [t.clone() for t in tensors]
    ours = run(*tensors, 0, padding, align_corners, [True] * 3)
    assert all(map(torch.equal, tensors, before))
    truth = derived(*harness.in_double(tensors), padding, align_corners)
    allowed = harness.units(dtype, 4, floor=16 * torch.finfo(dtype).eps)
    harness.assert_accurate(ours, truth, allowed, derived(*tensors, padding, align_corners))
    v, u, *rest = tensors
    settings = 0, padding, align_corners
    of_grid = run(None, u, *rest, *settings, [True] * 3)
    of_image = run(v, None, *rest, *settings, [True] * 3)
    # Both orders are linear in what comes in.
    for whole, a, b in zip(ours, of_grid, of_image, strict=True):
        rough = 8 * torch.finfo(dtype).eps * max(1, whole.abs().max().item())
        torch.testing.assert_close(a.double() + b.double(), whole.double(), rtol=0, atol=rough)


@on_every_device
def test_masks_strides_and_nearest(device: str) -> None:
    tensors = operands((2, 1, 5, 4), (3, 2), torch.float32, device)
    settings = 0, 0, False
    full = run(*tensors, *settings, [True] * 3)
    for mask in harness.each_mask(3):
        for result, wanted, asked in zip(run(*tensors, *settings, mask), full, mask, strict=True):
            assert result is None if not asked else torch.allclose(result, wanted, rtol=1e-5, atol=1e-5)
    for a, e in zip(run(*map(harness.strided, tensors), *settings, [True] * 3), full, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    nearest = (1, 2, True, [True] * 3)
    expected = composite.call("grid_sample_double_backward", *tensors, *nearest)
    for a, e in zip(run(*tensors, *nearest), expected, strict=True):
        torch.testing.assert_close(a, e)


@on_every_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_points_that_are_nowhere(bad: float, device: str) -> None:
    for shape, points in (((1, 2, 3, 4), (2, 2)), ((1, 2, 3, 4, 3), (2, 2, 2))):
        tensors = operands(shape, points, torch.float32, device)
        tensors[-1][(0,) * (len(points) + 1)] = bad
        for padding in range(3):
            settings = 0, padding, False, [True] * 3
            expected = composite.call("grid_sample_double_backward", *tensors, *settings)
            for a, e in zip(run(*tensors, *settings), expected, strict=True):
                torch.testing.assert_close(a, e, equal_nan=True)


@on_every_device
def test_bad_input(device: str) -> None:
    v, u, g, x, grid = operands((2, 3, 5, 4), (3, 7), torch.float32, device)
    settings = 0, 0, False, [True] * 3
    launcher = grid_sample.grid_sample_double_backward
    harness.assert_rejected(
        (TypeError, "expected input", launcher, v, u, g, x.int(), grid, *settings),
        (ValueError, "grid of shape", launcher, v, u, g, x, grid[:1], *settings),
        (ValueError, "expected grad_output", launcher, v, u, x, x, grid, *settings),
        (ValueError, "expected grad_grad_grid", launcher, v, u[:, :1], g, x, grid, *settings),
        (RuntimeError, "grad_output .* got meta", launcher, v, u, g.to("meta"), x, grid, *settings),
    )
