"""Triton kernels of layer normalisation.

PyTorch's own kernels are layer norm's forward and backward over the last dimensions. Here are its double
backward, all three passes over the channels of NCHW, and all three of RMS norm.

A kernel sees its tensors as groups of rows of columns, `row_stride` and `column_stride` apart: all rows are
one group where the columns are the last dimensions; an image is a group of height * width rows where they are
the channels. A program takes tiles of neighbouring rows and keeps them in registers, if a row is whole: in
one block of columns. RMS norm's kernels are the same, without a mean.

A tile is (pieces, rows, columns of a piece). Where a piece is what a warp reads at once, Triton gives each
warp rows of its own, and no sum over a row waits for another warp; otherwise a row is one piece.
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

from .common import (
    DTYPES,
    FP_FUSION,
    Gpu,
    Launcher,
    add_terms,
    at_most_128_registers,
    check_operands,
    contiguous,
    empty_like,
    gpu,
    load,
    load_parameter,
    normalization_double_backward,
    normalization_terms,
    opmath,
    project,
)


@triton.jit
def _sizes(rows, columns, row_stride, column_stride, unit: tl.constexpr, across: tl.constexpr):
    """Of units, in elements. What is known to divide them is how many elements an access may have."""
    if across:
        return rows * unit, columns, row_stride, column_stride * unit
    else:
        return rows, columns * unit, row_stride * unit, column_stride


@triton.jit
def _rows_of_tile(tile, rows, columns, row_stride, block_rows: tl.constexpr):
    """Which rows these are, counted over all groups, a mask, and where they are: the first, in 64 bits, for
    a tensor may have more than 2^31 elements, and the others relative to it.
    """
    tiles = tl.cdiv(rows, block_rows)
    group = tl.cast(tile // tiles, tl.int64)
    first = tl.cast(tile % tiles, tl.int64) * block_rows
    row = tl.arange(0, block_rows)[None, :, None]
    return (
        group * rows + first + row,
        first + row < rows,
        group * rows * columns + first * row_stride,
        row * row_stride,
    )


@triton.jit
def _columns_offsets(column, column_stride, wide: tl.constexpr):
    """In 64 bits, which take more registers, only where a group is wide: of more than 2^31 elements."""
    if wide:
        column = column.to(tl.int64)
    return column * column_stride


@triton.jit
def _columns(first, shape: tl.constexpr, in_warps: tl.constexpr):
    """Which columns a tile has. What is read at them is laid out like the tile only if it has its rows."""
    piece = tl.arange(0, shape[0])[:, None, None] * shape[2]
    column = first + piece + tl.arange(0, shape[2])[None, None, :]
    return tl.broadcast_to(column, shape) if in_warps else column


@triton.jit
def _place(
    tile, first, columns, column_stride, wide: tl.constexpr, shape: tl.constexpr, in_warps: tl.constexpr
):
    """Of a tile's columns from first on: their offsets and mask; which columns they are, and a mask."""
    _, row_mask, start, offsets = tile
    column = _columns(first, shape, in_warps)
    offsets += _columns_offsets(column, column_stride, wide)
    return (start, offsets, row_mask & (column < columns)), (column, column < columns)


@triton.jit
def _load_at(ptr, place):
    return load(ptr + place[0], place[1], place[2])


@triton.jit
def _store_at(ptr, place, value):
    if ptr is not None:
        tl.store(ptr + place[0] + place[1], value, mask=place[2])


@triton.jit
def _normalized(input_ptr, place, mean, rstd):
    x = load(input_ptr + place[0], place[1], place[2])
    if mean is not None:
        x -= mean
    return x * rstd


