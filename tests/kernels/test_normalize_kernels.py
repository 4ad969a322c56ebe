"""The Triton kernel of division by the Euclidean norm, run against float64."""

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

normalize: Any = importlib.import_module("gradnorm_kernels.kernels.normalize")
EPS = 1e-12


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Embeddings, the gradients of images, and the channels of feature maps."""
    for name, shape in (
        ("embeddings", (4096, 512)),
        ("images", (64, 3 * 224 * 224)),
        ("maps", (8, 256, 56, 56)),
    ):
        x, g = meta(*shape, dtype=dtype), meta(shape[0], 1, *shape[2:], dtype=dtype)
        yield name, normalize.normalize, x, 1, EPS
        yield name, normalize.normalize_backward, x, x, 1, EPS
        yield name, normalize.normalize_double_backward, x, x, x, 1, EPS
        yield f"{name}-norm", normalize.vector_norm_double_backward, x, g, x, 1
    for name, shape, dim in (("weight", (1024, 512, 3), 0), ("transposed weight", (512, 3, 1024), 2)):
        v = meta(*shape, dtype=dtype)
        g = meta(*(n if k == dim else 1 for k, n in enumerate(shape)), dtype=dtype)
        yield name, normalize.weight_norm_double_backward, v, g, v, v, g, dim


test_compiles_without_spills = harness.compilation_test(calls)


def run(v: Tensor, g: Tensor, x: Tensor, dim: int, eps: float = EPS) -> list[Tensor]:
    """Output, gradient and the double backward's two, and that of the norm, with one of g for each row."""
    ops = harness.implementation(normalize, x)
    return [
        ops.normalize(x, dim, eps),
        ops.normalize_backward(g, x, dim, eps),
        *ops.normalize_double_backward(v, g, x, dim, eps),
        *ops.vector_norm_double_backward(v, of_rows(g, dim), x, dim),
    ]


def of_rows(g: Tensor, dim: int) -> Tensor:
    return g if g.ndim == 0 else g.contiguous().sum(dim, keepdim=True)


def derived(v: Tensor, g: Tensor, x: Tensor, dim: int, eps: float) -> list[Tensor]:
    whole = reference.all_orders(lambda x: reference.normalize(x, dim, eps), (x,), g, (v,))
    rows = reference.all_orders(
        lambda x: reference.vector_norm(x, dim, keepdim=True), (x,), of_rows(g, dim), (v,)
    )
    return [result for order in whole for result in order] + rows[2]


