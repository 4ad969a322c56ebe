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
    "group_norm",
    "group_norm_backward",
    "group_norm_double_backward",
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
    normalized, _ = _normalize(input, num_groups, eps)
    output = _per_channel(weight, input) * _ungroup(normalized)
    return output if bias is None else output + _per_channel(bias, input)


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
    b, r = _normalize(input, num_groups, eps)
    a = _group(_per_channel(weight, input) * grad_output, num_groups)
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
    b, r = _normalize(input, num_groups, eps)
    v, g = _group(grad_grad_input, num_groups), _group(grad_output, num_groups)
    w = _per_channel(weight, input)
    a = _group(w * grad_output, num_groups)
    mixed = a * _group_mean(v * b) + v * _group_mean(a * b)
    grad_input = -(r**2) * (_project(mixed, b) + b * _group_mean(v * _project(a, b)))
    projected = _ungroup(r * _project(v, b))
    grad_grad_output = w * projected
    if grad_grad_weight is not None:
        p = _per_channel(grad_grad_weight, input)
        grad_grad_output = grad_grad_output + p * _ungroup(b)
        grad_input = grad_input + r * _project(_group(p * grad_output, num_groups), b)
    if grad_grad_bias is not None:
        grad_grad_output = grad_grad_output + _per_channel(grad_grad_bias, input)
    return grad_grad_output, _ungroup(grad_input), _sum_per_channel(_ungroup(g) * projected)


def _group(tensor: Tensor, num_groups: int) -> Tensor:
    return tensor.unflatten(1, (num_groups, tensor.shape[1] // num_groups))


def _ungroup(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, 2)


def _group_mean(tensor: Tensor) -> Tensor:
    return tensor.mean(tuple(range(2, tensor.ndim)), keepdim=True)


def _normalize(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    x = _group(input, num_groups)
    centered = x - _group_mean(x)
    rstd = torch.rsqrt(_group_mean(centered**2) + eps)
    return centered * rstd, rstd


def _project(tensor: Tensor, normalized: Tensor) -> Tensor:
    return tensor - _group_mean(tensor) - normalized * _group_mean(tensor * normalized)


def _per_channel(parameter: Tensor | None, input: Tensor) -> Tensor:
    parameter = input.new_ones(input.shape[1]) if parameter is None else parameter
    return parameter.reshape(-1, *[1] * (input.ndim - 2))


def _sum_per_channel(tensor: Tensor) -> Tensor:
    return tensor.sum([dim for dim in range(tensor.ndim) if dim != 1])
