r"""The mathematics of every op, in plain differentiable PyTorch: the yardstick of tests and benchmarks.

For an elementwise :math:`y = f(x)` with incoming gradient :math:`g`, the backward is
:math:`h = g f'(x)`. Differentiating :math:`h` against an incoming :math:`v` gives the double backward:
:math:`v f'(x)` for :math:`g` and :math:`v g f''(x)` for :math:`x`.

Nothing here casts: float64 in, float64 arithmetic.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "gelu",
    "gelu_backward",
    "gelu_double_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "scaled_dot_product_attention_double_backward",
]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    r"""``"none"``: :math:`x \Phi(x)`. ``"tanh"``: :math:`x\,\sigma(v)` with
    :math:`v = 2\sqrt{2/\pi}\,(x + 0.044715 x^3)`, which equals :math:`\tfrac12 x (1 + \tanh(v/2))`.
    """
    return input * _gelu_gate(input, approximate)[0]


def gelu_backward(grad_output: Tensor, input: Tensor, approximate: str = "none") -> Tensor:
    r""":math:`g f'(x)`. ``"none"``: :math:`f' = \Phi + x\varphi`. ``"tanh"``:
    :math:`f' = \sigma + x \sigma(1-\sigma) v'`.
    """
    gate, gate_slope, _ = _gelu_gate(input, approximate)
    return grad_output * (gate + input * gate_slope)


def gelu_double_backward(
    grad_grad_input: Tensor, grad_output: Tensor, input: Tensor, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    r""":math:`(v f'(x),\ v g f''(x))`. ``"none"``: :math:`f'' = (2 - x^2)\varphi`. ``"tanh"``:
    :math:`f'' = 2 \sigma(1-\sigma) v' + x \sigma(1-\sigma)(v'' + (1 - 2\sigma) v'^2)`.
    """
    _, gate_slope, gate_curvature = _gelu_gate(input, approximate)
    return (
        gelu_backward(grad_grad_input, input, approximate),
        grad_grad_input * grad_output * (2 * gate_slope + input * gate_curvature),
    )


def _gelu_gate(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gate :math:`s` of :math:`f = x s`, with its first and second derivatives."""
    if approximate == "none":
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return torch.special.erfc(-x / math.sqrt(2)) / 2, density, -x * density
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    gate = torch.sigmoid(scale * (x + cubic * x**3))
    slope_of_v = scale * (1 + 3 * cubic * x**2)
    logistic_slope = gate * torch.sigmoid(-scale * (x + cubic * x**3))
    return (
        gate,
        logistic_slope * slope_of_v,
        logistic_slope * (scale * 6 * cubic * x + (1 - 2 * gate) * slope_of_v**2),
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r""":math:`P V` of :math:`P = \mathrm{softmax}(s Q K^\top + M)`, whose rows are 0 where every score is
    :math:`-\infty`.
    """
    return _attention_weights(query, key, attn_mask, scale) @ value


def scaled_dot_product_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of query, key, value and scores. With :math:`dP = dO\,V^\top`,
    :math:`\delta = \sum_j (P \odot dP)_{ij}` and :math:`dS = P \odot (dP - \delta)`:
    :math:`(s\,dS\,K,\ s\,dS^\top Q,\ P^\top dO,\ dS)`. The mask's gradient is the last, summed over what the
    mask was broadcast over.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = _attention_weights(query, key, attn_mask, scale)
    grad_scores = _centred(weights, grad_output @ value.mT)
    return (
        scale * grad_scores @ key,
        scale * grad_scores.mT @ query,
        weights.mT @ grad_output,
        grad_scores,
    )


def scaled_dot_product_attention_double_backward(
    grad_grads: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of grad_output, query, key, value and scores, of those of what
    :func:`scaled_dot_product_attention_backward` returns, :math:`(ddQ, ddK, ddV, ddS)`. With

    .. math::
        A &= s\,(ddQ\,K^\top + Q\,ddK^\top) + ddS, \quad \alpha = \textstyle\sum_j (P \odot A)_{ij}, \quad
        B = P \odot (A - \alpha), \\
        C &= A \odot (dP - \delta) - \alpha\,dP + dO\,ddV^\top, \quad
        E = P \odot (C - \textstyle\sum_j (P \odot C)_{ij}):

    :math:`(P\,ddV + B\,V,\ s\,(E K + dS\,ddK),\ s\,(E^\top Q + dS^\top ddQ),\ B^\top dO,\ E)`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dd_query, dd_key, dd_value, dd_scores = grad_grads
    weights = _attention_weights(query, key, attn_mask, scale)
    grad_weights = grad_output @ value.mT
    grad_scores = _centred(weights, grad_weights)
    a = scale * (dd_query @ key.mT + query @ dd_key.mT) + dd_scores
    alpha = (weights * a).sum(-1, keepdim=True)
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    b = weights * (a - alpha)
    c = a * (grad_weights - delta) - alpha * grad_weights + grad_output @ dd_value.mT
    e = _centred(weights, c)
    return (
        weights @ dd_value + b @ value,
        scale * (e @ key + grad_scores @ dd_key),
        scale * (e.mT @ query + grad_scores.mT @ dd_query),
        b.mT @ grad_output,
        e,
    )


def _attention_weights(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.mT
    if attn_mask is None:
        return scores.softmax(-1)
    scores = scores + attn_mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _centred(weights: Tensor, x: Tensor) -> Tensor:
    return weights * (x - (weights * x).sum(-1, keepdim=True))
