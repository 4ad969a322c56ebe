"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

import torch
from torch import Tensor

__all__ = ["batch_norm", "gelu"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation, as :func:`torch.nn.functional.batch_norm` (Ioffe and Szegedy 2015,
    arXiv:1502.03167).

    :math:`y = w\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + b` for each channel, with the mean and the
    variance of the batch if ``training``, and the running ones if not. Forward and first backward are
    PyTorch's own kernels. The double backward is fused: in training one pass reads three tensors for the sums
    of each channel, and one reads them again and writes two. In evaluation mode, where the statistics are
    constants, it reads two tensors and writes one; the first backward is ours there too, and if only
    ``input`` needs a gradient it reads one tensor and writes one.

    The third order and ``torch.func`` transforms are exact, through plain ATen ops (PyTorch's own third order
    in training is not); in a region compiled by ``torch.compile`` this is ``torch.nn.functional.batch_norm``.

    Args:
        input: shape ``(N, C, ...)``, any strides; float16, bfloat16, float32 or float64. Arithmetic is done
            in float32 (float64 for float64). Interleaved channels (``torch.channels_last``) are kept.
        running_mean: shape ``(C,)``, or None if ``training``. In training it becomes
            ``(1 - momentum) * running_mean + momentum * mean``, in place.
        running_var: likewise, with the unbiased variance of the batch.
        weight: shape ``(C,)``, in ``input``'s dtype or float32, or None for ones.
        bias: likewise, or None for zeros.
        training: whether to use the statistics of the batch, and to update the running ones.
        momentum: the weight of the batch in the update.
        eps: added to the variance.

    Returns:
        A tensor of ``input``'s shape, dtype and memory layout.

    Raises:
        TypeError: if a dtype is none of the four.
        ValueError: if ``input`` has less than two dimensions, or in training one value a channel; if another
            argument's shape is not ``(C,)``; if the running statistics are missing where they are needed.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return torch.ops.gradnorm_kernels.batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )


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
