"""Triton kernel of group normalisation's double backward; forward and first backward are PyTorch's."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .common import (
    FP_FUSION,
    add_terms,
    check_operands,
    contiguous,
    launch,
    load,
    normalization_double_backward,
    normalization_terms,
    opmath,
    widen,
)

# A group is a matrix whose rows are contiguous in memory, and which programs take in tiles: a channel is a
# row of it, or a column where the layout is channels_last.


@triton.jit
def _matrix(rows, column_units, unit: tl.constexpr, block_columns: tl.constexpr):
    """Its rows and columns, and the tiles of a row, which are whole units."""
    # 64-bit before each product: a tensor, and a row, may have more than 2^31 elements. A product it is, so
    # that the compiler knows how rows are aligned.
    return rows, tl.cast(column_units, tl.int64) * unit, tl.cdiv(column_units, block_columns // unit)


@triton.jit
def _where(index, matrix, row_stride, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """A tile's offsets and mask."""
    rows, columns, tiles_of_a_row = matrix
    row = tl.cast(index // tiles_of_a_row, tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.cast(index % tiles_of_a_row, tl.int64) * block_columns + tl.arange(0, block_columns)
    offsets = row[:, None] * row_stride + column[None, :]
    return offsets, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask):
    """A tile's grad_grad_input, grad_output and normalized input."""
    h = (load(input_ptr, offsets, mask) - mean) * rstd
    return load(grad_grad_input_ptr, offsets, mask), load(grad_output_ptr, offsets, mask), h