# Shape and dimension.
ROWS = [
    ((3, 5, 49), 2),  # several rows in a tile that is partly filled
    ((2, 8192), 1),  # the longest row of a tile, except in float64
    ((2, 8193), 1),  # beyond it
    ((3, 50, 37), 1),  # across the memory, within a block of columns
    ((2, 133, 2, 3), -3),  # and in several
    ((70, 3), 0),
    ((5, 1), 1),
    ((), 0),
    ((0, 4), 1),
    ((4, 0), 1),
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "dim"), ROWS, ids=str)
def test_values(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> None:
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    x += x.sign()  # Of one short number all that is left is rounding, times the square of its inverse.
    if x.numel():
        (x.movedim(dim, -1) if x.ndim else x)[(0,) * (x.ndim - 1)] = 0
    eps = 0.5
    ours = harness.untouched(lambda *args: run(*args, dim, eps), v, g, x)
    assert all(result.is_contiguous() for result in ours)
    truth = derived(*harness.in_double((v, g, x)), dim, eps)
    # Terms cancel in a sum that is then divided by the square of the norm.
    harness.assert_accurate(ours, truth, harness.units(dtype, 8, floor=8 * torch.finfo(dtype).eps))


# Shape and dimension.
WEIGHTS = [
    ((6, 5, 3), 0),
    ((3, 8193), 0),  # longer than a tile
    ((4, 3, 37), 2),
    ((133, 5), 1),  # in several blocks of columns
    ((7,), 0),
    ((0, 3), 0),
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "dim"), WEIGHTS, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_weight_norm(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> None:
    lengths = [n if k == dim else 1 for k, n in enumerate(shape)]
    u, a, v = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    t, g = (normal(*lengths, dtype=dtype, device=device) for _ in range(2))
    v += v.sign()

    def double_backward(u: Tensor | None, t: Tensor | None, a: Tensor, v: Tensor, g: Tensor) -> Any:
        return harness.implementation(normalize, v).weight_norm_double_backward(u, t, a, v, g, dim)

    ours = harness.untouched(double_backward, u, t, a, v, g)
    allowed = harness.units(dtype, 8, floor=8 * torch.finfo(dtype).eps)

    def truth(u: Tensor | None, t: Tensor | None, *rest: Tensor) -> list[Tensor]:
        a, v, g = harness.in_double(rest)
        grad_grads = harness.in_double((u, t))
        return reference.all_orders(
            lambda v, g: reference.weight_norm(v, g, dim), (v, g), a, tuple(grad_grads)
        )[2]

    harness.assert_accurate(ours, truth(u, t, a, v, g), allowed)
    assert all(result.is_contiguous() for result in ours)
    for some in ((u, None), (None, t)):
        harness.assert_accurate(double_backward(*some, a, v, g), truth(*some, a, v, g), allowed)


@on_every_device
def test_strided_operands_give_the_same_bits(device: str) -> None:
    v, g, x = (normal(6, 10, 4, dtype=torch.float32, device=device) for _ in range(3))
    assert all(map(torch.equal, run(*map(harness.strided, (v, g, x)), 1), run(v, g, x, 1)))


@on_every_device
@pytest.mark.parametrize("n", harness.usual_interpreted([49, 8200], 49))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_nan_stays_in_its_row(n: int, device: str) -> None:
    v, g, x = (normal(4, n, dtype=torch.float32, device=device) for _ in range(3))
    x[1, n - 1] = math.nan
    g[2, 0] = math.nan
    output, gradient, *double = run(v, g, x, 1)
    assert output.isnan().any(1).tolist() == [False, True, False, False]
    for result in (gradient, double[1], double[3]):
        assert result.isnan().all(1).tolist() == [False, True, True, False]
    for result in (double[0], double[2]):
        assert result.isnan().all(1).tolist() == [False, True, False, False]


@on_every_device
def test_bad_input(device: str) -> None:
    x, g = torch.ones(4, 3, device=device), torch.ones(4, 1, device=device)
    forward, backward = normalize.normalize, normalize.normalize_backward
    double_backward, of_norm = normalize.normalize_double_backward, normalize.vector_norm_double_backward
    harness.assert_rejected(
        (TypeError, "expected input", forward, x.int(), 1, EPS),
        (ValueError, "expected eps", forward, x, 1, 0.0),
        (IndexError, "Dimension out of range", forward, x, 2, EPS),
        (ValueError, "expected grad_output", backward, g, x, 1, EPS),
        (TypeError, "expected grad_output", backward, x.double(), x, 1, EPS),
        (RuntimeError, "grad_output .* got meta", backward, x.to("meta"), x, 1, EPS),
        (ValueError, "expected grad_grad_input", double_backward, g, x, x, 1, EPS),
        (ValueError, "expected grad_output", of_norm, x, x, x, 1),
        (ValueError, "expected grad_grad_input", of_norm, g, g, x, 1),
        (IndexError, "Dimension out of range", of_norm, x, g, x, -3),
        (ValueError, "expected dim", normalize.weight_norm_double_backward, x, g, x, x, g, -1),
        (ValueError, "expected g", normalize.weight_norm_double_backward, x, g, x, x, g, 1),
        (ValueError, "expected grad_output", normalize.weight_norm_double_backward, x, g, g, x, g, 0),
        (TypeError, "expected grad_grad_g", normalize.weight_norm_double_backward, x, g.double(), x, x, g, 0),
    )
