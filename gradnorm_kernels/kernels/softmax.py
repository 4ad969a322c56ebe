"""Triton kernels of softmax: the forward that adds a bias, and the double backward, also of its logarithm.

ATen's own forward and first backward are single kernels that read and write no more than they must.

A program takes a tile of whole rows if they fit, else it walks along its rows block by block. A row is what
the softmax normalises: n_cols elements, col_stride apart.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import DTYPES, FP_FUSION, launch, load, on_meta, widen

# How these kernels, and those of other families, see a contiguous tensor: as matrices whose lines are
# contiguous, of units * unit elements, and whose rows, which sums run over, are lines or go across them. What
# divides a line is known when a kernel is compiled: it is how many elements an access may have.


@triton.jit
def rows_of_program(
    others, units, unit: tl.constexpr, across: tl.constexpr, wide: tl.constexpr, block_rows: tl.constexpr
):
    """A program's rows: the offset of the first of them; the number that this one has of all; and, for
    elements, the rows' places from there on, a mask, the number of columns and their stride."""
    line = units * unit
    row = tl.arange(0, block_rows)[:, None]
    if across:
        n_rows, n_cols = line, others
        blocks = tl.cdiv(n_rows, block_rows)
        matrix = (tl.program_id(0) // blocks).to(tl.int64)
        first = (tl.program_id(0) % blocks).to(tl.int64) * block_rows
        start = matrix * n_rows * n_cols + first
        number = matrix * n_rows + first
        place = row
        # In 64 bits, which take more registers, only where a matrix is wide: of more than 2^31 elements.
        col_stride = tl.cast(line, tl.int64) if wide else line
    else:
        n_rows, n_cols = others, line
        first = tl.program_id(0).to(tl.int64) * block_rows
        start = first * n_cols
        number = first
        place = row * n_cols
        col_stride = 1
    in_rows = row < tl.minimum(n_rows - first, block_rows).to(tl.int32)
    return start, number, (place, in_rows, n_cols, col_stride)


@triton.jit
def elements(rows, first, block_cols: tl.constexpr):
    """Of the columns from first on: their offsets, a mask, and which columns they are."""
    place, in_rows, n_cols, col_stride = rows
    cols = first + tl.arange(0, block_cols)[None, :]
    return place + cols * col_stride, in_rows & (cols < n_cols), cols


@triton.jit
def _zeros(block_rows: tl.constexpr, a_ptr, b_ptr):
    """One for each row, in the dtype of the arithmetic of a and b."""
    return widen(tl.zeros([block_rows, 1], a_ptr.dtype.element_ty)) + widen(
        tl.zeros([block_rows, 1], b_ptr.dtype.element_ty)
    )


@triton.jit
def _load_sum(input_ptrs, bias_ptrs, mask):
    """-inf outside the mask."""
    x = widen(tl.load(input_ptrs, mask=mask, other=float("-inf")))
    return x + widen(tl.load(bias_ptrs, mask=mask, other=0.0))


@triton.jit
def _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask):
    return (
        load(grad_grad_input_ptr, offsets, mask),
        load(grad_output_ptr, offsets, mask),
        load(output_ptr, offsets, mask),
    )


@triton.jit
def _sum(t):
    return tl.sum(t, axis=1, keep_dims=True)


@triton.jit
def _weighted(v, g, y, log: tl.constexpr):
    """The softmax, and what of v and g is summed over a row."""
    if log:
        p = tl.exp(y)
        return p, v * p, g
    else:
        return y, v * y, g * y


@triton.jit
def _gradients(v, g, p, v_mean, g_sum, product_mean, to_input: tl.constexpr, log: tl.constexpr):
    v_centred = v - v_mean
    if log:
        if to_input:
            return v_centred, -g_sum * p * v_centred
        else:
            return v_centred, -g_sum * p * v
    else:
        g_centred = g - g_sum
        if to_input:
            return p * v_centred, p * (v_centred * g_centred - product_mean)
        else:
            return p * v_centred, v * g_centred - v_mean * g


