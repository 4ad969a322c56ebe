r"""The mathematics of every op, in plain differentiable PyTorch: the yardstick of tests and benchmarks.

For an elementwise :math:`y = f(x)` with incoming gradient :math:`g`, the backward is
:math:`h = g f'(x)`. Differentiating :math:`h` against an incoming :math:`v` gives the double backward:
:math:`v f'(x)` for :math:`g` and :math:`v g f''(x)` for :math:`x`.

Layer normalisation, for each row :math:`x` of :math:`D` elements, has
:math:`\hat x = r (x - \overline x)`, :math:`r = (\overline{(x - \overline x)^2} + \epsilon)^{-1/2}` and
:math:`y = w \hat x + b`, where a bar is the mean over the row. With the projection

.. math:: P(a) = a - \overline a - \hat x\, \overline{a \hat x}

one has :math:`d\hat x = r P(dx)` and :math:`dr = -r^2\, \overline{\hat x\, dx}`, exactly, for any
:math:`\epsilon`. Since :math:`\overline{a P(b)} = \overline{P(a) b}`, the backward is

- for :math:`x`: :math:`r P(w g)`;
- for :math:`w`: :math:`\sum g \hat x`, and for :math:`b`: :math:`\sum g`, over the rows.

Differentiating these against incoming :math:`v`, :math:`u` and :math:`t` gives the double backward:

- for :math:`g`: :math:`w\, r P(v) + u \hat x + t`;
- for :math:`w`: :math:`\sum g\, r P(v)`;
- for :math:`x`: :math:`-r^2 \left(\hat x\, \overline{v P(w g)} + P(v)\, \overline{w g \hat x}
  + P(w g)\, \overline{v \hat x}\right) + r P(u g)`.

The kernels take five means of a row first, of :math:`v`, :math:`v \hat x`, :math:`w g`, :math:`w g \hat x`
and :math:`v w g`, and two more with :math:`u`, of :math:`u g` and :math:`u g \hat x`. Each result is then a
combination of :math:`x`, :math:`v` and :math:`g` with coefficients that are constant over the row.

Nothing here casts: float64 in, float64 arithmetic.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "gelu",
    "gelu_backward",
    "gelu_double_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
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


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r""":math:`w \hat x + b`."""
    output, _, _ = _normalize(input, normalized_shape, eps)
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`(r P(w g),\ \sum g \hat x,\ \sum g)`."""
    x_hat, rstd, project = _normalize(input, normalized_shape, eps)
    g = grad_output
    return (
        rstd * project(g if weight is None else g * weight),
        (g * x_hat).sum_to_size(normalized_shape),
        g.sum_to_size(normalized_shape),
    )


def layer_norm_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for grad_output, input and weight, as above."""
    x_hat, rstd, project = _normalize(input, normalized_shape, eps)
    dims = tuple(range(-len(normalized_shape), 0))

    def mean(tensor: Tensor) -> Tensor:
        return tensor.mean(dims, keepdim=True)

    w = torch.ones_like(x_hat) if weight is None else weight
    g, v = grad_output, grad_grad_input
    grad_grad_output = w * rstd * project(v)
    grad_input = -(rstd**2) * (
        x_hat * mean(v * project(w * g)) + project(v) * mean(w * g * x_hat) + project(w * g) * mean(v * x_hat)
    )
    if grad_grad_weight is not None:
        grad_grad_output = grad_grad_output + grad_grad_weight * x_hat
        grad_input = grad_input + rstd * project(grad_grad_weight * g)
    if grad_grad_bias is not None:
        grad_grad_output = grad_grad_output + grad_grad_bias
    return grad_grad_output, grad_input, (g * rstd * project(v)).sum_to_size(normalized_shape)


def _normalize(
    input: Tensor, normalized_shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    r""":math:`\hat x`, :math:`r` and :math:`P`."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    x_hat = centred * rstd

    def project(a: Tensor) -> Tensor:
        return a - a.mean(dims, keepdim=True) - x_hat * (a * x_hat).mean(dims, keepdim=True)

    return x_hat, rstd, project
