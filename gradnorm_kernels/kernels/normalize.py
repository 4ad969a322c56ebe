"""The Triton kernel of division by the Euclidean norm, and of that norm's and weight normalisation's double
backward.

A program takes a tile of whole rows if they fit, else it walks along its rows twice, block by block.
csrc/normalize.cpp has the mathematics.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BACKWARD,
    DOUBLE_BACKWARD,
    DTYPES,
    FORWARD,
    contiguous,
    empty_like,
    load,
    moved,
    on_meta,
    opmath_of,
    or_zeros,
)
from .softmax import elements, launch_plan, rows_of_program, rows_plan

NORM_DOUBLE_BACKWARD, WEIGHT_NORM_DOUBLE_BACKWARD = DOUBLE_BACKWARD + 1, DOUBLE_BACKWARD + 2


@triton.jit
def _load_operands(input_ptr, grad_output_ptr, grad_grad_input_ptr, offsets, mask, order: tl.constexpr):
    """The input, grad_output and grad_grad_input; for what the pass does not read, the input again."""
    x = load(input_ptr, offsets, mask)
    g = x
    v = x
    if order != 0 and order != 3:
        g = load(grad_output_ptr, offsets, mask)
    if order >= 2:
        v = load(grad_grad_input_ptr, offsets, mask)
    return x, g, v


@triton.jit
def _sum(t):
    return tl.sum(t, axis=1, keep_dims=True)


@triton.jit
def _unless(is_short, value):
    return tl.where(is_short, 0.0, value)


@triton.jit
def _along_y(xx, gx, vx, vg, eps: tl.constexpr, order: tl.constexpr):
    """Of a row's sums: its r, <g, y>, <v, y> and <v, g>."""
    norm = tl.sqrt(xx)
    if order == 3:
        is_short = norm == 0.0
        r = _unless(is_short, 1.0 / norm)
    elif order == 4:
        is_short = norm < 0.0  # None is.
        r = 1.0 / norm
    else:
        is_short = norm < eps
        r = tl.where(is_short, 1.0 / eps, 1.0 / norm)
    g_y = _unless(is_short, r * gx)
    v_y = _unless(is_short, r * vx)
    return r, g_y, v_y, _unless(is_short, vg)


@triton.jit
def _store(
    first_ptr, second_ptr, offsets, mask, x, g, v, r, g_y, v_y, v_g, length, of_length, order: tl.constexpr
):
    y = r * x
    of_y = v_g - 3.0 * g_y * v_y
    if order == 0:
        tl.store(first_ptr + offsets, y, mask=mask)
    elif order == 1:
        tl.store(first_ptr + offsets, r * (g - y * g_y), mask=mask)
    elif order == 2:
        tl.store(first_ptr + offsets, r * (v - y * v_y), mask=mask)
        # r is large where a row is short: it multiplies the sum, whose terms cancel.
        tl.store(second_ptr + offsets, -r * (r * (of_y * y + (g_y * v + v_y * g))), mask=mask)
    elif order == 4:
        tl.store(first_ptr + offsets, of_length * y + length * (r * (v - y * v_y)), mask=mask)
        of_x = of_length * (g - y * g_y) - length * (r * (of_y * y + (g_y * v + v_y * g)))
        tl.store(second_ptr + offsets, r * of_x, mask=mask)
    else:
        tl.store(second_ptr + offsets, g * r * (v - y * v_y), mask=mask)


@triton.jit
def normalize_kernel(
    input_ptr,
    grad_output_ptr,
    grad_grad_input_ptr,
    length_ptr,
    grad_grad_length_ptr,
    first_ptr,
    second_ptr,
    grad_length_ptr,
    others,
    units,
    eps: tl.constexpr,
    order: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
    unit: tl.constexpr,
    across: tl.constexpr,
    wide: tl.constexpr,
):
    """With x = input, g = grad_output and v = grad_grad_input, by order: first = output; first = grad_input;
    first = grad_grad_output and second = grad_input; that of the norm, of which grad_output and first have an
    element a row; or that of weight normalisation, as have length, its grad_grad and its gradient there.

    Moves 2N, 3N, 5N, 3N or 5N elements: reads 1, 2, 3, 2 or 3, writes 1, 1, 2, 1 or 2. If looped, reads
    twice.
    """
    start, number, rows = rows_of_program(others, units, unit, across, wide, block_rows)
    in_rows, n_cols = rows[1], rows[2]
    own = number + tl.arange(0, block_rows)[:, None]
    of_norm: tl.constexpr = order == 3
    of_weights: tl.constexpr = order == 4
    length = 1.0
    of_length = 0.0
    if of_weights:
        length = load(length_ptr, own, in_rows)
        of_length = load(grad_grad_length_ptr, own, in_rows)
    input_ptr += start
    grad_grad_input_ptr = moved(grad_grad_input_ptr, start)
    second_ptr = moved(second_ptr, start)
    if not of_norm:
        grad_output_ptr = moved(grad_output_ptr, start)
        first_ptr += start
    if looped:
        xx = tl.zeros([block_rows, 1], opmath_of(input_ptr))
        gx = xx
        vx = xx
        vg = xx
        for first in range(0, n_cols, block_cols):
            offsets, mask, _cols = elements(rows, first, block_cols)
            x, g, v = _load_operands(input_ptr, grad_output_ptr, grad_grad_input_ptr, offsets, mask, order)
            xx += _sum(x * x)
            gx += _sum(g * x)
            vx += _sum(v * x)
            vg += _sum(v * g)
        r, g_y, v_y, v_g = _along_y(xx, gx, vx, vg, eps, order)
        for first in range(0, n_cols, block_cols):
            offsets, mask, _cols = elements(rows, first, block_cols)
            x, g, v = _load_operands(input_ptr, grad_output_ptr, grad_grad_input_ptr, offsets, mask, order)
            if of_norm:
                g = load(grad_output_ptr, own, in_rows)
            _store(first_ptr, second_ptr, offsets, mask, x, g, v, r, g_y, v_y, v_g, length, of_length, order)
    else:
        offsets, mask, _cols = elements(rows, 0, block_cols)
        x, g, v = _load_operands(input_ptr, grad_output_ptr, grad_grad_input_ptr, offsets, mask, order)
        r, g_y, v_y, v_g = _along_y(_sum(x * x), _sum(g * x), _sum(v * x), _sum(v * g), eps, order)
        if of_norm:
            g = load(grad_output_ptr, own, in_rows)
        _store(first_ptr, second_ptr, offsets, mask, x, g, v, r, g_y, v_y, v_g, length, of_length, order)
    if of_norm:
        tl.store(first_ptr + own, v_y, mask=in_rows)
    if of_weights:
        tl.store(grad_length_ptr + own, r * (v_g - g_y * v_y), mask=in_rows)


