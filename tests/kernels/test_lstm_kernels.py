"""The Triton kernel of an LSTM cell's step, run against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from harness import in_every_dtype, meta, normal, on_every_device
from torch import Tensor

lstm: Any = importlib.import_module("gradnorm_kernels.kernels.lstm")


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    gates, cell = meta(64, 1024, dtype=dtype), meta(64, 256, dtype=dtype)
    yield "step", lstm.lstm_cell, gates, cell
    yield "step", lstm.lstm_cell_backward, cell, cell, gates, cell
    yield "step", lstm.lstm_cell_double_backward, gates, cell, cell, cell, gates, cell


test_compiles_without_spills = harness.compilation_test(calls)


def values(gates: Tensor, cell: Tensor) -> Tensor:
    i, f, g, o = gates.chunk(4, -1)
    next_cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * next_cell.tanh(), next_cell], -1)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("shape", [(3, 5), (7, 97), (2, 3, 2), (0, 4), (5,)], ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    wide = (*shape[:-1], 4 * shape[-1])
    gates, v = (normal(*wide, dtype=dtype, device=device) for _ in range(2))
    cell, u, dh, dc = (normal(*shape, dtype=dtype, device=device) for _ in range(4))
    exact = harness.in_double([gates, cell, torch.cat([dh, dc], -1), v, u])
    (output,), first, (of_grads, *second) = reference.all_orders(values, exact[:2], exact[2], exact[3:])
    ops = harness.implementation(lstm, cell)
    allowed = harness.units(dtype, 8, floor=torch.finfo(dtype).eps)
    results = harness.untouched(ops.lstm_cell, gates, cell)
    harness.assert_accurate(results, output.chunk(2, -1), allowed)
    results = harness.untouched(ops.lstm_cell_backward, dh, dc, gates, cell)
    harness.assert_accurate(results, first, allowed)
    results = harness.untouched(ops.lstm_cell_double_backward, v, u, dh, dc, gates, cell)
    harness.assert_accurate(results, [*of_grads.chunk(2, -1), *second], allowed)


@on_every_device
def test_bad_operands(device: str) -> None:
    gates, cell = (normal(3, n, dtype=torch.float32, device=device) for n in (8, 2))
    harness.assert_rejected(
        (ValueError, "four times the columns", lstm.lstm_cell, gates[:, 1:], cell),
        (ValueError, "shape", lstm.lstm_cell_backward, cell[:2], cell, gates, cell),
        (TypeError, "dtype", lstm.lstm_cell, gates.double(), cell),
    )
