"""Drop-ins for ``torch.nn.functional`` with fused forward, backward and double backward.

Every activation takes a tensor of any shape and strides, of float16, bfloat16, float32 or float64, and
returns one of the same shape, dtype and memory layout. Arithmetic is done in float32 (float64 for float64).
Other dtypes and layouts are PyTorch's to compute (tanh and sigmoid of integers and complex numbers); where it
cannot, a dtype raises ``TypeError``. A bad parameter raises ``ValueError``. At a kink the derivatives are
PyTorch's.

The double backward reads three tensors and writes two in one kernel. The third order and ``torch.func``
transforms are exact, through plain ATen ops, as is a region compiled by ``torch.compile``, where the compiler
fuses them with their neighbours. Nested tensors and tensor subclasses such as DTensor take PyTorch's own
kernels.

The activations of linear pieces (ReLU, ReLU6, Leaky ReLU, hard sigmoid) have no second derivative. Their
double backward reads two tensors and writes one. The gradient of the input, which is zero (PyTorch's hard
sigmoid raises), is written where ``torch.autograd.grad`` is asked for something before it, or the input is a
leaf without a gradient; ``backward`` passes nothing on instead.

``inplace`` is accepted because ``torch.nn.functional`` has it, and ignored: the result is always a new
tensor, since derivatives are computed from the input.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "batch_norm",
    "batch_norm_act",
    "cdist",
    "celu",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cos",
    "cosine_similarity",
    "cross_entropy",
    "elu",
    "geglu",
    "gelu",
    "glu",
    "grid_sample",
    "group_norm",
    "hardsigmoid",
    "hardswish",
    "instance_norm",
    "layer_norm",
    "layer_norm_2d",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "mish",
    "normalize",
    "pairwise_distance",
    "qkv_attention",
    "quick_gelu",
    "relu",
    "relu6",
    "rms_norm",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "softmax",
    "softplus",
    "softsign",
    "squared_relu",
    "swiglu",
    "tanh",
    "vector_norm",
    "weight_norm",
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


def quick_gelu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As timm's: :math:`x\,\sigma(1.702 x)` (Hendrycks and Gimpel 2016, arXiv:1606.08415). Written in
    PyTorch's ops, of these the switch covers the sigmoid alone.
    """
    if torch.compiler.is_compiling():
        return input * torch.sigmoid(1.702 * input)
    return torch.ops.gradnorm_kernels.quick_gelu(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.mish`: :math:`x \tanh(\log(1 + e^x))` (Misra 2019, arXiv:1908.08681)."""
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


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.celu`: :math:`x` for :math:`x > 0`, else
    :math:`\alpha (e^{x / \alpha} - 1)` (Barron 2017, arXiv:1704.07483).

    Raises:
        ValueError: if ``alpha`` is not greater than 0.
    """
    if not alpha > 0:
        raise ValueError(f"celu: expected alpha to be greater than 0, got {alpha}")
    if torch.compiler.is_compiling():
        return torch.nn.functional.celu(input, alpha=alpha)
    return torch.ops.gradnorm_kernels.elu(input, alpha=alpha, input_scale=1 / alpha)


# PyTorch's.
_SELU = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""As :func:`torch.nn.functional.selu`: :math:`1.0507 x` for :math:`x > 0`, else
    :math:`1.7581 (e^x - 1)` (Klambauer et al. 2017, arXiv:1706.02515).
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.selu(input)
    return torch.ops.gradnorm_kernels.elu(input, **_SELU)


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


def squared_relu(input: Tensor) -> Tensor:
    r""":math:`\max(x, 0)^2` (So et al. 2021, arXiv:2109.08668), for which PyTorch has no function. Of
    ``relu(x).square()`` the switch covers the ReLU alone.
    """
    if torch.compiler.is_compiling():
        return torch.relu(input).square()
    return torch.ops.gradnorm_kernels.squared_relu(input)


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


def sin(input: Tensor, frequency: float = 1.0) -> Tensor:
    r""":math:`\sin(\omega x)`, with :math:`\omega` the ``frequency``: the activation of a SIREN (Sitzmann et
    al. 2020, arXiv:2006.09661), and :func:`torch.sin` without it.
    """
    if torch.compiler.is_compiling():
        return torch.sin(input if frequency == 1 else frequency * input)
    return torch.ops.gradnorm_kernels.sin(input, frequency=frequency)


def cos(input: Tensor, frequency: float = 1.0) -> Tensor:
    r""":math:`\cos(\omega x)`, with :math:`\omega` the ``frequency``: as :func:`sin`."""
    if torch.compiler.is_compiling():
        return torch.cos(input if frequency == 1 else frequency * input)
    return torch.ops.gradnorm_kernels.cos(input, frequency=frequency)


def softsign(input: Tensor) -> Tensor:
    r"""As :func:`torch.nn.functional.softsign`: :math:`x / (1 + |x|)` (Bergstra et al. 2009). PyTorch's own
    is made of several ops, which the switch leaves alone.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.softsign(input)
    return torch.ops.gradnorm_kernels.softsign(input)


def logsigmoid(input: Tensor) -> Tensor:
    r"""As :func:`torch.nn.functional.logsigmoid`: :math:`\log \sigma(x) = -\log(1 + e^{-x})`."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.logsigmoid(input)
    return torch.ops.gradnorm_kernels.logsigmoid(input)


# What the CUDA kernels of layer_norm_2d can hold in registers.
_MOST_CHANNELS = 4096


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
    two in one kernel, and adds the sum of small partial gradients of ``weight``. The third order,
    ``torch.func`` transforms and regions compiled by ``torch.compile`` are exact, through plain ATen ops.
    Nested tensors take PyTorch's own kernels.

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
    # torch.jit.trace gives sizes of its own kind, which our op does not take.
    if torch.jit.is_tracing():
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    return torch.ops.gradnorm_kernels.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    r"""Root-mean-square normalisation over the last dimensions, as :func:`torch.nn.functional.rms_norm`:
    :math:`x / \sqrt{\mathrm{E}[x^2] + \epsilon} \cdot w` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Forward, backward and double backward are one kernel each. The third order and ``torch.func`` transforms
    are exact, through plain ATen ops; in a region compiled by ``torch.compile`` this is
    ``torch.nn.functional.rms_norm``.

    Args:
        input, normalized_shape: as for :func:`layer_norm`.
        weight: of shape ``normalized_shape``; any of the four dtypes.
        eps: added to the mean square. Default: the machine epsilon of the dtype of arithmetic.

    Returns:
        A contiguous tensor of ``input``'s shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`layer_norm`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    return torch.ops.gradnorm_kernels.rms_norm(input, normalized_shape, weight, eps)[0]


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


def _piecewise_linear(output: Tensor) -> Tensor:
    """The output of a PyTorch function that is linear piece by piece, whose second derivative by its input is
    from here on nothing in place of zeros."""
    torch.ops.gradnorm_kernels.mark_piecewise_linear(output)
    return output


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

    The third order, ``torch.func`` transforms and regions compiled by ``torch.compile`` are exact, through
    plain ATen ops (PyTorch's own third order in training is not).

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
    return torch.ops.gradnorm_kernels.batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str,
    params: Sequence[float] = (),
) -> Tensor:
    r"""An activation of :func:`batch_norm`, as one op.

    :math:`y = f(w\,(x - \mu)\,(\sigma^2 + \epsilon)^{-1/2} + b)`, and only :math:`x` is kept between the
    passes: what the activation is of is computed again. The first backward reads two tensors, in training
    twice, and writes one; the double backward reads three, in training twice, and writes two. The forward is
    PyTorch's own kernels.

    The third order, ``torch.func`` transforms and regions compiled by ``torch.compile`` are exact, through
    plain ATen ops.

    Args:
        input: as :func:`batch_norm`, and so are the arguments down to ``eps``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"hardswish"``, ``"silu"``, ``"mish"``,
            ``"gelu_none"`` (erf) or ``"gelu_tanh"``.
        params: of ``"leaky_relu"`` its negative slope; of the others none.

    Returns:
        A tensor of ``input``'s shape, dtype and memory layout.

    Raises:
        TypeError: as :func:`batch_norm`.
        ValueError: as :func:`batch_norm`, and if ``activation`` or the length of ``params`` is none of these.
    """
    return torch.ops.gradnorm_kernels.batch_norm_act(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
        list(params),
    )


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
    twice. The third order, ``torch.func`` transforms and regions compiled by ``torch.compile`` are exact,
    through plain ATen ops. Tensor subclasses such as DTensor take PyTorch's own kernels.

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

    This is :func:`group_norm` with a group for each channel; where it normalises by running statistics,
    :func:`batch_norm` in evaluation mode.

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
    if input.ndim < 3 or 0 in input.shape or input.shape[2:].numel() == 1:
        return torch.nn.functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None and running_var is not None:
        wide = torch.promote_types(input.dtype, torch.float32)
        var, mean = torch.var_mean(input.detach().to(wide), tuple(range(2, input.ndim)))
        for running, new in ((running_mean, mean), (running_var, var)):
            # torch.func refuses to change in place what it did not make, and has made an alias.
            torch.ops.aten.alias(running).lerp_(new.mean(0).to(running.dtype), momentum)
    return group_norm(input, input.shape[1], weight, bias, eps)


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


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""The logarithm of :func:`softmax` along ``dim``, as :func:`torch.nn.functional.log_softmax`.

    :math:`y_i = x_i - \log \sum_j e^{x_j}`. Forward and first backward are PyTorch's kernels; the double
    backward, as :func:`softmax`'s, reads three tensors and writes two. Arguments and errors as there.
    """
    if dim is None:
        dim = torch.nn.functional._get_softmax_dim(  # type: ignore[attr-defined]
            "log_softmax", input.dim(), _stacklevel
        )
    if torch.compiler.is_compiling():
        return torch.nn.functional.log_softmax(input, dim, dtype=dtype)
    return torch.ops.gradnorm_kernels.log_softmax(input, dim, dtype)


def normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int | tuple[int, ...] = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    r"""Division by the Euclidean norm along ``dim``, as :func:`torch.nn.functional.normalize`.

    :math:`y = x / \max(\lVert x \rVert, \epsilon)`. Where a row is shorter than ``eps`` this is
    :math:`x / \epsilon`, linear: all derivatives of a row of zeros are finite, where those of PyTorch's are
    NaN.

    With :math:`P a = a - \langle a, y \rangle y` the backward is :math:`P g / \lVert x \rVert` and reads two
    tensors and writes one; the double backward reads three and writes two. Only ``input`` is saved. The third
    order, ``torch.func`` transforms and compiled regions are exact, through plain ATen ops. PyTorch's own
    function computes the rest: another ``p`` than 2, several dimensions, an ``eps`` that is not positive,
    ``out``.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64. Arithmetic is done in float32
            (float64 for float64).
        dim: whose elements are a row.
        eps: the least number that is divided by.

    Returns:
        A contiguous tensor of ``input``'s shape and dtype; float32 in a region of ``torch.autocast`` for
        CUDA.

    Raises:
        TypeError: if ``input``'s dtype is none of the four.
        IndexError: if ``input`` has no dimension ``dim``.
    """
    if p != 2 or not isinstance(dim, int) or not eps > 0 or out is not None:
        return torch.nn.functional.normalize(input, p, dim, eps, out)  # type: ignore[arg-type]
    return torch.ops.gradnorm_kernels.normalize(input, dim, eps)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    r"""The sum of the products of ``x1`` and ``x2``, each divided by its norm as by :func:`normalize`, along
    ``dim``, as :func:`torch.nn.functional.cosine_similarity`.

    Args:
        x1, x2: of shapes that broadcast; float16, bfloat16, float32 or float64.

    Raises:
        TypeError: if a dtype is none of the four.
        ValueError: if ``eps`` is not positive.
        RuntimeError: if the shapes do not broadcast.
        IndexError: if the inputs have no dimension ``dim``.
    """
    y1, y2 = (torch.ops.gradnorm_kernels.normalize(x, dim, eps) for x in torch.broadcast_tensors(x1, x2))
    return (y1 * y2).sum(dim)


def vector_norm(input: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    r"""The Euclidean norm, as :func:`torch.linalg.vector_norm` with ``ord=2``, over ``dim`` or, if that is
    ``None``, all dimensions.

    Forward and first backward, :math:`g\,x / \lVert x \rVert`, are PyTorch's. The double backward reads two
    tensors and writes one, if the dimensions are neighbours. At a row of zeros all derivatives are 0, where
    PyTorch's second one is NaN. Otherwise as :func:`normalize`.
    """
    return torch.ops.gradnorm_kernels.vector_norm(input, (dim,) if isinstance(dim, int) else dim, keepdim)


def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    r"""The norm of ``x1 - x2 + eps`` along the last dimension, as
    :func:`torch.nn.functional.pairwise_distance`, which computes it for another ``p`` than 2. Otherwise as
    :func:`vector_norm`.
    """
    if p != 2:
        return torch.nn.functional.pairwise_distance(x1, x2, p, eps, keepdim)
    return vector_norm(x1 - x2 + eps, -1, keepdim)


_CDIST_MODES = (
    "use_mm_for_euclid_dist_if_necessary",
    "use_mm_for_euclid_dist",
    "donot_use_mm_for_euclid_dist",
)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = _CDIST_MODES[0]) -> Tensor:
    r"""The distances between all pairs of a point of ``x1`` and one of ``x2``, as :func:`torch.cdist`.

    With ``p`` of 1 or 2 the double backward holds no difference of a pair: of up to 32 coordinates, or of any
    number for ``p = 1``, it is one kernel that reads and writes as many numbers as there are distances; of
    more, matrix products. The forward is PyTorch's, on the CPU the first backward too. At a distance of 0 all
    derivatives are 0. The third order and ``torch.func`` transforms are exact, through plain ATen ops, which
    may hold the differences. PyTorch's own function computes another ``p``.

    Args:
        x1, x2: (\*, n, D) and (\*, m, D), of batches that broadcast; float16, bfloat16, float32 or float64.
            Arithmetic is done in float32 (float64 for float64).

    Raises:
        TypeError: if a dtype is none of the four, or the two differ.
        ValueError: if ``x1`` and ``x2`` differ in the number of coordinates, or have fewer than two
            dimensions, or ``compute_mode`` is none of PyTorch's.
    """
    if compute_mode not in _CDIST_MODES:
        raise ValueError(f"cdist: expected compute_mode to be one of {_CDIST_MODES}, got {compute_mode!r}")
    if p not in (1, 2):
        return torch.cdist(x1, x2, p, compute_mode)
    return torch.ops.gradnorm_kernels.cdist(x1, x2, p, _CDIST_MODES.index(compute_mode))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`.

    :math:`-\sum_c q_c \log p_c` of each row of logits, with :math:`p` its softmax and :math:`q` the target,
    smoothed as in Szegedy et al. 2016 (arXiv:1512.00567).

    Of classes, the forward reads the logits; the backward, :math:`g\,(p - q)`, reads them and writes one
    tensor; the double backward, :math:`g\,p\,(v - \sum p v)` and :math:`\sum p v - \sum q v`, reads two and
    writes one. Probabilities are read as well. Only the logits and the target are saved. The third order,
    the gradient of probabilities and ``torch.func`` transforms are exact, through plain ATen ops. PyTorch's
    own ops compute the rest: targets of another dtype than int64 or the logits', classes with both ``weight``
    and ``label_smoothing``, nested tensors, and regions compiled by ``torch.compile``.

    Args:
        input: (C), (N, C) or (N, C, d1, ...), any strides; float16, bfloat16, float32 or float64. Arithmetic
            is done in float32 (float64 for float64).
        target: classes, int64, of ``input``'s shape without C; or probabilities, of ``input``'s shape.
        weight: (C), a factor of each class.
        size_average, reduce: PyTorch's deprecated forms of ``reduction``.
        ignore_index: a class whose rows are left out, also of the mean.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: between 0 and 1, the share that all classes have in equal parts.

    Returns:
        A scalar, or with ``"none"`` a tensor of ``input``'s shape without C; float32 in a region of
        ``torch.autocast``.

    Raises:
        IndexError: if a class is neither ``ignore_index`` nor one of the C. On CUDA its loss and gradient are
            NaN.
        TypeError, ValueError, RuntimeError: for any other bad argument, as PyTorch's own.
    """
    if torch.compiler.is_compiling():
        return torch.nn.functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return torch.ops.gradnorm_kernels.cross_entropy_loss(
        input, target, weight, torch.nn._reduction.get_enum(reduction), ignore_index, label_smoothing
    )


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    r"""Samples of an image or a volume at the points of a grid, as :func:`torch.nn.functional.grid_sample`.

    :math:`\sum_k w_k x_k` over the corners :math:`k` of the cell of pixels that a point is in, bilinear or
    trilinear (Jaderberg et al. 2015, arXiv:1506.02025). Forward and first backward are PyTorch's kernels. The
    double backward computes the gradients of ``grad_output``, ``input`` and ``grid`` from those of both first
    gradients at once, reading each corner once. The third order and ``torch.func`` transforms, forward mode
    among them, are exact, through plain ATen ops. PyTorch's own ops compute the rest: ``"bicubic"``, and
    regions compiled by ``torch.compile``.

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), any strides; float16, bfloat16, float32 or float64. The double
            backward's arithmetic is done in float32 (float64 for float64).
        grid: (N, ..., 2) or (N, ..., 3), of ``input``'s dtype: x, y and z between -1 and 1, and beyond.
        mode: ``"bilinear"``, ``"nearest"`` or ``"bicubic"``.
        padding_mode: what is outside of the input: ``"zeros"``, ``"border"`` or ``"reflection"``.
        align_corners: whether -1 and 1 are the centres of the first and the last pixel, else their edges.

    Returns:
        (N, C, ...), with the points' dimensions of ``grid``; float32 in a region of ``torch.autocast`` on the
        CPU.

    Raises:
        ValueError, TypeError, RuntimeError: for an unknown mode, and shapes, dtypes or devices that do not
            match.
    """
    if mode not in ("bilinear", "nearest") or padding_mode not in _PADDINGS or torch.compiler.is_compiling():
        return torch.nn.functional.grid_sample(input, grid, mode, padding_mode, align_corners)
    return torch.ops.gradnorm_kernels.grid_sample(
        input, grid, int(mode == "nearest"), _PADDINGS.index(padding_mode), align_corners
    )


# In the order of ATen's enumeration.
_PADDINGS = ("zeros", "border", "reflection")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`, differentiable twice.

    :math:`\mathrm{softmax}(\mathrm{scale}\, Q K^\top + M)\, V` (Vaswani et al. 2017, arXiv:1706.03762).
    Nothing of the size of the scores is kept for the backward passes, which compute them again. On CUDA they
    stay on chip, for up to 64 columns a head, 128 in half types from sm_80 on: windows of up to 64 tokens
    take one kernel a pass, longer sequences and wider heads two in the backward passes. What else there is
    (float64, more columns, and the gradient of a longer sequence's mask) takes matrix products and one kernel
    for the rows of scores. On the CPU the scores stay in the cache.

    In forward mode (``torch.func.jvp``, dual numbers) the tangent is one op, computed as the double backward
    is, and differentiable: by the backward of the incoming gradient with respect to the tangents, by its
    double backward with respect to the operands.

    The third order, other ``torch.func`` transforms and dropout are exact, through plain ATen ops, which is
    also what ``torch.export`` gets: PyTorch's own fused kernels have no double backward. In a region
    compiled by ``torch.compile`` the ops stay as they are.

    Args:
        query: ``(..., L, E)``; float16, bfloat16, float32 or float64. Arithmetic is done in float32 (float64
            for float64). Any strides: the views that one linear layer's output is split into are not copied.
        key: ``(..., S, E)``, of ``query``'s dtype.
        value: ``(..., S, Ev)``, of ``query``'s dtype. The leading dimensions of the three broadcast.
        attn_mask: what is added to the scores, of any floating dtype, or a bool tensor that is True where a
            key takes part. Broadcast to ``(..., L, S)``. Its gradient has the same bits in each run. A query
            that no key takes part for gets 0.
        dropout_p: the probability of an attention weight to be dropped.
        is_causal: whether query ``i`` attends to the keys up to ``i`` only; without ``attn_mask``.
        scale: the factor of the scores, by default ``E ** -0.5``.
        enable_gqa: whether each head of ``key`` and ``value`` serves as many consecutive ones of ``query`` as
            there are for it; heads are the third dimension from the end. They are copied.

    Returns:
        ``(..., L, Ev)``. With 4 dimensions or more it lies in memory as ``(..., L, heads, Ev)``, so that
        ``transpose(1, 2).flatten(2)`` is a view; so do the gradients.

    Raises:
        TypeError: if a dtype is not one of the four, or key's or value's is not query's.
        ValueError: if the shapes do not match, ``dropout_p`` is not a probability, both ``attn_mask`` and
            ``is_causal`` are given, or heads that ``enable_gqa`` repeats do not divide ``query``'s.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: expected is_causal=False where attn_mask is given")
    if not 0 <= dropout_p <= 1:
        raise ValueError(
            f"scaled_dot_product_attention: expected dropout_p to be between 0 and 1, got {dropout_p}"
        )
    if query.is_nested:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = _repeat_heads("key", key, query), _repeat_heads("value", value, query)
    if is_causal:
        attn_mask = query.new_full((query.shape[-2], key.shape[-2]), -torch.inf).triu(1)
    attn_mask = _additive(attn_mask, query)
    if torch.compiler.is_exporting() or dropout_p > 0:
        return _plain_attention(query, key, value, attn_mask, dropout_p, scale)
    batch = query.shape[:-2]
    if key.shape[:-2] != batch or value.shape[:-2] != batch:
        batch = torch.broadcast_shapes(batch, key.shape[:-2], value.shape[:-2])
        query, key, value = (t.expand(*batch, *t.shape[-2:]) for t in (query, key, value))
    return torch.ops.gradnorm_kernels.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)


def qkv_attention(qkv: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    r"""Self-attention of query, key and value in one tensor, as one linear layer makes them.

    :func:`scaled_dot_product_attention` of ``qkv.unbind(-3)``, with the heads before the tokens. Its
    gradient is one tensor too, which saves the copies that would gather the gradients of the three.

    Args:
        qkv: ``(..., N, 3, heads, E)``; float16, bfloat16, float32 or float64, of any strides.
        attn_mask: as there, broadcast to ``(..., heads, N, N)``.
        scale: the factor of the scores, by default ``E ** -0.5``.

    Returns:
        ``(..., N, heads, E)``, contiguous.

    Raises:
        TypeError: if a dtype is not one of the four.
        ValueError: if the shapes do not match.
    """
    attn_mask = _additive(attn_mask, qkv)
    if torch.compiler.is_exporting():
        query, key, value = qkv.transpose(-4, -2).unbind(-3)
        return _plain_attention(query, key, value, attn_mask, 0.0, scale).transpose(-3, -2)
    return torch.ops.gradnorm_kernels.qkv_attention(qkv, attn_mask, scale=scale)


def _repeat_heads(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    if min(tensor.dim(), query.dim()) < 3 or tensor.shape[-3] == 0 or query.shape[-3] % tensor.shape[-3]:
        raise ValueError(
            f"scaled_dot_product_attention: expected {name} to have a divisor of query's heads where "
            f"enable_gqa is True, got shapes {tuple(tensor.shape)} and {tuple(query.shape)}"
        )
    times = query.shape[-3] // tensor.shape[-3]
    return tensor if times == 1 else tensor.repeat_interleave(times, -3)


def _additive(attn_mask: Tensor | None, like: Tensor) -> Tensor | None:
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return additive_mask(attn_mask, like.dtype)


def additive_mask(takes_part: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key takes part, minus infinity elsewhere."""
    return torch.zeros_like(takes_part, dtype=dtype).masked_fill_(~takes_part, -torch.inf)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + attn_mask
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return torch.nn.functional.dropout(weights.to(value.dtype), dropout_p) @ value


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    The products are ATen's. What differs is the memory between the passes: an operand that an activation, a
    normalisation or the backward of an activation, LayerNorm or RMSNorm of this package computed is not kept,
    but computed again from what these keep, unless it was changed in place or hooks on saved tensors are set.
    :func:`conv1d` and its kin do the same. The third order and ``torch.func`` transforms are exact; in a
    region compiled by ``torch.compile``, and for other dtypes and layouts than those below, this is PyTorch's
    function.

    Args:
        input: ``(..., in_features)``, strided; float16, bfloat16, float32 or float64.
        weight: ``(out_features, in_features)``, of ``input``'s dtype.
        bias: ``(out_features,)``, of ``input``'s dtype.

    Returns:
        ``(..., out_features)``, of ``input``'s dtype.

    Raises:
        TypeError: if ``weight`` or ``bias`` has another dtype than ``input``.
        ValueError: if shapes do not match.
    """
    ours = input.is_floating_point() and input.layout == torch.strided and weight.layout == torch.strided
    # Quantised weights know torch.nn.functional.linear by that name.
    ours = ours and not torch.overrides.has_torch_function((input, weight, bias))
    if not ours or torch.compiler.is_compiling():
        return torch.nn.functional.linear(input, weight, bias)
    output: Tensor = torch.ops.gradnorm_kernels.linear(input, weight, bias)
    return output


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
    groups there are: PyTorch's own takes one for every group. The convolutions are ATen's, in a region
    compiled by ``torch.compile`` too. The third order and ``torch.func`` transforms are exact; in
    ``torch.export``, and for other dtypes and layouts than those below, this is PyTorch's function.

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
        if not isinstance(setting, Sequence):
            return (setting,) * dims
        return tuple(setting) * dims if len(setting) == 1 else setting

    transposed = output_padding is not None
    strides, dilations = per_dimension(stride), per_dimension(dilation)
    same = padding == "same" and all(step == 1 for step in strides)
    same = same and len(dilations) == dims == weight.dim() - 2
    ours = input.is_floating_point() and input.layout == torch.strided and input.dim() - dims in (1, 2)
    # Arguments that PyTorch's function rejects are left for it to reject.
    ours = ours and (same or padding == "valid" or not isinstance(padding, str))
    # Traced sizes of the weight are no padding that our op takes.
    ours = ours and not (same and torch.jit.is_tracing())
    if not ours or torch.compiler.is_exporting():
        extra = {"output_padding": output_padding} if transposed else {}
        return stock(
            input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, **extra
        )
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


def glu(input: Tensor, dim: int = -1) -> Tensor:
    r"""Gated linear unit, as :func:`torch.nn.functional.glu`: :math:`a\,\sigma(b)` of the halves :math:`a`
    and :math:`b` of ``input`` along ``dim`` (Dauphin et al. 2017, arXiv:1612.08083). Otherwise as
    :func:`swiglu`.

    Raises:
        RuntimeError: if ``input`` has no dimensions, or an odd size along ``dim``.
    """
    if torch.compiler.is_compiling() or input.dim() == 0 or input.shape[dim] % 2:
        return torch.nn.functional.glu(input, dim)
    half = input.shape[dim] // 2
    return _gated_unit(input.narrow(dim, half, half), input.narrow(dim, 0, half), "sigmoid")


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    r""":math:`\operatorname{silu}(gate)\,value` (Shazeer 2020, arXiv:2002.05202) in one kernel, and one for
    each derivative: the backward reads three tensors and writes two, the double backward five and three.

    Args:
        gate, value: of one shape and any strides; float16, bfloat16, float32 or float64, of two the wider
            one. Arithmetic is done in float32 (float64 for float64).

    Raises:
        TypeError: if a dtype is none of the four.
        ValueError: if the shapes differ.
    """
    return _gated_unit(gate, value, "silu")


def geglu(gate: Tensor, value: Tensor, approximate: str = "none") -> Tensor:
    r""":math:`\operatorname{gelu}(gate)\,value` (Shazeer 2020, arXiv:2002.05202), with :func:`gelu`'s
    ``approximate``; otherwise as :func:`swiglu`.

    Raises:
        ValueError: also if ``approximate`` is neither ``"none"`` nor ``"tanh"``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: expected approximate to be 'none' or 'tanh', got {approximate!r}")
    return _gated_unit(gate, value, f"gelu_{approximate}")


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu_none": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


def _gated_unit(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _GATES[activation](gate) * value
    if gate.dtype != value.dtype:
        dtype = torch.promote_types(gate.dtype, value.dtype)
        gate, value = gate.to(dtype), value.to(dtype)
    return torch.ops.gradnorm_kernels.gated_unit(gate, value, activation)


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    r"""The weight :math:`g\,v / \lVert v \rVert` of weight normalisation (Salimans and Kingma 2016,
    arXiv:1602.07868), as ``torch.nn.utils.parametrizations.weight_norm`` computes it.

    Right to every order: the second derivative of PyTorch's own takes the norm for a constant. Where ``dim``
    is the first or the last, forward and first backward are PyTorch's kernels, and the double backward reads
    three tensors and writes two in one kernel; else all is plain ops.

    Args:
        v: the direction.
        g: the length, of size 1 in all dimensions but ``dim``; without dimensions where ``dim`` is None.
        dim: the dimension that keeps a norm for each index; None or -1 for one norm of all.

    Raises:
        TypeError: if a dtype is none of float16, bfloat16, float32 and float64, or the two differ.
        ValueError: if ``g`` has another shape.
    """
    if dim is None or dim not in (0, v.dim() - 1):
        return v * (g / torch.norm_except_dim(v, 2, -1 if dim is None else dim))
    return torch.ops.gradnorm_kernels.weight_norm(v, g, dim)
