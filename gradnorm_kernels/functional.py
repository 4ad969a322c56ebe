"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

import torch
from torch import Tensor

__all__ = ["gelu", "qkv_attention", "scaled_dot_product_attention"]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    r"""Gaussian error linear unit, as :func:`torch.nn.functional.gelu`.

    ``approximate="none"``: :math:`x\,\Phi(x)`; ``"tanh"``:
    :math:`\tfrac12 x (1 + \tanh(\sqrt{2/\pi}(x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016,
    arXiv:1606.08415).

    The double backward reads three tensors and writes two in one kernel. The third order and
    ``torch.func`` transforms are exact, through plain ATen ops; in a region compiled by ``torch.compile``
    this is ``torch.nn.functional.gelu``, which the compiler fuses with its neighbours. Nested tensors and
    tensor subclasses such as DTensor take PyTorch's own kernels.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64. Arithmetic is done in
            float32 (float64 for float64).
        approximate: ``"none"`` or ``"tanh"``.

    Returns:
        A tensor of ``input``'s shape, dtype and memory layout.

    Raises:
        TypeError: if ``input``'s dtype is not one of the four.
        ValueError: if ``approximate`` is neither ``"none"`` nor ``"tanh"``.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.gelu(input, approximate=approximate)
    return torch.ops.gradnorm_kernels.gelu(input, approximate=approximate)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`, differentiable twice.

    :math:`\mathrm{softmax}(\mathrm{scale}\, Q K^\top + M)\, V` (Vaswani et al. 2017, arXiv:1706.03762).
    Nothing of the size of the scores is kept for the backward passes, which compute them again. On CUDA,
    windows (up to 64 tokens and 64 columns a head) take one kernel a pass, which keeps the scores on chip;
    longer sequences take matrix products and one kernel for the rows of scores. On the CPU the scores stay
    in the cache.

    The third order, ``torch.func`` transforms and dropout are exact, through plain ATen ops, as is a region
    compiled by ``torch.compile``: PyTorch's own fused kernels have no double backward.

    Args:
        query: ``(..., L, E)``; float16, bfloat16, float32 or float64. Arithmetic is done in float32 (float64
            for float64). Any strides: the views that one linear layer's output is split into are not copied.
        key: ``(..., S, E)``, of ``query``'s dtype.
        value: ``(..., S, Ev)``, of ``query``'s dtype. The leading dimensions of the three broadcast.
        attn_mask: what is added to the scores, of any floating dtype, or a bool tensor that is True where a
            key takes part. Broadcast to ``(..., L, S)``. Its gradient has the same bits in each run. A query
            that no key takes part for gets 0.
        dropout_p: the probability of an attention weight to be dropped.
        is_causal: whether query ``i`` attends to the keys up to ``i`` only; without ``attn_mask``.
        scale: the factor of the scores, by default ``E ** -0.5``.

    Returns:
        ``(..., L, Ev)``. With 4 dimensions or more it lies in memory as ``(..., L, heads, Ev)``, so that
        ``transpose(1, 2).flatten(2)`` is a view; so do the gradients.

    Raises:
        TypeError: if a dtype is not one of the four, or key's or value's is not query's.
        ValueError: if the shapes do not match, ``dropout_p`` is not a probability, or both ``attn_mask`` and
            ``is_causal`` are given.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: expected is_causal=False where attn_mask is given")
    if not 0 <= dropout_p <= 1:
        raise ValueError(
            f"scaled_dot_product_attention: expected dropout_p to be between 0 and 1, got {dropout_p}"
        )
    if query.is_nested:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )
    if is_causal:
        attn_mask = query.new_full((query.shape[-2], key.shape[-2]), -torch.inf).triu(1)
    attn_mask = _additive(attn_mask, query)
    if torch.compiler.is_compiling() or dropout_p > 0:
        return _plain_attention(query, key, value, attn_mask, dropout_p, scale)
    batch = query.shape[:-2]
    if key.shape[:-2] != batch or value.shape[:-2] != batch:
        batch = torch.broadcast_shapes(batch, key.shape[:-2], value.shape[:-2])
        query, key, value = (t.expand(*batch, *t.shape[-2:]) for t in (query, key, value))
    return torch.ops.gradnorm_kernels.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)


def qkv_attention(qkv: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    r"""Self-attention of query, key and value in one tensor, as one linear layer makes them.

    :func:`scaled_dot_product_attention` of ``qkv.unbind(-3)``, with the heads before the tokens. Its
    gradient is one tensor too, which saves the copies that would gather the gradients of the three.

    Args:
        qkv: ``(..., N, 3, heads, E)``; float16, bfloat16, float32 or float64, of any strides.
        attn_mask: as there, broadcast to ``(..., heads, N, N)``.
        scale: the factor of the scores, by default ``E ** -0.5``.

    Returns:
        ``(..., N, heads, E)``, contiguous.

    Raises:
        TypeError: if a dtype is not one of the four.
        ValueError: if the shapes do not match.
    """
    attn_mask = _additive(attn_mask, qkv)
    if torch.compiler.is_compiling():
        query, key, value = qkv.transpose(-4, -2).unbind(-3)
        return _plain_attention(query, key, value, attn_mask, 0.0, scale).transpose(-3, -2)
    return torch.ops.gradnorm_kernels.qkv_attention(qkv, attn_mask, scale=scale)


def _additive(attn_mask: Tensor | None, like: Tensor) -> Tensor | None:
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=like.dtype).masked_fill_(~attn_mask, -torch.inf)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + attn_mask
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return torch.nn.functional.dropout(weights.to(value.dtype), dropout_p) @ value
