"""Triton kernel of group normalisation's double backward; forward and first backward are PyTorch's."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .common import DTYPES, FP_FUSION, Specialization, pointer_type, widen

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
    v = widen(tl.load(grad_grad_input_ptr + offsets, mask=mask, other=0.0))
    g = widen(tl.load(grad_output_ptr + offsets, mask=mask, other=0.0))
    x = widen(tl.load(input_ptr + offsets, mask=mask, other=0.0))
    return v, g, (x - mean) * rstd


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
        return tl.full((1, 1), absent, tl.float32)
    elif channels_last:
        column = (index % tiles_of_a_row) * block_columns + tl.arange(0, block_columns)
        return widen(tl.load(ptr + column, mask=column < columns, other=0.0))[None, :]
    else:
        row = (index // tiles_of_a_row) * block_rows + tl.arange(0, block_rows)
        return widen(tl.load(ptr + row, mask=row < rows, other=0.0))[:, None]


@triton.jit
def _total(tile):
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
    """With v, g and x the grad_grad_input, grad_output and input, a = weight g, b = (x - mean) rstd, p and q
    the grad_grad_weight and grad_grad_bias, and <> the mean over a group:

        grad_grad_output = weight rstd (v - <v> - b <v b>) + p b + q
        grad_input = rstd (p - weight rstd <v b>) g - rstd^2 <a b> v
                     + (rstd^2 (3 <a b> <v b> + <a> <v> - <v a>) - rstd <p g b>) b
                     + rstd^2 (<v b> <a> + <a b> <v>) - rstd <p g>
        grad_weight = sum of g rstd (v - <v> - b <v b>), of each channel, for each tile along it

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

    sum_pg = 0.0 * one
    sum_pgb = 0.0 * one
    if whole:
        offsets, mask = _where(0, matrix, row_stride, block_rows, block_columns)
        v, g, b = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
        w = _parameter(weight_ptr, 1.0, 0, matrix, channels_last, block_rows, block_columns)
        a = w * g
        sum_a, sum_ab, sum_va = _total(a), _total(a * b), _total(v * a)
        sum_v, sum_vb = _total(v), _total(v * b)
        if grad_grad_weight_ptr is not None:
            p = _parameter(grad_grad_weight_ptr, 0.0, 0, matrix, channels_last, block_rows, block_columns)
            sum_pg, sum_pgb = _total(p * g), _total(p * g * b)
    elif adds:
        # Added up element by element of the tiles: a sum over a tile costs more than reading it.
        all_a = tl.zeros((block_rows, block_columns), mean.dtype)
        all_ab, all_va, all_v, all_vb = all_a, all_a, all_a, all_a
        all_pg, all_pgb = all_a, all_a
        for index in range(first, last):
            offsets, mask = _where(index, matrix, row_stride, block_rows, block_columns)
            v, g, b = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
            w = _parameter(weight_ptr, 1.0, index, matrix, channels_last, block_rows, block_columns)
            a = w * g
            all_a += a
            all_ab += a * b
            all_va += v * a
            all_v += v
            all_vb += v * b
            if grad_grad_weight_ptr is not None:
                p = _parameter(
                    grad_grad_weight_ptr, 0.0, index, matrix, channels_last, block_rows, block_columns
                )
                all_pg += p * g
                all_pgb += p * g * b
        sum_a, sum_ab, sum_va = _total(all_a), _total(all_ab), _total(all_va)
        sum_v, sum_vb = _total(all_v), _total(all_vb)
        if grad_grad_weight_ptr is not None:
            sum_pg, sum_pgb = _total(all_pg), _total(all_pgb)
    else:
        part = tl.arange(0, block_splits)
        parts = sums_ptr + (group.to(tl.int64) * splits + part) * 7
        mine = part < splits
        sum_a = tl.sum(tl.load(parts, mask=mine, other=0.0))
        sum_ab = tl.sum(tl.load(parts + 1, mask=mine, other=0.0))
        sum_va = tl.sum(tl.load(parts + 2, mask=mine, other=0.0))
        sum_v = tl.sum(tl.load(parts + 3, mask=mine, other=0.0))
        sum_vb = tl.sum(tl.load(parts + 4, mask=mine, other=0.0))
        sum_pg = tl.sum(tl.load(parts + 5, mask=mine, other=0.0))
        sum_pgb = tl.sum(tl.load(parts + 6, mask=mine, other=0.0))

    if applies:
        mean_a, mean_ab, mean_va = sum_a * per_element, sum_ab * per_element, sum_va * per_element
        mean_v, mean_vb = sum_v * per_element, sum_vb * per_element
        of_b = rstd * (rstd * (3.0 * mean_ab * mean_vb + mean_a * mean_v - mean_va) - sum_pgb * per_element)
        of_one = rstd * (rstd * (mean_vb * mean_a + mean_ab * mean_v) - sum_pg * per_element)
        for index in range(first, last):
            # Of a whole group again, which is cheaper than to keep them in registers meanwhile.
            offsets, mask = _where(index, matrix, row_stride, block_rows, block_columns)
            if not whole:
                v, g, b = _read(grad_grad_input_ptr, grad_output_ptr, input_ptr, mean, rstd, offsets, mask)
            w = _parameter(weight_ptr, 1.0, index, matrix, channels_last, block_rows, block_columns)
            p = _parameter(grad_grad_weight_ptr, 0.0, index, matrix, channels_last, block_rows, block_columns)
            projected = rstd * (v - mean_v - b * mean_vb)
            if grad_grad_output_ptr is not None:
                q = _parameter(
                    grad_grad_bias_ptr, 0.0, index, matrix, channels_last, block_rows, block_columns
                )
                tl.store(grad_grad_output_ptr + start + offsets, w * projected + (p * b + q), mask=mask)
            if grad_input_ptr is not None:
                of_g = rstd * (p - w * (rstd * mean_vb))
                grad_input = of_g * g - (rstd * rstd * mean_ab) * v + (of_b * b + of_one)
                tl.store(grad_input_ptr + start + offsets, grad_input, mask=mask)
            if grad_weight_ptr is not None:
                all_channels = (num_groups * channels).to(tl.int64)
                if channels_last:
                    along = batch * tiles_of_a_column + index // tiles_of_a_row
                    channel = (index % tiles_of_a_row) * block_columns + tl.arange(0, block_columns)
                    grad_weight = tl.sum(g * projected, axis=0)
                else:
                    along = batch * tiles_of_a_row + index % tiles_of_a_row
                    channel = (index // tiles_of_a_row) * block_rows + tl.arange(0, block_rows)
                    grad_weight = tl.sum(g * projected, axis=1)
                tl.store(
                    grad_weight_ptr + along * all_channels + first_channel + channel,
                    grad_weight,
                    mask=channel < channels,
                )
    else:
        parts = sums_ptr + tl.program_id(0).to(tl.int64) * 7
        tl.store(parts, sum_a)
        tl.store(parts + 1, sum_ab)
        tl.store(parts + 2, sum_va)
        tl.store(parts + 3, sum_v)
        tl.store(parts + 4, sum_vb)
        tl.store(parts + 5, sum_pg)
        tl.store(parts + 6, sum_pgb)


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


def _power_of_two(n: int) -> int:
    """The least that is not less than n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _plan(batch: int, num_groups: int, channels: int, inner: int, itemsize: int, channels_last: bool) -> Plan:
    rows, columns = (inner, channels) if channels_last else (channels, inner)
    unit = 16 // itemsize
    while columns % unit:
        unit //= 2
    shrink = max(1, itemsize // 4)
    block_rows, block_columns = _power_of_two(rows), _power_of_two(columns)
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
        "block_splits": _power_of_two(splits),
        "whole": whole,
    }
    num_warps = min(16, max(1, block_rows * block_columns * shrink // (512 if whole else 256)))
    tiles_inside = tiles_of_a_column if channels_last else tiles_of_a_row
    return Plan(rows, columns // unit, splits, constants, num_warps, tiles_inside)


# In float64 for float64, and float32 otherwise: the dtype of what is added up.
def _opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(*args: Any) -> None:
    """Raise what the Meta kernel does, which does not see devices and is too slow for every call."""
    op = torch.ops.gradnorm_kernels.group_norm_double_backward.default
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=True)}
    device = named["input"].device
    for name, value in named.items():
        if isinstance(value, Tensor) and value.device != device:
            raise RuntimeError(
                f"{op._schema.name.split('::')[1]}: expected {name} to be on the device of input ({device}), "
                f"got {value.device}"
            )
    op(*(value.to("meta") if isinstance(value, Tensor) else value for value in args))


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
    large, small = (grad_grad_input, grad_output), (weight, grad_grad_weight, grad_grad_bias)
    if (
        any(t is not None and (t.shape != input.shape or t.dtype != input.dtype) for t in large)
        or any(t is not None and t.shape != input.shape[1:2] for t in small)
        or any(t.shape != (*input.shape[:1], num_groups) for t in (mean, rstd))
        or any(t is not None and t.device != input.device for t in (*large, *small, mean, rstd))
        or input.dtype not in DTYPES
    ):
        _check(
            *(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, mean, rstd, weight),
            *(num_groups, eps, output_mask),
        )
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
        sums = x.new_empty(batch * num_groups * plan.splits, 7, dtype=_opmath(x.dtype))
    if output_mask[2]:
        grad_weights = x.new_empty(batch * plan.tiles_inside, channels, dtype=_opmath(x.dtype))
    operands = (v, g, x, *(None if t is None else t.contiguous() for t in (mean, rstd, *small)))
    outputs = (grad_grad_output, grad_input, grad_weights)
    grid = (batch * num_groups * plan.splits,)
    with torch.cuda.device_of(x):  # does nothing for a CPU tensor (Triton's interpreter)
        for constants in plan.passes():
            group_norm_bwd_bwd_kernel[grid](
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


# (batch, num_groups, channels, inner, channels_last): ResNet-50's with 32 groups, where a group fits in a
# program and where it does not, and one whose channels are all one group, as PoolFormer's.
_SHAPES = {
    "rows14": (64, 32, 1024, 196, False),
    "rows28": (64, 32, 512, 784, False),
    "rows56": (64, 32, 256, 3136, False),
    "columns28": (64, 32, 512, 784, True),
    "one_group56": (64, 1, 96, 3136, False),
}


def specializations() -> Iterator[Specialization]:
    """With weight, without grad_grad_weight and grad_grad_bias, and with all results: as in training."""
    chosen = [(name, torch.float32) for name in _SHAPES] + [("rows28", torch.bfloat16)]
    for name, dtype in chosen:
        batch, num_groups, channels, inner, channels_last = _SHAPES[name]
        plan = _plan(batch, num_groups, channels // num_groups, inner, dtype.itemsize, channels_last)
        for constants in plan.passes():
            pointer = pointer_type(dtype)
            types = dict.fromkeys(group_norm_bwd_bwd_kernel.arg_names, pointer)
            types |= dict.fromkeys(("grad_weight_ptr", "sums_ptr"), "*fp32")
            sizes = {"rows": plan.rows, "column_units": plan.column_units, "splits": plan.splits}
            sizes["num_groups"] = num_groups
            absent = ["grad_grad_weight_ptr", "grad_grad_bias_ptr"]
            absent += [] if plan.splits > 1 else ["sums_ptr"]
            # As a launch: Triton makes constants of None and of 1.
            constants |= dict.fromkeys(absent) | {size: 1 for size, value in sizes.items() if value == 1}
            types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
            pointers = [argument for argument, type_ in types.items() if type_.startswith("*")]
            stage = "" if plan.splits == 1 else "-adds" if constants["adds"] else "-applies"
            yield Specialization(
                f"group_norm_bwd_bwd_kernel-{name}-{pointer[1:]}{stage}",
                group_norm_bwd_bwd_kernel,
                types,
                constants,
                (*pointers, *(size for size, value in sizes.items() if value % 16 == 0)),
                {"num_warps": plan.num_warps, **FP_FUSION},
            )
