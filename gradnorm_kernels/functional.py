"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gelu", "layer_norm", "layer_norm_2d"]

# What the CUDA kernels of layer_norm_2d can hold in registers.
_MOST_CHANNELS = 4096


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


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalisation over the last dimensions, as :func:`torch.nn.functional.layer_norm`:
    :math:`(x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x] + \epsilon} \cdot w + b` (Ba et al. 2016,
    arXiv:1607.06450).

    Forward and first backward are PyTorch's own kernels. The double backward reads three tensors and writes
    two in one kernel, and adds the sum of small partial gradients of ``weight``. The third order and
    ``torch.func`` transforms are exact, through plain ATen ops; in a region compiled by ``torch.compile``
    this is ``torch.nn.functional.layer_norm``. Nested tensors take PyTorch's own kernels.

    Args:
        input: any strides; float16, bfloat16, float32 or float64. Arithmetic is done in float32 (float64
            for float64).
        normalized_shape: the sizes of the last dimensions, which are normalised together.
        weight: of shape ``normalized_shape`` and ``input``'s dtype; on the CPU it may be float32 for a
            float16 or bfloat16 ``input``.
        bias: as ``weight``.
        eps: added to the variance.

    Returns:
        A contiguous tensor of ``input``'s shape and dtype.

    Raises:
        TypeError: if the dtype of ``input``, ``weight`` or ``bias`` is not one of the four.
        ValueError: if ``input``'s shape does not end in ``normalized_shape``, or ``weight``'s or
            ``bias``'s is another.
        RuntimeError: if devices differ, or dtypes that PyTorch does not mix.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    return torch.ops.gradnorm_kernels.layer_norm(input, normalized_shape, weight, bias, eps)


def layer_norm_2d(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    r"""Layer normalisation over the channels of an image: :func:`layer_norm` of ``input`` permuted to
    channels last, and its output permuted back (ConvNeXt's, Liu et al. 2022, arXiv:2201.03545; timm's
    ``LayerNorm2d``).

    Where ``input`` is channels_last that is what it does, without a copy. Otherwise forward, backward and
    double backward are kernels that read and write NCHW as it lies.

    Args:
        input: of shape (N, C, H, W); any strides; float16, bfloat16, float32 or float64. Arithmetic is
            done in float32 (float64 for float64).
        weight: of shape (C,). In float32 or ``input``'s dtype.
        bias: as ``weight``.
        eps: added to the variance.

    Returns:
        A tensor of ``input``'s shape and dtype; channels_last if ``input`` is, or has more than 4096
        channels, and contiguous otherwise.

    Raises:
        TypeError: if the dtype of ``input``, ``weight`` or ``bias`` is not one of the four.
        ValueError: if ``input`` does not have four dimensions, or ``weight``'s or ``bias``'s shape is not
            (C,).
        RuntimeError: if devices differ.
    """
    rows = input.ndim == 4 and (input.stride(1) == 1 or input.shape[1] > _MOST_CHANNELS)
    if rows or torch.compiler.is_compiling():
        nhwc = input.permute(0, 2, 3, 1)
        return layer_norm(nhwc, nhwc.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)
    return torch.ops.gradnorm_kernels.layer_norm_2d(input, weight, bias, eps)[0]
