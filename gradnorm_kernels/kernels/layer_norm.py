"""Triton kernels of layer normalisation.

PyTorch's own kernels are the forward and the backward over the last dimensions. Here is the double backward,
and all three passes over the channels of NCHW.

With v, u and t the gradients of those of input, weight and bias, g the output's, h the normalised input, r
its factor, <.> the mean over columns and P a = a - <a> - h <a h>, the double backward gives

    grad_output  w r P v + u h + t
    input        r P(u g) - r^2 (h <v P(w g)> + <w g h> P v + <v h> P(w g))
    weight       the sum over rows of g r P v

A kernel sees its tensors as groups of rows of columns, `row_stride` and `column_stride` apart: all rows are
one group where the columns are the last dimensions; an image is a group of height * width rows where they are
the channels. A program takes tiles of neighbouring rows, each row whole, and keeps them in registers.
"""

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

from .common import DTYPES, FP_FUSION, Specialization, pointer_type, widen


@triton.jit
def _load(pointer, offsets, mask):
    return widen(tl.load(pointer + offsets, mask=mask, other=0.0))


@triton.jit
def _load_parameter(pointer, columns, mask, absent: tl.constexpr):
    if pointer is None:
        return absent
    else:
        return _load(pointer, columns, mask)


@triton.jit
def _rows_of_tile(tile, rows, columns, row_stride, block_rows: tl.constexpr):
    """Which rows these are, counted over all groups, a mask, and where they are: the first, in 64 bits, for
    a tensor may have more than 2^31 elements, and the others relative to it.
    """
    tiles = tl.cdiv(rows, block_rows)
    group = tl.cast(tile // tiles, tl.int64)
    first = tl.cast(tile % tiles, tl.int64) * block_rows
    row = tl.arange(0, block_rows)[:, None]
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
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """output = x_hat * weight + bias, and the statistics. Moves 2N elements: reads 1, writes 1."""
    column = tl.arange(0, block_columns)[None, :]
    row, row_mask, start, offsets = _rows_of_tile(tl.program_id(0), rows, columns, row_stride, block_rows)
    offsets += _columns_offsets(column, column_stride, wide)
    mask = row_mask & (column < columns)
    x = _load(input_ptr + start, offsets, mask)
    mean = (tl.sum(x, axis=1) / columns)[:, None]
    centred = tl.where(mask, x - mean, 0.0)
    variance = (tl.sum(centred * centred, axis=1) / columns)[:, None]
    rstd = 1 / tl.sqrt(variance + eps)
    weight = _load_parameter(weight_ptr, column, column < columns, 1.0)
    bias = _load_parameter(bias_ptr, column, column < columns, 0.0)
    tl.store(output_ptr + start + offsets, centred * rstd * weight + bias, mask=mask)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)


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
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """grad_input = rstd * P(weight * grad_output), and each program's part of the sums over the rows of
    grad_output * x_hat and grad_output.

    Moves 3N elements: reads 2, writes 1; and two rows for each program.
    """
    column = tl.arange(0, block_columns)[None, :]
    weight = _load_parameter(weight_ptr, column, column < columns, 1.0)
    weight_sum = tl.zeros([block_rows, block_columns], widen(tl.load(rstd_ptr)).dtype)
    bias_sum = weight_sum
    for tile in range(tl.program_id(0), groups * tl.cdiv(rows, block_rows), tl.num_programs(0)):
        row, row_mask, start, offsets = _rows_of_tile(tile, rows, columns, row_stride, block_rows)
        offsets += _columns_offsets(column, column_stride, wide)
        mask = row_mask & (column < columns)
        g = _load(grad_output_ptr + start, offsets, mask)
        x = _load(input_ptr + start, offsets, mask)
        rstd = _load(rstd_ptr, row, row_mask)
        x_hat = (x - _load(mean_ptr, row, row_mask)) * rstd
        if grad_input_ptr is not None:
            gw = g * weight
            gw_mean = (tl.sum(gw, axis=1) / columns)[:, None]
            gw_xhat = (tl.sum(gw * x_hat, axis=1) / columns)[:, None]
            tl.store(grad_input_ptr + start + offsets, rstd * (gw - gw_mean - x_hat * gw_xhat), mask=mask)
        weight_sum += g * x_hat
        bias_sum += g
    partial = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, block_columns)
    mask = tl.arange(0, block_columns) < columns
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + partial, tl.sum(weight_sum, axis=0), mask=mask)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + partial, tl.sum(bias_sum, axis=0), mask=mask)


