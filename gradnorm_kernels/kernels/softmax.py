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

from .common import DTYPES, FP_FUSION, load, on_meta, widen


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
    n_rows,
    n_cols,
    size_1,
    size_2,
    bias_stride_0,
    bias_stride_1,
    bias_stride_2,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
):
    """output = softmax(input + bias) along contiguous rows.

    Moves 2N elements and the bias: reads 1, writes 1. If looped, reads twice (3N). The rows are those of an
    array of (anything, size_1, size_2), of which the bias has the given strides: 0 where it repeats itself.
    """
    # 64-bit before any product: a tensor may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    in_rows = row < n_rows
    outer = row // size_2
    bias_rows = (
        (outer // size_1) * bias_stride_0 + (outer % size_1) * bias_stride_1 + (row % size_2) * bias_stride_2
    )
    # 64-bit before the product: a tensor may have more than 2^31 elements.
    rows = row * n_cols
    if looped:
        total = _zeros(block_rows, input_ptr, bias_ptr)
        largest = total + float("-inf")
        for start in range(0, n_cols, block_cols):
            cols = start + tl.arange(0, block_cols)[None, :]
            x = _load_sum(input_ptr + rows + cols, bias_ptr + bias_rows + cols, in_rows & (cols < n_cols))
            previous = largest
            largest = tl.maximum(previous, tl.max(x, axis=1, keep_dims=True))
            # For a row that begins with -inf, where inf - inf would be NaN.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp(previous - shift) + tl.sum(tl.exp(x - shift), axis=1, keep_dims=True)
        for start in range(0, n_cols, block_cols):
            cols = start + tl.arange(0, block_cols)[None, :]
            mask = in_rows & (cols < n_cols)
            x = _load_sum(input_ptr + rows + cols, bias_ptr + bias_rows + cols, mask)
            tl.store(output_ptr + rows + cols, tl.exp(x - largest) / total, mask=mask)
    else:
        cols = tl.arange(0, block_cols)[None, :]
        mask = in_rows & (cols < n_cols)
        x = _load_sum(input_ptr + rows + cols, bias_ptr + bias_rows + cols, mask)
        exponentials = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
        y = exponentials / tl.sum(exponentials, axis=1, keep_dims=True)
        tl.store(output_ptr + rows + cols, y, mask=mask)


@triton.jit
def softmax_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    output_ptr,
    grad_grad_output_ptr,
    grad_ptr,
    n_rows,
    n_cols,
    row_stride,
    col_stride,
    to_input: tl.constexpr,
    log: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    looped: tl.constexpr,
):
    """With v = grad_grad_input, g = grad_output, and means over a row weighted by y = output:
    grad_grad_output = y (v - mean(v)) and grad = v (g - mean(g)) - mean(v) g, or, carried on to the
    softmax's input, y (p - mean(p)) with p = (v - mean(v)) (g - mean(g)). If log, output is the logarithm of
    y: grad_grad_output = v - mean(v) and grad = -sum(g) y v, or -sum(g) y (v - mean(v)).

    Moves 5N elements: reads 3, writes 2. If looped, reads the 3 twice, or three times if to_input and not
    log: 8N or 11N, unless a cache holds the row. The tensor is a stack of n_rows x n_cols matrices of these
    strides.
    """
    blocks = tl.cdiv(n_rows, block_rows)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    in_rows = row < n_rows
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    rows = matrix * n_rows * n_cols + row * row_stride
    if looped:
        v_mean = _zeros(block_rows, grad_grad_input_ptr, output_ptr)
        g_sum = v_mean
        product_mean = v_mean
        for start in range(0, n_cols, block_cols):
            cols = start + tl.arange(0, block_cols)[None, :]
            mask = in_rows & (cols < n_cols)
            offsets = rows + cols.to(tl.int64) * col_stride
            v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
            _, of_v, of_g = _weighted(v, g, y, log)
            v_mean += _sum(of_v)
            g_sum += _sum(of_g)
        if to_input and not log:
            for start in range(0, n_cols, block_cols):
                cols = start + tl.arange(0, block_cols)[None, :]
                mask = in_rows & (cols < n_cols)
                offsets = rows + cols.to(tl.int64) * col_stride
                v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
                product_mean += _sum((v - v_mean) * (g - g_sum) * y)
        for start in range(0, n_cols, block_cols):
            cols = start + tl.arange(0, block_cols)[None, :]
            mask = in_rows & (cols < n_cols)
            offsets = rows + cols.to(tl.int64) * col_stride
            v, g, y = _load_three(grad_grad_input_ptr, grad_output_ptr, output_ptr, offsets, mask)
            p, _, _ = _weighted(v, g, y, log)
            grad_g, grad = _gradients(v, g, p, v_mean, g_sum, product_mean, to_input, log)
            tl.store(grad_grad_output_ptr + offsets, grad_g, mask=mask)
            tl.store(grad_ptr + offsets, grad, mask=mask)
    else:
        cols = tl.arange(0, block_cols)[None, :]
        mask = in_rows & (cols < n_cols)
        offsets = rows + cols.to(tl.int64) * col_stride
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
    n_rows: int,
    matrices: int,
    itemsize: int,
    integers: dict[str, int],
    constants: dict[str, Any],
) -> Plan:
    """A thread owns 16 elements of each array (8 of float64): few registers enough that most warps of an
    SM are resident."""
    tile = 2048 if itemsize <= 4 else 1024  # with 4 warps
    block_cols = triton.next_power_of_2(n_cols)
    if integers.get("col_stride", 1) > 1:
        # The rows' elements are the neighbours: as many as fill a 128-byte line.
        block_cols = min(block_cols, tile // 32)
        block_rows, warps = 32, 4
    else:
        if block_cols > 4 * tile:
            block_cols = 2 * tile
        block_rows, warps = max(1, tile // block_cols), max(4, 4 * block_cols // tile)
    blocks = {"block_rows": block_rows, "block_cols": block_cols, "looped": n_cols > block_cols}
    programs = matrices * -(-n_rows // block_rows)
    return Plan(programs, integers, constants | blocks, {"num_warps": warps, **FP_FUSION})


@functools.lru_cache(maxsize=256)
def rows_plan(shape: tuple[int, ...], dim: int, itemsize: int, **constants: Any) -> Plan:
    """Of a kernel over the rows of a contiguous tensor along dim."""
    n_cols = shape[dim] if shape else 1
    inner = math.prod(shape[dim:][1:])
    outer = math.prod(shape) // (n_cols * inner)
    if inner == 1:
        n_rows, row_stride, matrices = outer, n_cols, 1
    else:
        n_rows, row_stride, matrices = inner, 1, outer
    integers = {"n_rows": n_rows, "n_cols": n_cols, "row_stride": row_stride, "col_stride": inner}
    return _plan(n_cols, n_rows, matrices, itemsize, integers, constants)


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
    n_rows = math.prod(outer)
    integers = {"n_rows": n_rows, "n_cols": n_cols, "size_1": size_1, "size_2": size_2}
    integers |= {"bias_stride_0": stride_0, "bias_stride_1": stride_1, "bias_stride_2": stride_2}
    return _plan(n_cols, n_rows, 1, itemsize, integers, {})


def launch(kernel: Any, plan: Plan, *tensors: Tensor | None) -> None:
    with torch.cuda.device_of(tensors[0]):  # does nothing for a CPU tensor (Triton's interpreter)
        kernel[(plan.programs,)](*tensors, *plan.integers.values(), **plan.constants, **plan.options)


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
        launch(softmax_bwd_bwd_kernel, plan, *contiguous, grad_grad_output, grad)
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
    launch(softmax_fwd_kernel, plan, input.contiguous(), bias.contiguous(), output)
    return output
