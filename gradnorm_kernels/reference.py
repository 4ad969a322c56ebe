r"""The mathematics of every op, in plain differentiable PyTorch: the yardstick of tests and benchmarks.

For an elementwise :math:`y = f(x)` with incoming gradient :math:`g`, the backward is
:math:`h = g f'(x)`. Differentiating :math:`h` against an incoming :math:`v` gives the double backward:
:math:`v f'(x)` for :math:`g` and :math:`v g f''(x)` for :math:`x`. Only :math:`f` is written here: autograd's
derivatives of these formulas lose nothing to cancellation.

Nothing here casts: float64 in, float64 arithmetic.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "mish",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    r"""``"none"``: :math:`x \Phi(x)`. ``"tanh"``: :math:`x\,\sigma(v)` with
    :math:`v = 2\sqrt{2/\pi}\,(x + 0.044715 x^3)`, which equals :math:`\tfrac12 x (1 + \tanh(v/2))`.
    """
    if approximate == "none":
        return input * torch.special.erfc(-input / math.sqrt(2)) / 2
    return input * sigmoid(2 * math.sqrt(2 / math.pi) * (input + 0.044715 * input**3))


def silu(input: Tensor) -> Tensor:
    r""":math:`x\,\sigma(x)`."""
    return input * sigmoid(input)


def mish(input: Tensor) -> Tensor:
    r""":math:`x \tanh(\log(1 + e^x)) = x (1 - 2 / (2 + 2 e^x + e^{2x}))`."""
    positive = input > 0
    d = _decay(input)
    numerator = torch.where(positive, 1 + 2 * d, d * (d + 2))
    return input * numerator / (numerator + torch.where(positive, 2 * d**2, 2))


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    r""":math:`\log(1 + e^{\beta x}) / \beta`, and :math:`x` for :math:`\beta x` above the threshold."""
    z = beta * input
    linear = z > threshold
    return torch.where(linear, input, z.masked_fill(linear, 0).exp().log1p() / beta)


def elu(input: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    r""":math:`s x` for :math:`x > 0`, else :math:`s \alpha (e^{c x} - 1)`, with :math:`s` the scale and
    :math:`c` the input scale.
    """
    positive = input > 0
    negative = torch.expm1(input_scale * input.masked_fill(positive, 0))
    return scale * torch.where(positive, input, alpha * negative)


def tanh(input: Tensor) -> Tensor:
    r""":math:`\tanh(x) = 2 \sigma(2x) - 1`."""
    return torch.tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    r""":math:`\sigma(x) = 1 / (1 + e^{-x})`."""
    d = _decay(input)
    return torch.where(input > 0, 1, d) / (1 + d)


def relu(input: Tensor) -> Tensor:
    r""":math:`\max(x, 0)`."""
    return leaky_relu(input, 0.0)


def relu6(input: Tensor) -> Tensor:
    r""":math:`\min(\max(x, 0), 6)`."""
    return torch.where(input < 6, relu(input), 6)


def leaky_relu(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    r""":math:`x` for :math:`x > 0`, else :math:`a x` with the negative slope :math:`a`."""
    return torch.where(input > 0, input, negative_slope * input)


def hardsigmoid(input: Tensor) -> Tensor:
    r""":math:`(x + 3) / 6` between -3 and 3, where it is 0 and 1."""
    # Not of relu6(x + 3): rounding of the sum would move the kinks.
    return torch.where(input <= -3, 0, torch.where(input >= 3, 1, (input + 3) / 6))


def hardswish(input: Tensor) -> Tensor:
    r""":math:`x` times the hard sigmoid."""
    return input * hardsigmoid(input)


def _decay(x: Tensor) -> Tensor:
    r""":math:`e^{-|x|}`, as :math:`e^x` or :math:`e^{-x}`: derivatives through :math:`|x|` are wrong at 0."""
    return torch.where(x > 0, -x, x).exp()
