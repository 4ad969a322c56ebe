"""The forward, and the backward passes over longer sequences.

A backward pass is two launches of one kernel. A program of the first takes a block of queries, and goes
through the keys twice: for the statistics of its rows, which it writes for the second launch, and for its
results. A program of the second takes a block of keys, and goes through the queries once. What they read
again is in the cache, as a head is small. Where its loads are not pipelined, a loop hoists nothing, since
that takes registers.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import dot, indices, inverse_of, load, make_scores, next_weights, product, split, store


@triton.jit
def _place(size, batch_1, batch_2, block: tl.constexpr):
    """A program's item, by its number and by its indices, and where in it the program's block begins."""
    blocks = tl.cdiv(size, block)
    number = tl.program_id(0) // blocks
    return number, split(number, batch_1, batch_2), tl.program_id(0) % blocks * block


@triton.jit(do_not_specialize=("batch_1", "batch_2"))
def attention_fwd_kernel(
    query, key, value, mask, output, scale, rows, keys, batch_1, batch_2,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    is_window: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """output = P V. Reads query, key, value and the mask, and writes output: 4N elements and the mask.

    One program a block of queries. Of a window one block holds all keys.
    """
    _, item, first = _place(rows, batch_1, batch_2, row_block)
    q = load(query, item, first, rows, columns, row_block, block)
    highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((row_block,), dtype=tl.float32)
    o = tl.zeros((row_block, value_block), dtype=tl.float32)
    for start in tl.range(0, key_block if is_window else keys, key_block):
        k = load(key, item, start, keys, columns, key_block, block)
        scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, False, precision)
        weights, _added, highest, total, factor = next_weights(scores, highest, total)
        v = load(value, item, start, keys, value_columns, key_block, value_block)
        o = o * factor[:, None] + dot(weights, v, precision)
    store(output, item, first, o * inverse_of(total)[:, None], rows, value_columns)


# Statistics of each row are a pointer to (their number, items, rows), and the number of items.


@triton.jit
def _statistic(statistics, index: tl.constexpr, number, i, rows):
    return statistics[0] + (index * statistics[1] + number).to(tl.int64) * rows + i


@triton.jit
def _store_statistics(statistics, values, number, first, rows):
    i = first + tl.arange(0, values[0].shape[0])
    for index in tl.static_range(len(values)):
        tl.store(_statistic(statistics, index, number, i, rows), values[index], mask=i < rows)


@triton.jit
def _load_statistic(statistics, index: tl.constexpr, number, first, rows, size: tl.constexpr):
    i = first + tl.arange(0, size)
    return tl.load(_statistic(statistics, index, number, i, rows), mask=i < rows, other=0.0)[None, :]


@triton.jit
def _known_weights(scores, statistics, number, first, rows):
    """P of a transposed tile."""
    size: tl.constexpr = scores.shape[1]
    highest = _load_statistic(statistics, 0, number, first, rows, size)
    inverse = _load_statistic(statistics, 1, number, first, rows, size)
    return tl.where(indices(first, size, 0) < rows, tl.exp(scores - highest) * inverse, 0.0)


@triton.jit
def tiled_attention_bwd_kernel(
    grad_output, query, key, value, mask, grad_query, grad_key, grad_value, statistics,
    scale, rows, keys, batch_1, batch_2,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    of_keys: tl.constexpr, precision: tl.constexpr, pipelined: tl.constexpr,
):  # fmt: skip
    """grad_query = scale dS K, then, of_keys, grad_key = scale dS^T Q and grad_value = P^T dO.

    Each launch reads grad_output, query, key, value and the mask: in all 8N elements, the mask twice, and 3N
    written. The first makes 5 products of matrices, the second 4.
    """
    if of_keys:
        number, item, start = _place(keys, batch_1, batch_2, key_block)
        k = load(key, item, start, keys, columns, key_block, block)
        v = load(value, item, start, keys, value_columns, key_block, value_block)
        dk = tl.zeros((key_block, block), dtype=tl.float32)
        dv = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows, row_block, disable_licm=not pipelined):
            q = load(query, item, first, rows, columns, row_block, block)
            scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, True, precision)
            p = _known_weights(scores, statistics, number, first, rows)
            do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
            if grad_value is not None:
                dv += dot(p, do, precision)
            if grad_key is not None:
                dp = product(do, v, True, precision)
                dp -= _load_statistic(statistics, 2, number, first, rows, row_block)
                dk += dot(p * dp, q, precision)
        if grad_key is not None:
            store(grad_key, item, start, dk * scale, keys, columns)
        if grad_value is not None:
            store(grad_value, item, start, dv, keys, value_columns)
    else:
        number, item, first = _place(rows, batch_1, batch_2, row_block)
        q = load(query, item, first, rows, columns, row_block, block)
        do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
        highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((row_block,), dtype=tl.float32)
        delta = tl.zeros((row_block,), dtype=tl.float32)
        for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
            k = load(key, item, start, keys, columns, key_block, block)
            scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, False, precision)
            weights, _, highest, total, factor = next_weights(scores, highest, total)
            v = load(value, item, start, keys, value_columns, key_block, value_block)
            dp = product(do, v, False, precision)
            delta = delta * factor + tl.sum(weights * dp, axis=1)
        inverse = inverse_of(total)
        delta *= inverse
        _store_statistics(statistics, (highest, inverse, delta), number, first, rows)
        if grad_query is not None:
            dq = tl.zeros((row_block, block), dtype=tl.float32)
            for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
                k = load(key, item, start, keys, columns, key_block, block)
                scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, False, precision)
                p = tl.exp(scores - highest[:, None]) * inverse[:, None]
                v = load(value, item, start, keys, value_columns, key_block, value_block)
                dp = product(do, v, False, precision) - delta[:, None]
                dq += dot(p * dp, k, precision)
            store(grad_query, item, first, dq * scale, rows, columns)


@triton.jit
def _mean(weights, inverse, x):
    return tl.sum(weights * x, axis=1) * inverse


@triton.jit
def _load_pair(
    matrix, grad_grad, item, first, rows, columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):
    """A matrix and, if there is one, the incoming gradient of its gradient."""
    values = load(matrix, item, first, rows, columns, size, block)
    if grad_grad is None:
        return values, None
    else:  # Triton would compile what follows the if in any case.
        return values, load(grad_grad, item, first, rows, columns, size, block)


@triton.jit
def _second_products(
    q, ddq, do, k, ddk, v, ddv, scale, transposed: tl.constexpr, precision: tl.constexpr
):  # fmt: skip
    """A without the mask's part, dP and dO ddV^T."""
    dp = product(do, v, transposed, precision)
    a = tl.zeros_like(dp)
    if ddq is not None:
        a += product(ddq, k, transposed, precision)
    if ddk is not None:
        a += product(q, ddk, transposed, precision)
    c = tl.zeros_like(dp)
    if ddv is not None:
        c += product(do, ddv, transposed, precision)
    return a * scale, dp, c


