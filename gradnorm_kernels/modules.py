"""Drop-ins for ``torch.nn`` modules, built on :mod:`gradnorm_kernels.functional`.

Each is a subclass of the module that it replaces, with its arguments, attributes and ``state_dict``. The
activations also serve as timm's ``act_layer``: they take ``inplace``, and always return a new tensor, since
every derivative is computed from the input.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _WeightNorm

from . import functional

__all__ = [
    "FusedBatchNorm1d",
    "FusedBatchNorm2d",
    "FusedBatchNorm3d",
    "FusedCELU",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedCosineSimilarity",
    "FusedCrossEntropyLoss",
    "FusedELU",
    "FusedGLU",
    "FusedGeLU",
    "FusedGroupNorm",
    "FusedHardsigmoid",
    "FusedHardswish",
    "FusedInstanceNorm1d",
    "FusedInstanceNorm2d",
    "FusedInstanceNorm3d",
    "FusedLayerNorm",
    "FusedLeakyReLU",
    "FusedLinear",
    "FusedLogSigmoid",
    "FusedLogSoftmax",
    "FusedMish",
    "FusedMultiheadAttention",
    "FusedPairwiseDistance",
    "FusedQuickGELU",
    "FusedRMSNorm",
    "FusedReLU",
    "FusedReLU6",
    "FusedSELU",
    "FusedSiLU",
    "FusedSigmoid",
    "FusedSoftmax",
    "FusedSoftplus",
    "FusedSoftsign",
    "FusedTanh",
    "FusedWeightNorm",
]


class FusedGeLU(nn.GELU):
    """:class:`torch.nn.GELU` with fused forward, backward and double backward.

    Args:
        approximate: ``"none"`` (erf) or ``"tanh"``.
        inplace: accepted because timm passes it, and ignored.

    Raises:
        ValueError: if ``approximate`` is neither ``"none"`` nor ``"tanh"``.
    """

    def __init__(self, approximate: str = "none", inplace: bool = False) -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"FusedGeLU: expected approximate to be 'none' or 'tanh', got {approximate!r}")
        super().__init__(approximate)

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)


class FusedSiLU(nn.SiLU):
    """:class:`torch.nn.SiLU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input)


class FusedQuickGELU(nn.Module):
    """timm's ``QuickGELU`` with fused forward, backward and double backward."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class FusedMish(nn.Mish):
    """:class:`torch.nn.Mish` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.mish(input)


class FusedSoftplus(nn.Softplus):
    """:class:`torch.nn.Softplus` with fused forward, backward and double backward."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0, inplace: bool = False) -> None:
        super().__init__(beta, threshold)

    def forward(self, input: Tensor) -> Tensor:
        return functional.softplus(input, self.beta, self.threshold)


class FusedELU(nn.ELU):
    """:class:`torch.nn.ELU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha)


class FusedCELU(nn.CELU):
    """:class:`torch.nn.CELU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.celu(input, self.alpha)


class FusedSELU(nn.SELU):
    """:class:`torch.nn.SELU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.selu(input)


class FusedLeakyReLU(nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope)


class FusedReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` whose double backward writes no zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input)


class FusedReLU6(nn.ReLU6):
    """:class:`torch.nn.ReLU6` whose double backward writes no zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input)


class FusedHardswish(nn.Hardswish):
    """:class:`torch.nn.Hardswish` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input)


class FusedHardsigmoid(nn.Hardsigmoid):
    """:class:`torch.nn.Hardsigmoid` with the double backward that PyTorch lacks."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input)


class FusedTanh(nn.Tanh):
    """:class:`torch.nn.Tanh` with fused forward, backward and double backward."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class FusedSigmoid(nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` with fused forward, backward and double backward."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class FusedSoftsign(nn.Softsign):
    """:class:`torch.nn.Softsign` with fused forward, backward and double backward."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.softsign(input)


class FusedLogSigmoid(nn.LogSigmoid):
    """:class:`torch.nn.LogSigmoid` with fused forward, backward and double backward."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class FusedSoftmax(nn.Softmax):
    """:class:`torch.nn.Softmax` with a fused double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim) if self.dim is None else functional.softmax(input, self.dim)


class FusedGLU(nn.GLU):
    """:class:`torch.nn.GLU` with fused forward, backward and double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.glu(input, self.dim)


