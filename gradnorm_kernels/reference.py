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
    "softmax",
    "softmax_backward",
    "softmax_double_backward",
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