@triton.jit
def _sum(a):
    """Of each row."""
    if a is None:
        return 0.0
    else:
        return tl.sum(tl.sum(a, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def layer_norm_fwd_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    mean_ptr,
    rstd_ptr,
    groups,
    rows,
    columns,
    row_stride,
    column_stride,
    eps: tl.constexpr,
    unit: tl.constexpr,
    across: tl.constexpr,
    whole: tl.constexpr,
    wide: tl.constexpr,
    shape: tl.constexpr,
    in_warps: tl.constexpr,
):
    """output = weight * h + bias, and the statistics.

    Moves 2N elements: reads 1, writes 1. Rows that are not whole, as RMS norm's may be, are read twice: 3N.
    """
    rows, columns, row_stride, column_stride = _sizes(rows, columns, row_stride, column_stride, unit, across)
    tile = _rows_of_tile(tl.program_id(0), rows, columns, row_stride, shape[1])
    row, row_mask = tile[0], tile[1]
    if whole:
        place, _ = _place(tile, 0, columns, column_stride, wide, shape, in_warps)
        x = _load_at(input_ptr, place)
        if mean_ptr is not None:
            mean = _sum(x) / columns
            tl.store(mean_ptr + row, mean, mask=row_mask)
            x = tl.where(place[2], x - mean, 0.0)
        squares = _sum(x * x)
    else:
        tl.static_assert(mean_ptr is None)
        squares = tl.zeros([1, shape[1], 1], rstd_ptr.dtype.element_ty)
        for first in range(0, columns, shape[2]):
            place, _ = _place(tile, first, columns, column_stride, wide, shape, in_warps)
            x = _load_at(input_ptr, place)
            squares += _sum(x * x)
    rstd = 1 / tl.sqrt(squares / columns + eps)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    for first in range(0, shape[2] if whole else columns, shape[2]):
        place, column = _place(tile, first, columns, column_stride, wide, shape, in_warps)
        if not whole:
            x = _load_at(input_ptr, place)
        weight = load_parameter(weight_ptr, column[0], column[1], 1.0)
        bias = load_parameter(bias_ptr, column[0], column[1], 0.0)
        _store_at(output_ptr, place, x * rstd * weight + bias)


@triton.jit
def _operands(pointers, mean, rstd, place, column):
    """v, g, h, w, and u and t, which may be None."""
    grad_grad_input_ptr, grad_grad_weight_ptr, grad_grad_bias_ptr, grad_output_ptr, input_ptr, weight_ptr = (
        pointers
    )
    return (
        _load_at(grad_grad_input_ptr, place),
        _load_at(grad_output_ptr, place),
        _normalized(input_ptr, place, mean, rstd),
        load_parameter(weight_ptr, column[0], column[1], 1.0),
        load_parameter(grad_grad_weight_ptr, column[0], column[1], None),
        load_parameter(grad_grad_bias_ptr, column[0], column[1], None),
    )


@triton.jit
def _store_partial(ptr, term, columns, first, adds):
    """The sum of a term over rows, in the program's part of the sums; or added to it, where a tile adds."""
    if ptr is not None:
        column = _columns(first, (term.shape[0], 1, term.shape[2]), False)
        ptrs = ptr + tl.program_id(0).to(tl.int64) * columns + column
        before = tl.load(ptrs, mask=adds & (column < columns), other=0.0)
        tl.store(ptrs, before + tl.sum(term, axis=1, keep_dims=True), mask=column < columns)


@triton.jit
def layer_norm_bwd_kernel(
    grad_output_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    groups,
    rows,
    columns,
    row_stride,
    column_stride,
    unit: tl.constexpr,
    across: tl.constexpr,
    whole: tl.constexpr,
    wide: tl.constexpr,
    shape: tl.constexpr,
    in_warps: tl.constexpr,
):
    """grad_input = rstd * P(weight * grad_output), and each program's part of the sums over the rows of
    grad_output * h and grad_output.

    Moves 3N elements: reads 2, writes 1; and two rows for each program. Rows that are not whole are read
    twice: 5N.
    """
    rows, columns, row_stride, column_stride = _sizes(rows, columns, row_stride, column_stride, unit, across)
    centred: tl.constexpr = mean_ptr is not None
    weight_sum = tl.zeros(shape, rstd_ptr.dtype.element_ty)
    bias_sum = weight_sum
    if whole:
        every = _columns(0, shape, in_warps)
        w = load_parameter(weight_ptr, every, every < columns, 1.0)
    first_tile = tl.program_id(0)
    for index in range(first_tile, groups * tl.cdiv(rows, shape[1]), tl.num_programs(0)):
        tile = _rows_of_tile(index, rows, columns, row_stride, shape[1])
        row, row_mask = tile[0], tile[1]
        rstd = load(rstd_ptr, row, row_mask)
        mean = load_parameter(mean_ptr, row, row_mask, None)
        if whole:
            place, column = _place(tile, 0, columns, column_stride, wide, shape, in_warps)
            g, h = _load_at(grad_output_ptr, place), _normalized(input_ptr, place, mean, rstd)
            a_sum, ah_sum = _sum(w * g if centred else None), _sum(w * g * h)
        else:
            a_sum, ah_sum = tl.zeros_like(rstd), tl.zeros_like(rstd)
            for first in range(0, columns, shape[2]):
                place, column = _place(tile, first, columns, column_stride, wide, shape, in_warps)
                g, h = _load_at(grad_output_ptr, place), _normalized(input_ptr, place, mean, rstd)
                w = load_parameter(weight_ptr, column[0], column[1], 1.0)
                a_sum += _sum(w * g if centred else None)
                ah_sum += _sum(w * g * h)
        for first in range(0, shape[2] if whole else columns, shape[2]):
            place, column = _place(tile, first, columns, column_stride, wide, shape, in_warps)
            if not whole:
                g, h = _load_at(grad_output_ptr, place), _normalized(input_ptr, place, mean, rstd)
                w = load_parameter(weight_ptr, column[0], column[1], 1.0)
            _store_at(grad_input_ptr, place, rstd * project(w * g, a_sum / columns, ah_sum / columns, h))
            if whole:
                weight_sum += g * h
                bias_sum += g
            else:
                _store_partial(grad_weight_ptr, g * h, columns, first, index != first_tile)
                _store_partial(grad_bias_ptr, g, columns, first, index != first_tile)
        if not whole:
            # The next tile's sums may be read by other threads than those that wrote them.
            tl.debug_barrier()
    if whole:
        _store_partial(grad_weight_ptr, weight_sum, columns, 0, False)
        _store_partial(grad_bias_ptr, bias_sum, columns, 0, False)


@triton.jit
def _sums(v, g, h, w, u, centred: tl.constexpr):
    return [_sum(term) for term in normalization_terms(v, g, h, w, u, centred)]


@triton.jit
def layer_norm_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_grad_weight_ptr,
    grad_grad_bias_ptr,
    grad_output_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    groups,
    rows,
    columns,
    row_stride,
    column_stride,
    unit: tl.constexpr,
    across: tl.constexpr,
    whole: tl.constexpr,
    wide: tl.constexpr,
    shape: tl.constexpr,
    in_warps: tl.constexpr,
):
    """grad_grad_output, grad_input, and each program's part of grad_weight.

    Moves 5N elements: reads 3, writes 2; and one row for each program. Rows that are not whole are read
    twice: 8N.
    """
    rows, columns, row_stride, column_stride = _sizes(rows, columns, row_stride, column_stride, unit, across)
    centred: tl.constexpr = mean_ptr is not None
    pointers = (
        grad_grad_input_ptr,
        grad_grad_weight_ptr,
        grad_grad_bias_ptr,
        grad_output_ptr,
        input_ptr,
        weight_ptr,
    )
    weight_sum = tl.zeros(shape, rstd_ptr.dtype.element_ty)
    first_tile = tl.program_id(0)
    for index in range(first_tile, groups * tl.cdiv(rows, shape[1]), tl.num_programs(0)):
        tile = _rows_of_tile(index, rows, columns, row_stride, shape[1])
        row, row_mask = tile[0], tile[1]
        rstd = load(rstd_ptr, row, row_mask)
        mean = load_parameter(mean_ptr, row, row_mask, None)
        if whole:
            place, column = _place(tile, 0, columns, column_stride, wide, shape, in_warps)
            v, g, h, w, u, t = _operands(pointers, mean, rstd, place, column)
            sums = _sums(v, g, h, w, u, centred)
        else:
            zero = tl.zeros_like(rstd)
            sums = (zero, zero, zero, zero, zero, zero, zero)
            for first in range(0, columns, shape[2]):
                place, column = _place(tile, first, columns, column_stride, wide, shape, in_warps)
                v, g, h, w, u, t = _operands(pointers, mean, rstd, place, column)
                sums = add_terms(sums, _sums(v, g, h, w, u, centred))
        means = [sum * (1.0 / tl.cast(columns, rstd.dtype)) for sum in sums]
        for first in range(0, shape[2] if whole else columns, shape[2]):
            place, column = _place(tile, first, columns, column_stride, wide, shape, in_warps)
            if not whole:
                v, g, h, w, u, t = _operands(pointers, mean, rstd, place, column)
            grad_grad_output, grad_input, term = normalization_double_backward(means, v, g, h, rstd, w, u, t)
            _store_at(grad_grad_output_ptr, place, grad_grad_output)
            _store_at(grad_input_ptr, place, grad_input)
            if whole:
                weight_sum += term
            else:
                _store_partial(grad_weight_ptr, term, columns, first, index != first_tile)
        if not whole:
            tl.debug_barrier()
    if whole:
        _store_partial(grad_weight_ptr, weight_sum, columns, 0, False)


