"""The Triton kernel of a recurrent cell's step, run against float64."""

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

recurrent: Any = importlib.import_module("gradnorm_kernels.kernels.recurrent")
CELLS = ("lstm", "gru")


def ops_of(cell: str, module: Any) -> list[Any]:
    return [getattr(module, f"{cell}_step{suffix}") for suffix in ("", "_backward", "_double_backward")]


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    gates, state = meta(64, 1024, dtype=dtype), meta(64, 256, dtype=dtype)
    for cell in CELLS:
        forward, backward, double_backward = ops_of(cell, recurrent)
        yield cell, forward, gates, state
        yield cell, backward, state, state, gates, state
        yield cell, double_backward, gates, state, state, state, gates, state


test_compiles_without_spills = harness.compilation_test(calls)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(3, 5), (7, 97), (2, 3, 2), (0, 4), (5,)], ids=str)
def test_values(shape: tuple[int, ...], cell: str, dtype: torch.dtype, device: str) -> None:
    wide = (*shape[:-1], 4 * shape[-1])
    gates, v = (normal(*wide, dtype=dtype, device=device) for _ in range(2))
    state, u, dh, dc = (normal(*shape, dtype=dtype, device=device) for _ in range(4))

    def side_by_side(gates: Tensor, state: Tensor) -> Tensor:
        return torch.cat(reference.recurrent_step(cell, gates, state), -1)

    exact = harness.in_double([gates, state, torch.cat([dh, dc], -1), v, u])
    (output,), first, (of_grads, *second) = reference.all_orders(side_by_side, exact[:2], exact[2], exact[3:])
    forward, backward, double_backward = ops_of(cell, harness.implementation(recurrent, state))
    allowed = harness.units(dtype, 8, floor=torch.finfo(dtype).eps)
    harness.assert_accurate(harness.untouched(forward, gates, state), output.chunk(2, -1), allowed)
    harness.assert_accurate(harness.untouched(backward, dh, dc, gates, state), first, allowed)
    results = harness.untouched(double_backward, v, u, dh, dc, gates, state)
    harness.assert_accurate(results, [*of_grads.chunk(2, -1), *second], allowed)


@on_every_device
def test_bad_operands(device: str) -> None:
    gates, state = (normal(3, n, dtype=torch.float32, device=device) for n in (8, 2))
    harness.assert_rejected(
        (ValueError, "four times the columns", recurrent.lstm_step, gates[:, 1:], state),
        (ValueError, "shape", recurrent.gru_step_backward, state[:2], state, gates, state),
        (TypeError, "dtype", recurrent.lstm_step, gates.double(), state),
    )