@triton.jit
def _operands(pointers, statistics, place, first_column, wide: tl.constexpr, block_columns: tl.constexpr):
    """Where they are, a mask, and x_hat, v, g, w, u and t."""
    grad_grad_input_ptr, grad_grad_weight_ptr, grad_grad_bias_ptr, grad_output_ptr, input_ptr, weight_ptr = (
        pointers
    )
    mean, rstd = statistics
    row_mask, start, offsets, columns, column_stride = place
    column = (first_column + tl.arange(0, block_columns))[None, :]
    offsets += _columns_offsets(column, column_stride, wide)
    column_mask = column < columns
    mask = row_mask & column_mask
    v = _load(grad_grad_input_ptr + start, offsets, mask)
    g = _load(grad_output_ptr + start, offsets, mask)
    x_hat = (_load(input_ptr + start, offsets, mask) - mean) * rstd
    w = _load_parameter(weight_ptr, column, column_mask, 1.0)
    u = _load_parameter(grad_grad_weight_ptr, column, column_mask, 0.0)
    t = _load_parameter(grad_grad_bias_ptr, column, column_mask, 0.0)
    return offsets, mask, x_hat, v, g, w, u, t


@triton.jit
def _sums(x_hat, v, g, w, u, has_u: tl.constexpr):
    """Of each row."""
    gw = g * w
    sum_v = tl.sum(v, axis=1, keep_dims=True)
    sum_v_xhat = tl.sum(v * x_hat, axis=1, keep_dims=True)
    sum_gw = tl.sum(gw, axis=1, keep_dims=True)
    sum_gw_xhat = tl.sum(gw * x_hat, axis=1, keep_dims=True)
    sum_v_gw = tl.sum(v * gw, axis=1, keep_dims=True)
    if has_u:
        gu = g * u
        sum_gu = tl.sum(gu, axis=1, keep_dims=True)
        sum_gu_xhat = tl.sum(gu * x_hat, axis=1, keep_dims=True)
    else:
        sum_gu = tl.zeros_like(sum_v)
        sum_gu_xhat = tl.zeros_like(sum_v)
    return sum_v, sum_v_xhat, sum_gw, sum_gw_xhat, sum_v_gw, sum_gu, sum_gu_xhat


