"""The Triton kernel of permute_rows, run against indexing."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from harness import INTERPRET, in_every_dtype, meta, normal, on_every_device
from torch import Tensor

from gradnorm_kernels.kernels import NotCoveredError

permute_rows: Any = importlib.import_module("gradnorm_kernels.kernels.permute_rows")


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Swin-B's first and last stage, Swin-T's first, and rows that no access of 16 bytes fits."""
    for name, shape in (
        ("swin56", (64, 3136, 128)),
        ("swin7", (64, 49, 1024)),
        ("swin_tiny56", (64, 3136, 96)),
        ("odd", (64, 49, 33)),
    ):
        index = meta(shape[1], dtype=torch.int64)
        yield name, permute_rows.permute_rows, meta(*shape, dtype=dtype), index, index


test_compiles_without_spills = harness.compilation_test(calls)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["swin56", "swin7", "swin_tiny56"])
def test_rows_are_copied_in_16_bytes(name: str, dtype: torch.dtype) -> None:
    """Four accesses a thread each way. All others are of the index, and ptxas merges most of them."""
    (launch,) = harness.recorded(*next(call[1:] for call in calls(dtype) if call[0] == name))
    wide, narrow = harness.accesses(launch.compiled(90).asm["ptx"])
    assert wide == 8 and set(narrow) == {"ld.global.b64"}


def run(x: Tensor, index: Tensor) -> Tensor:
    return harness.implementation(permute_rows, x).permute_rows(x, index, index.argsort())


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 3),
        (3, 49, 96),  # a last block of columns that is partly filled
        (2, 70, 1024),  # several tiles, the last one partly filled
        (1, 3, 5000),  # rows longer than a tile
        (4, 1, 8),
        (2, 6, 1),
        (0, 5, 3),
        (2, 0, 3),
        (2, 5, 0),
    ],
    ids=str,
)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, index = normal(*shape, dtype=dtype, device=device), torch.randperm(shape[1], device=device)
    (output,) = harness.untouched(lambda *args: [run(*args)], x, index)
    assert output.is_contiguous() and torch.equal(output, x[:, index])
    steps = torch.stack([index, index], 1)[:, 0]
    assert torch.equal(run(harness.strided(x), steps), output)


@on_every_device
def test_a_row_that_there_is_not_gives_nan(device: str) -> None:
    x = normal(2, 4, 3, dtype=torch.float32, device=device)
    output = run(x, torch.tensor([1, 4, -1, 3], device=device))
    assert torch.equal(output[:, ::3], x[:, 1::2])
    assert output[:, 1:3].isnan().all() and not math.isnan(output[:, ::3].sum())


@harness.in_the_interpreter
def test_other_dtypes_are_not_covered_in_the_interpreter() -> None:
    with pytest.raises(NotCoveredError):
        run(torch.ones(2, 4, 3, dtype=torch.int64), torch.arange(4))


@on_every_device
def test_bad_input(device: str) -> None:
    x, index = torch.ones(2, 4, 3, device=device), torch.arange(4, device=device)
    op = permute_rows.permute_rows
    harness.assert_rejected(
        (ValueError, "expected input", op, x[0], index, index),
        (TypeError, "expected index", op, x, index.int(), index),
        (ValueError, "expected inverse", op, x, index, index[:3]),
        (RuntimeError, "index .* got meta", op, x, index.to("meta"), index),
    )


@pytest.mark.gpu
def test_other_dtypes_and_autograd() -> None:
    index = torch.randperm(49, device="cuda")
    x = torch.randint(9, (2, 49, 3), device="cuda")
    assert torch.equal(run(x, index), x[:, index])
    x = torch.randn(2, 49, 96, device="cuda", requires_grad=True)
    g, v = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    (grad,) = torch.autograd.grad(run(x, index), x, g, create_graph=True)
    assert torch.equal(grad, g[:, index.argsort()])
    assert torch.equal(torch.autograd.grad(grad, g, v)[0], v[:, index])


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    shape = (2**15 + 1, 512, 128)
    harness.skip_without_memory(3 * math.prod(shape) * torch.bfloat16.itemsize)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    for batch in (0, -1):
        x[batch].normal_()
    index = torch.randperm(shape[1], device="cuda")
    harness.assert_same_in_parts(lambda x: (run(x, index),), (0, shape[0] - 1), 1, x)
