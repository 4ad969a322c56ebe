"""The ops on CUDA without kernels of ours: PyTorch's own, several of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.gradnorm_kernels
# Of a backend that no kernel is registered for: there the dispatcher takes the composite.
_WITHOUT_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """The op's composite."""
    if op in _IN_PLACE:
        return _IN_PLACE[op](*args)
    return getattr(_OPS, op).default.redispatch(_WITHOUT_KERNELS, *args, **kwargs)


# Ops that write into results which C++ made, where these are wanted.


def _copy(results: tuple[Tensor | None, ...], computed: tuple[Tensor, ...], mask_sums: Tensor | None) -> None:
    for result, value in zip(results, computed, strict=False):
        if result is not None:
            result.copy_(value)
    if mask_sums is not None:
        # (parts, tiles, rows, columns), of which the first part gets all, and the padding nothing.
        grad_mask = computed[-1]
        rows, keys = grad_mask.shape[-2:]
        mask_sums.zero_()
        if grad_mask.numel():
            mask_sums[0, ..., :keys] = grad_mask.reshape(-1, mask_sums.shape[1], rows, keys).sum(0)


def _attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor
) -> None:
    output.copy_(call("scaled_dot_product_attention", query, key, value, mask, scale=scale))


def _attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *results: Tensor | None,
) -> None:
    *gradients, mask_sums = results
    wanted = [result is not None for result in results]
    op = "scaled_dot_product_attention_backward"
    computed = call(op, grad_output, query, key, value, mask, scale=scale, output_mask=wanted)
    _copy(tuple(gradients), computed, mask_sums)


def _attention_bwd_bwd(*args: Any) -> None:
    *incoming, scale, grad_grad_output, grad_query, grad_key, grad_value, mask_sums = args
    results = (grad_grad_output, grad_query, grad_key, grad_value)
    wanted = [result is not None for result in (*results, mask_sums)]
    op = "scaled_dot_product_attention_double_backward"
    _copy(results, call(op, *incoming, scale=scale, output_mask=wanted), mask_sums)


_IN_PLACE: dict[str, Any] = {
    "_attention_fwd": _attention_fwd,
    "_attention_bwd": _attention_bwd,
    "_attention_bwd_bwd": _attention_bwd_bwd,
}
