"""Launches over windows and over tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..._tf32 import has_tf32_products
from .. import NotCoveredError
from ..common import FP_FUSION, gpu, launch
from .tiles import attention_fwd_kernel, tiled_attention_bwd_bwd_kernel, tiled_attention_bwd_kernel
from .windows import window_attention_bwd_bwd_kernel, window_attention_bwd_kernel

_HALF = (torch.float16, torch.bfloat16)

# What one program holds of a window.
_WINDOW_TOKENS = _WINDOW_COLUMNS = 64

# Of more columns a program takes up to 80 KiB of shared memory. Devices have 64, or 99 and more.
_WIDE_MEMORY = 96 * 1024

# The fewest rows that are multiplied without tensor cores.
_FEWEST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


def _precision(query: Tensor, order: int, is_window: bool, has_mask: bool) -> str:
    """As the user set it, where the device has such instructions and Triton's backend takes the name.

    Each of float32's products is three of TF32's, with which emulation found errors of at most 1.6 times
    stock's. Not where these spill much.
    """
    device = gpu(query.device)
    if query.dtype != torch.float32 or device.backend != "cuda" or device.capability < 80:
        return "ieee"
    if has_tf32_products():
        return "tf32"
    # Beyond the forward, sm_90 alone takes a warp group's operands from shared memory, and so has registers.
    takes_three = order == 0 or (device.capability == 90 and not is_window and (order == 1 or not has_mask))
    return "tf32x3" if takes_three else "ieee"


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


# What a kernel is compiled for, and how.
_Compiled = tuple[dict[str, Any], dict[str, Any]]


def _compiled(
    row_block: int, key_block: int, columns: int, value_columns: int, precision: str, warps: int, stages: int
) -> _Compiled:
    constants = {
        "columns": columns,
        "value_columns": value_columns,
        "row_block": row_block,
        "key_block": key_block,
        "block": _power(columns),
        "value_block": _power(value_columns),
        "precision": precision,
    }
    return constants, {"num_warps": warps, "num_stages": stages, **FP_FUSION}


def _fits(limit: int, dtype: torch.dtype, row_block: int, keys: int, columns: int) -> bool:
    """Whether a window's double backward in these blocks has enough shared memory: for K, ddK, V and ddV, and
    for about three tiles of scores and three of the rows' operands. What was compiled took up
    to 0.06 more, and 0.16 on sm_90, which has room.
    """
    elements = keys * 2 * columns + row_block * (3 * keys + 1.5 * columns)
    return dtype.itemsize * elements * 1.1 <= limit


@functools.cache
def _window(
    dtype: torch.dtype,
    columns: int,
    value_columns: int,
    precision: str,
    order: int,
    rows: int,
    keys: int,
    shared_memory: int,
) -> _Compiled:
    """
    Raises:
        NotCoveredError: if a program has too little shared memory.
    """

    def fits(row_block: int) -> bool:
        return _fits(shared_memory, dtype, row_block, _power(keys), _power(columns) + _power(value_columns))

    # With tensor cores a warp holds 16 rows, or in the second order, of which there is twice as much, half of
    # their columns. Without, a few rows of scores are as much as fits into the registers of many warps.
    if dtype in _HALF or precision != "ieee":
        row_block = _power(rows)
        warps = row_block // 16 * (2 if order == 2 else 1)
        while order == 2 and row_block > 16 and not fits(row_block):
            row_block //= 2
    else:
        row_block, warps = _FEWEST_ROWS, 8
    if order == 2 and not fits(row_block):
        raise NotCoveredError
    constants, options = _compiled(row_block, _power(keys), columns, value_columns, precision, warps, 1)
    constants |= {"rows": rows, "keys": keys} if order else {"is_window": True}
    return constants, options


@functools.cache
def _tiles(
    dtype: torch.dtype,
    columns: int,
    value_columns: int,
    precision: str,
    order: int,
    has_mask: bool,
    of_keys: bool = False,
) -> _Compiled:
    """Of the pass of this order: about the largest tiles that 64 columns a head, or in half types 128, leave
    registers for.
    """
    pipelined, warps = False, 4
    if max(columns, value_columns) > _WINDOW_COLUMNS:
        own, other, warps = 64 if order < 2 or of_keys else 32, (64, 32, 16)[order], 8
    elif dtype in _HALF:
        own, other = 64, (64, 32, 16 if has_mask else 32)[order]
        pipelined = not has_mask
    elif precision != "ieee":
        own, other = (64, 64, 32 if has_mask else 64)[order], (32, 32, 16)[order]
    else:
        own, other, warps = 32, (32, 32, 16)[order], 8
    blocks = (other, own) if of_keys else (own, other)
    constants, options = _compiled(*blocks, columns, value_columns, precision, warps, 2 if pipelined else 1)
    constants |= {"pipelined": pipelined, "of_keys": of_keys} if order else {"is_window": False}
    return constants, options


def _strided(*tensors: Tensor | None) -> Iterator[tuple[Any, ...] | None]:
    """As kernels take them."""
    for tensor in tensors:
        yield None if tensor is None else (tensor, *tensor.stride())


def _run(
    order: int,
    incoming: tuple[Tensor | None, ...],
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None],
    results: tuple[Tensor | None, ...],
    scale: float,
    mask_sums: Tensor | None = None,
    grad_grad_mask: Tensor | None = None,
) -> None:
    """The pass of this order. Here, and only here, it is chosen between windows and tiles."""
    query, key, value, mask = operands
    (*batch, rows, columns), keys = query.shape, key.shape[3]
    items = math.prod(batch)
    if items == 0:
        if mask_sums is not None:
            mask_sums.zero_()
        return
    is_wide = max(columns, value.shape[4]) > _WINDOW_COLUMNS
    is_window = max(rows, keys) <= _WINDOW_TOKENS and not is_wide
    precision = _precision(query, order, is_window, mask is not None)
    kind = (query.dtype, columns, value.shape[4], precision, order)
    tensors = tuple(_strided(*incoming, *operands, *results))
    limit = gpu(query.device).shared_memory
    if is_wide and limit < _WIDE_MEMORY:
        raise NotCoveredError
    with torch.cuda.device_of(query):  # does nothing for a CPU tensor (Triton's interpreter)
        if order == 0:
            constants, options = (
                _window(*kind, rows, keys, limit) if is_window else _tiles(*kind, mask is not None)
            )
            grid = (items * -(-rows // constants["row_block"]),)
            counts = (rows, keys, *batch[1:])
            launch(attention_fwd_kernel, grid, *tensors, scale, *counts, **constants, **options)
        elif is_window:
            kernel = (window_attention_bwd_kernel, window_attention_bwd_bwd_kernel)[order - 1]
            constants, options = _window(*kind, rows, keys, limit)
            if order == 2:
                tensors += tuple(_strided(grad_grad_mask))
            # The parts of the batch, the tiles of the mask, and how often the batch goes through the tiles.
            parts, tiles = (1, items) if mask_sums is None else mask_sums.shape[:2]
            counts = (rows, *batch[1:], tiles, parts, items // tiles)
            arguments = (*tensors, mask_sums, scale, *counts)
            launch(kernel, (tiles * parts,), *arguments, **constants, **options)
        else:
            assert mask_sums is None and grad_grad_mask is None
            kernel = (tiled_attention_bwd_kernel, tiled_attention_bwd_bwd_kernel)[order - 1]
            # Of each row its highest score, inverse of the sum of weights, delta; in the second order alpha
            # and gamma, too. The launch over queries leaves them to the one over keys.
            between = torch.empty((2 * order + 1, items, rows), dtype=torch.float32, device=query.device)
            for of_keys, size in ((False, rows), (True, keys)):
                if size == 0 or (of_keys and results[-2] is results[-1] is None):
                    continue
                constants, options = _tiles(*kind, mask is not None, of_keys)
                grid = (items * -(-size // constants["key_block" if of_keys else "row_block"]),)
                counts = (rows, keys, *batch[1:])
                statistics = (between, items)
                launch(kernel, grid, *tensors, statistics, scale, *counts, **constants, **options)


def _attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor
) -> None:
    _run(0, (), (query, key, value, mask), (output,), scale)


def _attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    mask_sums: Tensor | None,
) -> None:
    results = (grad_query, grad_key, grad_value)
    _run(1, (grad_output,), (query, key, value, mask), results, scale, mask_sums)


def _attention_bwd_bwd(
    grad_grad_query: Tensor | None,
    grad_grad_key: Tensor | None,
    grad_grad_value: Tensor | None,
    grad_grad_mask: Tensor | None,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    grad_grad_output: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    mask_sums: Tensor | None,
) -> None:
    incoming = (grad_grad_query, grad_grad_key, grad_grad_value, grad_output)
    results = (grad_grad_output, grad_query, grad_key, grad_value)
    _run(2, incoming, (query, key, value, mask), results, scale, mask_sums, grad_grad_mask)