@triton.jit
def softmax_fwd_kernel(
    input_ptr,
    bias_ptr,
    output_ptr,
    others,
    units,
    size_1,
    size_2,
    bias_stride_0,
    bias_stride_1,
    bias_stride_2,
    unit: tl.constexpr,
    across: tl.constexpr,
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
):
    """output = softmax(input + bias) along contiguous rows.

    Moves 2N elements and the bias: reads 1, writes 1. If looped, reads twice (3N). The rows are those of an
    array of (anything, size_1, size_2), of which the bias has the given strides: 0 where it repeats itself.
    """
    start, number, rows = rows_of_program(others, units, unit, across, wide, block_rows)
    n_cols = rows[2]
    input_ptr += start
    output_ptr += start
    row = (number if wide else number.to(tl.int32)) + tl.arange(0, block_rows)[:, None]
    outer = row // size_2
    bias_ptrs = bias_ptr + unit * (
        (outer // size_1) * bias_stride_0 + (outer % size_1) * bias_stride_1 + (row % size_2) * bias_stride_2
    )
    if looped:
        total = _zeros(block_rows, input_ptr, bias_ptr)
        largest = total + float("-inf")
        for first in range(0, n_cols, block_cols):
            offsets, mask, cols = elements(rows, first, block_cols)
            x = _load_sum(input_ptr + offsets, bias_ptrs + cols, mask)
            previous = largest
            largest = tl.maximum(previous, tl.max(x, axis=1, keep_dims=True))
            # For a row that begins with -inf, where inf - inf would be NaN.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp(previous - shift) + tl.sum(tl.exp(x - shift), axis=1, keep_dims=True)
        for first in range(0, n_cols, block_cols):
            offsets, mask, cols = elements(rows, first, block_cols)
            x = _load_sum(input_ptr + offsets, bias_ptrs + cols, mask)
            tl.store(output_ptr + offsets, tl.exp(x - largest) / total, mask=mask)
    else:
        offsets, mask, cols = elements(rows, 0, block_cols)
        x = _load_sum(input_ptr + offsets, bias_ptrs + cols, mask)
        exponentials = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
        y = exponentials / tl.sum(exponentials, axis=1, keep_dims=True)
        tl.store(output_ptr + offsets, y, mask=mask)


@triton.jit
def softmax_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    output_ptr,
    grad_grad_output_ptr,
    grad_ptr,
    others,
    units,
    to_input: tl.constexpr,
    log: tl.constexpr,
    unit: tl.constexpr,
    across: tl.constexpr,
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
):
    """With v = grad_grad_input, g = grad_output, and means over a row weighted by y = output:
    grad_grad_output = y (v - mean(v)) and grad = v (g - mean(g)) - mean(v) g, or, carried on to the
    softmax's input, y (p - mean(p)) with p = (v - mean(v)) (g - mean(g)). If log, output is the logarithm of
    y: grad_grad_output = v - mean(v) and grad = -sum(g) y v, or -sum(g) y (v - mean(v)).

    Moves 5N elements: reads 3, writes 2. If looped, reads the 3 twice, or three times if to_input and not
    log: 8N or 11N, unless a cache holds the row.
    """
    start, _number, rows = rows_of_program(others, units, unit, across, wide, block_rows)
    n_cols = rows[2]
    grad_grad_input_ptr += start
    grad_output_ptr += start
    output_ptr += start
    grad_grad_output_ptr += start
    grad_ptr += start
    if looped:
        v_mean = _zeros(block_rows, grad_grad_input_ptr, output_ptr)
        g_sum = v_mean
        product_mean = v_mean
        for first in range(0, n_cols, block_cols):
            offsets, mask, _cols = elements(rows, first, block_cols)
            v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
            _, of_v, of_g = _weighted(v, g, y, log)
            v_mean += _sum(of_v)
            g_sum += _sum(of_g)
        if to_input and not log:
            for first in range(0, n_cols, block_cols):
                offsets, mask, _cols = elements(rows, first, block_cols)
                v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
                product_mean += _sum((v - v_mean) * (g - g_sum) * y)
        for first in range(0, n_cols, block_cols):
            offsets, mask, _cols = elements(rows, first, block_cols)
            v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
            p, _, _ = _weighted(v, g, y, log)
            grad_g, grad = _gradients(v, g, p, v_mean, g_sum, product_mean, to_input, log)
            tl.store(grad_grad_output_ptr + offsets, grad_g, mask=mask)
            tl.store(grad_ptr + offsets, grad, mask=mask)
    else:
        offsets, mask, _cols = elements(rows, 0, block_cols)
        v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
        p, of_v, of_g = _weighted(v, g, y, log)
        v_mean = _sum(of_v)
        g_sum = _sum(of_g)
        product_mean = _sum((v - v_mean) * (g - g_sum) * p)
        grad_g, grad = _gradients(v, g, p, v_mean, g_sum, product_mean, to_input, log)
        tl.store(grad_grad_output_ptr + offsets, grad_g, mask=mask)
        tl.store(grad_ptr + offsets, grad, mask=mask)


class Plan(NamedTuple):
    """How a kernel is launched: the arguments that follow its tensors, and their names."""

    programs: int
    integers: dict[str, int]
    constants: dict[str, Any]
    options: dict[str, Any]


