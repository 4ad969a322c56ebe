"""The rows of scores of what windows and tiles do not cover: one program a row, in contiguous tensors."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import NotCoveredError
from ..common import DTYPES, FP_FUSION, at_most_128_registers, contiguous, gpu, launch, widen
from .primitives import split, start_of


@triton.jit
def _load_row(ptr, place):
    _, row, _, keys, j, _ = place
    return widen(tl.load(ptr + row * keys + j, mask=j < keys, other=0.0))


@triton.jit
def _store_row(ptr, place, value):
    _, row, _, keys, j, _ = place
    tl.store(ptr + row * keys + j, value, mask=j < keys)


@triton.jit
def _load_mask_row(mask, place, dtype: tl.constexpr):
    item, row, rows, keys, j, _ = place
    start = start_of(mask, item) + row % rows * mask[4]
    return tl.load(mask[0] + start + j.to(tl.int64) * mask[5], mask=j < keys, other=0.0).to(dtype)


@triton.jit
def _weights(scores_ptr, mask, place):
    """P of a row: 0 where nothing is attended to."""
    _, _, _, keys, j, scale = place
    scores = _load_row(scores_ptr, place) * scale
    if mask is not None:
        scores += _load_mask_row(mask, place, scores.dtype)
    scores = tl.where(j < keys, scores, -float("inf"))
    highest = tl.max(scores, axis=0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(scores - highest)
    total = tl.sum(weights, axis=0)
    return weights / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _place(scale, rows, keys, batch_1, batch_2, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    return split(row // rows, batch_1, batch_2), row, rows, keys, tl.arange(0, block), scale


@triton.jit
def attention_rows_fwd_kernel(
    scores_ptr, mask, p_ptr, scale, rows, keys, batch_1, batch_2, block: tl.constexpr
):  # fmt: skip
    """P. Reads the scores and the mask, and writes P: 2 scores and the mask."""
    place = _place(scale, rows, keys, batch_1, batch_2, block)
    _store_row(p_ptr, place, _weights(scores_ptr, mask, place))


@triton.jit
def attention_rows_bwd_kernel(
    dp_ptr, scores_ptr, mask, p_ptr, ds_ptr, scale, rows, keys, batch_1, batch_2, block: tl.constexpr
):  # fmt: skip
    """P and dS. Reads dP, the scores and the mask, and writes both: 4 scores and the mask."""
    place = _place(scale, rows, keys, batch_1, batch_2, block)
    dp = _load_row(dp_ptr, place)
    p = _weights(scores_ptr, mask, place)
    _store_row(p_ptr, place, p)
    _store_row(ds_ptr, place, p * (dp - tl.sum(p * dp, axis=0)))


@triton.jit
def attention_rows_bwd_bwd_kernel(
    a_ptr, grad_grad_mask, c_ptr, dp_ptr, scores_ptr, mask, p_ptr, ds_ptr, b_ptr, e_ptr,
    scale, rows, keys, batch_1, batch_2, block: tl.constexpr,
):  # fmt: skip
    """P, dS, B and E. Reads A, dO ddV^T, dP, the scores and the mask, and writes the four: 8 scores and the
    mask.
    """
    place = _place(scale, rows, keys, batch_1, batch_2, block)
    dp = _load_row(dp_ptr, place)
    p = _weights(scores_ptr, mask, place)
    a = tl.zeros_like(p)
    if a_ptr is not None:
        a = _load_row(a_ptr, place) * scale
    if grad_grad_mask is not None:
        a += _load_mask_row(grad_grad_mask, place, a.dtype)
    alpha = tl.sum(p * a, axis=0)
    delta = tl.sum(p * dp, axis=0)
    c = a * (dp - delta) - alpha * dp
    if c_ptr is not None:
        c += _load_row(c_ptr, place)
    _store_row(p_ptr, place, p)
    _store_row(ds_ptr, place, p * (dp - delta))
    _store_row(b_ptr, place, p * (a - alpha))
    _store_row(e_ptr, place, p * (c - tl.sum(p * c, axis=0)))


# What the registers of a program hold of a row without spills. The composite takes longer rows.
_MOST_KEYS = {dtype: 4096 if dtype == torch.float64 else 8192 for dtype in DTYPES}


def _broadcast(mask: Tensor | None, scores: Tensor) -> tuple[Any, ...] | None:
    if mask is None:
        return None
    mask = mask.expand(scores.shape)
    mask = mask.flatten(0, mask.ndim - 5) if mask.ndim > 5 else mask
    return mask, *(0, 0, 0, *mask.stride())[-5:]


def _launch(kernel: Any, scores: Tensor, scale: float, *arguments: Any) -> None:
    if scores.numel() == 0:
        return
    rows, keys = scores.shape[-2:]
    if keys > _MOST_KEYS[scores.dtype]:
        raise NotCoveredError
    batch = (1, 1, *scores.shape[:-2])[-2:]
    block = max(16, triton.next_power_of_2(keys))
    warps = min(max(block // 256, 1), 16)
    options: dict[str, Any] = dict(FP_FUSION)
    if kernel is attention_rows_bwd_bwd_kernel and scores.dtype != torch.float64:  # which takes more
        options |= at_most_128_registers(gpu(scores.device))
    with torch.cuda.device_of(scores):  # does nothing for a CPU tensor (Triton's interpreter)
        launch(
            kernel,
            (scores.numel() // keys,),
            *arguments,
            scale,
            rows,
            keys,
            *batch,
            block=block,
            num_warps=warps,
            **options,
        )


def _attention_softmax(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = scores.contiguous()
    p = torch.empty_like(scores)
    _launch(attention_rows_fwd_kernel, scores, scale, scores, _broadcast(mask, scores), p)
    return p


def _attention_softmax_backward(
    dp: Tensor, scores: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dp, scores = dp.contiguous(), scores.contiguous()
    p, ds = torch.empty_like(scores), torch.empty_like(scores)
    _launch(attention_rows_bwd_kernel, scores, scale, dp, scores, _broadcast(mask, scores), p, ds)
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
    a, c = contiguous(a, c)
    dp, scores = dp.contiguous(), scores.contiguous()
    p, ds, b, e = (torch.empty_like(scores) for _ in range(4))
    masks = [_broadcast(t, scores) for t in (grad_grad_mask, mask)]
    tensors = (a, masks[0], c, dp, scores, masks[1], p, ds, b, e)
    _launch(attention_rows_bwd_bwd_kernel, scores, scale, *tensors)
    return p, ds, b, e
