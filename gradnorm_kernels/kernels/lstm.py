"""The Triton kernel of an LSTM cell's step: forward, backward and double backward.

A program takes a block of the cell's elements, and the four gates of each. csrc/cpu/lstm.h has the
mathematics.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import expm1, logistic, tile
from .common import DTYPES, FP_FUSION, load, on_meta

FORWARD, BACKWARD, DOUBLE_BACKWARD = range(3)


@triton.jit
def _tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (2.0 + e)
    return tl.where(x >= 0, size, -size)


@triton.jit
def _load_gates(ptr, at, features, mask):
    return (
        load(ptr, at, mask),
        load(ptr, at + features, mask),
        load(ptr, at + 2 * features, mask),
        load(ptr, at + 3 * features, mask),
    )


@triton.jit
def _store_gates(ptr, at, features, mask, i, f, g, o):
    tl.store(ptr + at, i, mask=mask)
    tl.store(ptr + at + features, f, mask=mask)
    tl.store(ptr + at + 2 * features, g, mask=mask)
    tl.store(ptr + at + 3 * features, o, mask=mask)


@triton.jit
def lstm_cell_kernel(
    grad_grad_gates_ptr,
    grad_grad_cell_ptr,
    grad_hidden_ptr,
    grad_next_cell_ptr,
    gates_ptr,
    cell_ptr,
    of_hidden_ptr,
    of_next_cell_ptr,
    of_gates_ptr,
    of_cell_ptr,
    n,
    features,
    order: tl.constexpr,
    block_size: tl.constexpr,
):
    """With s the logistic function, c = s(f) cell + s(i) tanh(g) and h = s(o) tanh(c): these, the
    gradients of gates and cell, or those of all that these are functions of.

    Moves 7n, 12n or 19n elements: reads 5, 7 or 12 and writes the rest.
    """
    own, mask = tile(n, block_size)
    at = own + own // features * (3 * features)
    i, f, g, o = _load_gates(gates_ptr, at, features, mask)
    cell = load(cell_ptr, own, mask)
    si, di = logistic(i)
    sf, df = logistic(f)
    so, do = logistic(o)
    tg = _tanh(g)
    c = sf * cell + si * tg
    t = _tanh(c)
    if order == 0:
        tl.store(of_hidden_ptr + own, so * t, mask=mask)
        tl.store(of_next_cell_ptr + own, c, mask=mask)
    else:
        dt = 1.0 - t * t
        dg = 1.0 - tg * tg
        grad = load(grad_hidden_ptr, own, mask)
        d = load(grad_next_cell_ptr, own, mask) + grad * so * dt
        if order == 1:
            _store_gates(
                of_gates_ptr, at, features, mask, d * tg * di, d * cell * df, d * si * dg, grad * t * do
            )
            tl.store(of_cell_ptr + own, d * sf, mask=mask)
        else:
            vi, vf, vg, vo = _load_gates(grad_grad_gates_ptr, at, features, mask)
            vc = load(grad_grad_cell_ptr, own, mask)
            # Of d, and of c through t.
            of_d = vi * tg * di + vf * cell * df + vg * si * dg + vc * sf
            of_c = (vo * do - 2.0 * of_d * so * t) * grad * dt
            tl.store(of_hidden_ptr + own, of_d * so * dt + vo * t * do, mask=mask)
            tl.store(of_next_cell_ptr + own, of_d, mask=mask)
            _store_gates(
                of_gates_ptr,
                at,
                features,
                mask,
                d * (vi * tg * di * (1.0 - 2.0 * si) + vg * di * dg) + of_c * tg * di,
                d * (vf * cell * df * (1.0 - 2.0 * sf) + vc * df) + of_c * cell * df,
                d * (vi * di - 2.0 * vg * si * tg) * dg + of_c * si * dg,
                grad * (of_d * dt * do + vo * t * do * (1.0 - 2.0 * so)),
            )
            tl.store(of_cell_ptr + own, d * vf * df + of_c * sf, mask=mask)


def _run(op: str, order: int, *tensors: Tensor) -> Any:
    """The tensors are the op's: gates and cell come last."""
    gates, cell = tensors[-2:]
    like_gates = (gates, *tensors[: order == DOUBLE_BACKWARD])
    like_cell = tensors[order == DOUBLE_BACKWARD : -2]
    if (
        cell.dtype not in DTYPES
        or cell.ndim == 0
        or any(t.dtype != cell.dtype or t.device != cell.device for t in tensors)
        or any(t.shape != (*cell.shape[:-1], 4 * cell.shape[-1]) for t in like_gates)
        or any(t.shape != cell.shape for t in like_cell)
    ):
        on_meta(op, tensors)

    def new(like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    of_hidden, of_next = (None, None) if order == BACKWARD else (new(cell), new(cell))
    of_gates, of_cell = (None, None) if order == FORWARD else (new(gates), new(cell))
    if cell.numel() > 0:
        operands = [None] * (6 - len(tensors)) + [tensor.contiguous() for tensor in tensors]
        block_size = 256
        lstm_cell_kernel[(triton.cdiv(cell.numel(), block_size),)](
            *operands,
            of_hidden,
            of_next,
            of_gates,
            of_cell,
            cell.numel(),
            cell.shape[-1],
            order=order,
            block_size=block_size,
            num_warps=4,
            **FP_FUSION,
        )
    return tuple(result for result in (of_hidden, of_next, of_gates, of_cell) if result is not None)


def lstm_cell(gates: Tensor, cell: Tensor) -> Any:
    return _run("lstm_cell", FORWARD, gates, cell)


def lstm_cell_backward(grad_hidden: Tensor, grad_next_cell: Tensor, gates: Tensor, cell: Tensor) -> Any:
    return _run("lstm_cell_backward", BACKWARD, grad_hidden, grad_next_cell, gates, cell)


def lstm_cell_double_backward(
    grad_grad_gates: Tensor,
    grad_grad_cell: Tensor,
    grad_hidden: Tensor,
    grad_next_cell: Tensor,
    gates: Tensor,
    cell: Tensor,
) -> Any:
    tensors = grad_grad_gates, grad_grad_cell, grad_hidden, grad_next_cell, gates, cell
    return _run("lstm_cell_double_backward", DOUBLE_BACKWARD, *tensors)
