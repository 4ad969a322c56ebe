"""The backward passes over windows.

A program takes row_block rows of queries at a time. Where that is all of them, the loop is none; otherwise
its end is not a constant, since the compiler would unroll it, and hoist more than the registers hold.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import dot, highest_of, indices, load, load_mask, make_scores, split, store

# One kernel for all of a model's windows, whatever their numbers.
_COUNTS = ("row_count", "batch_1", "batch_2", "tiles", "parts", "repeats")


@triton.jit
def _softmax(scores, first, rows):
    """P of all the keys: 0 in the padding, and where nothing is attended to."""
    weights = tl.exp(scores - highest_of(scores)[:, None])
    total = tl.sum(weights, axis=1)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.where(indices(first, scores.shape[0], 1) < rows, weights, 0.0)


@triton.jit
def _accumulate(ptr, program, first, value, is_first, rows: tl.constexpr):
    """Adds to sums that this program alone writes, and that stay in the cache. Their rows are padded."""
    block: tl.constexpr = value.shape[1]
    i = first + tl.arange(0, value.shape[0])[:, None]
    offsets = program.to(tl.int64) * (rows * block) + i * block + tl.arange(0, block)[None, :]
    before = tl.load(ptr + offsets, mask=(i < rows) & (not is_first), other=0.0)
    tl.store(ptr + offsets, before + value, mask=i < rows)


@triton.jit(do_not_specialize=_COUNTS)
def window_attention_bwd_kernel(
    grad_output, query, key, value, mask, grad_query, grad_key, grad_value, mask_sums_ptr,
    scale, row_count, batch_1, batch_2, tiles, parts, repeats,
    rows: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """grad_query = scale dS K, grad_key = scale dS^T Q, grad_value = P^T dO.

    Reads grad_output, query, key, value and the mask, and writes the gradients that are wanted: 7N elements
    and the mask. Where the mask's gradient is wanted, a program goes through those windows of one part of the
    batch that share one tile of the mask, and writes the sum of their dS.
    """
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = split(repeat * tiles + program % tiles, batch_1, batch_2)
        dk = tl.zeros((key_block, block), dtype=tl.float32)
        dv = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            q = load(query, item, first, rows, columns, row_block, block)
            k = load(key, item, 0, keys, columns, key_block, block)
            scores = make_scores(q, k, mask, item, first, 0, scale, rows, keys, False, precision)
            p = _softmax(scores, first, rows)
            do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
            v = load(value, item, 0, keys, value_columns, key_block, value_block)
            dp = dot(do, tl.trans(v), precision)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if grad_value is not None:
                dv += dot(tl.trans(p.to(do.dtype)), do, precision)
            if mask_sums_ptr is not None:
                _accumulate(mask_sums_ptr, program, first, ds, repeat < parts, rows)
            if grad_query is not None:
                store(grad_query, item, first, dot(ds, k, precision) * scale, rows, columns)
            if grad_key is not None:
                dk += dot(tl.trans(ds.to(q.dtype)), q, precision)
        if grad_key is not None:
            store(grad_key, item, 0, dk * scale, keys, columns)
        if grad_value is not None:
            store(grad_value, item, 0, dv, keys, value_columns)
        if mask_sums_ptr is not None:
            # The next round's sums may be read by other threads than those that wrote them.
            tl.debug_barrier()


@triton.jit(do_not_specialize=_COUNTS)
def window_attention_bwd_bwd_kernel(
    grad_grad_query, grad_grad_key, grad_grad_value, grad_output, query, key, value, mask,
    grad_grad_output, grad_query, grad_key, grad_value, grad_grad_mask, mask_sums_ptr,
    scale, row_count, batch_1, batch_2, tiles, parts, repeats,
    rows: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The gradients of the backward: with A, B, C and E of the formulas, grad_grad_output = P ddV + B V,
    grad_value = B^T dO, grad_query = scale (E K + dS ddK) and grad_key = scale (E^T Q + dS^T ddQ).

    Reads the three incoming gradients, grad_output, query, key, value and the mask, and writes the four
    results: 11N elements and the mask. The mask's gradient is the sum of E, as in the backward.
    """
    program = tl.program_id(0)
    for repeat in tl.range(program // tiles, repeats, parts, disable_licm=True):
        item = split(repeat * tiles + program % tiles, batch_1, batch_2)
        dk = tl.zeros((key_block, block), dtype=tl.float32)
        dv = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows if rows <= row_block else row_count, row_block, disable_licm=True):
            q = load(query, item, first, rows, columns, row_block, block)
            k = load(key, item, 0, keys, columns, key_block, block)
            scores = make_scores(q, k, mask, item, first, 0, scale, rows, keys, False, precision)
            p = _softmax(scores, first, rows)

            a = tl.zeros((row_block, key_block), dtype=tl.float32)
            if grad_grad_query is not None:
                ddq = load(grad_grad_query, item, first, rows, columns, row_block, block)
                a += dot(ddq, tl.trans(k), precision)
            if grad_grad_key is not None:
                ddk = load(grad_grad_key, item, 0, keys, columns, key_block, block)
                a += dot(q, tl.trans(ddk), precision)
            a *= scale
            if grad_grad_mask is not None:
                a += load_mask(grad_grad_mask, item, first, 0, rows, keys, row_block, key_block, False)
            a -= tl.sum(p * a, axis=1)[:, None]

            do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
            v = load(value, item, 0, keys, value_columns, key_block, value_block)
            dp = dot(do, tl.trans(v), precision)
            dp -= tl.sum(p * dp, axis=1)[:, None]
            # In products they are rounded anyway, and the registers hold more of them so. The mask's gradient
            # is the sum of E as rounded: stock's scores and their gradients are of that dtype, too.
            ds = (p * dp).to(q.dtype)
            b = (p * a).to(q.dtype)
            c = a * dp
            if grad_grad_value is not None:
                ddv = load(grad_grad_value, item, 0, keys, value_columns, key_block, value_block)
                c += dot(do, tl.trans(ddv), precision)
            e = (p * (c - tl.sum(p * c, axis=1)[:, None])).to(q.dtype)
            if mask_sums_ptr is not None:
                _accumulate(mask_sums_ptr, program, first, e, repeat < parts, rows)

            if grad_grad_output is not None:
                ddo = dot(b, v, precision)
                if grad_grad_value is not None:
                    ddo += dot(p, ddv, precision)
                store(grad_grad_output, item, first, ddo, rows, value_columns)
            if grad_value is not None:
                dv += dot(tl.trans(b), do, precision)
            if grad_query is not None:
                dq = dot(e, k, precision)
                if grad_grad_key is not None:
                    dq += dot(ds, ddk, precision)
                store(grad_query, item, first, dq * scale, rows, columns)
            if grad_key is not None:
                dk += dot(tl.trans(e), q, precision)
                if grad_grad_query is not None:
                    dk += dot(tl.trans(ds), ddq, precision)
        if grad_key is not None:
            store(grad_key, item, 0, dk * scale, keys, columns)
        if grad_value is not None:
            store(grad_value, item, 0, dv, keys, value_columns)
        if mask_sums_ptr is not None:
            tl.debug_barrier()
