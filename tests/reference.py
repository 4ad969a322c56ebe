r"""The forward of every op in plain differentiable PyTorch: the yardstick of the tests.

Run in float64, and differentiated by autograd: each function is of operations whose derivatives of any order
are right and lose nothing to cancellation. Nothing here casts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def all_orders(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad_output: Tensor,
    grad_grads: Sequence[Tensor | None],
    of: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """The output; the gradients of the inputs; and, of those, the gradients of grad_output and the inputs.

    Args:
        function: of the inputs.
        inputs: an optional one may be None. It has no gradient then.
        grad_grads: one for the gradient of each input. None is an undefined one.
        of: the positions of the inputs whose first gradients are computed; by default all.

    Returns:
        Three lists. The second has a gradient for every input that is given and of ``of``; the third for
        grad_output and every input that is given, zeros where nothing leads to it.
    """
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    grad_output = grad_output.detach().requires_grad_()
    chosen = [k for k in (range(len(inputs)) if of is None else of) if inputs[k] is not None]
    output = function(*inputs)
    first = torch.autograd.grad(output, [inputs[k] for k in chosen], grad_output, create_graph=True)
    pairs = [(f, grad_grads[k]) for f, k in zip(first, chosen, strict=True) if grad_grads[k] is not None]
    leaves = [grad_output, *(t for t in inputs if t is not None)]
    second = [torch.zeros_like(t) for t in leaves]
    pairs = [(f, v) for f, v in pairs if f.requires_grad]
    if pairs:
        gradients, incoming = zip(*pairs, strict=True)
        # A second run finds out a graph that wrote into what it saved.
        for _ in range(2):
            second = torch.autograd.grad(
                gradients, leaves, incoming, retain_graph=True, allow_unused=True, materialize_grads=True
            )
    return [[output.detach()], [f.detach() for f in first], list(second)]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    r"""``"none"``: :math:`x \Phi(x)`. ``"tanh"``: :math:`x\,\sigma(v)` with
    :math:`v = 2\sqrt{2/\pi}\,(x + 0.044715 x^3)`, which equals :math:`\tfrac12 x (1 + \tanh(v/2))`.
    """
    if approximate == "none":
        return input * torch.special.erfc(-input / math.sqrt(2)) / 2
    return input * sigmoid(2 * math.sqrt(2 / math.pi) * (input + 0.044715 * input**3))


def silu(input: Tensor) -> Tensor:
    return input * sigmoid(input)


def quick_gelu(input: Tensor) -> Tensor:
    return input * sigmoid(1.702 * input)


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
    return torch.tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    r""":math:`1 / (1 + e^{-x})`."""
    d = _decay(input)
    return torch.where(input > 0, 1, d) / (1 + d)


def _decay(x: Tensor) -> Tensor:
    r""":math:`e^{-|x|}`, as :math:`e^x` or :math:`e^{-x}`: derivatives through :math:`|x|` are wrong at 0."""
    return torch.where(x > 0, -x, x).exp()


def relu(input: Tensor) -> Tensor:
    return leaky_relu(input, 0.0)


def squared_relu(input: Tensor) -> Tensor:
    return relu(input).square()


def sin(input: Tensor, frequency: float = 1.0) -> Tensor:
    return torch.sin(frequency * input)


def cos(input: Tensor, frequency: float = 1.0) -> Tensor:
    return torch.cos(frequency * input)


def relu6(input: Tensor) -> Tensor:
    return torch.where(input < 6, relu(input), 6)


def leaky_relu(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(input > 0, input, negative_slope * input)


def hardsigmoid(input: Tensor) -> Tensor:
    r""":math:`(x + 3) / 6` between -3 and 3, where it is 0 and 1."""
    # Not of relu6(x + 3): rounding of the sum would move the kinks.
    return torch.where(input <= -3, 0, torch.where(input >= 3, 1, (input + 3) / 6))


def hardswish(input: Tensor) -> Tensor:
    return input * hardsigmoid(input)


def softsign(input: Tensor) -> Tensor:
    r""":math:`x / (1 + |x|) = \mathrm{sgn}(x) (1 - 1 / (1 + |x|))`: the derivatives of the one cancel far
    from 0, and the other itself does near it.
    """
    size = input.abs()
    return torch.where(size < 1, input / (1 + size), input.sign() * (1 - 1 / (1 + size)))


def logsigmoid(input: Tensor) -> Tensor:
    r""":math:`\log \sigma(x) = \min(x, 0) - \log(1 + e^{-|x|})`."""
    return torch.where(input > 0, 0, input) - _decay(input).log1p()


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(_normalized(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    r""":math:`x (\langle x^2 \rangle + \epsilon)^{-1/2}`, times the weight. The eps that PyTorch takes for
    None is of the dtype it computes in: give it where this is run in another.
    """
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalized(input, dims, eps, centred=False), weight, None)


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float = 1e-5,
) -> Tensor:
    """In training the statistics are the batch's, for each channel: the second dimension."""
    if training or mean is None or var is None:
        normalized = _normalized(input, (0, *range(2, input.ndim)), eps)
    else:
        normalized = (input - _per_channel(mean, input)) * (_per_channel(var, input) + eps).rsqrt()
    return _affine(normalized, _per_channel(weight, input), _per_channel(bias, input))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = input.unflatten(1, (num_groups, input.shape[1] // num_groups))
    normalized = _normalized(groups, tuple(range(2, groups.ndim)), eps).flatten(1, 2)
    return _affine(normalized, _per_channel(weight, input), _per_channel(bias, input))


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(a: Tensor | None, like: Tensor) -> Tensor | None:
    return a if a is None else a.reshape(-1, *[1] * (like.ndim - 2))


def softmax(input: Tensor, dim: int, bias: Tensor | None = None) -> Tensor:
    x = input if bias is None else input + bias
    exponentials = torch.exp(x - x.amax(dim, keepdim=True).detach()) if x.numel() else x
    return exponentials / exponentials.sum(dim, keepdim=True)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    r""":math:`x_i - \log \sum_j e^{x_j}`."""
    shifted = input - input.detach().amax(dim, keepdim=True) if input.numel() else input
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r""":math:`-\sum_c w_c q_c \log p_c`, of classes with 0 for -100."""
    dim = min(input.ndim, 2) - 1
    n = input.shape[dim]
    w = torch.ones(n, dtype=input.dtype, device=input.device) if weight is None else weight
    if target.is_floating_point():
        q, counted = target, torch.ones(target.sum(dim).shape, dtype=input.dtype, device=input.device)
    else:
        classes = target.clamp(min=0)
        q = torch.nn.functional.one_hot(classes, n).movedim(-1, dim).to(input.dtype)
        kept = target != -100
        counted = w[classes] * kept
    q = ((1 - label_smoothing) * q + label_smoothing / n) * w.view(n, *[1] * (input.ndim - dim - 1))
    losses = -(q * log_softmax(input, dim)).sum(dim)
    if not target.is_floating_point():
        losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


def normalize(input: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Of rows shorter than ``eps`` a quotient by it."""
    is_short = input.detach().square().sum(dim, keepdim=True).sqrt() < eps
    long_rows = input.masked_fill(is_short, 1)
    norm = long_rows.square().sum(dim, keepdim=True).sqrt()
    return torch.where(is_short, input / eps, long_rows / norm)


def vector_norm(input: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """With derivatives of 0 at rows of zeros."""
    is_zero = input.detach().square().sum(dim, keepdim=True) == 0
    norm = input.masked_fill(is_zero, 1).square().sum(dim, keepdim).sqrt()
    return norm.masked_fill(is_zero.view_as(norm), 0)


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Of the slices of ``v`` along ``dim``, each made as long as ``g`` says."""
    slices = v.movedim(dim, 0).flatten(1) if v.ndim > 1 else v[:, None]
    return v * (g / slices.square().sum(1).sqrt().view(g.shape))


def cdist(x1: Tensor, x2: Tensor, p: float) -> Tensor:
    """With derivatives of 0 at distances of 0."""
    differences = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 1:
        return differences.abs().sum(-1)
    squared = differences.square().sum(-1)
    is_zero = squared.detach() == 0
    return squared.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r""":math:`P V` of :math:`P = \mathrm{softmax}(s Q K^\top + M)`, whose rows are 0 where every score is
    :math:`-\infty`.
    """
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.mT
    if attn_mask is None:
        return softmax(scores, -1) @ value
    scores = scores + attn_mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0) @ value


def qkv_attention(qkv: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    query, key, value = qkv.transpose(-4, -2).unbind(-3)
    return scaled_dot_product_attention(query, key, value, attn_mask, scale).transpose(-3, -2)


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Sums over the corners of the cell that a point is in: 0 outside of the input."""
    cells = []
    for size, g in zip(reversed(input.shape[2:]), grid.unbind(-1), strict=True):
        span = size - 1 if align_corners else size
        first = 0.0 if align_corners else -0.5
        x = (g + 1) * (span / 2) + first
        if padding_mode == "reflection":
            way = torch.where(x < first, first - x, x - first)
            way = way - 2 * span * (way.detach() / max(2 * span, 1)).floor()
            x = first + torch.where(way > span, 2 * span - way, way)
        if padding_mode != "zeros":
            moves = (x > 0) & (x < size - 1)
            x = x.detach().clamp(0, size - 1) + moves * (x - x.detach())
        lower = x.detach().round() if mode == "nearest" else x.detach().floor()
        cells.append((size, lower, x - lower))
    pixels = torch.cat([input.flatten(2), torch.zeros_like(input.flatten(2)[..., :1])], -1)

    def corner(upper: Sequence[int]) -> Tensor:
        index, stride, inside = 0, 1, True
        for (size, lower, _), place in zip(cells, upper, strict=True):
            inside = inside & (lower + place >= 0) & (lower + place < size)
            index, stride = index + stride * (lower + place), stride * size
        index = torch.where(inside, index, stride).long().flatten(1).unsqueeze(1)
        return pixels.gather(2, index.expand(-1, input.shape[1], -1)).unflatten(2, grid.shape[1:-1])

    if mode == "nearest":
        # Zeros that are a function of the grid, as PyTorch's gradient of it is.
        nothing = torch.where(torch.zeros_like(grid, dtype=torch.bool), grid, 0).sum(-1)
        return corner((0,) * len(cells)) + nothing.unsqueeze(1)
    output = 0
    for upper in itertools.product((0, 1), repeat=len(cells)):
        weights = [t if place else 1 - t for (_, _, t), place in zip(cells, upper, strict=True)]
        output = output + corner(upper) * math.prod(weights).unsqueeze(1)
    return output


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = (input.unsqueeze(-2) * weight).sum(-1)
    return output if bias is None else output + bias


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Sums over windows of the padded input. Transposed: the gradient of those sums.

    Args:
        input: ``(N, C, ...)``.
        weight: ``(C', C / groups, ...)``; transposed: ``(C, C' / groups, ...)``.
        bias: ``(C',)``.
        stride, padding, dilation, output_padding: one int for each spatial dimension.
    """
    settings = (stride, padding, dilation, groups)
    if not transposed:
        output = _sums_over_windows(input, weight, *settings)
    else:
        sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in sizes]
        # An output_padding as large as the stride leaves room for more windows.
        inner = (..., *(slice(n) for n in input.shape[2:]))
        image = input.new_zeros(input.shape[0], weight.shape[1] * groups, *size)
        _, transpose = torch.func.vjp(lambda x: _sums_over_windows(x, weight, *settings)[inner], image)
        (output,) = transpose(input)
    return output if bias is None else output + bias.view(-1, *[1] * len(stride))


def _sums_over_windows(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x = torch.nn.functional.pad(x, [p for side in reversed(padding) for p in (side, side)])
    windows = x.unflatten(1, (groups, x.shape[1] // groups))
    for dim, (k, s, d) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True), start=3):
        windows = windows.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    weight = weight.unflatten(0, (groups, weight.shape[0] // groups))
    positions, taps = "xyz"[: len(stride)], "hij"[: len(stride)]
    sums = torch.einsum(f"ngc{positions}{taps},goc{taps}->ngo{positions}", windows, weight)
    return sums.flatten(1, 2)


def recurrent_step(cell: str, gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the next state of a cell's step. The gates are sums of products: an LSTM's as PyTorch
    orders them; a GRU's are reset, update, and the two parts of the new state's."""
    a, b, c, d = gates.chunk(4, -1)
    if cell == "lstm":
        next_state = b.sigmoid() * state + a.sigmoid() * c.tanh()
        return d.sigmoid() * next_state.tanh(), next_state
    new = (c + a.sigmoid() * d).tanh()
    hidden = (1 - b.sigmoid()) * new + b.sigmoid() * state
    return hidden, hidden
