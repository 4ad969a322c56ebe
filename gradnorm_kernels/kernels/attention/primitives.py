"""What the kernels over windows and over tiles are made of."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(item, batch_1, batch_2):
    return item // (batch_1 * batch_2), item // batch_2 % batch_1, item % batch_2


@triton.jit
def start_of(tensor, item):
    # 64-bit before the products: a tensor may have more than 2^31 elements.
    first, middle, last = item[0].to(tl.int64), item[1].to(tl.int64), item[2].to(tl.int64)
    return first * tensor[1] + middle * tensor[2] + last * tensor[3]


@triton.jit
def indices(first, size: tl.constexpr, axis: tl.constexpr):
    return tl.expand_dims((first + tl.arange(0, size)).to(tl.int64), axis)


@triton.jit
def load(matrix, item, first, rows, columns: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """The item's rows from first on, padded with zeros to (size, block)."""
    i, j = indices(first, size, 1), tl.arange(0, block)[None, :]
    offsets = start_of(matrix, item) + i * matrix[4] + j
    return tl.load(matrix[0] + offsets, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def store(matrix, item, first, value, rows, columns: tl.constexpr):
    i, j = indices(first, value.shape[0], 1), tl.arange(0, value.shape[1])[None, :]
    offsets = start_of(matrix, item) + i * matrix[4] + j
    tl.store(matrix[0] + offsets, value, mask=(i < rows) & (j < columns))


@triton.jit
def dot(a, b, precision: tl.constexpr):
    return tl.dot(a.to(b.dtype), b, input_precision=precision)


# A tile of scores is (queries, keys), or transposed. Row by row is along its keys.


@triton.jit
def load_mask(
    mask, item, first, start, rows, keys, size: tl.constexpr, block: tl.constexpr, transposed: tl.constexpr
):
    i, j = indices(first, size, 0 if transposed else 1), indices(start, block, 1 if transposed else 0)
    offsets = start_of(mask, item) + i * mask[4] + j * mask[5]
    return tl.load(mask[0] + offsets, mask=(i < rows) & (j < keys), other=0.0).to(tl.float32)


@triton.jit
def product(of_queries, of_keys, transposed: tl.constexpr, precision: tl.constexpr):
    if transposed:
        tile = dot(of_keys, tl.trans(of_queries), precision)
    else:
        tile = dot(of_queries, tl.trans(of_keys), precision)
    return tile


@triton.jit
def make_scores(
    q, k, mask, item, first, start, scale, rows, keys, transposed: tl.constexpr, precision: tl.constexpr
):
    """S, which is -inf in the padding of the keys."""
    scores = product(q, k, transposed, precision) * scale
    if mask is not None:
        scores += load_mask(mask, item, first, start, rows, keys, q.shape[0], k.shape[0], transposed)
    return tl.where(indices(start, k.shape[0], 1 if transposed else 0) < keys, scores, -float("inf"))


@triton.jit
def highest_of(scores):
    # Finite where nothing is attended to, so that all weights are 0.
    return tl.maximum(tl.max(scores, axis=1), -3.4028234663852886e38)


@triton.jit
def inverse_of(total):
    # Weights far below those of other keys may sum to less than has an inverse.
    return 1.0 / tl.where(total < 1e-30, 1.0, total)


@triton.jit
def next_weights(scores, highest, total):
    """Of the next keys: exp(S - highest), and their sum; and what becomes of the highest score, of the sum of
    all weights so far, and, by a factor, of what is proportional to these."""
    raised = tl.maximum(highest, highest_of(scores))
    weights = tl.exp(scores - raised[:, None])
    factor = tl.exp(highest - raised)
    added = tl.sum(weights, axis=1)
    return weights, added, raised, total * factor + added, factor
