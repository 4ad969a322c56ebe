"""The Triton kernel of both derivatives of distances between pairs of points.

A program takes a block of points of the one set and walks along the other: differences of pairs are in no
memory. csrc/cdist.cpp has the mathematics.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NotCoveredError
from .common import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FP_FUSION,
    contiguous,
    empty_like,
    launch,
    load,
    on_meta,
    opmath_of,
    or_zeros,
)

MOST_COORDINATES = 64  # that a program holds at once


@triton.jit
def _differences(a_ptr, b_ptr, rows, cols, offsets, in_rows, in_cols, in_point):
    """(rows, columns, coordinates)"""
    a = load(
        a_ptr, rows[:, None, :] + offsets[None, None, :], in_rows[:, None, None] & in_point[None, None, :]
    )
    b = load(
        b_ptr, cols[None, :, :] + offsets[None, None, :], in_cols[None, :, None] & in_point[None, None, :]
    )
    return a - b


@triton.jit
def _sign(e):
    return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, 0.0)).to(e.dtype)


@triton.jit
def cdist_kernel(
    x_ptr,
    y_ptr,
    u_ptr,
    v_ptr,
    grad_output_ptr,
    grad_grad_output_ptr,
    grad_x_ptr,
    n,
    m,
    coordinates,
    row_stride,
    col_stride,
    euclidean: tl.constexpr,
    order: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    block_coordinates: tl.constexpr,
):
    """With g = grad_output: of first order grad_x = sum_j g f(x - y_j), in a block of coordinates. Of second
    order grad_grad_output and grad_x, either of which may be None; not euclidean, grad_grad_output alone.

    Moves n m elements a batch for each of g, whose last two dimensions have these strides, and
    grad_grad_output.
    """
    blocks = tl.cdiv(n, block_rows)
    row = (tl.program_id(0) % blocks) * block_rows + tl.arange(0, block_rows)
    in_rows = row < n
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((batch * n + row) * coordinates)[:, None]
    pairs = batch * n * m + row.to(tl.int64)[:, None] * row_stride
    point = tl.arange(0, block_coordinates)
    start = tl.program_id(1) * block_coordinates
    total = tl.zeros([block_rows, block_coordinates], opmath_of(x_ptr))
    for first in range(0, m, block_cols):
        col = first + tl.arange(0, block_cols)
        in_cols = col < m
        cols = ((batch * m + col) * coordinates)[:, None]
        at = pairs + col.to(tl.int64)[None, :] * col_stride
        in_pairs = in_rows[:, None] & in_cols[None, :]
        if order == 2 and not euclidean:
            along = tl.zeros([block_rows, block_cols], opmath_of(x_ptr))
            for c in range(0, coordinates, block_coordinates):
                in_point = c + point < coordinates
                e = _differences(x_ptr, y_ptr, rows, cols, c + point, in_rows, in_cols, in_point)
                f = _differences(u_ptr, v_ptr, rows, cols, c + point, in_rows, in_cols, in_point)
                along += tl.sum(_sign(e) * f, axis=2)
            tl.store(grad_grad_output_ptr + at, along, mask=in_pairs)
        else:
            in_point = start + point < coordinates
            e = _differences(x_ptr, y_ptr, rows, cols, start + point, in_rows, in_cols, in_point)
            g = load(grad_output_ptr, at, in_pairs)
            if euclidean:
                squared = tl.sum(e * e, axis=2)
                inverse = tl.where(squared == 0.0, 0.0, 1.0 / tl.sqrt(squared))
                r = g * inverse
                if order == 2:
                    f = _differences(u_ptr, v_ptr, rows, cols, start + point, in_rows, in_cols, in_point)
                    along = tl.sum(e * f, axis=2) * inverse
                    if grad_grad_output_ptr is not None:
                        tl.store(grad_grad_output_ptr + at, along, mask=in_pairs)
                    terms = r[:, :, None] * (f - (along * inverse)[:, :, None] * e)
                else:
                    terms = r[:, :, None] * e
            else:
                terms = g[:, :, None] * _sign(e)
            # Beyond the last point there may be anything.
            total += tl.sum(tl.where(in_cols[None, :, None], terms, 0.0), axis=1)
    if grad_x_ptr is not None:
        offsets = rows + (start + point)[None, :]
        mask = in_rows[:, None] & (start + point < coordinates)[None, :]
        tl.store(grad_x_ptr + offsets, total, mask=mask)


def _launch(
    order: int,
    points: Sequence[Tensor | None],
    grad_output: Tensor | None,
    results: tuple[Tensor | None, Tensor | None],
    p: float,
    swapped: bool = False,
) -> None:
    """points are x, y, u and v; those of the other set come first if swapped."""
    x, y, u, v = points
    if swapped:
        x, y, u, v = y, x, v, u
    assert x is not None and y is not None
    n, m, coordinates = x.shape[-2], y.shape[-2], x.shape[-1]
    block_coordinates = min(triton.next_power_of_2(coordinates), MOST_COORDINATES)
    # Of each block of pairs a thread holds some numbers, whose differences are two.
    pairs = (2048 if x.itemsize <= 4 else 1024) // block_coordinates
    block_cols = 1 << ((pairs.bit_length() - 1) // 2)
    block_rows = min(pairs // block_cols, 64)
    all_at_once = order == DOUBLE_BACKWARD and p == 1
    programs = math.prod(x.shape[:-2]) * -(-n // block_rows)
    chunks = 1 if all_at_once else -(-coordinates // block_coordinates)
    with torch.cuda.device_of(x):  # does nothing for a CPU tensor (Triton's interpreter)
        launch(
            cdist_kernel,
            (programs, chunks),
            *(x, y, u, v, grad_output, *results),
            *(n, m, coordinates, *((1, n) if swapped else (m, 1))),
            euclidean=p == 2,
            order=order,
            block_rows=block_rows,
            block_cols=block_cols,
            block_coordinates=block_coordinates,
            num_warps=4,
            **FP_FUSION,
        )


def cdist_backward(
    grad_output: Tensor,
    x1: Tensor,
    x2: Tensor,
    output: Tensor,
    p: float,
    by_product: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    on_meta("cdist_backward", (grad_output, x1, x2, output), p, by_product, tuple(output_mask))
    if x1.numel() == 0 or x2.numel() == 0 or (p == 2 and x1.shape[-1] > MOST_COORDINATES):
        raise NotCoveredError
    g, x, y = contiguous(grad_output, x1, x2)
    results = empty_like(x1, output_mask[0]), empty_like(x2, output_mask[1])
    for swapped, result in enumerate(results):
        if result is not None:
            _launch(BACKWARD, (x, y, None, None), g, (None, result), p, bool(swapped))
    return results


def cdist_double_backward(
    grad_grad_x1: Tensor | None,
    grad_grad_x2: Tensor | None,
    grad_output: Tensor,
    x1: Tensor,
    x2: Tensor,
    p: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    u1 = or_zeros(grad_grad_x1, x1)
    u2 = or_zeros(grad_grad_x2, x2)
    on_meta("cdist_double_backward", (u1, u2, grad_output, x1, x2), p, tuple(output_mask))
    if x1.numel() == 0 or x2.numel() == 0 or (p == 2 and x1.shape[-1] > MOST_COORDINATES):
        raise NotCoveredError
    g, *points = contiguous(grad_output, x1, x2, u1, u2)
    to_g, to_x, to_y = map(empty_like, (grad_output, x1, x2), output_mask)
    if p == 1:
        to_x, to_y = (None if t is None else t.zero_() for t in (to_x, to_y))
    if to_g is not None or (p == 2 and to_x is not None):
        _launch(DOUBLE_BACKWARD, points, g, (to_g, to_x if p == 2 else None), p)
    if p == 2 and to_y is not None:
        _launch(DOUBLE_BACKWARD, points, g, (None, to_y), p, swapped=True)
    return to_g, to_x, to_y