@triton.jit
def sum_kernel(partial_ptr, sum_ptr, parts, columns, block_parts: tl.constexpr, block_columns: tl.constexpr):
    """The sums over the second of three dimensions, in its order."""
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    outer = tl.program_id(1)
    part = tl.arange(0, block_parts)
    offsets = (outer * parts + part).to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros([block_parts, block_columns], partial_ptr.dtype.element_ty)
    for first in range(0, parts, block_parts):
        mask = (first + part < parts)[:, None] & (column < columns)[None, :]
        total += tl.load(partial_ptr + tl.cast(first, tl.int64) * columns + offsets, mask=mask, other=0.0)
    tl.store(sum_ptr + outer * columns + column, tl.sum(total, axis=0), mask=column < columns)


class Rows(NamedTuple):
    """How a kernel sees contiguous tensors."""

    groups: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int


@functools.lru_cache(maxsize=4096)
def _rows(shape: torch.Size, kept: torch.Size) -> Rows:
    """The columns are the dimensions that the statistics have reduced to 1."""
    inner = 1
    for size, size_kept in zip(reversed(shape), reversed(kept), strict=True):
        if size != size_kept:
            break
        inner *= size
    outer = kept.numel() // inner
    columns = shape.numel() // kept.numel()
    return Rows(1, outer, columns, columns, 1) if inner == 1 else Rows(outer, inner, columns, 1, inner)