def _plan(
    n_cols: int,
    inner: int,
    outer: int,
    itemsize: int,
    constants: dict[str, Any],
    integers: dict[str, int] | None = None,
) -> Plan:
    """Of outer matrices of n_cols lines of inner elements; or, where inner is 1, of outer lines of n_cols.

    A thread owns 16 elements of each array (8 of float64): few registers enough that most warps of an SM are
    resident."""
    tile = 2048 if itemsize <= 4 else 1024  # with 4 warps
    block_cols = triton.next_power_of_2(n_cols)
    across = inner > 1
    if across:
        # The rows' elements are the neighbours: as many as fill a 128-byte line.
        block_cols = min(block_cols, tile // 32)
        block_rows, warps = 32, 4
        line, others, programs = inner, n_cols, outer * -(-inner // block_rows)
    else:
        if block_cols > 4 * tile:
            block_cols = 2 * tile
        block_rows, warps = max(1, tile // block_cols), max(4, 4 * block_cols // tile)
        line, others, programs = n_cols, outer, -(-outer // block_rows)
    unit = math.gcd(line, 16) if line < 2**31 else 1
    integers = {"others": others, "units": line // unit} | (integers or {})
    constants = constants | {
        "unit": unit,
        "across": across,
        "wide": (n_cols if across else outer) * line > 2**31,
    }
    constants |= {"block_rows": block_rows, "block_cols": block_cols, "looped": n_cols > block_cols}
    return Plan(programs, integers, constants, {"num_warps": warps, **FP_FUSION})


@functools.lru_cache(maxsize=256)
def rows_plan(shape: tuple[int, ...], dim: int, itemsize: int, **constants: Any) -> Plan:
    """Of a kernel over the rows of a contiguous tensor along dim."""
    n_cols = shape[dim] if shape else 1
    inner = math.prod(shape[dim:][1:])
    outer = math.prod(shape) // (n_cols * inner)
    return _plan(n_cols, inner, outer, itemsize, constants)


@functools.lru_cache(maxsize=256)
def _with_bias_plan(shape: tuple[int, ...], bias_shape: tuple[int, ...], itemsize: int) -> Plan | None:
    """None where the bias, contiguous and as long as the rows, repeats itself in too intricate a way."""
    *outer, n_cols = shape
    # The rows' dimensions, innermost first, as few as describe where a row's bias is: (size, stride).
    dims: list[tuple[int, int]] = []
    stride = n_cols
    for size, bias_size in zip(
        reversed(outer), (*reversed(bias_shape[:-1]), *[1] * (len(shape) - len(bias_shape))), strict=True
    ):
        if size == 1:
            continue
        bias_stride = stride if bias_size > 1 else 0
        stride *= bias_size
        if dims and dims[-1][0] * dims[-1][1] == bias_stride:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, bias_stride))
    if len(dims) > 3:
        return None
    (size_2, stride_2), (size_1, stride_1), (_, stride_0) = [*dims, *[(1, 0)] * (3 - len(dims))]
    unit = math.gcd(n_cols, 16)
    integers = {"size_1": size_1, "size_2": size_2}
    integers |= {f"bias_stride_{i}": s // unit for i, s in enumerate((stride_0, stride_1, stride_2))}
    return _plan(n_cols, 1, math.prod(outer), itemsize, {}, integers)


def launch_plan(kernel: Any, plan: Plan, *tensors: Tensor | None) -> None:
    with torch.cuda.device_of(tensors[0]):  # does nothing for a CPU tensor (Triton's interpreter)
        operands = (*tensors, *plan.integers.values())
        launch(kernel, (plan.programs,), *operands, **plan.constants, **plan.options)


def softmax_double_backward(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    to_input: bool,
    log: bool = False,
) -> tuple[Tensor, Tensor]:
    tensors = grad_grad_input, grad_output, output
    ndim = max(output.ndim, 1)
    if (
        not grad_grad_input.shape == grad_output.shape == output.shape
        or not grad_grad_input.device == grad_output.device == output.device
        or not -ndim <= dim < ndim
        or grad_output.dtype != output.dtype
        or output.dtype not in DTYPES
        or grad_grad_input.dtype not in DTYPES
    ):
        on_meta("softmax_double_backward", tensors, dim, to_input, log)
    grad_grad_output = torch.empty_like(output, memory_format=torch.contiguous_format)
    grad = torch.empty_like(grad_grad_input if to_input else output, memory_format=torch.contiguous_format)
    if output.numel() > 0:
        itemsize = max(output.itemsize, grad_grad_input.itemsize)
        plan = rows_plan(output.shape, dim % ndim, itemsize, to_input=to_input, log=log)
        contiguous = (t.contiguous() for t in tensors)
        launch_plan(softmax_bwd_bwd_kernel, plan, *contiguous, grad_grad_output, grad)
    return grad_grad_output, grad


def softmax_with_bias(input: Tensor, bias: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if (
        input.device != bias.device
        or input.dtype not in DTYPES
        or bias.dtype not in DTYPES
        or not 0 < input.ndim >= bias.ndim
        or any(size not in (1, n) for size, n in zip(bias.shape[::-1], input.shape[::-1], strict=False))
    ):
        on_meta("softmax_with_bias", (input, bias), dtype)
    result = dtype or torch.promote_types(input.dtype, bias.dtype)
    output = torch.empty_like(input, dtype=result, memory_format=torch.contiguous_format)
    if input.numel() == 0:
        return output
    if result == torch.float64:
        # The arithmetic is float32 unless an operand is wider.
        input = input.to(result)
    n_cols = input.shape[-1]
    if bias.ndim == 0 or bias.shape[-1] != n_cols:
        bias = bias.expand(*bias.shape[:-1], n_cols)
    plan = _with_bias_plan(input.shape, bias.shape, max(input.itemsize, bias.itemsize))
    if plan is None:
        bias = bias.expand(input.shape)
        plan = _with_bias_plan(input.shape, bias.shape, max(input.itemsize, bias.itemsize))
    assert plan is not None
    launch_plan(softmax_fwd_kernel, plan, input.contiguous(), bias.contiguous(), output)
    return output