def _run(op: str, order: int, tensors: tuple[Tensor, ...], dim: int, *eps: float) -> Any:
    """The tensors are the op's: the input comes last, the gradients before it."""
    *grads, input = tensors
    ndim = max(input.ndim, 1)
    of_norm = order == NORM_DOUBLE_BACKWARD
    shapes = [input.shape] * len(grads)
    if of_norm and -ndim <= dim < ndim and input.ndim:
        shapes[1] = torch.Size(1 if k == dim % ndim else n for k, n in enumerate(input.shape))
    if (
        input.dtype not in DTYPES
        or not -ndim <= dim < ndim
        or any(not e > 0 for e in eps)
        or any((t.dtype, t.device) != (input.dtype, input.device) for t in grads)
        or [t.shape for t in grads] != shapes
    ):
        on_meta(op, tensors, dim, *eps)
    results = [empty_like(input)]
    if order == DOUBLE_BACKWARD:
        results.append(empty_like(input))
    elif of_norm:
        # The sum of no elements is 0.
        results.insert(0, (input.new_empty if input.numel() else input.new_zeros)(shapes[1]))
    if input.numel() > 0:
        plan = rows_plan(input.shape, dim % ndim, input.itemsize, eps=eps[0] if eps else 0.0, order=order)
        operands: list[Tensor | None] = [None] * (2 - len(grads))
        operands += [tensor.contiguous() for tensor in tensors]
        v, g, x = operands
        absent = [None] * (2 - len(results))
        launch_plan(normalize_kernel, plan, x, g, v, None, None, *results, *absent, None)
    return results[0] if len(results) == 1 else tuple(results)


def normalize(input: Tensor, dim: int, eps: float) -> Any:
    return _run("normalize", FORWARD, (input,), dim, eps)


def normalize_backward(grad_output: Tensor, input: Tensor, dim: int, eps: float) -> Any:
    return _run("normalize_backward", BACKWARD, (grad_output, input), dim, eps)


def normalize_double_backward(
    grad_grad_input: Tensor, grad_output: Tensor, input: Tensor, dim: int, eps: float
) -> Any:
    tensors = grad_grad_input, grad_output, input
    return _run("normalize_double_backward", DOUBLE_BACKWARD, tensors, dim, eps)


def vector_norm_double_backward(grad_grad_input: Tensor, grad_output: Tensor, input: Tensor, dim: int) -> Any:
    tensors = grad_grad_input, grad_output, input
    return _run("vector_norm_double_backward", NORM_DOUBLE_BACKWARD, tensors, dim)


def weight_norm_double_backward(
    grad_grad_v: Tensor | None,
    grad_grad_g: Tensor | None,
    grad_output: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int,
) -> Any:
    u = or_zeros(grad_grad_v, v)
    t = or_zeros(grad_grad_g, g)
    lengths = [n if k == dim else 1 for k, n in enumerate(v.shape)]
    if (
        v.dtype not in DTYPES
        or v.ndim == 0
        or dim not in (0, v.ndim - 1)
        or any((a.dtype, a.device) != (v.dtype, v.device) for a in (u, t, grad_output, g))
        or not u.shape == grad_output.shape == v.shape
        or not list(t.shape) == list(g.shape) == lengths
    ):
        on_meta("weight_norm_double_backward", (u, t, grad_output, v, g), dim)
    # The sum of no elements is 0.
    grad_g = (g.new_empty if v.numel() else g.new_zeros)(g.shape)
    results = empty_like(v), empty_like(v), grad_g
    if v.numel() > 0:
        others = v.numel() // v.shape[dim]
        shape = (v.shape[0], others) if dim == 0 else (others, v.shape[-1])
        along = 1 if dim == 0 else 0
        plan = rows_plan(shape, along, v.itemsize, eps=0.0, order=WEIGHT_NORM_DOUBLE_BACKWARD)
        launch_plan(normalize_kernel, plan, *contiguous(v, grad_output, u, g, t), *results)
    return results
