"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward.

Every activation takes a tensor of any shape and strides, of float16, bfloat16, float32 or float64, and
returns one of the same shape, dtype and memory layout. Arithmetic is done in float32 (float64 for float64).
Another dtype raises ``TypeError``, a bad parameter ``ValueError``. At a kink the derivatives are PyTorch's.

The double backward reads three tensors and writes two in one kernel. The third order and ``torch.func``
transforms are exact, through plain ATen ops; in a region compiled by ``torch.compile`` each function is its
namesake in ``torch.nn.functional``, which the compiler fuses with its neighbours. Nested tensors and tensor
subclasses such as DTensor take PyTorch's own kernels.

The activations of linear pieces (ReLU, ReLU6, Leaky ReLU, hard sigmoid) have no second derivative. Their
double backward reads two tensors, writes one, and gives the input no gradient, where PyTorch writes zeros or,
for the hard sigmoid, raises. ``torch.autograd.grad`` of nothing but that gradient needs
``materialize_grads=True``.

``inplace`` is accepted because ``torch.nn.functional`` has it, and ignored: the result is always a new
tensor, since derivatives are computed from the input.
"""

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
    r"""Gaussian error linear unit, as :func:`torch.nn.functional.gelu`.

    ``approximate="none"``: :math:`x\,\Phi(x)`; ``"tanh"``:
    :math:`\tfrac12 x (1 + \tanh(\sqrt{2/\pi}(x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016,
    arXiv:1606.08415).

    Args:
        approximate: ``"none"`` or ``"tanh"``.

    Raises:
        ValueError: if ``approximate`` is neither ``"none"`` nor ``"tanh"``.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.gelu(input, approximate=approximate)
    return torch.ops.gradnorm_kernels.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Sigmoid-weighted linear unit (swish), as :func:`torch.nn.functional.silu`: :math:`x\,\sigma(x)`
    (Elfwing, Uchibe and Doya 2018, arXiv:1702.03118).
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.silu(input)
    return torch.ops.gradnorm_kernels.silu(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.mish`: :math:`x \tanh(\log(1 + e^x))` (Misra 2019, arXiv:1908.08681)."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.mish(input)
    return torch.ops.gradnorm_kernels.mish(input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    r"""As :func:`torch.nn.functional.softplus`: :math:`\log(1 + e^{\beta x}) / \beta`, and :math:`x` where
    :math:`\beta x` exceeds ``threshold`` (Dugas et al. 2001). Under autocast on CUDA the result is float32.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.softplus(input, beta=beta, threshold=threshold)
    return torch.ops.gradnorm_kernels.softplus(input, beta=beta, threshold=threshold)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    r"""Exponential linear unit, as :func:`torch.nn.functional.elu`: :math:`x` for :math:`x > 0`, else
    :math:`\alpha (e^x - 1)` (Clevert, Unterthiner and Hochreiter 2016, arXiv:1511.07289).
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.elu(input, alpha=alpha)
    return torch.ops.gradnorm_kernels.elu(input, alpha=alpha)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.leaky_relu`: :math:`x` for :math:`x > 0`, else ``negative_slope`` times
    :math:`x` (Maas, Hannun and Ng 2013). Of linear pieces: see above for its double backward.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.leaky_relu(input, negative_slope=negative_slope)
    return torch.ops.gradnorm_kernels.leaky_relu(input, negative_slope=negative_slope)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.relu`: :math:`\max(x, 0)`. Of linear pieces: see above for its double
    backward.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.relu(input)
    return torch.ops.gradnorm_kernels.relu(input)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.relu6`: :math:`\min(\max(x, 0), 6)`. Of linear pieces: see above for its
    double backward.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.relu6(input)
    return torch.ops.gradnorm_kernels.relu6(input)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.hardswish`: :math:`x` times :func:`hardsigmoid` (Howard et al. 2019,
    arXiv:1905.02244).
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.hardswish(input)
    return torch.ops.gradnorm_kernels.hardswish(input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.hardsigmoid`: :math:`(x + 3) / 6`, clamped to 0 and 1. Of linear pieces:
    see above for its double backward, which PyTorch lacks.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.hardsigmoid(input)
    return torch.ops.gradnorm_kernels.hardsigmoid(input)


def tanh(input: Tensor) -> Tensor:
    r"""As :func:`torch.nn.functional.tanh`. The output is saved rather than the input, as PyTorch
    does, and so the input receives its gradient from the double backward through one more first backward.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.tanh(input)
    return torch.ops.gradnorm_kernels.tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    r"""As :func:`torch.nn.functional.sigmoid`: :math:`1 / (1 + e^{-x})`. Saves its output, as
    :func:`tanh` does.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.sigmoid(input)
    return torch.ops.gradnorm_kernels.sigmoid(input)