@triton.jit
def tiled_attention_bwd_bwd_kernel(
    grad_grad_query, grad_grad_key, grad_grad_value, grad_output, query, key, value, mask,
    grad_grad_output, grad_query, grad_key, grad_value, statistics,
    scale, rows, keys, batch_1, batch_2,
    columns: tl.constexpr, value_columns: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, block: tl.constexpr, value_block: tl.constexpr,
    of_keys: tl.constexpr, precision: tl.constexpr, pipelined: tl.constexpr,
):  # fmt: skip
    """The gradients of the backward: with A, B and E of the formulas, grad_grad_output = P ddV + B V and
    grad_query = scale (E K + dS ddK), then, of_keys, grad_value = B^T dO and
    grad_key = scale (E^T Q + dS^T ddQ).

    Each launch reads the three incoming gradients, grad_output, query, key, value and the mask: in all 14N
    elements, the mask twice, and 4N written. The first makes 14 products of matrices, the second 8.
    """
    if of_keys:
        number, item, start = _place(keys, batch_1, batch_2, key_block)
        k, ddk = _load_pair(key, grad_grad_key, item, start, keys, columns, key_block, block)
        v, ddv = _load_pair(value, grad_grad_value, item, start, keys, value_columns, key_block, value_block)
        dk = tl.zeros((key_block, block), dtype=tl.float32)
        dv = tl.zeros((key_block, value_block), dtype=tl.float32)
        for first in tl.range(0, rows, row_block, disable_licm=not pipelined):
            q, ddq = _load_pair(query, grad_grad_query, item, first, rows, columns, row_block, block)
            do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
            scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, True, precision)
            p = _known_weights(scores, statistics, number, first, rows)
            a, dp, c = _second_products(q, ddq, do, k, ddk, v, ddv, scale, True, precision)
            dp -= _load_statistic(statistics, 2, number, first, rows, row_block)
            a -= _load_statistic(statistics, 3, number, first, rows, row_block)
            if grad_value is not None:
                dv += dot(p * a, do, precision)
            if grad_key is not None:
                c += a * dp - _load_statistic(statistics, 4, number, first, rows, row_block)
                dk += dot(p * c, q, precision)
                if grad_grad_query is not None:
                    dk += dot(p * dp, ddq, precision)
        if grad_key is not None:
            store(grad_key, item, start, dk * scale, keys, columns)
        if grad_value is not None:
            store(grad_value, item, start, dv, keys, value_columns)
    else:
        number, item, first = _place(rows, batch_1, batch_2, row_block)
        q, ddq = _load_pair(query, grad_grad_query, item, first, rows, columns, row_block, block)
        do = load(grad_output, item, first, rows, value_columns, row_block, value_block)
        highest = tl.full((row_block,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((row_block,), dtype=tl.float32)
        delta = tl.zeros((row_block,), dtype=tl.float32)
        alpha = tl.zeros((row_block,), dtype=tl.float32)
        gamma = tl.zeros((row_block,), dtype=tl.float32)
        for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
            k, ddk = _load_pair(key, grad_grad_key, item, start, keys, columns, key_block, block)
            v, ddv = _load_pair(
                value, grad_grad_value, item, start, keys, value_columns, key_block, value_block
            )
            scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, False, precision)
            weights, added, highest, total, _ = next_weights(scores, highest, total)
            a, dp, c = _second_products(q, ddq, do, k, ddk, v, ddv, scale, False, precision)
            # gamma is a covariance, of which the sum of products would lose digits: the means and the
            # covariance of these keys are combined with those of the keys before.
            inverse = inverse_of(added)
            share = added * inverse_of(total)
            next_delta = _mean(weights, inverse, dp)
            next_alpha = _mean(weights, inverse, a)
            next_gamma = _mean(weights, inverse, (a - next_alpha[:, None]) * (dp - next_delta[:, None]) + c)
            apart = (next_alpha - alpha) * (next_delta - delta)
            gamma += (next_gamma - gamma + apart * (1.0 - share)) * share
            delta += (next_delta - delta) * share
            alpha += (next_alpha - alpha) * share
        inverse = inverse_of(total)
        _store_statistics(statistics, (highest, inverse, delta, alpha, gamma), number, first, rows)
        if grad_grad_output is not None or grad_query is not None:
            ddo = tl.zeros((row_block, value_block), dtype=tl.float32)
            dq = tl.zeros((row_block, block), dtype=tl.float32)
            for start in tl.range(0, keys, key_block, disable_licm=not pipelined):
                k, ddk = _load_pair(key, grad_grad_key, item, start, keys, columns, key_block, block)
                v, ddv = _load_pair(
                    value, grad_grad_value, item, start, keys, value_columns, key_block, value_block
                )
                scores = make_scores(q, k, mask, item, first, start, scale, rows, keys, False, precision)
                p = tl.exp(scores - highest[:, None]) * inverse[:, None]
                a, dp, c = _second_products(q, ddq, do, k, ddk, v, ddv, scale, False, precision)
                dp -= delta[:, None]
                a -= alpha[:, None]
                if grad_grad_output is not None:
                    ddo += dot(p * a, v, precision)
                    if grad_grad_value is not None:
                        ddo += dot(p, ddv, precision)
                if grad_query is not None:
                    dq += dot(p * (a * dp + c - gamma[:, None]), k, precision)
                    if grad_grad_key is not None:
                        dq += dot(p * dp, ddk, precision)
            if grad_grad_output is not None:
                store(grad_grad_output, item, first, ddo, rows, value_columns)
            if grad_query is not None:
                store(grad_query, item, first, dq * scale, rows, columns)
