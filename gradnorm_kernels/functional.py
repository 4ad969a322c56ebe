"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

import torch
from torch import Tensor

__all__ = ["gelu", "softmax"]


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


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Softmax along ``dim``, as :func:`torch.nn.functional.softmax`, of ``input + bias``.

    :math:`y_i = e^{x_i} / \sum_j e^{x_j}`. A bias along the last dimension is added while ``input`` is read,
    and its gradient is one reduction of ``input``'s. An attention's mask is a bias of 0 and ``-inf``; as in
    PyTorch, a row of nothing but ``-inf`` gives NaN.

    Only the output is saved. The double backward reads three tensors and writes two in one kernel: the
    gradient for the first backward's ``grad_output``, and the one for ``input``, with no pass through the
    softmax's backward between. The third order and ``torch.func`` transforms are exact, through plain ATen
    ops; in a region compiled by ``torch.compile`` this is ``torch.nn.functional.softmax``, which the compiler
    fuses with its neighbours. Nested tensors and tensor subclasses such as DTensor take PyTorch's own
    kernels.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64. Arithmetic is done in
            float32 (float64 for float64).
        dim: the dimension whose elements sum to 1. ``None`` is PyTorch's deprecated choice by the number of
            dimensions.
        dtype: of the result, and of the arithmetic if that is wider; by default ``input``'s, or what it
            promotes to with ``bias``'s. A region of ``torch.autocast`` for CUDA makes it float32.
        bias: added to ``input``, to whose shape it must broadcast: relative position biases of (1, heads,
            N, N) for scores of (batch, heads, N, N), or of (windows, heads, N, N), with a mask in the sum,
            for scores of (batch, windows, heads, N, N). float16, bfloat16, float32 or float64.

    Returns:
        A contiguous tensor of ``input``'s shape.

    Raises:
        TypeError: if ``input``'s dtype, after conversion to ``dtype``, or ``bias``'s is not one of the four.
        ValueError: if ``bias`` does not broadcast to ``input``'s shape.
        IndexError: if ``input`` has no dimension ``dim``.
    """
    if dim is None:
        dim = torch.nn.functional._get_softmax_dim(  # type: ignore[attr-defined]
            "softmax", input.dim(), _stacklevel
        )
    if torch.compiler.is_compiling():
        return torch.nn.functional.softmax(input if bias is None else input + bias, dim, dtype=dtype)
    if bias is None:
        return torch.ops.gradnorm_kernels.softmax(input, dim, dtype)
    if input.dim() > 0 and dim in (-1, input.dim() - 1):
        return torch.ops.gradnorm_kernels.softmax_with_bias(input, bias, dtype)
    return torch.ops.gradnorm_kernels.softmax(input + bias, dim, dtype)
