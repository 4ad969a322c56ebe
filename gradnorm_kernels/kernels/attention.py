"""Triton kernels of scaled dot-product attention.

Windows, of up to 64 tokens and 64 columns a head, take one kernel a pass: a program holds one window of one
head, and its scores never reach memory. Longer sequences take matrix products, and here one kernel over the
rows of scores a pass. `csrc/attention.cpp` has the mathematics and its names: S = scale Q K^T + M,
P = softmax(S), dP = dO V^T and so on.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import triton
import triton.language as tl

# Windows. A tensor is (batch 0, batch 1, batch 2, rows, columns), its columns contiguous: it comes with the
# strides of the first four. An absent one is given as any other, and never touched.


@triton.jit
def _split(item, batch_1, batch_2):
    # 64-bit before the products with strides: a tensor may have more than 2^31 elements.
    first = (item // (batch_1 * batch_2)).to(tl.int64)
    middle = (item // batch_2 % batch_1).to(tl.int64)
    last = (item % batch_2).to(tl.int64)
    return first, middle, last


@triton.jit
def _start(item, stride_0, stride_1, stride_2):
    return item[0] * stride_0 + item[1] * stride_1 + item[2] * stride_2


@triton.jit
def _load(
    ptr, start, stride_row, first, rows: tl.constexpr, columns: tl.constexpr, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Rows from first on of the matrix at start, padded with zeros to (size, block)."""
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    return tl.load(ptr + start + i * stride_row + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _store(
    ptr, start, stride_row, first, value, rows: tl.constexpr, columns: tl.constexpr, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    tl.store(ptr + start + i * stride_row + j, value, mask=(i < rows) & (j < columns))


@triton.jit
def _load_mask(
    ptr, start, stride_row, stride_column, first, rows: tl.constexpr, keys: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = first + tl.arange(0, size)[:, None]
    j = tl.arange(0, block)[None, :]
    inside = (i < rows) & (j < keys)
    return tl.load(ptr + start + i * stride_row + j * stride_column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _accumulate(ptr, first, value, is_first, rows: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """Adds to sums that this program alone writes, and that stay in the cache. Their rows are padded."""
    i = first + tl.arange(0, size)[:, None]
    offsets = i * block + tl.arange(0, block)[None, :]
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


# A program takes a few rows of queries at a time: whole tiles of scores, of which the double backward holds
# four, would not fit into its registers.


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
    item = _split(tl.program_id(0), batch_1, batch_2)
    for first in tl.range(0, row_count, row_block, disable_licm=True):
        query = _load(
            query_ptr,
            _start(item, query_0, query_1, query_2),
            query_row,
            first,
            rows,
            columns,
            row_block,
            block,
        )
        key = _load(key_ptr, _start(item, key_0, key_1, key_2), key_row, 0, keys, columns, key_block, block)
        scores = _dot(query, tl.trans(key), precision) * scale
        if has_mask:
            scores += _load_mask(
                mask_ptr,
                _start(item, mask_0, mask_1, mask_2),
                mask_row,
                mask_column,
                first,
                rows,
                keys,
                row_block,
                key_block,
            )
        p = _softmax(scores, first, rows, keys, row_block, key_block)
        value = _load(
            value_ptr,
            _start(item, value_0, value_1, value_2),
            value_row,
            0,
            keys,
            value_columns,
            key_block,
            value_block,
        )
        output = _dot(p, value, precision)
        _store(
            output_ptr,
            _start(item, output_0, output_1, output_2),
            output_row,
            first,
            output,
            rows,
            value_columns,
            row_block,
            value_block,
        )


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
    program = tl.program_id(0)
    tile = program % tiles
    sums_ptr = mask_sums_ptr + program.to(tl.int64) * (rows * key_block)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + tile, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, row_count, row_block, disable_licm=True):
            query = _load(
                query_ptr,
                _start(item, query_0, query_1, query_2),
                query_row,
                first,
                rows,
                columns,
                row_block,
                block,
            )
            key = _load(
                key_ptr, _start(item, key_0, key_1, key_2), key_row, 0, keys, columns, key_block, block
            )
            scores = _dot(query, tl.trans(key), precision) * scale
            if has_mask:
                scores += _load_mask(
                    mask_ptr,
                    _start(item, mask_0, mask_1, mask_2),
                    mask_row,
                    mask_column,
                    first,
                    rows,
                    keys,
                    row_block,
                    key_block,
                )
            p = _softmax(scores, first, rows, keys, row_block, key_block)
            grad_output = _load(
                grad_output_ptr, _start(item, grad_output_0, grad_output_1, grad_output_2), grad_output_row, first, rows, value_columns, row_block,
                value_block,
            )  # fmt: skip
            value = _load(
                value_ptr,
                _start(item, value_0, value_1, value_2),
                value_row,
                0,
                keys,
                value_columns,
                key_block,
                value_block,
            )
            dp = _dot(grad_output, tl.trans(value), precision)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if value_wanted:
                grad_value += _dot(tl.trans(p.to(grad_output.dtype)), grad_output, precision)
            if mask_wanted:
                _accumulate(sums_ptr, first, ds, repeat < parts, rows, row_block, key_block)
            if query_wanted:
                grad_query = _dot(ds, key, precision) * scale
                _store(
                    grad_query_ptr, _start(item, grad_query_0, grad_query_1, grad_query_2), grad_query_row, first, grad_query, rows, columns, row_block,
                    block,
                )  # fmt: skip
            if key_wanted:
                grad_key += _dot(tl.trans(ds.to(query.dtype)), query, precision)
        if key_wanted:
            _store(
                grad_key_ptr,
                _start(item, grad_key_0, grad_key_1, grad_key_2),
                grad_key_row,
                0,
                grad_key * scale,
                keys,
                columns,
                key_block,
                block,
            )
        if value_wanted:
            _store(
                grad_value_ptr, _start(item, grad_value_0, grad_value_1, grad_value_2), grad_value_row, 0, grad_value, keys, value_columns, key_block,
                value_block,
            )  # fmt: skip
        if mask_wanted:
            # The sums are read by other threads than those that wrote them, if the compiler chooses so.
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
    results: 11N elements and the mask. The mask's gradient, the sum of E, as in the backward.
    """
    program = tl.program_id(0)
    tile = program % tiles
    sums_ptr = mask_sums_ptr + program.to(tl.int64) * (rows * key_block)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = _split(repeat * tiles + tile, batch_1, batch_2)
        grad_key = tl.zeros((key_block, block), dtype=tl.float32)
        grad_value = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, row_count, row_block, disable_licm=True):
            query = _load(
                query_ptr,
                _start(item, query_0, query_1, query_2),
                query_row,
                first,
                rows,
                columns,
                row_block,
                block,
            )
            key = _load(
                key_ptr, _start(item, key_0, key_1, key_2), key_row, 0, keys, columns, key_block, block
            )
            scores = _dot(query, tl.trans(key), precision) * scale
            if has_mask:
                scores += _load_mask(
                    mask_ptr,
                    _start(item, mask_0, mask_1, mask_2),
                    mask_row,
                    mask_column,
                    first,
                    rows,
                    keys,
                    row_block,
                    key_block,
                )
            p = _softmax(scores, first, rows, keys, row_block, key_block)

            tl.debug_barrier()
            a = tl.zeros((row_block, key_block), dtype=tl.float32)
            if has_grad_grad_query:
                dd_query = _load(
                    grad_grad_query_ptr,
                    _start(item, grad_grad_query_0, grad_grad_query_1, grad_grad_query_2),
                    grad_grad_query_row,
                    first,
                    rows,
                    columns,
                    row_block,
                    block,
                )
                a += _dot(dd_query, tl.trans(key), precision)
            if has_grad_grad_key:
                dd_key = _load(
                    grad_grad_key_ptr,
                    _start(item, grad_grad_key_0, grad_grad_key_1, grad_grad_key_2),
                    grad_grad_key_row,
                    0,
                    keys,
                    columns,
                    key_block,
                    block,
                )
                a += _dot(query, tl.trans(dd_key), precision)
            a *= scale
            if has_grad_grad_mask:
                a += _load_mask(
                    grad_grad_mask_ptr, _start(item, grad_grad_mask_0, grad_grad_mask_1, grad_grad_mask_2), grad_grad_mask_row, grad_grad_mask_column, first, rows, keys,
                    row_block, key_block,
                )  # fmt: skip
            alpha = tl.sum(p * a, axis=1)[:, None]

            tl.debug_barrier()
            grad_output = _load(
                grad_output_ptr, _start(item, grad_output_0, grad_output_1, grad_output_2), grad_output_row, first, rows, value_columns, row_block,
                value_block,
            )  # fmt: skip
            value = _load(
                value_ptr,
                _start(item, value_0, value_1, value_2),
                value_row,
                0,
                keys,
                value_columns,
                key_block,
                value_block,
            )
            dp = _dot(grad_output, tl.trans(value), precision)
            delta = tl.sum(p * dp, axis=1)[:, None]
            ds = (p * (dp - delta)).to(query.dtype)
            b = (p * (a - alpha)).to(query.dtype)
            e = a * (dp - delta) - alpha * dp

            tl.debug_barrier()
            if value_wanted:
                grad_value += _dot(tl.trans(b), grad_output, precision)
            grad_grad_output = _dot(b, value, precision)
            if has_grad_grad_value:
                tl.debug_barrier()
                dd_value = _load(
                    grad_grad_value_ptr, _start(item, grad_grad_value_0, grad_grad_value_1, grad_grad_value_2), grad_grad_value_row, 0, keys, value_columns, key_block,
                    value_block,
                )  # fmt: skip
                e += _dot(grad_output, tl.trans(dd_value), precision)
                grad_grad_output += _dot(p, dd_value, precision)
            if output_wanted:
                _store(
                    grad_grad_output_ptr, _start(item, grad_grad_output_0, grad_grad_output_1, grad_grad_output_2), grad_grad_output_row, first, grad_grad_output,
                    rows, value_columns, row_block, value_block,
                )  # fmt: skip
            e = p * (e - tl.sum(p * e, axis=1)[:, None])
            if mask_wanted:
                tl.debug_barrier()
                _accumulate(sums_ptr, first, e, repeat < parts, rows, row_block, key_block)

            # Loaded again, from the cache, rather than held all the while.
            tl.debug_barrier()
            e_narrow = e.to(query.dtype)
            if query_wanted:
                key = _load(
                    key_ptr, _start(item, key_0, key_1, key_2), key_row, 0, keys, columns, key_block, block
                )
                grad_query = _dot(e_narrow, key, precision)
                if has_grad_grad_key:
                    dd_key = _load(
                        grad_grad_key_ptr,
                        _start(item, grad_grad_key_0, grad_grad_key_1, grad_grad_key_2),
                        grad_grad_key_row,
                        0,
                        keys,
                        columns,
                        key_block,
                        block,
                    )
                    grad_query += _dot(ds, dd_key, precision)
                _store(
                    grad_query_ptr, _start(item, grad_query_0, grad_query_1, grad_query_2), grad_query_row, first, grad_query * scale, rows, columns,
                    row_block, block,
                )  # fmt: skip
            if key_wanted:
                tl.debug_barrier()
                query = _load(
                    query_ptr,
                    _start(item, query_0, query_1, query_2),
                    query_row,
                    first,
                    rows,
                    columns,
                    row_block,
                    block,
                )
                grad_key += _dot(tl.trans(e_narrow), query, precision)
                if has_grad_grad_query:
                    dd_query = _load(
                        grad_grad_query_ptr, _start(item, grad_grad_query_0, grad_grad_query_1, grad_grad_query_2), grad_grad_query_row, first, rows, columns, row_block,
                        block,
                    )  # fmt: skip
                    grad_key += _dot(tl.trans(ds), dd_query, precision)
        if key_wanted:
            _store(
                grad_key_ptr,
                _start(item, grad_key_0, grad_key_1, grad_key_2),
                grad_key_row,
                0,
                grad_key * scale,
                keys,
                columns,
                key_block,
                block,
            )
        if value_wanted:
            _store(
                grad_value_ptr, _start(item, grad_value_0, grad_value_1, grad_value_2), grad_value_row, 0, grad_value, keys, value_columns, key_block,
                value_block,
            )  # fmt: skip
        if mask_wanted:
            tl.debug_barrier()
