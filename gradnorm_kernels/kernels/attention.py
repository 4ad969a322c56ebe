"""Triton kernels of scaled dot-product attention.

Windows, of up to 64 tokens and 64 columns a head, take one kernel a pass: a program holds one window of one
head, and its scores never reach memory. Longer sequences take matrix products, and one kernel over the rows
of scores a pass. The names are those of csrc/attention.cpp, which has the mathematics: S = scale Q K^T + M,
P = softmax(S), dP = dO V^T and so on.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FP_FUSION, Specialization, pointer_type, widen

# Windows. A tensor is (batch 0, batch 1, batch 2, rows, columns), its columns contiguous, and comes with the
# strides of the other four; a mask with all five. An absent one is given as any other, and never touched.


@triton.jit
def _split(item, batch_1, batch_2):
    return item // (batch_1 * batch_2), item // batch_2 % batch_1, item % batch_2


@triton.jit
def _start(item, strides):
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    first, middle, last = item[0].to(tl.int64), item[1].to(tl.int64), item[2].to(tl.int64)
    return first * strides[0] + middle * strides[1] + last * strides[2]


@triton.jit
def _load(
    ptr, item, strides, first, rows: tl.constexpr, columns: tl.constexpr, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The item's rows from first on, padded with zeros to (size, block)."""
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    offsets = _start(item, strides) + i * strides[3] + j
    return tl.load(ptr + offsets, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _store(
    ptr, item, strides, first, value, rows: tl.constexpr, columns: tl.constexpr, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    offsets = _start(item, strides) + i * strides[3] + j
    tl.store(ptr + offsets, value, mask=(i < rows) & (j < columns))


@triton.jit
def _load_mask(
    ptr, item, strides, first, rows: tl.constexpr, keys: tl.constexpr, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    offsets = _start(item, strides) + i * strides[3] + j * strides[4]
    return tl.load(ptr + offsets, mask=(i < rows) & (j < keys), other=0.0).to(tl.float32)


@triton.jit
def _accumulate(
    ptr, program, first, value, is_first, rows: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):
    """Adds to sums that this program alone writes, and that stay in the cache. Their rows are padded."""
    i = first + tl.arange(0, size)[:, None]
    offsets = program.to(tl.int64) * (rows * block) + i * block + tl.arange(0, block)[None, :]
    before = tl.load(ptr + offsets, mask=(i < rows) & (not is_first), other=0.0)
    tl.store(ptr + offsets, before + value, mask=i < rows)


@triton.jit
def _dot(a, b, precision: tl.constexpr):
    return tl.dot(a.to(b.dtype), b, input_precision=precision)


@triton.jit
def _softmax(scores, first, rows: tl.constexpr, keys: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """P of padded scores: 0 in the padding, and where nothing is attended to."""
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    scores = tl.where(j < keys, scores, -float("inf"))
    highest = tl.max(scores, axis=1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(scores - highest[:, None])
    total = tl.sum(weights, axis=1)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.where((i < rows) & (j < keys), weights, 0.0)


# A program takes row_block rows of queries at a time. Where that is all of them, the loop is none; otherwise
# its end is not a constant, since the compiler would unroll it, and hoist more than the registers hold.


@triton.jit
def window_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, output_ptr,
    scale, row_count, batch_1, batch_2,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    output_0, output_1, output_2, output_row,
    rows: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    has_mask: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """output = P V. Reads query, key, value and the mask, and writes output: 4N elements and the mask."""
    query_strides = (query_0, query_1, query_2, query_row)
    key_strides = (key_0, key_1, key_2, key_row)
    value_strides = (value_0, value_1, value_2, value_row)
    mask_strides = (mask_0, mask_1, mask_2, mask_row, mask_column)
    output_strides = (output_0, output_1, output_2, output_row)
    item = _split(tl.program_id(0), batch_1, batch_2)
    for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
        query = _load(query_ptr, item, query_strides, first, rows, columns, row_block, block)
        key = _load(key_ptr, item, key_strides, 0, keys, columns, key_block, block)
        scores = _dot(query, tl.trans(key), precision) * scale
        if has_mask:
            scores += _load_mask(mask_ptr, item, mask_strides, first, rows, keys, row_block, key_block)
        p = _softmax(scores, first, rows, keys, row_block, key_block)
        value = _load(value_ptr, item, value_strides, 0, keys, value_columns, key_block, value_block)
        output = _dot(p, value, precision)
        _store(output_ptr, item, output_strides, first, output, rows, value_columns, row_block, value_block)


@triton.jit
def window_attention_bwd_kernel(
    grad_output_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    grad_query_ptr, grad_key_ptr, grad_value_ptr, mask_sums_ptr,
    scale, row_count, batch_1, batch_2, tiles, parts, repeats,
    grad_output_0, grad_output_1, grad_output_2, grad_output_row,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    grad_query_0, grad_query_1, grad_query_2, grad_query_row,
    grad_key_0, grad_key_1, grad_key_2, grad_key_row,
    grad_value_0, grad_value_1, grad_value_2, grad_value_row,
    rows: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    has_mask: tl.constexpr, query_wanted: tl.constexpr, key_wanted: tl.constexpr, value_wanted: tl.constexpr,
    mask_wanted: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """grad_query = scale dS K, grad_key = scale dS^T Q, grad_value = P^T dO.

    Reads grad_output, query, key, value and the mask, and writes the gradients that are wanted: 7N elements
    and the mask. Where the mask's gradient is wanted, a program goes through those windows of one part of the
    batch that share one tile of the mask, and writes the sum of their dS.
    """
    grad_output_strides = (grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_strides = (query_0, query_1, query_2, query_row)
    key_strides = (key_0, key_1, key_2, key_row)
    value_strides = (value_0, value_1, value_2, value_row)
    mask_strides = (mask_0, mask_1, mask_2, mask_row, mask_column)
    grad_query_strides = (grad_query_0, grad_query_1, grad_query_2, grad_query_row)
    grad_key_strides = (grad_key_0, grad_key_1, grad_key_2, grad_key_row)
    grad_value_strides = (grad_value_0, grad_value_1, grad_value_2, grad_value_row)
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + program % tiles, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            query = _load(query_ptr, item, query_strides, first, rows, columns, row_block, block)
            key = _load(key_ptr, item, key_strides, 0, keys, columns, key_block, block)
            scores = _dot(query, tl.trans(key), precision) * scale
            if has_mask:
                scores += _load_mask(mask_ptr, item, mask_strides, first, rows, keys, row_block, key_block)
            p = _softmax(scores, first, rows, keys, row_block, key_block)
            grad_output = _load(
                grad_output_ptr, item, grad_output_strides, first, rows, value_columns, row_block, value_block
            )
            value = _load(value_ptr, item, value_strides, 0, keys, value_columns, key_block, value_block)
            dp = _dot(grad_output, tl.trans(value), precision)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if value_wanted:
                grad_value += _dot(tl.trans(p.to(grad_output.dtype)), grad_output, precision)
            if mask_wanted:
                _accumulate(mask_sums_ptr, program, first, ds, repeat < parts, rows, row_block, key_block)
            if query_wanted:
                grad_query = _dot(ds, key, precision) * scale
                _store(
                    grad_query_ptr,
                    item,
                    grad_query_strides,
                    first,
                    grad_query,
                    rows,
                    columns,
                    row_block,
                    block,
                )
            if key_wanted:
                grad_key += _dot(tl.trans(ds.to(query.dtype)), query, precision)
        if key_wanted:
            _store(grad_key_ptr, item, grad_key_strides, 0, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            _store(
                grad_value_ptr, item, grad_value_strides, 0, grad_value, keys, value_columns, key_block,
                value_block,
            )  # fmt: skip
        if mask_wanted:
            # The next round's sums may be read by other threads than those that wrote them.
            tl.debug_barrier()


@triton.jit
def window_attention_bwd_bwd_kernel(
    grad_grad_query_ptr, grad_grad_key_ptr, grad_grad_value_ptr, grad_grad_mask_ptr,
    grad_output_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    grad_grad_output_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr, mask_sums_ptr,
    scale, row_count, batch_1, batch_2, tiles, parts, repeats,
    grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row,
    grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row,
    grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row,
    grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2, grad_grad_mask_row, grad_grad_mask_column,
    grad_output_0, grad_output_1, grad_output_2, grad_output_row,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    grad_grad_output_0, grad_grad_output_1, grad_grad_output_2, grad_grad_output_row,
    grad_query_0, grad_query_1, grad_query_2, grad_query_row,
    grad_key_0, grad_key_1, grad_key_2, grad_key_row,
    grad_value_0, grad_value_1, grad_value_2, grad_value_row,
    rows: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    has_grad_grad_query: tl.constexpr, has_grad_grad_key: tl.constexpr, has_grad_grad_value: tl.constexpr,
    has_grad_grad_mask: tl.constexpr, has_mask: tl.constexpr, output_wanted: tl.constexpr,
    query_wanted: tl.constexpr, key_wanted: tl.constexpr, value_wanted: tl.constexpr,
    mask_wanted: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradients of the backward: with A, B, C and E of the formulas, grad_grad_output = P ddV + B V,
    grad_value = B^T dO, grad_query = scale (E K + dS ddK) and grad_key = scale (E^T Q + dS^T ddQ).

    Reads the three incoming gradients, grad_output, query, key, value and the mask, and writes the four
    results: 11N elements and the mask. The mask's gradient is the sum of E, as in the backward.
    """
    dd_query_strides = (grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row)
    dd_key_strides = (grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row)
    dd_value_strides = (grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row)
    dd_mask_strides = (
        grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2, grad_grad_mask_row, grad_grad_mask_column
    )  # fmt: skip
    grad_output_strides = (grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_strides = (query_0, query_1, query_2, query_row)
    key_strides = (key_0, key_1, key_2, key_row)
    value_strides = (value_0, value_1, value_2, value_row)
    mask_strides = (mask_0, mask_1, mask_2, mask_row, mask_column)
    dd_output_strides = (grad_grad_output_0, grad_grad_output_1, grad_grad_output_2, grad_grad_output_row)
    grad_query_strides = (grad_query_0, grad_query_1, grad_query_2, grad_query_row)
    grad_key_strides = (grad_key_0, grad_key_1, grad_key_2, grad_key_row)
    grad_value_strides = (grad_value_0, grad_value_1, grad_value_2, grad_value_row)
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + program % tiles, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            query = _load(query_ptr, item, query_strides, first, rows, columns, row_block, block)
            key = _load(key_ptr, item, key_strides, 0, keys, columns, key_block, block)
            scores = _dot(query, tl.trans(key), precision) * scale
            if has_mask:
                scores += _load_mask(mask_ptr, item, mask_strides, first, rows, keys, row_block, key_block)
            p = _softmax(scores, first, rows, keys, row_block, key_block)

            a = tl.zeros((row_block, key_block), dtype=tl.float32)
            if has_grad_grad_query:
                dd_query = _load(
                    grad_grad_query_ptr, item, dd_query_strides, first, rows, columns, row_block, block
                )
                a += _dot(dd_query, tl.trans(key), precision)
            if has_grad_grad_key:
                dd_key = _load(grad_grad_key_ptr, item, dd_key_strides, 0, keys, columns, key_block, block)
                a += _dot(query, tl.trans(dd_key), precision)
            a *= scale
            if has_grad_grad_mask:
                a += _load_mask(
                    grad_grad_mask_ptr, item, dd_mask_strides, first, rows, keys, row_block, key_block
                )
            alpha = tl.sum(p * a, axis=1)[:, None]

            grad_output = _load(
                grad_output_ptr, item, grad_output_strides, first, rows, value_columns, row_block, value_block
            )
            value = _load(value_ptr, item, value_strides, 0, keys, value_columns, key_block, value_block)
            dp = _dot(grad_output, tl.trans(value), precision)
            delta = tl.sum(p * dp, axis=1)[:, None]
            ds = (p * (dp - delta)).to(query.dtype)
            b = (p * (a - alpha)).to(query.dtype)
            c = a * (dp - delta) - alpha * dp

            grad_grad_output = _dot(b, value, precision)
            if has_grad_grad_value:
                dd_value = _load(
                    grad_grad_value_ptr,
                    item,
                    dd_value_strides,
                    0,
                    keys,
                    value_columns,
                    key_block,
                    value_block,
                )
                c += _dot(grad_output, tl.trans(dd_value), precision)
                grad_grad_output += _dot(p, dd_value, precision)
            if output_wanted:
                _store(
                    grad_grad_output_ptr, item, dd_output_strides, first, grad_grad_output, rows,
                    value_columns, row_block, value_block,
                )  # fmt: skip
            if value_wanted:
                grad_value += _dot(tl.trans(b), grad_output, precision)

            e = p * (c - tl.sum(p * c, axis=1)[:, None])
            if mask_wanted:
                _accumulate(mask_sums_ptr, program, first, e, repeat < parts, rows, row_block, key_block)
            if query_wanted:
                grad_query = _dot(e, key, precision)
                if has_grad_grad_key:
                    grad_query += _dot(ds, dd_key, precision)
                _store(
                    grad_query_ptr, item, grad_query_strides, first, grad_query * scale, rows, columns,
                    row_block, block,
                )  # fmt: skip
            if key_wanted:
                grad_key += _dot(tl.trans(e.to(query.dtype)), query, precision)
                if has_grad_grad_query:
                    grad_key += _dot(tl.trans(ds), dd_query, precision)
        if key_wanted:
            _store(grad_key_ptr, item, grad_key_strides, 0, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            _store(
                grad_value_ptr, item, grad_value_strides, 0, grad_value, keys, value_columns, key_block,
                value_block,
            )  # fmt: skip
        if mask_wanted:
            tl.debug_barrier()


# Rows of scores, of sequences that no program could hold. One program a row.


@triton.jit
def _row(ptr, row, keys, j):
    return widen(tl.load(ptr + row * keys + j, mask=j < keys, other=0.0))


@triton.jit
def _mask_row(
    ptr, row, rows, batch_1, batch_2, stride_0, stride_1, stride_2, stride_row, stride_column, keys, j
):
    start = _start(_split(row // rows, batch_1, batch_2), (stride_0, stride_1, stride_2))
    start += row % rows * stride_row
    return tl.load(ptr + start + j.to(tl.int64) * stride_column, mask=j < keys, other=0.0)


@triton.jit
def _softmax_row(scores, j, keys):
    scores = tl.where(j < keys, scores, -float("inf"))
    highest = tl.max(scores, axis=0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(scores - highest)
    total = tl.sum(weights, axis=0)
    return weights / tl.where(total == 0.0, 1.0, total)


@triton.jit
def attention_rows_fwd_kernel(
    scores_ptr, mask_ptr, p_ptr,
    scale, rows, keys, batch_1, batch_2,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    has_mask: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """P. Reads the scores and the mask, and writes P: 2 scores and the mask."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, block)
    scores = _row(scores_ptr, row, keys, j) * scale
    if has_mask:
        scores += _mask_row(
            mask_ptr, row, rows, batch_1, batch_2, mask_0, mask_1, mask_2, mask_row, mask_column, keys, j
        ).to(scores.dtype)
    tl.store(p_ptr + row * keys + j, _softmax_row(scores, j, keys), mask=j < keys)


@triton.jit
def attention_rows_bwd_kernel(
    dp_ptr, scores_ptr, mask_ptr, p_ptr, ds_ptr,
    scale, rows, keys, batch_1, batch_2,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    has_mask: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """P and dS. Reads dP, the scores and the mask, and writes both: 4 scores and the mask."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, block)
    dp = _row(dp_ptr, row, keys, j)
    scores = _row(scores_ptr, row, keys, j) * scale
    if has_mask:
        scores += _mask_row(
            mask_ptr, row, rows, batch_1, batch_2, mask_0, mask_1, mask_2, mask_row, mask_column, keys, j
        ).to(scores.dtype)
    p = _softmax_row(scores, j, keys)
    tl.store(p_ptr + row * keys + j, p, mask=j < keys)
    tl.store(ds_ptr + row * keys + j, p * (dp - tl.sum(p * dp, axis=0)), mask=j < keys)


@triton.jit
def attention_rows_bwd_bwd_kernel(
    a_ptr, grad_grad_mask_ptr, c_ptr, dp_ptr, scores_ptr, mask_ptr, p_ptr, ds_ptr, b_ptr, e_ptr,
    scale, rows, keys, batch_1, batch_2,
    grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2, grad_grad_mask_row, grad_grad_mask_column,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    has_a: tl.constexpr, has_grad_grad_mask: tl.constexpr, has_c: tl.constexpr, has_mask: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """P, dS, B and E. Reads A, dO ddV^T, dP, the scores and the mask, and writes the four: 8 scores and the
    mask.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, block)
    dp = _row(dp_ptr, row, keys, j)
    scores = _row(scores_ptr, row, keys, j) * scale
    if has_mask:
        scores += _mask_row(
            mask_ptr, row, rows, batch_1, batch_2, mask_0, mask_1, mask_2, mask_row, mask_column, keys, j
        ).to(scores.dtype)
    p = _softmax_row(scores, j, keys)
    a = tl.zeros_like(p)
    if has_a:
        a = _row(a_ptr, row, keys, j) * scale
    if has_grad_grad_mask:
        a += _mask_row(
            grad_grad_mask_ptr, row, rows, batch_1, batch_2, grad_grad_mask_0, grad_grad_mask_1,
            grad_grad_mask_2, grad_grad_mask_row, grad_grad_mask_column, keys, j,
        ).to(a.dtype)  # fmt: skip
    alpha = tl.sum(p * a, axis=0)
    delta = tl.sum(p * dp, axis=0)
    c = a * (dp - delta) - alpha * dp
    if has_c:
        c += _row(c_ptr, row, keys, j)
    tl.store(p_ptr + row * keys + j, p, mask=j < keys)
    tl.store(ds_ptr + row * keys + j, p * (dp - delta), mask=j < keys)
    tl.store(b_ptr + row * keys + j, p * (a - alpha), mask=j < keys)
    tl.store(e_ptr + row * keys + j, p * (c - tl.sum(p * c, axis=0)), mask=j < keys)


# Launchers.

_HALF = (torch.float16, torch.bfloat16)


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


@functools.cache
def _window_constants(
    dtype: torch.dtype, rows: int, keys: int, columns: int, value_columns: int, tf32: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel is compiled for, and how."""
    # With tensor cores a warp holds 16 rows. Without, a few rows of scores are as much as fits into the
    # registers of many warps.
    tensor_cores = dtype in _HALF or tf32
    row_block = _power(rows) if tensor_cores else 16
    constants = {
        "rows": rows,
        "keys": keys,
        "columns": columns,
        "value_columns": value_columns,
        "row_block": row_block,
        "key_block": _power(keys),
        "block": _power(columns),
        "value_block": _power(value_columns),
        "precision": "tf32" if tf32 else "ieee",
    }
    return constants, {"num_warps": row_block // 16 if tensor_cores else 8, "num_stages": 1, **FP_FUSION}


def _constants(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return _window_constants(query.dtype, query.shape[3], key.shape[3], query.shape[4], value.shape[4], tf32)


def _matrix_strides(*tensors: Tensor | None) -> Iterator[int]:
    """Of each, those of the batch and of its rows; the columns are contiguous."""
    for tensor in tensors:
        yield from (0, 0, 0, 0) if tensor is None else tensor.stride()[:4]


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if mask is None else mask.stride()


def _sums_of(query: Tensor, mask_sums: Tensor | None) -> tuple[int, int, int]:
    """The tiles of the mask, the parts of the batch, and how often the batch goes through the tiles."""
    items = math.prod(query.shape[:3])
    if mask_sums is None:
        return items, 1, 1
    parts, tiles = mask_sums.shape[:2]
    return tiles, parts, items // tiles


def _window_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor
) -> None:
    constants, options = _constants(query, key, value)
    with torch.cuda.device_of(query):
        window_attention_fwd_kernel[(math.prod(query.shape[:3]),)](
            query,
            key,
            value,
            query if mask is None else mask,
            output,
            scale,
            query.shape[3],
            *query.shape[1:3],
            *_matrix_strides(query, key, value),
            *_mask_strides(mask),
            *_matrix_strides(output),
            has_mask=mask is not None,
            **constants,
            **options,
        )


def _window_attention_bwd(
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
    tiles, parts, repeats = _sums_of(query, mask_sums)
    if tiles == 0:
        return
    constants, options = _constants(query, key, value)
    results = (grad_query, grad_key, grad_value)
    with torch.cuda.device_of(query):
        window_attention_bwd_kernel[(tiles * parts,)](
            grad_output,
            query,
            key,
            value,
            *(query if t is None else t for t in (mask, *results, mask_sums)),
            scale,
            query.shape[3],
            *query.shape[1:3],
            tiles,
            parts,
            repeats,
            *_matrix_strides(grad_output, query, key, value),
            *_mask_strides(mask),
            *_matrix_strides(*results),
            has_mask=mask is not None,
            query_wanted=grad_query is not None,
            key_wanted=grad_key is not None,
            value_wanted=grad_value is not None,
            mask_wanted=mask_sums is not None,
            **constants,
            **options,
        )


def _window_attention_bwd_bwd(
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
    tiles, parts, repeats = _sums_of(query, mask_sums)
    if tiles == 0:
        return
    constants, options = _constants(query, key, value)
    incoming = (grad_grad_query, grad_grad_key, grad_grad_value)
    results = (grad_grad_output, grad_query, grad_key, grad_value)
    with torch.cuda.device_of(query):
        window_attention_bwd_bwd_kernel[(tiles * parts,)](
            *(query if t is None else t for t in (*incoming, grad_grad_mask)),
            grad_output,
            query,
            key,
            value,
            *(query if t is None else t for t in (mask, *results, mask_sums)),
            scale,
            query.shape[3],
            *query.shape[1:3],
            tiles,
            parts,
            repeats,
            *_matrix_strides(*incoming),
            *_mask_strides(grad_grad_mask),
            *_matrix_strides(grad_output, query, key, value),
            *_mask_strides(mask),
            *_matrix_strides(*results),
            has_grad_grad_query=grad_grad_query is not None,
            has_grad_grad_key=grad_grad_key is not None,
            has_grad_grad_value=grad_grad_value is not None,
            has_grad_grad_mask=grad_grad_mask is not None,
            has_mask=mask is not None,
            output_wanted=grad_grad_output is not None,
            query_wanted=grad_query is not None,
            key_wanted=grad_key is not None,
            value_wanted=grad_value is not None,
            mask_wanted=mask_sums is not None,
            **constants,
            **options,
        )


def _launch_rows(
    kernel: Any,
    scores: Tensor,
    tensors: tuple[Tensor, ...],
    masks: tuple[Tensor | None, ...],
    scale: float,
    flags: dict[str, bool],
) -> None:
    """Over the rows of contiguous tensors of the shape of scores, to which the masks are broadcast."""
    if scores.numel() == 0:
        return
    rows, keys = scores.shape[-2:]
    strides: list[int] = []
    for mask in masks:
        if mask is not None:
            mask = mask.expand(scores.shape)
            mask = mask.flatten(0, mask.ndim - 5) if mask.ndim > 5 else mask
        strides += (0, 0, 0, 0, 0, *_mask_strides(mask))[-5:]
    block = _power(keys)
    with torch.cuda.device_of(scores):
        kernel[(scores.numel() // keys,)](
            *tensors,
            scale,
            rows,
            keys,
            *(1, 1, *scores.shape[:-2])[-2:],
            *strides,
            **flags,
            block=block,
            num_warps=_row_warps(block),
            **FP_FUSION,
        )


def _row_warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _attention_softmax(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = scores.contiguous()
    p = torch.empty_like(scores)
    tensors = (scores, scores if mask is None else mask, p)
    flags = {"has_mask": mask is not None}
    _launch_rows(attention_rows_fwd_kernel, scores, tensors, (mask,), scale, flags)
    return p


def _attention_softmax_backward(
    dp: Tensor, scores: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dp, scores = dp.contiguous(), scores.contiguous()
    p, ds = torch.empty_like(scores), torch.empty_like(scores)
    tensors = (dp, scores, scores if mask is None else mask, p, ds)
    flags = {"has_mask": mask is not None}
    _launch_rows(attention_rows_bwd_kernel, scores, tensors, (mask,), scale, flags)
    return p, ds


def _attention_softmax_double_backward(
    a: Tensor | None,
    grad_grad_mask: Tensor | None,
    c: Tensor | None,
    dp: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, c = (t if t is None else t.contiguous() for t in (a, c))
    dp, scores = dp.contiguous(), scores.contiguous()
    p, ds, b, e = (torch.empty_like(scores) for _ in range(4))
    optional = tuple(scores if t is None else t for t in (a, grad_grad_mask, c))
    tensors = (*optional, dp, scores, scores if mask is None else mask, p, ds, b, e)
    flags = {
        "has_a": a is not None,
        "has_grad_grad_mask": grad_grad_mask is not None,
        "has_c": c is not None,
        "has_mask": mask is not None,
    }
    masks = (grad_grad_mask, mask)
    _launch_rows(attention_rows_bwd_bwd_kernel, scores, tensors, masks, scale, flags)
    return p, ds, b, e


def _specialization(
    kernel: Any, name: str, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, Any]
) -> Specialization:
    """With everything given and wanted but the incoming gradient of the mask."""
    optional = (n for n in kernel.arg_names if n.startswith("has_") or n.endswith("_wanted"))
    flags = {argument: argument != "has_grad_grad_mask" for argument in optional}
    # Triton compiles a 1, such as the stride of a mask's columns, as a constant, and the strides of an absent
    # tensor are 0.
    constants = {n: v for n, v in (flags | constants | {"mask_column": 1}).items() if n in kernel.arg_names}
    pointer = pointer_type(dtype)
    signature, divisible = {}, []
    for argument in kernel.arg_names:
        stride = argument.rsplit("_")[-1] in ("0", "1", "2", "row", "column")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            # Masks are of the dtype of arithmetic.
            mask = "mask" in argument
            signature[argument] = ("*fp32" if mask else pointer) if argument.endswith("_ptr") else "i32"
            of_matrix = not mask or argument.startswith("grad_grad_mask")
            if argument.endswith("_ptr") or argument == "mask_0" or (stride and of_matrix):
                divisible.append(argument)
    return Specialization(
        f"{kernel.__name__}-{name}-{pointer[1:]}", kernel, signature, constants, tuple(divisible), options
    )


def specializations() -> Iterator[Specialization]:
    """Windows of Swin, 7 by 7 with 32 columns a head, and the rows of ViT, of 197 tokens."""
    windows = (window_attention_fwd_kernel, window_attention_bwd_kernel, window_attention_bwd_bwd_kernel)
    for kernel, dtype in itertools.product(windows, (torch.float32, torch.bfloat16)):
        yield _specialization(kernel, "swin", dtype, *_window_constants(dtype, 49, 49, 32, 32, False))
    constants = {"block": 256, "has_mask": False}
    options = {"num_warps": _row_warps(256), **FP_FUSION}
    yield _specialization(attention_rows_bwd_bwd_kernel, "vit", torch.bfloat16, constants, options)