@triton.jit
def _parameter(
    ptr,
    absent: tl.constexpr,
    index,
    matrix,
    channels_last: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """The elements of a parameter that belong to a tile, or the value that stands for an absent one."""
    rows, columns, tiles_of_a_row = matrix
    if ptr is None:
        return absent
    elif channels_last:
        column = (index % tiles_of_a_row) * block_columns + tl.arange(0, block_columns)
        return load(ptr, column, column < columns)[None, :]
    else:
        row = (index // tiles_of_a_row) * block_rows + tl.arange(0, block_rows)
        return load(ptr, row, row < rows)[:, None]


@triton.jit
def _total(tile):
    if tile is None:
        return 0.0
    else:
        return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def group_norm_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_grad_weight_ptr,
    grad_grad_bias_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    sums_ptr,
    num_groups,
    rows,
    column_units,
    splits,
    unit: tl.constexpr,
    channels_last: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_splits: tl.constexpr,
    adds: tl.constexpr,
    applies: tl.constexpr,
    whole: tl.constexpr,
):
    """grad_grad_output, grad_input, and of each tile along a channel its part of grad_weight.

    A program has a group, which is whole if it fits in the registers. Or splits of them share one: then one
    launch adds, and the next one applies, having read the sums.

    Moves 5n elements where groups are whole: reads 3, writes 2. Else 8n, since the inputs are read twice; of
    the second time, what the L2 cache has kept is not from memory.
    """
    matrix = _matrix(rows, column_units, unit, block_columns)
    _, columns, tiles_of_a_row = matrix
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (group // num_groups).to(tl.int64)
    tiles_of_a_column = tl.cdiv(rows, block_rows)
    if channels_last:
        channels = columns
        row_stride = num_groups * columns
        start = batch * rows * row_stride + (group % num_groups) * columns
    else:
        channels = rows
        row_stride = columns
        start = group.to(tl.int64) * rows * columns
    first_channel = (group % num_groups) * channels
    grad_grad_input_ptr += start
    grad_output_ptr += start
    input_ptr += start
    if weight_ptr is not None:
        weight_ptr += first_channel
    if grad_grad_weight_ptr is not None:
        grad_grad_weight_ptr += first_channel
    if grad_grad_bias_ptr is not None:
        grad_grad_bias_ptr += first_channel
    mean = widen(tl.load(mean_ptr + group))
    rstd = widen(tl.load(rstd_ptr + group))
    one = tl.full((), 1.0, mean.dtype)
    per_element = one / (one * rows * columns)

    tiles = tiles_of_a_column * tiles_of_a_row
    share = tl.cdiv(tiles, splits)
    first = split * share
    last = tl.minimum(first + share, tiles)

    if whole:
        offsets, mask = _where(0, matrix, row_stride, block_rows, block_columns)
        v, g, h = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
        w = _parameter(weight_ptr, 1.0, 0, matrix, channels_last, block_rows, block_columns)
        u = _parameter(grad_grad_weight_ptr, None, 0, matrix, channels_last, block_rows, block_columns)
        sums = [_total(x) for x in normalization_terms(v, g, h, w, u, True)]
    elif adds:
        # Added up element by element of the tiles: a sum over a tile costs more than reading it.
        zeros = tl.zeros((block_rows, block_columns), mean.dtype)
        totals = (zeros, zeros, zeros, zeros, zeros, zeros, zeros)
        for index in range(first, last):
            offsets, mask = _where(index, matrix, row_stride, block_rows, block_columns)
            v, g, h = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
            w = _parameter(weight_ptr, 1.0, index, matrix, channels_last, block_rows, block_columns)
            u = _parameter(
                grad_grad_weight_ptr, None, index, matrix, channels_last, block_rows, block_columns
            )
            totals = add_terms(totals, normalization_terms(v, g, h, w, u, True))
        has_u: tl.constexpr = grad_grad_weight_ptr is not None
        sums = [_total(totals[i]) if i < 5 or has_u else 0.0 for i in (0, 1, 2, 3, 4, 5, 6)]
    else:
        part = tl.arange(0, block_splits)
        parts = sums_ptr + (group.to(tl.int64) * splits + part) * 7
        mine = part < splits
        sums = [tl.sum(tl.load(parts + i, mask=mine, other=0.0)) for i in (0, 1, 2, 3, 4, 5, 6)]

    if applies:
        means = [x * per_element for x in sums]
        for index in range(first, last):
            # Of a whole group again, which is cheaper than to keep them in registers meanwhile.
            offsets, mask = _where(index, matrix, row_stride, block_rows, block_columns)
            if not whole:
                v, g, h = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
            w = _parameter(weight_ptr, 1.0, index, matrix, channels_last, block_rows, block_columns)
            p = _parameter(
                grad_grad_weight_ptr, None, index, matrix, channels_last, block_rows, block_columns
            )
            q = _parameter(grad_grad_bias_ptr, None, index, matrix, channels_last, block_rows, block_columns)
            grad_grad_output, grad_input, term = normalization_double_backward(means, v, g, h, rstd, w, p, q)
            if grad_grad_output_ptr is not None:
                tl.store(grad_grad_output_ptr + start + offsets, grad_grad_output, mask=mask)
            if grad_input_ptr is not None:
                tl.store(grad_input_ptr + start + offsets, grad_input, mask=mask)
            if grad_weight_ptr is not None:
                all_channels = (num_groups * channels).to(tl.int64)
                if channels_last:
                    along = batch * tiles_of_a_column + index // tiles_of_a_row
                    channel = (index % tiles_of_a_row) * block_columns + tl.arange(0, block_columns)
                    grad_weight = tl.sum(term, axis=0)
                else:
                    along = batch * tiles_of_a_row + index % tiles_of_a_row
                    channel = (index // tiles_of_a_row) * block_rows + tl.arange(0, block_rows)
                    grad_weight = tl.sum(term, axis=1)
                tl.store(
                    grad_weight_ptr + along * all_channels + first_channel + channel,
                    grad_weight,
                    mask=channel < channels,
                )
    else:
        for i in tl.static_range(7):
            tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * 7 + i, sums[i])


class Plan(NamedTuple):
    """How a launch divides its tensors."""

    rows: int
    column_units: int
    splits: int
    constants: dict[str, Any]
    num_warps: int
    # Tiles along a channel.
    tiles_inside: int

    def passes(self) -> tuple[dict[str, Any], ...]:
        if self.splits == 1:
            return ({**self.constants, "adds": True, "applies": True},)
        return (
            {**self.constants, "adds": True, "applies": False},
            {**self.constants, "adds": False, "applies": True},
        )


# Elements of a group that one program holds in its registers, and of a tile of larger ones: 16 of three
# tensors a thread, or 8 and as many of five sums. Few large programs at a time, rather than many small ones,
# leave what they have read in the L2 cache for their second look at it.
_WHOLE = 8192
_TILE = 4096
# Programs that keep any GPU busy. Where there are not half as many groups, several programs share one.
_PROGRAMS = 1024


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _plan(batch: int, num_groups: int, channels: int, inner: int, itemsize: int, channels_last: bool) -> Plan:
    rows, columns = (inner, channels) if channels_last else (channels, inner)
    unit = 16 // itemsize
    while columns % unit:
        unit //= 2
    shrink = max(1, itemsize // 4)
    block_rows, block_columns = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    whole = block_rows * block_columns <= _WHOLE // shrink
    if not whole:
        # Of the widths that make a full tile, the one that leaves least of it over the edges.
        tile = _TILE // shrink
        widths = [min(block_columns, tile), *(w for w in (128, 256, 512, 1024) if w < block_columns)]
        heights = {width: min(block_rows, tile // width) for width in widths}

        def covered(width: int) -> int:
            height = heights[width]
            return _ceil(rows, height) * height * _ceil(columns, width) * width

        full = [width for width in widths if width * heights[width] == tile]
        block_columns = min(full, key=covered)
        block_rows = heights[block_columns]
    tiles_of_a_row, tiles_of_a_column = _ceil(columns, block_columns), _ceil(rows, block_rows)
    programs = batch * num_groups
    splits = 1
    if not whole and programs < _PROGRAMS // 2:
        splits = min(tiles_of_a_row * tiles_of_a_column, _ceil(_PROGRAMS, programs))
    constants = {
        "unit": unit,
        "channels_last": channels_last,
        "block_rows": block_rows,
        "block_columns": block_columns,
        "block_splits": triton.next_power_of_2(splits),
        "whole": whole,
    }
    num_warps = min(16, max(1, block_rows * block_columns * shrink // (512 if whole else 256)))
    tiles_inside = tiles_of_a_column if channels_last else tiles_of_a_row
    return Plan(rows, columns // unit, splits, constants, num_warps, tiles_inside)


def group_norm_double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    op = "group_norm_double_backward"
    small = {"weight": weight, "grad_grad_weight": grad_grad_weight, "grad_grad_bias": grad_grad_bias}
    large = {"grad_grad_input": grad_grad_input, "grad_output": grad_output}
    check_operands(op, input, large, small, input.shape[1])
    check_operands(op, input, {}, {"mean": mean, "rstd": rstd}, input.shape[0] * num_groups)
    layout = torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)
    if grad_grad_input is None:
        grad_grad_input = torch.zeros_like(input)
    v, g, x = (t.contiguous(memory_format=layout) for t in (grad_grad_input, grad_output, input))
    grad_grad_output = torch.empty_like(x) if output_mask[0] else None
    grad_input = torch.empty_like(x) if output_mask[1] else None

    batch, channels = x.shape[:2]
    like_weight = x if weight is None else weight
    if x.numel() == 0:
        grad_weight = like_weight.new_zeros(channels) if output_mask[2] else None
        return grad_grad_output, grad_input, grad_weight
    inner = x.numel() // (batch * channels)
    plan = _plan(
        batch,
        num_groups,
        channels // num_groups,
        inner,
        x.element_size(),
        # The layouts are one where a channel has one element, and these rows are the long ones.
        layout != torch.contiguous_format or inner == 1,
    )
    sums = grad_weights = None
    if plan.splits > 1:
        sums = x.new_empty(batch * num_groups * plan.splits, 7, dtype=opmath(x.dtype))
    if output_mask[2]:
        grad_weights = x.new_empty(batch * plan.tiles_inside, channels, dtype=opmath(x.dtype))
    operands = (v, g, x, *contiguous(mean, rstd, *small.values()))
    outputs = (grad_grad_output, grad_input, grad_weights)
    grid = (batch * num_groups * plan.splits,)
    with torch.cuda.device_of(x):  # does nothing for a CPU tensor (Triton's interpreter)
        for constants in plan.passes():
            launch(
                group_norm_bwd_bwd_kernel,
                grid,
                *operands,
                *outputs,
                sums,
                num_groups,
                plan.rows,
                plan.column_units,
                plan.splits,
                **constants,
                num_warps=plan.num_warps,
                **FP_FUSION,
            )
    grad_weight = None if grad_weights is None else grad_weights.sum(0).to(like_weight.dtype)
    return grad_grad_output, grad_input, grad_weight
