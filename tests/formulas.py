"""Formulas of first and second derivatives, for the ops whose tests compare with them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    eps: float = 1e-5,
) -> Tensor:
    r""":math:`w h + b` with :math:`h = (x - \mu) r` and :math:`r = (\sigma^2 + \epsilon)^{-1/2}`, for each
    channel: the second dimension. In training :math:`\mu` and :math:`\sigma^2` are those of ``input``.
    """
    h, _ = _batch_normalized(input, mean, var, training, eps)
    return h * _per_channel(weight, input) + _per_channel(bias, input)


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    training: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of input, weight and bias, with :math:`\langle\cdot\rangle` the mean over a channel:
    :math:`w r\,(g - \langle g\rangle - h \langle g h\rangle)` in training and :math:`w r g` in evaluation
    mode, :math:`\sum g h`, and :math:`\sum g`.
    """
    h, r = _batch_normalized(input, mean, var, training, eps)
    slope = _centred(grad_output, h) if training else grad_output
    return _per_channel(weight, input) * r * slope, _channel_sum(grad_output * h), _channel_sum(grad_output)


def batch_norm_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor,
    grad_grad_bias: Tensor,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    training: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of grad_output, input and weight. With :math:`v, u, t` the incoming gradients and
    :math:`P a = a - \langle a\rangle - h \langle a h\rangle`, in training

    .. math::
        w r\,P v + u h + t, \quad
        u r\,P g - w r^2 (\langle g h\rangle P v + \langle v h\rangle P g + h \langle g\,P v\rangle), \quad
        r \sum g\,P v,

    and in evaluation mode :math:`w r v + u h + t`, :math:`u r g`, and :math:`r \sum g v`.
    """
    h, r = _batch_normalized(input, mean, var, training, eps)
    w, u, t = (_per_channel(a, input) for a in (weight, grad_grad_weight, grad_grad_bias))
    v, g = grad_grad_input, grad_output
    if not training:
        return w * r * v + u * h + t, u * r * g, _channel_sum(r * v * g)
    pv, pg = _centred(v, h), _centred(g, h)
    curvature = _channel_mean(g * h) * pv + _channel_mean(v * h) * pg + h * _channel_mean(g * pv)
    return w * r * pv + u * h + t, u * r * pg - w * r**2 * curvature, _channel_sum(r * g * pv)


def _batch_normalized(
    x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    r""":math:`h` and :math:`r`."""
    if training or mean is None or var is None:
        deviation = x - _channel_mean(x)
        r = (_channel_mean(deviation**2) + eps).rsqrt()
    else:
        deviation = x - _per_channel(mean, x)
        r = (_per_channel(var, x) + eps).rsqrt()
    return deviation * r, r


def _centred(a: Tensor, h: Tensor) -> Tensor:
    return a - _channel_mean(a) - h * _channel_mean(a * h)


def _per_channel(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (like.ndim - 2))


def _channel_sum(a: Tensor) -> Tensor:
    return a.sum([0, *range(2, a.ndim)])


def _channel_mean(a: Tensor) -> Tensor:
    return a.mean([0, *range(2, a.ndim)], keepdim=True)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r""":math:`y = w b + \beta` with :math:`b = (x - \langle x\rangle) r`,
    :math:`r = (\langle (x - \langle x\rangle)^2\rangle + \epsilon)^{-1/2}` and
    :math:`\langle\cdot\rangle` the mean over a group.
    """
    normalized, _ = _group_norm_normalize(input, num_groups, eps)
    output = _group_norm_per_channel(weight, input) * _ungroup(normalized)
    return output if bias is None else output + _group_norm_per_channel(bias, input)


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""For input, weight and bias: :math:`r P(w g)`, :math:`\sum g b` and :math:`\sum g`, where
    :math:`P(t) = t - \langle t\rangle - b \langle t b\rangle`.
    """
    b, r = _group_norm_normalize(input, num_groups, eps)
    a = _group(_group_norm_per_channel(weight, input) * grad_output, num_groups)
    return (
        _ungroup(r * _project(a, b)),
        _sum_per_channel(grad_output * _ungroup(b)),
        _sum_per_channel(grad_output),
    )


