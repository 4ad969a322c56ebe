"""The Triton kernels of gated linear units, run against float64."""

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

gated: Any = importlib.import_module("gradnorm_kernels.kernels.gated")

REFERENCE = {
    "sigmoid": reference.sigmoid,
    "silu": reference.silu,
    "gelu_none": reference.gelu,
    "gelu_tanh": lambda gate: reference.gelu(gate, "tanh"),
}
in_every_gate = pytest.mark.parametrize("activation", REFERENCE)


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    x = meta(64, 197, 3072, dtype=dtype)
    for activation in REFERENCE:
        yield activation, gated.gated_unit, x, x, activation
        yield activation, gated.gated_unit_backward, x, x, x, activation
        yield activation, gated.gated_unit_double_backward, x, x, x, x, x, activation


test_compiles_without_spills = harness.compilation_test(calls, wide=["all"])


def derived(activation: str, v: Tensor, u: Tensor, g: Tensor, x: Tensor, z: Tensor) -> list[list[Tensor]]:
    """The output; the gradients of the gate and the value; those of all that these are functions of."""
    return reference.all_orders(lambda x, z: REFERENCE[activation](x) * z, (x, z), g, (v, u))


@on_every_device
@in_every_dtype
@in_every_gate
@pytest.mark.parametrize("shape", [(3, 5, 7), (1500,), (), (0, 4)], ids=str)
def test_values(shape: tuple[int, ...], activation: str, dtype: torch.dtype, device: str) -> None:
    operands = [normal(*shape, dtype=dtype, device=device) for _ in range(5)]
    v, u, g, x, z = operands
    (output,), first, second = derived(activation, *harness.in_double(operands))
    ops = harness.implementation(gated, x)
    allowed = harness.units(dtype, 8, floor=torch.finfo(dtype).eps)
    (forward,) = harness.untouched(lambda *args: [ops.gated_unit(*args)], x, z, activation)
    harness.assert_accurate([forward], [output], allowed)
    harness.assert_accurate(harness.untouched(ops.gated_unit_backward, g, x, z, activation), first, allowed)
    results = harness.untouched(ops.gated_unit_double_backward, v, u, g, x, z, activation)
    harness.assert_accurate(results, second, allowed)


@on_every_device
def test_strided_operands(device: str) -> None:
    x, z, g = (normal(6, 4, 10, dtype=torch.float32, device=device) for _ in range(3))
    halves = torch.cat([x, z], -1).chunk(2, -1)
    ops = harness.implementation(gated, x)
    for strided, dense in (
        (
            ops.gated_unit_backward(harness.strided(g), *halves, "silu"),
            ops.gated_unit_backward(g, x, z, "silu"),
        ),
        ([ops.gated_unit(*halves, "silu")], [ops.gated_unit(x, z, "silu")]),
    ):
        assert all(map(torch.equal, strided, dense))


@on_every_device
def test_bad_operands(device: str) -> None:
    x = normal(3, dtype=torch.float32, device=device)
    harness.assert_rejected(
        (ValueError, "activation", gated.gated_unit, x, x, "relu"),
        (ValueError, "shape", gated.gated_unit, x, normal(4, dtype=torch.float32, device=device), "silu"),
        (TypeError, "float16, bfloat16", gated.gated_unit, x.long(), x.long(), "silu"),
    )
