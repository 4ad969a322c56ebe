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
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "gelu",
    "gelu_backward",
    "gelu_double_backward",
]


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