def group_norm_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""For grad_output, input and weight, with :math:`a = w g`, and :math:`v, p, q` the gradients of the
    three gradients:
    :math:`w r P(v) + p b + q`,
    :math:`r P(p g) - r^2 (P(a \langle v b\rangle + v \langle a b\rangle) + b \langle v P(a)\rangle)` and
    :math:`\sum g r P(v)`.
    """
    b, r = _group_norm_normalize(input, num_groups, eps)
    v, g = _group(grad_grad_input, num_groups), _group(grad_output, num_groups)
    w = _group_norm_per_channel(weight, input)
    a = _group(w * grad_output, num_groups)
    mixed = a * _group_mean(v * b) + v * _group_mean(a * b)
    grad_input = -(r**2) * (_project(mixed, b) + b * _group_mean(v * _project(a, b)))
    projected = _ungroup(r * _project(v, b))
    grad_grad_output = w * projected
    if grad_grad_weight is not None:
        p = _group_norm_per_channel(grad_grad_weight, input)
        grad_grad_output = grad_grad_output + p * _ungroup(b)
        grad_input = grad_input + r * _project(_group(p * grad_output, num_groups), b)
    if grad_grad_bias is not None:
        grad_grad_output = grad_grad_output + _group_norm_per_channel(grad_grad_bias, input)
    return grad_grad_output, _ungroup(grad_input), _sum_per_channel(_ungroup(g) * projected)


def _group(tensor: Tensor, num_groups: int) -> Tensor:
    return tensor.unflatten(1, (num_groups, tensor.shape[1] // num_groups))


def _ungroup(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, 2)


def _group_mean(tensor: Tensor) -> Tensor:
    return tensor.mean(tuple(range(2, tensor.ndim)), keepdim=True)


def _group_norm_normalize(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    x = _group(input, num_groups)
    centered = x - _group_mean(x)
    rstd = torch.rsqrt(_group_mean(centered**2) + eps)
    return centered * rstd, rstd


def _project(tensor: Tensor, normalized: Tensor) -> Tensor:
    return tensor - _group_mean(tensor) - normalized * _group_mean(tensor * normalized)


def _group_norm_per_channel(parameter: Tensor | None, input: Tensor) -> Tensor:
    parameter = input.new_ones(input.shape[1]) if parameter is None else parameter
    return parameter.reshape(-1, *[1] * (input.ndim - 2))


def _sum_per_channel(tensor: Tensor) -> Tensor:
    return tensor.sum([dim for dim in range(tensor.ndim) if dim != 1])


def softmax(input: Tensor, dim: int, bias: Tensor | None = None) -> Tensor:
    r""":math:`y_i = e^{x_i - m} / \sum_j e^{x_j - m}` along ``dim``, where :math:`x` is ``input + bias`` and
    :math:`m` its maximum.
    """
    x = input if bias is None else input + bias
    exponentials = torch.exp(x - x.amax(dim, keepdim=True))
    return exponentials / exponentials.sum(dim, keepdim=True)


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    r""":math:`h = y (g - \bar g)`, where :math:`\bar t = \sum_j t_j y_j` along ``dim``."""
    return output * (grad_output - _softmax_mean(grad_output, output, dim))


def softmax_double_backward(
    grad_grad_input: Tensor, grad_output: Tensor, output: Tensor, dim: int, to_input: bool
) -> tuple[Tensor, Tensor]:
    r"""The gradients for :math:`g` and :math:`y` of :math:`h` against :math:`v`:
    :math:`(y (v - \bar v),\ v (g - \bar g) - \bar v g)`.

    If ``to_input``, the second one is carried on to the softmax's input by another backward: with
    :math:`p = (v - \bar v)(g - \bar g)` that is :math:`y (p - \bar p)`.
    """
    v_centred = grad_grad_input - _softmax_mean(grad_grad_input, output, dim)
    g_centred = grad_output - _softmax_mean(grad_output, output, dim)
    if to_input:
        return output * v_centred, softmax_backward(v_centred * g_centred, output, dim)
    v_mean = _softmax_mean(grad_grad_input, output, dim)
    return output * v_centred, grad_grad_input * g_centred - v_mean * grad_output


def _softmax_mean(t: Tensor, output: Tensor, dim: int) -> Tensor:
    return (t * output).sum(dim, keepdim=True)


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
    grad_scores = _attention_centred(weights, grad_output @ value.mT)
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
    grad_scores = _attention_centred(weights, grad_weights)
    a = scale * (dd_query @ key.mT + query @ dd_key.mT) + dd_scores
    alpha = (weights * a).sum(-1, keepdim=True)
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    b = weights * (a - alpha)
    c = a * (grad_weights - delta) - alpha * grad_weights + grad_output @ dd_value.mT
    e = _attention_centred(weights, c)
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


def _attention_centred(weights: Tensor, x: Tensor) -> Tensor:
    return weights * (x - (weights * x).sum(-1, keepdim=True))


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    r""":math:`O = \sum_k W_k A_k X + b`, where :math:`A_k` is the tap :math:`k` of the kernel: the element of
    :math:`X`, padded by :math:`p`, at :math:`s\,i + d\,k` for each :math:`i` of the output. Transposed:
    :math:`O = \sum_k A_k^T W_k^T X + b`.

    Args:
        input: ``(N, C, ...)``.
        weight: ``(C', C / groups, ...)``; transposed: ``(C, C' / groups, ...)``.
        bias: ``(C',)``.
        stride, padding, dilation, output_padding: one int for each spatial dimension.
    """
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
    settings = (stride, padding, dilation, groups)
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in sizes]
        output = _scatter(input, weight, size, *settings)
    else:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in sizes]
        output = _gather(input, weight, size, *settings)
    if bias is None:
        return output
    return output + bias.view(-1, *[1] * len(stride))


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""For the gradient :math:`G` of the output: :math:`X' = \sum_k A_k^T W_k^T G`,
    :math:`W'_k = G (A_k X)^T`, :math:`b' = \sum G`. Transposed: :math:`X' = \sum_k W_k A_k G`,
    :math:`W'_k = X (A_k G)^T`.
    """
    settings = (stride, padding, dilation, groups)
    grad_bias = grad_output.transpose(0, 1).flatten(1).sum(1)
    if transposed:
        grad_input = _gather(grad_output, weight, input.shape[2:], *settings)
        return grad_input, _correlate(grad_output, input, weight, *settings), grad_bias
    grad_input = _scatter(grad_output, weight, input.shape[2:], *settings)
    return grad_input, _correlate(input, grad_output, weight, *settings), grad_bias


def convolution_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor,
    grad_grad_bias: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The backward is bilinear in :math:`G` and :math:`(X, W)`. For the gradients :math:`V, U, u` of
    :math:`X', W', b'`, with :math:`*` the convolution above: :math:`V * W + X * U + u` for :math:`G`; and
    for :math:`X` and :math:`W` the backward of :math:`V * U`.
    """
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    grad_grad_output = convolution(grad_grad_input, weight, grad_grad_bias, *settings) + convolution(
        input, grad_grad_weight, None, *settings
    )
    grad_input, grad_weight, _ = convolution_backward(
        grad_output, grad_grad_input, grad_grad_weight, *settings
    )
    return grad_grad_output, grad_input, grad_weight


def _taps(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Any, Any]]:
    """Indices of each tap of the kernel, and of the padded input's elements that it meets."""
    for tap in itertools.product(*map(range, kernel)):
        starts = [d * k for d, k in zip(dilation, tap, strict=True)]
        spans = zip(starts, size, stride, strict=True)
        yield (..., *tap), (..., *(slice(start, start + s * (n - 1) + 1, s) for start, n, s in spans))


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    return torch.nn.functional.pad(x, [p for side in reversed(padding) for p in (side, side)])


def _gather(
    x: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The first size elements of each dimension of a convolution."""
    x = _pad(x, padding).unflatten(1, (groups, -1))
    weight = weight.unflatten(0, (groups, -1))
    y = x.new_zeros(x.shape[0], groups, weight.shape[1], *size)
    for tap, window in _taps(size, weight.shape[3:], stride, dilation):
        y = y + torch.einsum("goc,ngc...->ngo...", weight[tap], x[window])
    return y.flatten(1, 2)


def _scatter(
    y: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The adjoint of _gather, for an input of size."""
    y = y.unflatten(1, (groups, -1))
    weight = weight.unflatten(0, (groups, -1))
    padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    x = y.new_zeros(y.shape[0], groups, weight.shape[2], *padded)
    for tap, window in _taps(y.shape[3:], weight.shape[3:], stride, dilation):
        x[window] += torch.einsum("goc,ngo...->ngc...", weight[tap], y)
    inner: Any = (..., *(slice(p, p + n) for n, p in zip(size, padding, strict=True)))
    return x[inner].flatten(1, 2)


def _correlate(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of _gather's weight, for the gradient y of its output."""
    x, y = _pad(x, padding).unflatten(1, (groups, -1)), y.unflatten(1, (groups, -1))
    grad = torch.zeros_like(weight).unflatten(0, (groups, -1))
    for tap, window in _taps(y.shape[3:], weight.shape[2:], stride, dilation):
        grad[tap] = torch.einsum("ngo...,ngc...->goc", y, x[window])
    return grad.flatten(0, 1)