class FusedLogSoftmax(nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` with a fused double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim)


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` with fused forward, backward and double backward."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class FusedCosineSimilarity(nn.CosineSimilarity):
    """:class:`torch.nn.CosineSimilarity` with fused passes, finite for rows of zeros."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return functional.cosine_similarity(x1, x2, self.dim, self.eps)


class FusedPairwiseDistance(nn.PairwiseDistance):
    """:class:`torch.nn.PairwiseDistance` with a fused double backward, finite for rows of zeros."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return functional.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class FusedLayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with a fused double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class FusedRMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` with fused forward, backward and double backward."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class FusedGroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with a fused double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _FusedInstanceNorm(_InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class FusedInstanceNorm1d(_FusedInstanceNorm, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` with a fused double backward."""


class FusedInstanceNorm2d(_FusedInstanceNorm, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` with a fused double backward."""


class FusedInstanceNorm3d(_FusedInstanceNorm, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` with a fused double backward."""


def batch_norm_arguments(module: _BatchNorm) -> dict[str, Any]:
    """What ``module.forward`` passes to :func:`torch.nn.functional.batch_norm`; counts the batch."""
    tracks = module.track_running_stats
    momentum = module.momentum or 0.0
    if module.training and tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    uses_running_stats = not module.training or tracks
    return {
        "running_mean": module.running_mean if uses_running_stats else None,
        "running_var": module.running_var if uses_running_stats else None,
        "weight": module.weight,
        "bias": module.bias,
        "training": module.training or (module.running_mean is None and module.running_var is None),
        "momentum": momentum,
        "eps": module.eps,
    }


class _FusedBatchNorm(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return functional.batch_norm(input, **batch_norm_arguments(self))


class FusedBatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with a fused double backward, in train and eval mode."""


class FusedBatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with a fused double backward, in train and eval mode."""


class FusedBatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with a fused double backward, in train and eval mode."""


def batch_norm_act(norm: nn.Module, act: nn.Module, input: Tensor) -> Tensor:
    """``act(norm(input))``, as one op where there is one and no hook looks at what is between the two."""
    activation = activation_of_batch_norm(act, input)
    if activation is None or not isinstance(norm, _FusedBatchNorm) or has_hooks(norm):
        return act(norm(input))  # type: ignore[no-any-return]
    norm._check_input_dim(input)
    return functional.batch_norm_act(input, **batch_norm_arguments(norm), **activation)


def activation_of_batch_norm(act: nn.Module, input: Tensor) -> dict[str, Any] | None:
    """What :func:`functional.batch_norm_act` takes of it. None for other activations, for those with hooks,
    and for float16 on a CPU, which computes them faster in two ops."""
    kind = type(act)
    if kind not in _OF_BATCH_NORM or has_hooks(act) or (input.is_cpu and input.dtype == torch.float16):
        return None
    if kind is FusedGeLU:
        return {"activation": f"gelu_{act.approximate}"}
    params = [act.negative_slope] if kind is FusedLeakyReLU else []
    return {"activation": _OF_BATCH_NORM[kind], "params": params}


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_OF_BATCH_NORM: dict[type[nn.Module], str] = {
    FusedGeLU: "gelu",
    FusedHardswish: "hardswish",
    FusedLeakyReLU: "leaky_relu",
    FusedMish: "mish",
    FusedReLU: "relu",
    FusedReLU6: "relu6",
    FusedSiLU: "silu",
}


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` in which an activation after a batch normalisation is one op with it."""

    def forward(self, input: Any) -> Any:
        todo = list(self)
        while todo:
            module = todo.pop(0)
            if todo and isinstance(module, _FusedBatchNorm):
                input = batch_norm_act(module, todo.pop(0), input)
            else:
                input = module(input)
        return input


def has_pair(sequence: Iterable[nn.Module], replacements: Mapping[type[nn.Module], tuple[type, Any]]) -> bool:
    """Whether, after these replacements of the modules, :class:`FusedSequential` has something to do."""
    kinds = [replacements.get(type(module), (type(module), None))[0] for module in sequence]
    pairs = itertools.pairwise(kinds)
    return any(issubclass(norm, _FusedBatchNorm) and act in _OF_BATCH_NORM for norm, act in pairs)


class _FusedConv(nn.modules.conv._ConvNd):
    """The padding modes other than zeros pad first, as PyTorch's own modules do."""

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        if self.padding_mode == "zeros":
            return input, self.padding
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return padded, 0


class FusedConv1d(_FusedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` whose double backward is at most three convolution calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class FusedConv2d(_FusedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` whose double backward is at most three convolution calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class FusedConv3d(_FusedConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` whose double backward is at most three convolution calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._padded(input)
        return functional.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class FusedLinear(nn.Linear):
    """:class:`torch.nn.Linear` that computes operands again which normalisations and activations computed."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class FusedMultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` that can be differentiated twice, with a fused double backward.

    Calls that ask for ``need_weights`` (the default), unbatched or nested input and the options
    ``add_bias_kv`` and ``add_zero_attn`` run PyTorch's own forward.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        plain = query.dim() == 3 and not query.is_nested and self.bias_k is None and not self.add_zero_attn
        if need_weights or not plain or (is_causal and attn_mask is None):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        first = query if self.batch_first else query.transpose(0, 1)
        batch, heads = first.shape[0], self.num_heads
        # is_causal only says what the mask is.
        mask = _attention_mask(attn_mask, key_padding_mask, batch, heads, query.dtype)
        dropout = self.dropout if self.training else 0.0
        if query is key and key is value and self._qkv_same_embed_dim and not dropout:
            qkv = F.linear(first, self.in_proj_weight, self.in_proj_bias)
            output = functional.qkv_attention(qkv.unflatten(-1, (3, heads, self.head_dim)), mask)
        else:
            tensors = first, *(t if self.batch_first else t.transpose(0, 1) for t in (key, value))
            weights: Any = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            weights = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else weights
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (
                F.linear(t, weight, bias).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
                for t, weight, bias in zip(tensors, weights, biases, strict=True)
            )
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)
        output = self.out_proj(output.flatten(2))
        return output if self.batch_first else output.transpose(0, 1), None


class FusedWeightNorm(_WeightNorm):
    """What ``torch.nn.utils.parametrizations.weight_norm`` registers, with the right second derivative."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return functional.weight_norm(weight_v, weight_g, self.dim)


def _attention_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """The sum of (L, S) or (N * heads, L, S) and (N, S), of which a bool says where no key takes part."""

    def additive(mask: Tensor) -> Tensor:
        if mask.is_floating_point():
            return mask.to(dtype)
        if mask.dtype != torch.bool:
            raise TypeError(f"MultiheadAttention: expected bool or floating masks, got {mask.dtype}")
        return functional.additive_mask(~mask, dtype)

    masks = []
    if attn_mask is not None:
        masks.append(additive(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))))
    if key_padding_mask is not None:
        masks.append(additive(key_padding_mask)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


class _PiecewiseLinear(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        functional._piecewise_linear(result[0] if isinstance(result, tuple) else result)
        return result


def _piecewise_linear(kind: type[nn.Module]) -> type[nn.Module]:
    name = f"Fused{kind.__name__}"
    doc = f":class:`torch.nn.{kind.__name__}` whose input gets no zeros for a second derivative."
    fused = type(name, (_PiecewiseLinear, kind), {"__doc__": doc, "__module__": __name__})
    globals()[name] = fused  # where pickle looks for it
    return fused


_PIECEWISE_LINEAR = [
    _piecewise_linear(kind)
    for kind in (
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.Hardshrink,
        nn.Hardtanh,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.ReflectionPad1d,
        nn.ReflectionPad2d,
        nn.ReflectionPad3d,
        nn.ReplicationPad1d,
        nn.ReplicationPad2d,
        nn.ReplicationPad3d,
        nn.Softshrink,
        nn.Threshold,
    )
]

# What fuse() swaps.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    fused.__bases__[-1]: fused
    for fused in (
        FusedBatchNorm1d,
        FusedBatchNorm2d,
        FusedBatchNorm3d,
        FusedCELU,
        FusedConv1d,
        FusedConv2d,
        FusedConv3d,
        FusedCosineSimilarity,
        FusedCrossEntropyLoss,
        FusedELU,
        FusedGLU,
        FusedGeLU,
        FusedGroupNorm,
        FusedHardsigmoid,
        FusedHardswish,
        FusedInstanceNorm1d,
        FusedInstanceNorm2d,
        FusedInstanceNorm3d,
        FusedLayerNorm,
        FusedLeakyReLU,
        FusedLinear,
        FusedLogSigmoid,
        FusedLogSoftmax,
        FusedMish,
        FusedMultiheadAttention,
        FusedPairwiseDistance,
        FusedRMSNorm,
        FusedReLU,
        FusedReLU6,
        FusedSELU,
        FusedSiLU,
        FusedSigmoid,
        FusedSoftmax,
        FusedSoftplus,
        FusedSoftsign,
        FusedTanh,
        FusedWeightNorm,
        *_PIECEWISE_LINEAR,
    )
}
