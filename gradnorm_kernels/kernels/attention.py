"""Triton kernels of scaled dot-product attention.

Windows, of up to 64 tokens and 64 columns a head, take one kernel a pass: a program holds one window of one
head. Longer sequences are cut into tiles of scores, which their backward passes make several times over, in
two launches: over blocks of queries, and over blocks of keys. Neither has scores in memory. What they do not
cover takes matrix products, and one kernel over the rows of scores a pass. The names are those of
csrc/attention.cpp, which has the mathematics: S = scale Q K^T + M, P = softmax(S), dP = dO V^T and so on.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FP_FUSION, Specialization, pointer_type, widen

# A tensor is (batch 0, batch 1, batch 2, rows, columns), its columns contiguous: a tuple of its pointer and
# the strides of the other four. A mask comes with all five. An absent one is given as any other, and never
# touched.


@triton.jit
def _split(item, batch_1, batch_2):
    return item // (batch_1 * batch_2), item // batch_2 % batch_1, item % batch_2


@triton.jit
def _start(item, stride_0, stride_1, stride_2):
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    first, middle, last = item[0].to(tl.int64), item[1].to(tl.int64), item[2].to(tl.int64)
    return first * stride_0 + middle * stride_1 + last * stride_2


@triton.jit
def _range(first, size: tl.constexpr, axis: tl.constexpr):
    return tl.expand_dims((first + tl.arange(0, size)).to(tl.int64), axis)


@triton.jit
def _load(tensor, item, first, rows, columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """The item's rows from first on, padded with zeros to (size, block)."""
    i, j = _range(first, size, 1), tl.arange(0, block)[None, :]
    offsets = _start(item, tensor[1], tensor[2], tensor[3]) + i * tensor[4] + j
    return tl.load(tensor[0] + offsets, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _store(tensor, item, first, value, rows, columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    i, j = _range(first, size, 1), tl.arange(0, block)[None, :]
    offsets = _start(item, tensor[1], tensor[2], tensor[3]) + i * tensor[4] + j
    tl.store(tensor[0] + offsets, value, mask=(i < rows) & (j < columns))


@triton.jit
def _load_mask(
    mask, item, first, start, rows, keys, size: tl.constexpr, block: tl.constexpr, transposed: tl.constexpr
):
    i, j = _range(first, size, 0 if transposed else 1), _range(start, block, 1 if transposed else 0)
    offsets = _start(item, mask[1], mask[2], mask[3]) + i * mask[4] + j * mask[5]
    return tl.load(mask[0] + offsets, mask=(i < rows) & (j < keys), other=0.0).to(tl.float32)


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


# A tile of scores is (queries, keys), or transposed. Row by row is along its keys.


@triton.jit
def _product(of_queries, of_keys, transposed: tl.constexpr, precision: tl.constexpr):
    if transposed:
        product = _dot(of_keys, tl.trans(of_queries), precision)
    else:
        product = _dot(of_queries, tl.trans(of_keys), precision)
    return product


@triton.jit
def _scores(
    query, key, mask, item, first, start, scale, rows, keys, size: tl.constexpr, block: tl.constexpr,
    has_mask: tl.constexpr, transposed: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """S, which is -inf in the padding of the keys."""
    scores = _product(query, key, transposed, precision) * scale
    if has_mask:
        scores += _load_mask(mask, item, first, start, rows, keys, size, block, transposed)
    return tl.where(_range(start, block, 1 if transposed else 0) < keys, scores, -float("inf"))


@triton.jit
def _highest(scores):
    # Finite where nothing is attended to, so that all weights are 0.
    return tl.maximum(tl.max(scores, axis=1), -3.4028234663852886e38)


@triton.jit
def _inverse(total):
    # Weights far below those of other keys may sum to less than has an inverse.
    return 1.0 / tl.where(total < 1e-30, 1.0, total)


@triton.jit
def _softmax(scores, first, rows, size: tl.constexpr):
    """P of all the keys: 0 in the padding, and where nothing is attended to."""
    weights = tl.exp(scores - _highest(scores)[:, None])
    total = tl.sum(weights, axis=1)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.where(_range(first, size, 1) < rows, weights, 0.0)


@triton.jit
def _next_weights(scores, highest, total):
    """Of the next keys: exp(S - highest), and their sum; and what becomes of the highest score, of the sum of
    all weights so far, and, by a factor, of what is proportional to these."""
    raised = tl.maximum(highest, _highest(scores))
    weights = tl.exp(scores - raised[:, None])
    factor = tl.exp(highest - raised)
    added = tl.sum(weights, axis=1)
    return weights, added, raised, total * factor + added, factor


@triton.jit
def _mean(weights, inverse, x):
    return tl.sum(weights * x, axis=1) * inverse


@triton.jit
def attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, output_ptr,
    scale, rows, keys, batch_1, batch_2,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    output_0, output_1, output_2, output_row,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    is_window: tl.constexpr, has_mask: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """output = P V. Reads query, key, value and the mask, and writes output: 4N elements and the mask.

    One program a block of queries. Of a window one block holds all keys.
    """
    query_of = (query_ptr, query_0, query_1, query_2, query_row)
    key_of = (key_ptr, key_0, key_1, key_2, key_row)
    value_of = (value_ptr, value_0, value_1, value_2, value_row)
    mask = (mask_ptr, mask_0, mask_1, mask_2, mask_row, mask_column)
    output_of = (output_ptr, output_0, output_1, output_2, output_row)
    blocks = tl.cdiv(rows, row_block)
    item = _split(tl.program_id(0) // blocks, batch_1, batch_2)
    first = tl.program_id(0) % blocks * row_block
    query = _load(query_of, item, first, rows, columns, row_block, block)
    highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((row_block,), dtype=tl.float32)
    output = tl.zeros((row_block, value_block), dtype=tl.float32)
    for start in tl.range(0, key_block if is_window else keys, key_block):
        key = _load(key_of, item, start, keys, columns, key_block, block)
        scores = _scores(
            query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask, False,
            precision,
        )  # fmt: skip
        weights, _, highest, total, factor = _next_weights(scores, highest, total)
        value = _load(value_of, item, start, keys, value_columns, key_block, value_block)
        output = output * factor[:, None] + _dot(weights, value, precision)
    output *= _inverse(total)[:, None]
    _store(output_of, item, first, output, rows, value_columns, row_block, value_block)


# Backward over windows. A program takes row_block rows of queries at a time. Where that is all of them, the
# loop is none; otherwise its end is not a constant, since the compiler would unroll it, and hoist more than
# the registers hold.


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
    grad_output_of = (grad_output_ptr, grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_of = (query_ptr, query_0, query_1, query_2, query_row)
    key_of = (key_ptr, key_0, key_1, key_2, key_row)
    value_of = (value_ptr, value_0, value_1, value_2, value_row)
    mask = (mask_ptr, mask_0, mask_1, mask_2, mask_row, mask_column)
    grad_query_of = (grad_query_ptr, grad_query_0, grad_query_1, grad_query_2, grad_query_row)
    grad_key_of = (grad_key_ptr, grad_key_0, grad_key_1, grad_key_2, grad_key_row)
    grad_value_of = (grad_value_ptr, grad_value_0, grad_value_1, grad_value_2, grad_value_row)
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + program % tiles, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            query = _load(query_of, item, first, rows, columns, row_block, block)
            key = _load(key_of, item, 0, keys, columns, key_block, block)
            scores = _scores(
                query, key, mask, item, first, 0, scale, rows, keys, row_block, key_block, has_mask, False,
                precision,
            )  # fmt: skip
            p = _softmax(scores, first, rows, row_block)
            grad_output = _load(grad_output_of, item, first, rows, value_columns, row_block, value_block)
            value = _load(value_of, item, 0, keys, value_columns, key_block, value_block)
            dp = _dot(grad_output, tl.trans(value), precision)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if value_wanted:
                grad_value += _dot(tl.trans(p.to(grad_output.dtype)), grad_output, precision)
            if mask_wanted:
                _accumulate(mask_sums_ptr, program, first, ds, repeat < parts, rows, row_block, key_block)
            if query_wanted:
                grad_query = _dot(ds, key, precision) * scale
                _store(grad_query_of, item, first, grad_query, rows, columns, row_block, block)
            if key_wanted:
                grad_key += _dot(tl.trans(ds.to(query.dtype)), query, precision)
        if key_wanted:
            _store(grad_key_of, item, 0, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            _store(grad_value_of, item, 0, grad_value, keys, value_columns, key_block, value_block)
        if mask_wanted:
            # The next round's sums may be read by other threads than those that wrote them.
            tl.debug_barrier()


@triton.jit
def window_attention_bwd_bwd_kernel(
    grad_grad_mask_ptr, grad_grad_query_ptr, grad_grad_key_ptr, grad_grad_value_ptr,
    grad_output_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    grad_grad_output_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr, mask_sums_ptr,
    scale, row_count, batch_1, batch_2, tiles, parts, repeats,
    grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2, grad_grad_mask_row, grad_grad_mask_column,
    grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row,
    grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row,
    grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row,
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
    dd_query_of = (
        grad_grad_query_ptr, grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row
    )  # fmt: skip
    dd_key_of = (grad_grad_key_ptr, grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row)
    dd_value_of = (
        grad_grad_value_ptr, grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row
    )  # fmt: skip
    dd_mask = (
        grad_grad_mask_ptr, grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2, grad_grad_mask_row,
        grad_grad_mask_column,
    )  # fmt: skip
    grad_output_of = (grad_output_ptr, grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_of = (query_ptr, query_0, query_1, query_2, query_row)
    key_of = (key_ptr, key_0, key_1, key_2, key_row)
    value_of = (value_ptr, value_0, value_1, value_2, value_row)
    mask = (mask_ptr, mask_0, mask_1, mask_2, mask_row, mask_column)
    dd_output_of = (
        grad_grad_output_ptr, grad_grad_output_0, grad_grad_output_1, grad_grad_output_2, grad_grad_output_row
    )  # fmt: skip
    grad_query_of = (grad_query_ptr, grad_query_0, grad_query_1, grad_query_2, grad_query_row)
    grad_key_of = (grad_key_ptr, grad_key_0, grad_key_1, grad_key_2, grad_key_row)
    grad_value_of = (grad_value_ptr, grad_value_0, grad_value_1, grad_value_2, grad_value_row)
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + program % tiles, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            query = _load(query_of, item, first, rows, columns, row_block, block)
            key = _load(key_of, item, 0, keys, columns, key_block, block)
            scores = _scores(
                query, key, mask, item, first, 0, scale, rows, keys, row_block, key_block, has_mask, False,
                precision,
            )  # fmt: skip
            p = _softmax(scores, first, rows, row_block)

            a = tl.zeros((row_block, key_block), dtype=tl.float32)
            if has_grad_grad_query:
                dd_query = _load(dd_query_of, item, first, rows, columns, row_block, block)
                a += _dot(dd_query, tl.trans(key), precision)
            if has_grad_grad_key:
                dd_key = _load(dd_key_of, item, 0, keys, columns, key_block, block)
                a += _dot(query, tl.trans(dd_key), precision)
            a *= scale
            if has_grad_grad_mask:
                a += _load_mask(dd_mask, item, first, 0, rows, keys, row_block, key_block, False)
            a -= tl.sum(p * a, axis=1)[:, None]

            grad_output = _load(grad_output_of, item, first, rows, value_columns, row_block, value_block)
            value = _load(value_of, item, 0, keys, value_columns, key_block, value_block)
            dp = _dot(grad_output, tl.trans(value), precision)
            dp -= tl.sum(p * dp, axis=1)[:, None]
            # In products they are rounded anyway, and the registers hold more of them so. The mask's gradient
            # is the sum of E as rounded: stock's scores and their gradients are of that dtype, too.
            ds = (p * dp).to(query.dtype)
            b = (p * a).to(query.dtype)
            c = a * dp
            if has_grad_grad_value:
                dd_value = _load(dd_value_of, item, 0, keys, value_columns, key_block, value_block)
                c += _dot(grad_output, tl.trans(dd_value), precision)
            e = p * (c - tl.sum(p * c, axis=1)[:, None])
            e = e.to(query.dtype)
            if mask_wanted:
                _accumulate(mask_sums_ptr, program, first, e, repeat < parts, rows, row_block, key_block)

            grad_grad_output = _dot(b, value, precision)
            if has_grad_grad_value:
                grad_grad_output += _dot(p, dd_value, precision)
            if output_wanted:
                _store(
                    dd_output_of, item, first, grad_grad_output, rows, value_columns, row_block, value_block
                )
            if value_wanted:
                grad_value += _dot(tl.trans(b), grad_output, precision)
            if query_wanted:
                grad_query = _dot(e, key, precision)
                if has_grad_grad_key:
                    grad_query += _dot(ds, dd_key, precision)
                _store(grad_query_of, item, first, grad_query * scale, rows, columns, row_block, block)
            if key_wanted:
                grad_key += _dot(tl.trans(e), query, precision)
                if has_grad_grad_query:
                    grad_key += _dot(tl.trans(ds), dd_query, precision)
        if key_wanted:
            _store(grad_key_of, item, 0, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            _store(grad_value_of, item, 0, grad_value, keys, value_columns, key_block, value_block)
        if mask_wanted:
            tl.debug_barrier()


# Backward over longer sequences, by two launches of one kernel. A program of the first takes a block of
# queries, and goes through the keys twice: for the statistics of its rows, which it writes for the second
# launch, and for its results. A program of the second takes a block of keys, and goes through the queries
# once. What they read again is in the cache, as a head is small. Where its loads are not pipelined, a loop
# hoists nothing, since that takes registers.


@triton.jit
def _statistic(ptr, index: tl.constexpr, items, item, i, rows):
    return ptr + (index * items + item).to(tl.int64) * rows + i


@triton.jit
def _store_statistic(ptr, index: tl.constexpr, items, item, first, rows, value, size: tl.constexpr):
    i = first + tl.arange(0, size)
    tl.store(_statistic(ptr, index, items, item, i, rows), value, mask=i < rows)


@triton.jit
def _load_statistic(ptr, index: tl.constexpr, items, item, first, rows, size: tl.constexpr):
    i = first + tl.arange(0, size)
    return tl.load(_statistic(ptr, index, items, item, i, rows), mask=i < rows, other=0.0)[None, :]


@triton.jit
def tiled_attention_bwd_kernel(
    grad_output_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    grad_query_ptr, grad_key_ptr, grad_value_ptr, statistics_ptr,
    scale, rows, keys, items, batch_1, batch_2,
    grad_output_0, grad_output_1, grad_output_2, grad_output_row,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    grad_query_0, grad_query_1, grad_query_2, grad_query_row,
    grad_key_0, grad_key_1, grad_key_2, grad_key_row,
    grad_value_0, grad_value_1, grad_value_2, grad_value_row,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    of_keys: tl.constexpr, has_mask: tl.constexpr, query_wanted: tl.constexpr, key_wanted: tl.constexpr,
    value_wanted: tl.constexpr, precision: tl.constexpr, pipelined: tl.constexpr,
):  # fmt: skip
    """grad_query = scale dS K, then, of_keys, grad_key = scale dS^T Q and grad_value = P^T dO.

    Each launch reads grad_output, query, key, value and the mask: in all 8N elements, the mask twice, and 3N
    written. The first makes 5 products of matrices, the second 4.
    """
    grad_output_of = (grad_output_ptr, grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_of = (query_ptr, query_0, query_1, query_2, query_row)
    key_of = (key_ptr, key_0, key_1, key_2, key_row)
    value_of = (value_ptr, value_0, value_1, value_2, value_row)
    mask = (mask_ptr, mask_0, mask_1, mask_2, mask_row, mask_column)
    if of_keys:
        blocks = tl.cdiv(keys, key_block)
        number = tl.program_id(0) // blocks
        item = _split(number, batch_1, batch_2)
        start = tl.program_id(0) % blocks * key_block
        key = _load(key_of, item, start, keys, columns, key_block, block)
        value = _load(value_of, item, start, keys, value_columns, key_block, value_block)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows, row_block, disable_licm=not pipelined):
            query = _load(query_of, item, first, rows, columns, row_block, block)
            scores = _scores(
                query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask, True,
                precision,
            )  # fmt: skip
            highest = _load_statistic(statistics_ptr, 0, items, number, first, rows, row_block)
            inverse = _load_statistic(statistics_ptr, 1, items, number, first, rows, row_block)
            p = tl.where(_range(first, row_block, 0) < rows, tl.exp(scores - highest) * inverse, 0.0)
            grad_output = _load(grad_output_of, item, first, rows, value_columns, row_block, value_block)
            if value_wanted:
                grad_value += _dot(p, grad_output, precision)
            if key_wanted:
                dp = _product(grad_output, value, True, precision)
                dp -= _load_statistic(statistics_ptr, 2, items, number, first, rows, row_block)
                grad_key += _dot(p * dp, query, precision)
        if key_wanted:
            grad_key_of = (grad_key_ptr, grad_key_0, grad_key_1, grad_key_2, grad_key_row)
            _store(grad_key_of, item, start, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            grad_value_of = (grad_value_ptr, grad_value_0, grad_value_1, grad_value_2, grad_value_row)
            _store(grad_value_of, item, start, grad_value, keys, value_columns, key_block, value_block)
    else:
        blocks = tl.cdiv(rows, row_block)
        number = tl.program_id(0) // blocks
        item = _split(number, batch_1, batch_2)
        first = tl.program_id(0) % blocks * row_block
        query = _load(query_of, item, first, rows, columns, row_block, block)
        grad_output = _load(grad_output_of, item, first, rows, value_columns, row_block, value_block)
        highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((row_block,), dtype=tl.float32)
        delta = tl.zeros((row_block,), dtype=tl.float32)
        for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
            key = _load(key_of, item, start, keys, columns, key_block, block)
            scores = _scores(
                query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask,
                False, precision,
            )  # fmt: skip
            weights, _, highest, total, factor = _next_weights(scores, highest, total)
            value = _load(value_of, item, start, keys, value_columns, key_block, value_block)
            dp = _product(grad_output, value, False, precision)
            delta = delta * factor + tl.sum(weights * dp, axis=1)
        inverse = _inverse(total)
        delta *= inverse
        _store_statistic(statistics_ptr, 0, items, number, first, rows, highest, row_block)
        _store_statistic(statistics_ptr, 1, items, number, first, rows, inverse, row_block)
        _store_statistic(statistics_ptr, 2, items, number, first, rows, delta, row_block)
        if query_wanted:
            grad_query = tl.zeros((row_block, block), dtype=tl.float32)
            for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
                key = _load(key_of, item, start, keys, columns, key_block, block)
                scores = _scores(
                    query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask,
                    False, precision,
                )  # fmt: skip
                p = tl.exp(scores - highest[:, None]) * inverse[:, None]
                value = _load(value_of, item, start, keys, value_columns, key_block, value_block)
                dp = _product(grad_output, value, False, precision) - delta[:, None]
                grad_query += _dot(p * dp, key, precision)
            grad_query_of = (grad_query_ptr, grad_query_0, grad_query_1, grad_query_2, grad_query_row)
            _store(grad_query_of, item, first, grad_query * scale, rows, columns, row_block, block)


@triton.jit
def _load_of_queries(
    query_of, dd_query_of, grad_output_of, item, first, rows, columns: tl.constexpr,
    value_columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    has_dd_query: tl.constexpr,
):  # fmt: skip
    query = _load(query_of, item, first, rows, columns, size, block)
    dd_query = query
    if has_dd_query:
        dd_query = _load(dd_query_of, item, first, rows, columns, size, block)
    return query, dd_query, _load(grad_output_of, item, first, rows, value_columns, size, value_block)


@triton.jit
def _load_of_keys(
    key_of, dd_key_of, value_of, dd_value_of, item, start, keys, columns: tl.constexpr,
    value_columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    has_dd_key: tl.constexpr, has_dd_value: tl.constexpr,
):  # fmt: skip
    key = _load(key_of, item, start, keys, columns, size, block)
    value = _load(value_of, item, start, keys, value_columns, size, value_block)
    dd_key, dd_value = key, value
    if has_dd_key:
        dd_key = _load(dd_key_of, item, start, keys, columns, size, block)
    if has_dd_value:
        dd_value = _load(dd_value_of, item, start, keys, value_columns, size, value_block)
    return key, dd_key, value, dd_value


@triton.jit
def _second_products(
    query, dd_query, grad_output, key, dd_key, value, dd_value, scale, has_dd_query: tl.constexpr,
    has_dd_key: tl.constexpr, has_dd_value: tl.constexpr, transposed: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """A without the mask's part, dP and dO ddV^T."""
    dp = _product(grad_output, value, transposed, precision)
    a = tl.zeros_like(dp)
    if has_dd_query:
        a += _product(dd_query, key, transposed, precision)
    if has_dd_key:
        a += _product(query, dd_key, transposed, precision)
    c = tl.zeros_like(dp)
    if has_dd_value:
        c += _product(grad_output, dd_value, transposed, precision)
    return a * scale, dp, c


@triton.jit
def tiled_attention_bwd_bwd_kernel(
    grad_grad_query_ptr, grad_grad_key_ptr, grad_grad_value_ptr,
    grad_output_ptr, query_ptr, key_ptr, value_ptr, mask_ptr,
    grad_grad_output_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr, statistics_ptr,
    scale, rows, keys, items, batch_1, batch_2,
    grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row,
    grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row,
    grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row,
    grad_output_0, grad_output_1, grad_output_2, grad_output_row,
    query_0, query_1, query_2, query_row,
    key_0, key_1, key_2, key_row,
    value_0, value_1, value_2, value_row,
    mask_0, mask_1, mask_2, mask_row, mask_column,
    grad_grad_output_0, grad_grad_output_1, grad_grad_output_2, grad_grad_output_row,
    grad_query_0, grad_query_1, grad_query_2, grad_query_row,
    grad_key_0, grad_key_1, grad_key_2, grad_key_row,
    grad_value_0, grad_value_1, grad_value_2, grad_value_row,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    of_keys: tl.constexpr, has_grad_grad_query: tl.constexpr, has_grad_grad_key: tl.constexpr,
    has_grad_grad_value: tl.constexpr, has_mask: tl.constexpr,
    output_wanted: tl.constexpr, query_wanted: tl.constexpr, key_wanted: tl.constexpr,
    value_wanted: tl.constexpr, precision: tl.constexpr, pipelined: tl.constexpr,
):  # fmt: skip
    """The gradients of the backward: with A, B and E of the formulas, grad_grad_output = P ddV + B V and
    grad_query = scale (E K + dS ddK), then, of_keys, grad_value = B^T dO and
    grad_key = scale (E^T Q + dS^T ddQ).

    Each launch reads the three incoming gradients, grad_output, query, key, value and the mask: in all 14N
    elements, the mask twice, and 4N written. The first makes 14 products of matrices, the second 8.
    """
    dd_query_of = (
        grad_grad_query_ptr, grad_grad_query_0, grad_grad_query_1, grad_grad_query_2, grad_grad_query_row
    )  # fmt: skip
    dd_key_of = (grad_grad_key_ptr, grad_grad_key_0, grad_grad_key_1, grad_grad_key_2, grad_grad_key_row)
    dd_value_of = (
        grad_grad_value_ptr, grad_grad_value_0, grad_grad_value_1, grad_grad_value_2, grad_grad_value_row
    )  # fmt: skip
    grad_output_of = (grad_output_ptr, grad_output_0, grad_output_1, grad_output_2, grad_output_row)
    query_of = (query_ptr, query_0, query_1, query_2, query_row)
    key_of = (key_ptr, key_0, key_1, key_2, key_row)
    value_of = (value_ptr, value_0, value_1, value_2, value_row)
    mask = (mask_ptr, mask_0, mask_1, mask_2, mask_row, mask_column)
    if of_keys:
        blocks = tl.cdiv(keys, key_block)
        number = tl.program_id(0) // blocks
        item = _split(number, batch_1, batch_2)
        start = tl.program_id(0) % blocks * key_block
        key, dd_key, value, dd_value = _load_of_keys(
            key_of, dd_key_of, value_of, dd_value_of, item, start, keys, columns, value_columns, key_block,
            block, value_block, has_grad_grad_key, has_grad_grad_value,
        )  # fmt: skip
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows, row_block, disable_licm=not pipelined):
            query, dd_query, grad_output = _load_of_queries(
                query_of, dd_query_of, grad_output_of, item, first, rows, columns, value_columns, row_block,
                block, value_block, has_grad_grad_query,
            )  # fmt: skip
            scores = _scores(
                query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask, True,
                precision,
            )  # fmt: skip
            highest = _load_statistic(statistics_ptr, 0, items, number, first, rows, row_block)
            inverse = _load_statistic(statistics_ptr, 1, items, number, first, rows, row_block)
            p = tl.where(_range(first, row_block, 0) < rows, tl.exp(scores - highest) * inverse, 0.0)
            a, dp, c = _second_products(
                query, dd_query, grad_output, key, dd_key, value, dd_value, scale, has_grad_grad_query,
                has_grad_grad_key, has_grad_grad_value, True, precision,
            )  # fmt: skip
            dp -= _load_statistic(statistics_ptr, 2, items, number, first, rows, row_block)
            a -= _load_statistic(statistics_ptr, 3, items, number, first, rows, row_block)
            if value_wanted:
                grad_value += _dot(p * a, grad_output, precision)
            if key_wanted:
                c += a * dp - _load_statistic(statistics_ptr, 4, items, number, first, rows, row_block)
                grad_key += _dot(p * c, query, precision)
                if has_grad_grad_query:
                    grad_key += _dot(p * dp, dd_query, precision)
        if key_wanted:
            grad_key_of = (grad_key_ptr, grad_key_0, grad_key_1, grad_key_2, grad_key_row)
            _store(grad_key_of, item, start, grad_key * scale, keys, columns, key_block, block)
        if value_wanted:
            grad_value_of = (grad_value_ptr, grad_value_0, grad_value_1, grad_value_2, grad_value_row)
            _store(grad_value_of, item, start, grad_value, keys, value_columns, key_block, value_block)
    else:
        blocks = tl.cdiv(rows, row_block)
        number = tl.program_id(0) // blocks
        item = _split(number, batch_1, batch_2)
        first = tl.program_id(0) % blocks * row_block
        query, dd_query, grad_output = _load_of_queries(
            query_of, dd_query_of, grad_output_of, item, first, rows, columns, value_columns, row_block,
            block, value_block, has_grad_grad_query,
        )  # fmt: skip
        highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((row_block,), dtype=tl.float32)
        delta = tl.zeros((row_block,), dtype=tl.float32)
        alpha = tl.zeros((row_block,), dtype=tl.float32)
        gamma = tl.zeros((row_block,), dtype=tl.float32)
        for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
            key, dd_key, value, dd_value = _load_of_keys(
                key_of, dd_key_of, value_of, dd_value_of, item, start, keys, columns, value_columns,
                key_block, block, value_block, has_grad_grad_key, has_grad_grad_value,
            )  # fmt: skip
            scores = _scores(
                query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask,
                False, precision,
            )  # fmt: skip
            weights, added, highest, total, _ = _next_weights(scores, highest, total)
            a, dp, c = _second_products(
                query, dd_query, grad_output, key, dd_key, value, dd_value, scale, has_grad_grad_query,
                has_grad_grad_key, has_grad_grad_value, False, precision,
            )  # fmt: skip
            # gamma is a covariance, of which the sum of products would lose digits: the means and the
            # covariance of these keys are combined with those of the keys before.
            inverse = _inverse(added)
            share = added * _inverse(total)
            next_delta = _mean(weights, inverse, dp)
            next_alpha = _mean(weights, inverse, a)
            next_gamma = _mean(weights, inverse, (a - next_alpha[:, None]) * (dp - next_delta[:, None]) + c)
            apart = (next_alpha - alpha) * (next_delta - delta)
            gamma += (next_gamma - gamma + apart * (1.0 - share)) * share
            delta += (next_delta - delta) * share
            alpha += (next_alpha - alpha) * share
        inverse = _inverse(total)
        _store_statistic(statistics_ptr, 0, items, number, first, rows, highest, row_block)
        _store_statistic(statistics_ptr, 1, items, number, first, rows, inverse, row_block)
        _store_statistic(statistics_ptr, 2, items, number, first, rows, delta, row_block)
        _store_statistic(statistics_ptr, 3, items, number, first, rows, alpha, row_block)
        _store_statistic(statistics_ptr, 4, items, number, first, rows, gamma, row_block)
        if output_wanted or query_wanted:
            grad_grad_output = tl.zeros((row_block, value_block), dtype=tl.float32)
            grad_query = tl.zeros((row_block, block), dtype=tl.float32)
            for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
                key, dd_key, value, dd_value = _load_of_keys(
                    key_of, dd_key_of, value_of, dd_value_of, item, start, keys, columns, value_columns,
                    key_block, block, value_block, has_grad_grad_key, has_grad_grad_value,
                )  # fmt: skip
                scores = _scores(
                    query, key, mask, item, first, start, scale, rows, keys, row_block, key_block, has_mask,
                    False, precision,
                )  # fmt: skip
                p = tl.exp(scores - highest[:, None]) * inverse[:, None]
                a, dp, c = _second_products(
                    query, dd_query, grad_output, key, dd_key, value, dd_value, scale, has_grad_grad_query,
                    has_grad_grad_key, has_grad_grad_value, False, precision,
                )  # fmt: skip
                dp -= delta[:, None]
                a -= alpha[:, None]
                if output_wanted:
                    grad_grad_output += _dot(p * a, value, precision)
                    if has_grad_grad_value:
                        grad_grad_output += _dot(p, dd_value, precision)
                if query_wanted:
                    grad_query += _dot(p * (a * dp + c - gamma[:, None]), key, precision)
                    if has_grad_grad_key:
                        grad_query += _dot(p * dp, dd_key, precision)
            if output_wanted:
                dd_output_of = (
                    grad_grad_output_ptr, grad_grad_output_0, grad_grad_output_1, grad_grad_output_2,
                    grad_grad_output_row,
                )  # fmt: skip
                _store(
                    dd_output_of, item, first, grad_grad_output, rows, value_columns, row_block, value_block
                )
            if query_wanted:
                grad_query_of = (grad_query_ptr, grad_query_0, grad_query_1, grad_query_2, grad_query_row)
                _store(grad_query_of, item, first, grad_query * scale, rows, columns, row_block, block)


# Rows of scores, of what the kernels above do not cover. One program a row.


@triton.jit
def _row(ptr, row, keys, j):
    return widen(tl.load(ptr + row * keys + j, mask=j < keys, other=0.0))


@triton.jit
def _mask_row(
    ptr, row, rows, batch_1, batch_2, stride_0, stride_1, stride_2, stride_row, stride_column, keys, j
):
    start = _start(_split(row // rows, batch_1, batch_2), stride_0, stride_1, stride_2)
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


# What one program holds of a window.
_WINDOW_TOKENS = 64

# The fewest rows that are multiplied without tensor cores.
_FEWEST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


def _is_window(query: Tensor, key: Tensor) -> bool:
    return max(query.shape[3], key.shape[3]) <= _WINDOW_TOKENS


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _constants(
    row_block: int, key_block: int, columns: int, value_columns: int, precision: str
) -> dict[str, Any]:
    return {
        "columns": columns,
        "value_columns": value_columns,
        "row_block": row_block,
        "key_block": key_block,
        "block": _power(columns),
        "value_block": _power(value_columns),
        "precision": precision,
    }


# What a kernel is compiled for, and how.
_Compiled = tuple[dict[str, Any], dict[str, Any]]


@functools.cache
def _window(
    dtype: torch.dtype,
    rows: int,
    keys: int,
    columns: int,
    value_columns: int,
    precision: str,
    order: int,
) -> _Compiled:
    # With tensor cores a warp holds 16 rows, or in the second order, of which there is twice as much, half of
    # their columns. Without, a few rows of scores are as much as fits into the registers of many warps.
    if dtype in _HALF or precision == "tf32":
        row_block = _power(rows)
        warps = row_block // 16 * (2 if order == 2 else 1)
    else:
        row_block, warps = _FEWEST_ROWS, 8
    constants = _constants(row_block, _power(keys), columns, value_columns, precision)
    return constants, {"num_warps": warps, "num_stages": 1, **FP_FUSION}


@functools.cache
def _tiles(
    dtype: torch.dtype,
    columns: int,
    value_columns: int,
    precision: str,
    order: int,
    of_keys: bool = False,
    has_mask: bool = False,
) -> _Compiled:
    """Of the pass of this order: about the largest tiles that 64 columns a head leave registers for."""
    pipelined, warps = False, 4
    if dtype in _HALF:
        own, other = 64, (64, 32, 16 if has_mask else 32)[order]
        pipelined = not has_mask
    elif precision == "tf32":
        own, other = (64, 64, 32 if has_mask else 64)[order], (32, 32, 16)[order]
    else:
        own, other, warps = 32, (32, 32, 16)[order], 8
    row_block, key_block = (other, own) if of_keys else (own, other)
    constants = _constants(row_block, key_block, columns, value_columns, precision)
    if order > 0:
        constants["pipelined"] = pipelined
    return constants, {"num_warps": warps, "num_stages": 2 if pipelined else 1, **FP_FUSION}


def _matrix_strides(*tensors: Tensor | None) -> Iterator[int]:
    """Of each, those of the batch and of its rows; the columns are contiguous."""
    for tensor in tensors:
        yield from (0, 0, 0, 0) if tensor is None else tensor.stride()[:4]


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if mask is None else mask.stride()


def _attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor
) -> None:
    rows, keys, sizes = query.shape[3], key.shape[3], (query.shape[4], value.shape[4])
    precision = _precision(query.dtype)
    is_window = _is_window(query, key)
    constants, options = (
        _window(query.dtype, rows, keys, *sizes, precision, 0)
        if is_window
        else _tiles(query.dtype, *sizes, precision, 0, has_mask=mask is not None)
    )
    with torch.cuda.device_of(query):
        attention_fwd_kernel[(math.prod(query.shape[:3]) * triton.cdiv(rows, constants["row_block"]),)](
            query,
            key,
            value,
            query if mask is None else mask,
            output,
            scale,
            rows,
            keys,
            *query.shape[1:3],
            *_matrix_strides(query, key, value),
            *_mask_strides(mask),
            *_matrix_strides(output),
            is_window=is_window,
            has_mask=mask is not None,
            **constants,
            **options,
        )


def _launch_windows(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    order: int,
    mask_sums: Tensor | None,
    strides: tuple[int, ...],
    flags: dict[str, bool],
) -> None:
    query, key, value = inputs
    rows, keys = query.shape[3], key.shape[3]
    items = math.prod(query.shape[:3])
    if items == 0:
        return
    # The tiles of the mask, the parts of the batch, and how often the batch goes through the tiles.
    parts, tiles = (1, items) if mask_sums is None else mask_sums.shape[:2]
    precision = _precision(query.dtype)
    constants, options = _window(query.dtype, rows, keys, query.shape[4], value.shape[4], precision, order)
    with torch.cuda.device_of(query):
        kernel[(tiles * parts,)](
            *tensors,
            query if mask_sums is None else mask_sums,
            scale,
            rows,
            *query.shape[1:3],
            tiles,
            parts,
            items // tiles,
            *strides,
            rows=rows,
            keys=keys,
            mask_wanted=mask_sums is not None,
            **flags,
            **constants,
            **options,
        )


def _launch_tiles(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    order: int,
    strides: tuple[int, ...],
    flags: dict[str, bool],
) -> None:
    """One launch over queries, and one over keys, with statistics of each row in between."""
    query, key, value = inputs
    rows, keys = query.shape[3], key.shape[3]
    items = math.prod(query.shape[:3])
    sizes, precision = (query.shape[4], value.shape[4]), _precision(query.dtype)
    # Highest score, inverse of the sum of weights, delta; in the second order alpha and gamma, too.
    between = torch.empty((2 * order + 1, items, rows), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        for of_keys, size in ((False, rows), (True, keys)):
            if items * size == 0 or (of_keys and not (flags["key_wanted"] or flags["value_wanted"])):
                continue
            constants, options = _tiles(query.dtype, *sizes, precision, order, of_keys, flags["has_mask"])
            block = constants["key_block" if of_keys else "row_block"]
            kernel[(items * triton.cdiv(size, block),)](
                *tensors,
                between,
                scale,
                rows,
                keys,
                items,
                *query.shape[1:3],
                *strides,
                of_keys=of_keys,
                **flags,
                **constants,
                **options,
            )


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
    inputs, results = (query, key, value), (grad_query, grad_key, grad_value)
    tensors = (grad_output, *inputs, *(query if t is None else t for t in (mask, *results)))
    strides = (*_matrix_strides(grad_output, *inputs), *_mask_strides(mask), *_matrix_strides(*results))
    flags = {
        "has_mask": mask is not None,
        "query_wanted": grad_query is not None,
        "key_wanted": grad_key is not None,
        "value_wanted": grad_value is not None,
    }
    if _is_window(query, key):
        _launch_windows(window_attention_bwd_kernel, tensors, inputs, scale, 1, mask_sums, strides, flags)
    else:
        assert mask_sums is None
        _launch_tiles(tiled_attention_bwd_kernel, tensors, inputs, scale, 1, strides, flags)


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
    incoming, inputs = (grad_grad_query, grad_grad_key, grad_grad_value), (query, key, value)
    results = (grad_grad_output, grad_query, grad_key, grad_value)
    tensors = (
        *(query if t is None else t for t in incoming),
        grad_output,
        *inputs,
        *(query if t is None else t for t in (mask, *results)),
    )
    strides = (
        *_matrix_strides(*incoming, grad_output, *inputs),
        *_mask_strides(mask),
        *_matrix_strides(*results),
    )
    flags = {
        "has_grad_grad_query": grad_grad_query is not None,
        "has_grad_grad_key": grad_grad_key is not None,
        "has_grad_grad_value": grad_grad_value is not None,
        "has_mask": mask is not None,
        "output_wanted": grad_grad_output is not None,
        "query_wanted": grad_query is not None,
        "key_wanted": grad_key is not None,
        "value_wanted": grad_value is not None,
    }
    if _is_window(query, key):
        tensors = (query if grad_grad_mask is None else grad_grad_mask, *tensors)
        strides = (*_mask_strides(grad_grad_mask), *strides)
        flags["has_grad_grad_mask"] = grad_grad_mask is not None
        kernel = window_attention_bwd_bwd_kernel
        _launch_windows(kernel, tensors, inputs, scale, 2, mask_sums, strides, flags)
    else:
        assert mask_sums is None
        assert grad_grad_mask is None
        _launch_tiles(tiled_attention_bwd_bwd_kernel, tensors, inputs, scale, 2, strides, flags)


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
    constants = {argument: argument != "has_grad_grad_mask" for argument in optional} | constants
    if constants["has_mask"]:
        # Triton compiles a 1, such as the stride of a mask's columns, as a constant. The strides of an absent
        # tensor are 0.
        constants["mask_column"] = 1
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    pointer = pointer_type(dtype)
    signature, divisible = {}, []
    for argument in kernel.arg_names:
        stride = argument.rsplit("_")[-1] in ("0", "1", "2", "row", "column")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            # Masks and statistics are of the dtype of arithmetic.
            mask = "mask" in argument or argument == "statistics_ptr"
            signature[argument] = ("*fp32" if mask else pointer) if argument.endswith("_ptr") else "i32"
            of_matrix = not mask or argument.startswith("grad_grad_mask")
            if argument.endswith("_ptr") or argument == "mask_0" or (stride and of_matrix):
                divisible.append(argument)
    return Specialization(
        f"{kernel.__name__}-{name}-{pointer[1:]}", kernel, signature, constants, tuple(divisible), options
    )


def specializations() -> Iterator[Specialization]:
    """Windows of Swin, 7 by 7 with 32 columns a head, and ViT's 197 tokens of 64 columns a head."""
    for dtype in (torch.float32, torch.bfloat16):
        windows = (attention_fwd_kernel, window_attention_bwd_kernel, window_attention_bwd_bwd_kernel)
        for order, kernel in enumerate(windows):
            constants, options = _window(dtype, 49, 49, 32, 32, "ieee", order)
            constants = constants | ({"rows": 49, "keys": 49} if order else {"is_window": True})
            yield _specialization(kernel, "swin", dtype, constants, options)
        for order, of_keys in ((0, False), (1, False), (1, True), (2, False), (2, True)):
            kernel = (attention_fwd_kernel, tiled_attention_bwd_kernel, tiled_attention_bwd_bwd_kernel)[order]
            constants, options = _tiles(dtype, 64, 64, "ieee", order, of_keys)
            constants = constants | {"is_window": False, "of_keys": of_keys, "has_mask": False}
            name = "vit-keys" if of_keys else "vit"
            yield _specialization(kernel, name, dtype, constants, options)