@triton.jit
def _results(sums, columns, rstd, x_hat, v, g, w, u, t, has_u: tl.constexpr):
    """grad_grad_output, grad_input, and a contribution to grad_weight."""
    per_column = 1.0 / tl.cast(columns, rstd.dtype)
    v_mean = sums[0] * per_column
    v_xhat = sums[1] * per_column
    gw_mean = sums[2] * per_column
    gw_xhat = sums[3] * per_column
    v_gw = sums[4] * per_column
    v_centred = v - v_mean
    projected = rstd * (v_centred - v_xhat * x_hat)
    grad_grad_output = w * projected
    # rstd is large where a row hardly varies: it multiplies differences, and no two terms that cancel.
    times_xhat = rstd * (3.0 * gw_xhat * v_xhat + gw_mean * v_mean - v_gw)
    total = times_xhat * x_hat - rstd * (gw_xhat * v_centred + v_xhat * (g * w - gw_mean))
    if has_u:
        grad_grad_output += u * x_hat + t
        total += g * u - sums[5] * per_column - sums[6] * per_column * x_hat
    return grad_grad_output, rstd * total, g * projected


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
    whole: tl.constexpr,
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """grad_grad_output, grad_input, and each program's part of grad_weight.

    Moves 5N elements: reads 3, writes 2; and one row for each program. Rows that are not whole in
    block_columns are read twice: 8N. grad_grad_weight and grad_grad_bias are both there, or neither is.
    """
    has_u: tl.constexpr = grad_grad_weight_ptr is not None
    pointers = (
        grad_grad_input_ptr,
        grad_grad_weight_ptr,
        grad_grad_bias_ptr,
        grad_output_ptr,
        input_ptr,
        weight_ptr,
    )
    dtype: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32
    weight_sum = tl.zeros([block_rows, block_columns], dtype)
    first_tile = tl.program_id(0)
    partial = first_tile.to(tl.int64) * columns + tl.arange(0, block_columns)
    for tile in range(first_tile, groups * tl.cdiv(rows, block_rows), tl.num_programs(0)):
        row, row_mask, start, row_offsets = _rows_of_tile(tile, rows, columns, row_stride, block_rows)
        rstd = _load(rstd_ptr, row, row_mask)
        statistics = (_load(mean_ptr, row, row_mask), rstd)
        place = (row_mask, start, row_offsets, columns, column_stride)
        if whole:
            offsets, mask, x_hat, v, g, w, u, t = _operands(
                pointers, statistics, place, 0, wide, block_columns
            )
            sums = _sums(x_hat, v, g, w, u, has_u)
            grad_grad_output, grad_input, weight_term = _results(
                sums, columns, rstd, x_hat, v, g, w, u, t, has_u
            )
            if grad_grad_output_ptr is not None:
                tl.store(grad_grad_output_ptr + start + offsets, grad_grad_output, mask=mask)
            if grad_input_ptr is not None:
                tl.store(grad_input_ptr + start + offsets, grad_input, mask=mask)
            weight_sum += weight_term
        else:
            zero = tl.zeros([block_rows, 1], dtype)
            sums = (zero, zero, zero, zero, zero, zero, zero)
            for first_column in range(0, columns, block_columns):
                _, _, x_hat, v, g, w, u, _ = _operands(
                    pointers, statistics, place, first_column, wide, block_columns
                )
                more = _sums(x_hat, v, g, w, u, has_u)
                sums = (
                    sums[0] + more[0],
                    sums[1] + more[1],
                    sums[2] + more[2],
                    sums[3] + more[3],
                    sums[4] + more[4],
                    sums[5] + more[5],
                    sums[6] + more[6],
                )
            for first_column in range(0, columns, block_columns):
                offsets, mask, x_hat, v, g, w, u, t = _operands(
                    pointers, statistics, place, first_column, wide, block_columns
                )
                grad_grad_output, grad_input, weight_term = _results(
                    sums, columns, rstd, x_hat, v, g, w, u, t, has_u
                )
                if grad_grad_output_ptr is not None:
                    tl.store(grad_grad_output_ptr + start + offsets, grad_grad_output, mask=mask)
                if grad_input_ptr is not None:
                    tl.store(grad_input_ptr + start + offsets, grad_input, mask=mask)
                if grad_weight_ptr is not None:
                    # In memory that no other program adds to, and that holds nothing yet at first.
                    sum_ptr = grad_weight_ptr + partial + first_column
                    sum_mask = first_column + tl.arange(0, block_columns) < columns
                    before = tl.where(tile == first_tile, 0.0, tl.load(sum_ptr, mask=sum_mask, other=0.0))
                    tl.store(sum_ptr, before + tl.sum(weight_term, axis=0), mask=sum_mask)
    if whole and grad_weight_ptr is not None:
        mask = tl.arange(0, block_columns) < columns
        tl.store(grad_weight_ptr + partial, tl.sum(weight_sum, axis=0), mask=mask)


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
    """How a kernel sees contiguous tensors; its integer arguments, in their order."""

    groups: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int