# Elements of a row that a program can hold in registers.
_MOST_COLUMNS = {dtype: 4096 if dtype == torch.float64 else 8192 for dtype in DTYPES}


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: Any, rows: Rows, dtype: torch.dtype, device: Gpu, parameters: bool = False, **others: Any
) -> tuple[Launcher, int, Rows]:
    """Of the kernel: block sizes, chosen so that no register is spilled; programs; and its integer arguments.

    parameters says whether the double backward has grad_grad_weight and grad_grad_bias.
    """
    most = _MOST_COLUMNS[dtype]
    double_backward = kernel is layer_norm_bwd_bwd_kernel
    block_columns = triton.next_power_of_2(rows.columns)
    # So many that a thread has at most 16 elements of a row, or 8 of float64.
    in_warps = rows.column_stride == 1 and block_columns * opmath(dtype).itemsize <= 2048
    if in_warps:
        wanted = 4
    elif rows.column_stride == 1:
        block_columns = min(block_columns, most // 2 if parameters else most)
        wanted = 1
    elif double_backward:
        # Neighbours in memory are rows: 16 of float32 fill two sectors. Many channels are rather read twice,
        # the second time from cache, than in fewer rows.
        block_columns = block_columns if block_columns <= 128 else 64
        wanted = most // 512
    else:
        wanted = min(most // 256, (most if kernel is layer_norm_fwd_kernel else most // 2) // block_columns)
    wanted = max(wanted, 1024 // block_columns)
    block_rows = max(1, min(wanted, triton.next_power_of_2(rows.rows)))
    # Neighbouring columns are counted in 64 bits by Triton itself where their number needs them.
    wide = rows.column_stride > 1 and rows.columns * rows.column_stride > 2**31
    whole = rows.columns <= block_columns
    # 32 accesses of 16 bytes.
    width = min(block_columns, 512 // dtype.itemsize) if in_warps else block_columns
    shape = (block_columns // width, block_rows, width)
    across, line = rows.column_stride > 1, rows.rows if rows.column_stride > 1 else rows.columns
    unit = math.gcd(line, 16) if line < 2**31 else 1
    if across:
        units = rows._replace(rows=line // unit, column_stride=line // unit)
    else:
        units = rows._replace(columns=line // unit, row_stride=line // unit)
    constants = {"unit": unit, "across": across, "whole": whole, "wide": wide, "shape": shape}
    constants["in_warps"] = in_warps
    elements_in_thread = 8 if block_rows == 1 else 4
    num_warps = min(max(block_rows * block_columns // (32 * elements_in_thread), 1), 4 if in_warps else 16)
    options = {"num_warps": num_warps, **FP_FUSION}
    if parameters and not whole:
        options |= at_most_128_registers(device)
    if kernel is layer_norm_fwd_kernel:
        programs = rows.groups * -(-rows.rows // block_rows)
    else:
        programs = _programs(rows, shape, num_warps, device.multiprocessors)
    return Launcher(kernel, constants | options | others), programs, units


def _programs(rows: Rows, shape: tuple[int, int, int], num_warps: int, sms: int) -> int:
    """As many as fill the device, as long as their partial sums are small beside the tensors: a row of sums
    for 16 of these at least."""
    tiles = rows.groups * -(-rows.rows // shape[1])
    # About 10 registers for each element of a thread's were compiled, of 65,536.
    elements = math.prod(shape) // (32 * num_warps)
    warps = min(32, 2048 // (10 * max(elements, 1)))
    return min(tiles, max(sms, min(sms * (warps // num_warps), rows.groups * rows.rows // 16)))


def _check_channels(op: str, input: Tensor, others: dict[str, Tensor], **parameters: Tensor | None) -> None:
    if input.ndim != 4:
        raise ValueError(f"{op}: expected input to be of shape (N, C, H, W), got {list(input.shape)}")
    check_operands(op, input, others, parameters, input.shape[1])
    most = _MOST_COLUMNS[input.dtype]
    if input.shape[1] > most:
        raise ValueError(f"{op}: expected input to have at most {most} channels, got {input.shape[1]}")


_SUMS = {"block_parts": 32, "block_columns": 32}
_launch_sum = Launcher(sum_kernel, {**_SUMS, "num_warps": 4, **FP_FUSION})


def _sum_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the second of three dimensions."""
    outer, parts, columns = partial.shape
    total = torch.empty((outer, columns), dtype=dtype, device=partial.device)
    grid = (-(-columns // _SUMS["block_columns"]), outer)
    _launch_sum(grid, (partial, total, parts, columns))
    return total


def _forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor, eps: float
) -> Tensor:
    """The output. The statistics are written; there is no mean if not centred."""
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.numel() == 0:
        return output
    rows = _rows(input.shape, rstd.shape)
    launcher, programs, units = _plan(layer_norm_fwd_kernel, rows, input.dtype, gpu(input.device), eps=eps)
    tensors = (*contiguous(input, weight, bias), output, mean, rstd)
    with torch.cuda.device_of(input):  # does nothing for a CPU tensor (Triton's interpreter)
        launcher((programs,), (*tensors, *units))
    return output


def _backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    columns: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_input = empty_like(input, output_mask[0])
    dtype = input.dtype if weight is None else weight.dtype
    of_parameters = sum(output_mask[1:])
    if input.numel() == 0:
        sums = input.new_zeros((of_parameters, columns), dtype=dtype)
    else:
        rows = _rows(input.shape, rstd.shape)
        launcher, programs, units = _plan(layer_norm_bwd_kernel, rows, input.dtype, gpu(input.device))
        partial = rstd.new_empty((of_parameters, programs, columns))
        parts = iter(partial)
        tensors = (
            *contiguous(grad_output, input, mean, rstd, weight),
            grad_input,
            *(next(parts) if wanted else None for wanted in output_mask[1:]),
        )
        with torch.cuda.device_of(input):
            launcher((programs,), (*tensors, *units))
            sums = _sum_parts(partial, dtype) if of_parameters else partial
    gradients = iter(sums)
    grad_weight, grad_bias = (next(gradients) if wanted else None for wanted in output_mask[1:])
    return grad_input, grad_weight, grad_bias


def _double_backward(
    op: str,
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    others = {"grad_output": grad_output, "grad_grad_input": grad_grad_input}
    parameters = {"weight": weight, "grad_grad_weight": grad_grad_weight, "grad_grad_bias": grad_grad_bias}
    rows = _rows(input.shape, rstd.shape) if input.numel() else None
    check_operands(op, input, others, parameters if rows else {}, rows.columns if rows else 0)
    grad_grad_output = empty_like(input, output_mask[0])
    grad_input = empty_like(input, output_mask[1])
    like_weight = weight if output_mask[2] else None
    if rows is None:
        return grad_grad_output, grad_input, None if like_weight is None else torch.zeros_like(like_weight)
    if grad_grad_input is None:
        grad_grad_input = torch.zeros_like(input)
    has_u = grad_grad_weight is not None
    launcher, programs, units = _plan(layer_norm_bwd_bwd_kernel, rows, input.dtype, gpu(input.device), has_u)
    partial = None if like_weight is None else rstd.new_empty((1, programs, rows.columns))
    tensors = (
        *contiguous(
            grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight
        ),
        grad_grad_output,
        grad_input,
        partial,
    )
    with torch.cuda.device_of(input):
        launcher((programs,), (*tensors, *units))
        if like_weight is None or partial is None:
            return grad_grad_output, grad_input, None
        return grad_grad_output, grad_input, _sum_parts(partial, like_weight.dtype).view_as(like_weight)


def layer_norm_2d(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check_channels("layer_norm_2d", input, {}, weight=weight, bias=bias)
    n, _, height, width = input.shape
    mean = input.new_empty((n, 1, height, width), dtype=opmath(input.dtype))
    rstd = torch.empty_like(mean)
    return _forward(input, weight, bias, mean, rstd, eps), mean, rstd


def layer_norm_2d_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _check_channels("layer_norm_2d_backward", input, {"grad_output": grad_output}, weight=weight)
    return _backward(grad_output, input, mean, rstd, weight, input.shape[1], output_mask)


def layer_norm_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    incoming = (grad_grad_input, grad_grad_weight, grad_grad_bias)
    op = "layer_norm_double_backward"
    return _double_backward(op, *incoming, grad_output, input, mean, rstd, weight, output_mask)


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """output, and rstd: of the shape of input, with the normalised dimensions reduced to 1."""
    columns = math.prod(normalized_shape)
    if list(input.shape[-len(normalized_shape) :]) != list(normalized_shape):
        raise ValueError(
            f"rms_norm: expected input to end in normalized_shape {list(normalized_shape)}, "
            f"got {list(input.shape)}"
        )
    check_operands("rms_norm", input, {}, {"weight": weight}, columns)
    kept = input.shape[: -len(normalized_shape)]
    rstd = input.new_empty((*kept, *[1] * len(normalized_shape)), dtype=opmath(input.dtype))
    if columns == 0:
        rstd.fill_(math.nan)  # the mean of nothing
    return _forward(input, weight, None, None, rstd, eps), rstd


def rms_norm_backward(
    grad_output: Tensor, input: Tensor, rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    columns = input.numel() // rstd.numel() if input.numel() else 0 if weight is None else weight.numel()
    check_operands("rms_norm_backward", input, {"grad_output": grad_output}, {"weight": weight}, columns)
    mask = [output_mask[0], output_mask[1] and weight is not None, False]
    grad_input, grad_weight, _ = _backward(grad_output, input, None, rstd, weight, columns, mask)
    return grad_input, grad_weight if weight is None or grad_weight is None else grad_weight.view_as(weight)


def rms_norm_double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    incoming = (grad_grad_input, grad_grad_weight, None)
    op = "rms_norm_double_backward"
    return _double_backward(op, *incoming, grad_output, input, None, rstd, weight, output_mask)
