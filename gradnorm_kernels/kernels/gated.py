"""Triton kernels of gated linear units, act(gate) value: the passes of `activation`, with more operands."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .activation import ACTIVATIONS, Activation, Pass, logistic, make_op, tile
from .common import widen


@triton.jit
def _logistic_f(x, parameters: tl.constexpr):
    s, _ = logistic(x)
    return s


@triton.jit
def _logistic_df(g, x, parameters: tl.constexpr):
    _, q = logistic(x)
    return g * q


@triton.jit
def _logistic_ddf(v, g, x, parameters: tl.constexpr):
    s, q = logistic(x)
    return v * (q * (1.0 - 2.0 * s)) * g


@triton.jit
def _gated_fwd_kernel(
    gate_ptr, value_ptr, output_ptr, n, parameters: tl.constexpr, f: tl.constexpr, block_size: tl.constexpr
):
    """output = f(gate) value. Moves 3n elements: reads 2, writes 1."""
    offsets, mask = tile(n, block_size)
    gate = widen(tl.load(gate_ptr + offsets, mask=mask))
    value = widen(tl.load(value_ptr + offsets, mask=mask))
    tl.store(output_ptr + offsets, f(gate, parameters) * value, mask=mask)


@triton.jit
def _gated_bwd_kernel(
    grad_output_ptr,
    gate_ptr,
    value_ptr,
    grad_gate_ptr,
    grad_value_ptr,
    n,
    parameters: tl.constexpr,
    f: tl.constexpr,
    df: tl.constexpr,
    block_size: tl.constexpr,
):
    """grad_gate = grad_output f'(gate) value, grad_value = grad_output f(gate).

    Moves 5n elements: reads 3, writes 2."""
    offsets, mask = tile(n, block_size)
    g = widen(tl.load(grad_output_ptr + offsets, mask=mask))
    gate = widen(tl.load(gate_ptr + offsets, mask=mask))
    value = widen(tl.load(value_ptr + offsets, mask=mask))
    tl.store(grad_gate_ptr + offsets, df(g * value, gate, parameters), mask=mask)
    tl.store(grad_value_ptr + offsets, g * f(gate, parameters), mask=mask)


@triton.jit
def _gated_bwd_bwd_kernel(
    grad_grad_gate_ptr,
    grad_grad_value_ptr,
    grad_output_ptr,
    gate_ptr,
    value_ptr,
    grad_grad_output_ptr,
    grad_gate_ptr,
    grad_value_ptr,
    n,
    parameters: tl.constexpr,
    f: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    block_size: tl.constexpr,
):
    """The gradients of the backward's operands (csrc/gated.cpp). Moves 8n elements: reads 5, writes 3."""
    offsets, mask = tile(n, block_size)
    v = widen(tl.load(grad_grad_gate_ptr + offsets, mask=mask))
    u = widen(tl.load(grad_grad_value_ptr + offsets, mask=mask))
    g = widen(tl.load(grad_output_ptr + offsets, mask=mask))
    gate = widen(tl.load(gate_ptr + offsets, mask=mask))
    value = widen(tl.load(value_ptr + offsets, mask=mask))
    grad_grad_output = df(v * value, gate, parameters) + u * f(gate, parameters)
    grad_gate = ddf(v, g * value, gate, parameters) + df(u * g, gate, parameters)
    tl.store(grad_grad_output_ptr + offsets, grad_grad_output, mask=mask)
    tl.store(grad_gate_ptr + offsets, grad_gate, mask=mask)
    tl.store(grad_value_ptr + offsets, df(v * g, gate, parameters), mask=mask)


GATES = {
    "sigmoid": Activation(_logistic_f, _logistic_df, _logistic_ddf),
    **{name: ACTIVATIONS[name] for name in ("silu", "gelu_none", "gelu_tanh")},
}


@functools.cache
def _select(activation: str) -> Activation:
    if activation not in GATES:
        names = ", ".join(map(repr, GATES))
        raise ValueError(f"gated_unit: expected activation to be one of {names}, got {activation!r}")
    return GATES[activation]


gated_unit = make_op(Pass(_gated_fwd_kernel, "", 2, 1, ("f",)), "gated_unit", _select)
gated_unit_backward = make_op(
    Pass(_gated_bwd_kernel, "_backward", 3, 2, ("f", "df")), "gated_unit_backward", _select
)
gated_unit_double_backward = make_op(
    Pass(_gated_bwd_bwd_kernel, "_double_backward", 5, 3, ("f", "df", "ddf")),
    "gated_unit_double_backward",
    _select,
)