def _rows(input: Tensor, mean: Tensor) -> Rows:
    """The columns are the dimensions that the statistics have reduced to 1."""
    inner = 1
    for size, kept in zip(reversed(input.shape), reversed(mean.shape), strict=True):
        if size != kept:
            break
        inner *= size
    outer = mean.numel() // inner
    columns = input.numel() // mean.numel()
    return Rows(1, outer, columns, columns, 1) if inner == 1 else Rows(outer, inner, columns, 1, inner)


# Elements of a row that a program can hold in registers.
_MOST_COLUMNS = {dtype: 4096 if dtype == torch.float64 else 8192 for dtype in DTYPES}


def _power_of_2_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _constants(
    kernel: Any, rows: Rows, dtype: torch.dtype, parameters: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The block sizes, chosen so that no register is spilled, and the options of the launch.

    parameters says whether the double backward has grad_grad_weight and grad_grad_bias.
    """
    most = _MOST_COLUMNS[dtype]
    double_backward = kernel is layer_norm_bwd_bwd_kernel
    block_columns = _power_of_2_from(rows.columns)
    if rows.column_stride == 1:
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
    block_rows = max(1, min(wanted, _power_of_2_from(rows.rows)))
    # Neighbouring columns are counted in 64 bits by Triton itself where their number needs them.
    wide = rows.column_stride > 1 and rows.columns * rows.column_stride > 2**31
    constants = {"wide": wide, "block_rows": block_rows, "block_columns": block_columns}
    if double_backward:
        constants["whole"] = rows.columns <= block_columns
    elements_in_thread = 8 if block_rows == 1 else 4
    num_warps = min(max(block_rows * block_columns // (32 * elements_in_thread), 1), 16)
    return constants, {"num_warps": num_warps, **FP_FUSION}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # A CPU tensor is for Triton's interpreter.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _programs(rows: Rows, block_rows: int, num_warps: int, device: torch.device) -> int:
    """As many as fill the device, as long as their partial sums are small beside the tensors."""
    tiles = rows.groups * -(-rows.rows // block_rows)
    sms = _multiprocessors(device)
    return min(tiles, max(sms, min(sms * (32 // num_warps), tiles // 16)))


def _check(
    op: str, input: Tensor, others: dict[str, Tensor], columns: int, **parameters: Tensor | None
) -> None:
    if input.dtype not in DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"{op}: expected input to be one of {names}, got {input.dtype}")
    for name, tensor in others.items():
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{op}: expected {name} to have the dtype of input ({input.dtype}), got {tensor.dtype}"
            )
        if tensor.shape != input.shape:
            shapes = f"({list(input.shape)}), got {list(tensor.shape)}"
            raise ValueError(f"{op}: expected {name} to have the shape of input {shapes}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.numel() != columns:
            raise ValueError(f"{op}: expected {name} to have {columns} elements, got {list(parameter.shape)}")
    for name, any_tensor in (others | parameters).items():
        if any_tensor is not None and any_tensor.device != input.device:
            devices = f"({input.device}), got {any_tensor.device}"
            raise RuntimeError(f"{op}: expected {name} to be on the device of input {devices}")


def _check_channels(op: str, input: Tensor, others: dict[str, Tensor], **parameters: Tensor | None) -> None:
    if input.ndim != 4:
        raise ValueError(f"{op}: expected input to be of shape (N, C, H, W), got {list(input.shape)}")
    _check(op, input, others, input.shape[1], **parameters)
    most = _MOST_COLUMNS[input.dtype]
    if input.shape[1] > most:
        raise ValueError(f"{op}: expected input to have at most {most} channels, got {input.shape[1]}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _empty_like(tensor: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else None


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the second of three dimensions."""
    outer, parts, columns = partial.shape
    total = torch.empty((outer, columns), dtype=dtype, device=partial.device)
    grid = (-(-columns // _SUM_CONSTANTS["block_columns"]), outer)
    sum_kernel[grid](partial, total, parts, columns, **_SUM_CONSTANTS, **_SUM_OPTIONS)
    return total


_SUM_CONSTANTS = {"block_parts": 32, "block_columns": 32}
_SUM_OPTIONS = {"num_warps": 4, **FP_FUSION}


def layer_norm_2d(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check_channels("layer_norm_2d", input, {}, weight=weight, bias=bias)
    n, _, height, width = input.shape
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    mean = input.new_empty((n, 1, height, width), dtype=_arithmetic(input.dtype))
    rstd = torch.empty_like(mean)
    if input.numel() == 0:
        return output, mean, rstd
    rows = _rows(input, mean)
    constants, options = _constants(layer_norm_fwd_kernel, rows, input.dtype)
    grid = (rows.groups * -(-rows.rows // constants["block_rows"]),)
    tensors = (input.contiguous(), _contiguous(weight), _contiguous(bias), output, mean, rstd)
    with torch.cuda.device_of(input):  # does nothing for a CPU tensor (Triton's interpreter)
        layer_norm_fwd_kernel[grid](*tensors, *rows, eps=eps, **constants, **options)
    return output, mean, rstd


def layer_norm_2d_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _check_channels("layer_norm_2d_backward", input, {"grad_output": grad_output}, weight=weight)
    grad_input = _empty_like(input, output_mask[0])
    channels = input.shape[1]
    dtype = input.dtype if weight is None else weight.dtype
    of_parameters = sum(output_mask[1:])
    if input.numel() == 0:
        sums = input.new_zeros((of_parameters, channels), dtype=dtype)
    else:
        rows = _rows(input, mean)
        constants, options = _constants(layer_norm_bwd_kernel, rows, input.dtype)
        programs = _programs(rows, constants["block_rows"], options["num_warps"], input.device)
        partial = mean.new_empty((of_parameters, programs, channels))
        parts = iter(partial)
        tensors = (
            grad_output.contiguous(),
            input.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            _contiguous(weight),
            grad_input,
            next(parts) if output_mask[1] else None,
            next(parts) if output_mask[2] else None,
        )
        with torch.cuda.device_of(input):
            layer_norm_bwd_kernel[(programs,)](*tensors, *rows, **constants, **options)
            sums = _sum(partial, dtype) if of_parameters else partial
    gradients = iter(sums)
    return (
        grad_input,
        next(gradients) if output_mask[1] else None,
        next(gradients) if output_mask[2] else None,
    )


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
    rows = _rows(input, mean) if input.numel() else None
    _check(
        "layer_norm_double_backward",
        input,
        {"grad_output": grad_output, "grad_grad_input": grad_grad_input},
        rows.columns if rows else 0,
        **(
            {"weight": weight, "grad_grad_weight": grad_grad_weight, "grad_grad_bias": grad_grad_bias}
            if rows
            else {}
        ),
    )
    grad_grad_output = _empty_like(input, output_mask[0])
    grad_input = _empty_like(input, output_mask[1])
    if rows is None:
        return (
            grad_grad_output,
            grad_input,
            torch.zeros_like(weight) if weight is not None and output_mask[2] else None,
        )
    parameters = grad_grad_weight is not None or grad_grad_bias is not None
    constants, options = _constants(layer_norm_bwd_bwd_kernel, rows, input.dtype, parameters)
    programs = _programs(rows, constants["block_rows"], options["num_warps"], input.device)
    partial = mean.new_empty((1, programs, rows.columns)) if weight is not None and output_mask[2] else None
    if grad_grad_weight is None and grad_grad_bias is not None:
        grad_grad_weight = torch.zeros_like(grad_grad_bias)
    if grad_grad_bias is None and grad_grad_weight is not None:
        grad_grad_bias = torch.zeros_like(grad_grad_weight)
    tensors = (
        grad_grad_input.contiguous(),
        _contiguous(grad_grad_weight),
        _contiguous(grad_grad_bias),
        grad_output.contiguous(),
        input.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        _contiguous(weight),
        grad_grad_output,
        grad_input,
        partial,
    )
    with torch.cuda.device_of(input):
        layer_norm_bwd_bwd_kernel[(programs,)](*tensors, *rows, **constants, **options)
        if weight is None or partial is None:
            return grad_grad_output, grad_input, None
        return grad_grad_output, grad_input, _sum(partial, weight.dtype).view_as(weight)


def specializations() -> Iterator[Specialization]:
    """What the models launch, Swin-B and ViT-B over the last dimension and ConvNeXt-B over channels; and an
    image that needs 64-bit offsets."""
    lean = ("grad_grad_weight_ptr", "grad_grad_bias_ptr")
    for name, kernel, dtype, shape, channels_first, absent in (
        ("vit", layer_norm_bwd_bwd_kernel, torch.float32, (64, 197, 768), False, lean),
        ("vit", layer_norm_bwd_bwd_kernel, torch.bfloat16, (64, 197, 768), False, lean),
        ("swin", layer_norm_bwd_bwd_kernel, torch.float32, (64, 56, 56, 128), False, lean),
        ("widest", layer_norm_bwd_bwd_kernel, torch.float32, (64, 49, 8192), False, lean),
        ("long", layer_norm_bwd_bwd_kernel, torch.float32, (64, 49, 16384), False, ()),
        ("convnext", layer_norm_fwd_kernel, torch.float32, (64, 256, 28, 28), True, ()),
        ("convnext", layer_norm_bwd_kernel, torch.float32, (64, 512, 14, 14), True, ()),
        ("convnext", layer_norm_bwd_bwd_kernel, torch.float32, (64, 512, 14, 14), True, lean),
        ("convnext", layer_norm_bwd_bwd_kernel, torch.bfloat16, (64, 128, 56, 56), True, lean),
        ("huge", layer_norm_bwd_bwd_kernel, torch.bfloat16, (1, 64, 8192, 8192), True, lean),
    ):
        yield _specialization(name, kernel, dtype, shape, channels_first, absent)


def _specialization(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channels_first: bool,
    absent: tuple[str, ...],
) -> Specialization:
    statistics = list(shape)
    statistics[1 if channels_first else -1] = 1
    meta = torch.empty(shape, device="meta")
    rows = _rows(meta, meta.new_empty(statistics))
    parameters = kernel is layer_norm_bwd_bwd_kernel and not absent
    constants, options = _constants(kernel, rows, dtype, parameters)
    constants = constants | dict.fromkeys(absent)
    # As Triton has them: an integer of 1 is a constant, and a multiple of 16 known to be one.
    integers = rows._asdict()
    constants |= {name: value for name, value in integers.items() if value == 1}
    if kernel is layer_norm_fwd_kernel:
        constants["eps"] = 1e-6
    sums = [name for name in ("grad_weight_ptr", "grad_bias_ptr") if name in kernel.arg_names]
    in_arithmetic = {"mean_ptr", "rstd_ptr"} | (set() if kernel is layer_norm_fwd_kernel else set(sums))
    arguments = [name for name in kernel.arg_names if name not in constants]
    types = {
        name: "i32"
        if name in integers
        else pointer_type(_arithmetic(dtype) if name in in_arithmetic else dtype)
        for name in arguments
    }
    aligned = tuple(name for name in arguments if name.endswith("_ptr") or integers.get(name, 1) % 16 == 0)
    pass_name = kernel.__name__.removesuffix("_kernel")
    return Specialization(
        f"{pass_name}-{name}-{pointer_type(dtype)[1:]}",
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        aligned,
        options,
    )
