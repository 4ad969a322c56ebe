"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "gelu",
]


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


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """1-dimensional convolution, as :func:`torch.nn.functional.conv1d`.

    The double backward is three convolutions at most, and two in gradient-norm training, however many
    groups there are: PyTorch's own takes one for every group. The convolutions are ATen's. The third order
    and ``torch.func`` transforms are exact; in a region compiled by ``torch.compile``, and for other dtypes
    and layouts than those below, this is PyTorch's function.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, strided; float16, bfloat16, float32 or float64.
        weight: ``(C', C / groups, K)``, of ``input``'s dtype.
        bias: ``(C',)``, of ``input``'s dtype.
        stride, padding, dilation: an int for all dimensions or one for each; ``padding`` may be
            ``"valid"`` or ``"same"``.
        groups: divides ``C`` and ``C'``.

    Returns:
        A tensor of ``input``'s dtype; its shape and memory format are those that PyTorch's function gives.

    Raises:
        TypeError: if ``weight`` or ``bias`` has another dtype than ``input``.
        RuntimeError: if shapes or settings do not match, as PyTorch's function.
    """
    stock = torch.nn.functional.conv1d
    return _convolution(stock, 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-dimensional convolution, as :func:`torch.nn.functional.conv2d`.

    :func:`conv1d` says the rest.
    """
    stock = torch.nn.functional.conv2d
    return _convolution(stock, 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """3-dimensional convolution, as :func:`torch.nn.functional.conv3d`.

    :func:`conv1d` says the rest.
    """
    stock = torch.nn.functional.conv3d
    return _convolution(stock, 3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """1-dimensional transposed convolution, as :func:`torch.nn.functional.conv_transpose1d`; otherwise
    as :func:`conv1d`.
    """
    stock = torch.nn.functional.conv_transpose1d
    return _convolution(stock, 1, input, weight, bias, stride, padding, dilation, groups, output_padding)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """2-dimensional transposed convolution, as :func:`torch.nn.functional.conv_transpose2d`; otherwise
    as :func:`conv1d`.
    """
    stock = torch.nn.functional.conv_transpose2d
    return _convolution(stock, 2, input, weight, bias, stride, padding, dilation, groups, output_padding)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """3-dimensional transposed convolution, as :func:`torch.nn.functional.conv_transpose3d`; otherwise
    as :func:`conv1d`.
    """
    stock = torch.nn.functional.conv_transpose3d
    return _convolution(stock, 3, input, weight, bias, stride, padding, dilation, groups, output_padding)


def _convolution(
    stock: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    output_padding: int | Sequence[int] | None = None,
) -> Tensor:
    """Transposed if there is an ``output_padding``."""

    def per_dimension(setting: int | Sequence[int]) -> Sequence[int]:
        return setting if isinstance(setting, Sequence) else (setting,) * dims

    transposed = output_padding is not None
    strides = per_dimension(stride)
    same = padding == "same" and all(step == 1 for step in strides)
    ours = input.is_floating_point() and input.layout == torch.strided and input.dim() - dims in (1, 2)
    # Arguments that PyTorch's function rejects are left for it to reject.
    ours = ours and (same or padding == "valid" or not isinstance(padding, str))
    if not ours or torch.compiler.is_compiling():
        extra = {"output_padding": output_padding} if transposed else {}
        return stock(
            input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, **extra
        )
    dilations = per_dimension(dilation)
    if same:
        totals = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            input = torch.nn.functional.pad(input, [p for total in totals[::-1] for p in (0, total % 2)])
        padding = [total // 2 for total in totals]
    elif isinstance(padding, str):
        padding = 0
    is_batch = input.dim() == dims + 2
    output = torch.ops.gradnorm_kernels.convolution(
        input if is_batch else input.unsqueeze(0),
        weight,
        bias,
        strides,
        per_dimension(padding),
        dilations,
        transposed,
        per_dimension(output_padding or 0),
        groups,
    )
    return output if is_batch else output.squeeze(0)
