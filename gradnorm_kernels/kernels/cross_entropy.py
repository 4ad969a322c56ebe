"""The Triton kernel of cross-entropy: forward, backward and double backward.

A program takes a tile of whole rows of classes if they fit, else it walks along its rows block by block.
csrc/cross_entropy.cpp has the mathematics.
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
    empty_like,
    load,
    moved,
    on_meta,
    opmath_of,
    widen,
)
from .softmax import elements, launch_plan, rows_of_program, rows_plan


@triton.jit
def _sum(t):
    return tl.sum(t, axis=1, keep_dims=True)


@triton.jit
def _load_target(target_ptr, label, offsets, cols, mask, zero, keep, floor, soft: tl.constexpr):
    """The smoothed probabilities, 0 outside the mask; zero has the dtype of the arithmetic."""
    if soft:
        q = load(target_ptr, offsets, mask) * keep + floor
    else:
        q = tl.where(cols == label, zero + (keep + floor), zero + floor)
    return tl.where(mask, q, 0.0)


@triton.jit
def cross_entropy_kernel(
    input_ptr,
    target_ptr,
    grad_output_ptr,
    grad_grad_input_ptr,
    rows_ptr,
    grad_input_ptr,
    others,
    units,
    ignore_index: tl.constexpr,
    keep: tl.constexpr,
    floor: tl.constexpr,
    soft: tl.constexpr,
    order: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
    unit: tl.constexpr,
    across: tl.constexpr,
    wide: tl.constexpr,
):
    """With x = input, p its softmax, q = keep * target + floor, Q = sum(q), g = grad_output and
    v = grad_grad_input: by order rows = Q log(sum(e^x)) - sum(q x); grad_input = g (Q p - q); or rows =
    Q sum(p v) - sum(q v) and grad_input = g Q p (v - sum(p v)).

    Moves N, 2N or 3N elements: reads 1, 1 or 2, writes 0, 1 or 1. Of probabilities the target is read as
    well. The two later orders read a second time, if looped from memory. A class that there is not gives NaN.
    """
    start, number, rows = rows_of_program(others, units, unit, across, wide, block_rows)
    in_rows, n_cols = rows[1], rows[2]
    own = number + tl.arange(0, block_rows)[:, None]
    input_ptr += start
    grad_grad_input_ptr = moved(grad_grad_input_ptr, start)
    grad_input_ptr = moved(grad_input_ptr, start)
    if soft:
        target_ptr += start
    zero = tl.zeros([block_rows, 1], opmath_of(input_ptr))
    label = None
    if not soft:
        label = tl.load(target_ptr + own, mask=in_rows, other=ignore_index)

    largest = zero + float("-inf")
    e_sum = zero
    q_sum = zero
    ev_sum = zero
    # Of q and the logits, shifted by the largest, or v.
    linear = zero
    for first in range(0, n_cols, block_cols):
        offsets, mask, cols = elements(rows, first, block_cols)
        x = widen(tl.load(input_ptr + offsets, mask=mask, other=float("-inf")))
        q = _load_target(target_ptr, label, offsets, cols, mask, zero, keep, floor, soft)
        previous = largest
        largest = tl.maximum(previous, tl.max(x, axis=1, keep_dims=True))
        # For a row that begins with -inf, where inf - inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        e = tl.exp(x - shift)
        if looped:
            scale = tl.exp(previous - shift)
            e_sum *= scale
            ev_sum *= scale
            if order == 0:
                linear += tl.where(q_sum == 0, 0.0, q_sum * (previous - shift))
        e_sum += _sum(e)
        q_sum += _sum(q)
        if order == 0:
            # Of classes, a logit of -inf that is not the target's.
            has_part = mask if soft else q != 0
            linear += _sum(tl.where(has_part, q * (x - shift), 0.0))
        elif order == 2:
            v = load(grad_grad_input_ptr, offsets, mask)
            ev_sum += _sum(e * v)
            linear += _sum(q * v)

    mass = q_sum if soft else zero + 1.0
    is_there = in_rows if soft else (label >= 0) & (label < n_cols)  # type: ignore[operator]
    is_counted = in_rows if soft else label != ignore_index
    if order != 1:
        value = mass * (tl.log(e_sum) if order == 0 else ev_sum / e_sum) - linear
        value = tl.where(is_counted, tl.where(is_there, value, float("nan")), 0.0)
        tl.store(rows_ptr + own, value, mask=in_rows)
    if order != 0:
        g = tl.where(is_there, load(grad_output_ptr, own, in_rows), float("nan"))
        g = tl.where(is_counted, g, 0.0)
        of_e = mass / e_sum
        for first in range(0, n_cols, block_cols):
            offsets, mask, cols = elements(rows, first, block_cols)
            p = of_e * tl.exp(load(input_ptr, offsets, mask) - largest)
            if order == 1:
                q = _load_target(target_ptr, label, offsets, cols, mask, zero, keep, floor, soft)
                grad = g * (p - q)
            else:
                grad = g * p * (load(grad_grad_input_ptr, offsets, mask) - ev_sum / e_sum)
            tl.store(grad_input_ptr + offsets, grad, mask=mask)


def _run(op: str, order: int, tensors: tuple[Tensor, ...], ignore_index: int, label_smoothing: float) -> Any:
    """The tensors are the op's: input and target come last, grad_output before them."""
    *grads, input, target = tensors
    dim = min(input.ndim, 2) - 1
    rows = input.shape[:dim] + input.shape[dim + 1 :]
    soft = target.is_floating_point()
    dtype, shape = (input.dtype, input.shape) if soft else (torch.int64, rows)
    if (
        input.dtype not in DTYPES
        or dim < 0
        or input.shape[dim] == 0
        or (target.dtype, target.shape) != (dtype, shape)
        or any(t.dtype != input.dtype for t in grads)
        or any(t.device != input.device for t in tensors)
        or [t.shape for t in grads] != [input.shape, rows][2 - order :]
    ):
        on_meta(op, tensors, ignore_index, label_smoothing)
    values = None if order == BACKWARD else input.new_empty(rows)
    grad_input = empty_like(input, order != FORWARD)
    if input.numel() > 0:
        constants = {"ignore_index": ignore_index, "keep": 1 - label_smoothing, "soft": soft, "order": order}
        constants["floor"] = label_smoothing / input.shape[dim]
        plan = rows_plan(input.shape, dim, input.itemsize, **constants)
        operands: list[Tensor | None] = [None] * (2 - order)
        operands += [tensor.contiguous() for tensor in tensors]
        v, g, x, t = operands
        launch_plan(cross_entropy_kernel, plan, x, t, g, v, values, grad_input)
    results = [result for result in (values, grad_input) if result is not None]
    return results[0] if len(results) == 1 else tuple(results)


def cross_entropy(input: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> Any:
    return _run("cross_entropy", FORWARD, (input, target), ignore_index, label_smoothing)


def cross_entropy_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> Any:
    tensors = grad_output, input, target
    return _run("cross_entropy_backward", BACKWARD, tensors, ignore_index, label_smoothing)


def cross_entropy_double_backward(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Any:
    tensors = grad_grad_input, grad_output, input, target
    return _run("cross_entropy_double_backward", DOUBLE_BACKWARD, tensors, ignore_index, label_smoothing)
