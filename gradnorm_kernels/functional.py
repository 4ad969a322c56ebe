"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward."""

import torch
from torch import Tensor

__all__ = ["gelu", "group_norm", "instance_norm"]


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


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Group normalisation (Wu and He 2018, arXiv:1803.08494), as :func:`torch.nn.functional.group_norm`.

    Normalises ``channels / num_groups`` consecutive channels of each batch entry together, then scales and
    shifts each channel by ``weight`` and ``bias``.

    Forward and first backward are PyTorch's fused kernels, the latter also where it will be differentiated
    again. The double backward reads three tensors and writes two in one kernel, and larger groups' tensors
    twice. The third order and ``torch.func`` transforms are exact, through plain ATen ops; in a region
    compiled by ``torch.compile`` this is ``torch.nn.functional.group_norm``. Tensor subclasses such as
    DTensor take PyTorch's own kernels.

    Args:
        input: shape (N, C, \*), any strides; float16, bfloat16, float32 or float64. Arithmetic is done in
            float32 (float64 for float64).
        num_groups: a divisor of C.
        weight: shape (C,), of ``input``'s dtype, or float32 where ``input`` is float16 or bfloat16.
        bias: like ``weight``.
        eps: added to the variance.

    Returns:
        A tensor of ``input``'s shape and dtype, and of its memory layout where PyTorch's kernels keep it.

    Raises:
        TypeError: if a dtype is none of these.
        ValueError: if ``input`` has fewer than two dimensions or a single value for each group and no more,
            ``num_groups`` does not divide C, or ``weight`` or ``bias`` is not of shape (C,).
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)
    return torch.ops.gradnorm_kernels.group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Instance normalisation (Ulyanov et al. 2016, arXiv:1607.08022), as
    :func:`torch.nn.functional.instance_norm`.

    This is :func:`group_norm` with a group for each channel. With running statistics, to update or to
    normalise by, it is ``torch.nn.functional.instance_norm`` itself.

    Args:
        input: shape (N, C, \*), any strides; float16, bfloat16, float32 or float64. Arithmetic is done in
            float32 (float64 for float64).
        running_mean: shape (C,).
        running_var: shape (C,).
        weight: shape (C,), of ``input``'s dtype, or float32 where ``input`` is float16 or bfloat16.
        bias: like ``weight``.
        use_input_stats: whether to normalise by the statistics of ``input``.
        momentum: the weight of ``input`` in the update of the running statistics.
        eps: added to the variance.

    Returns:
        A tensor of ``input``'s shape and dtype, and of :func:`group_norm`'s memory layout, where PyTorch's
        is always contiguous.

    Raises:
        TypeError: if a dtype is none of these.
        ValueError: if a channel has only one element, or a shape is none of these.
    """
    # PyTorch says what is wrong with an instance of a single element, or with no channels to group.
    of_its_own = use_input_stats and running_mean is None and running_var is None
    if not of_its_own or input.ndim < 3 or input.shape[1] == 0 or input.shape[2:].numel() == 1:
        return torch.nn.functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return group_norm(input, input.shape[1], weight, bias, eps)
