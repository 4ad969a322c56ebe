"""Drop-ins for timm's own modules; imports timm, and is imported by ``fuse`` when a model has such modules.

Each is a subclass of timm's class whose ``forward`` differs only in the functions that it calls. Most are
:class:`_CallsOurs` alone, which calls ours in timm's own code.
"""

import dis
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import timm.layers
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import (
    EvoNorm2dS0,
    EvoNorm2dS0a,
    EvoNorm2dS1,
    EvoNorm2dS1a,
    EvoNorm2dS2,
    EvoNorm2dS2a,
    norm_act,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2dFp32, LayerNormFp32, RmsNorm2dFp32, RmsNormFp32
from timm.layers.padding import pad_same
from timm.models import checkpoint_seq
from timm.models.eva import EvaAttention
from timm.models.hgnet import LearnableAffineBlock
from timm.models.mambaout import GatedConvBlock
from timm.models.metaformer import StarReLU
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from . import functional, modules

__all__ = ["REPLACEMENTS"]


class FusedTimmLayerNorm(timm.layers.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class FusedLayerNormFp32(LayerNormFp32):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class FusedLayerNorm2d(timm.layers.LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm_2d(x, self.weight, self.bias, self.eps)


class FusedLayerNorm2dFp32(LayerNorm2dFp32):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return functional.layer_norm_2d(x.float(), weight, bias, self.eps).to(x.dtype)


class FusedRmsNorm(timm.layers.RmsNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class FusedRmsNormFp32(RmsNormFp32):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None else self.weight.float()
        return functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class FusedRmsNorm2d(timm.layers.RmsNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return FusedRmsNorm.forward(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[arg-type]


class FusedRmsNorm2dFp32(RmsNorm2dFp32):
    def forward(self, x: Tensor) -> Tensor:
        return FusedRmsNormFp32.forward(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[arg-type]


def _gated(act: nn.Module, gate: Tensor, value: Tensor) -> Tensor:
    """``act(gate) * value``, in one kernel for the activations that gate in practice."""
    if type(act) in (nn.GELU, modules.FusedGeLU):
        return functional.geglu(gate, value, act.approximate)  # type: ignore[arg-type]
    if type(act) in (nn.SiLU, modules.FusedSiLU):
        return functional.swiglu(gate, value)
    return act(gate) * value


class FusedGluMlp(timm.layers.GluMlp):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=self.chunk_dim)
        gate, value = (second, first) if self.gate_last else (first, second)
        x = self.norm(self.drop1(_gated(self.act, gate, value)))
        return self.drop2(self.fc2(x))


class FusedSwiGLU(timm.layers.SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(_gated(self.act, self.fc1_g(x), self.fc1_x(x))))
        return self.drop2(self.fc2(x))


class FusedGatedConvBlock(GatedConvBlock):
    def forward(self, x: Tensor) -> Tensor:
        gate, plain, convolved = self.fc1(self.norm(x)).split(self.split_indices, dim=-1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.fc2(_gated(self.act, gate, torch.cat((plain, convolved), dim=-1)))
        return x + self.drop_path(self.ls(y))


class FusedTimmGroupNorm(timm.layers.GroupNorm):
    forward = modules.FusedGroupNorm.forward  # type: ignore[assignment]


class FusedGroupNorm1(timm.layers.GroupNorm1):
    forward = modules.FusedGroupNorm.forward  # type: ignore[assignment]


def _affine_arguments(weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    """Of a batch normalisation by 0 and 1, which is ``weight * x + bias`` for each channel."""
    ones, zeros = weight.new_ones(weight.shape), weight.new_zeros(weight.shape)
    return {"running_mean": zeros, "running_var": ones, "weight": weight, "bias": bias, "eps": 0.0}


def _filter_response(norm: Any, x: Tensor, act: nn.Module) -> Tensor:
    """Over the root mean square of each channel's pixels, times a weight of the channel, plus a bias."""
    x = functional.rms_norm(x.flatten(2), (x[0, 0].numel(),), None, norm.eps).view(x.shape)
    arguments = _affine_arguments(norm.weight, norm.bias)
    activation = modules.activation_of_batch_norm(act, x)
    if activation is not None:
        return functional.batch_norm_act(x, **arguments, **activation)
    return act(functional.batch_norm(x, **arguments))  # type: ignore[no-any-return]


class FusedFilterResponseNormAct2d(timm.layers.FilterResponseNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return _filter_response(self, x, self.act)


class FusedFilterResponseNormTlu2d(timm.layers.FilterResponseNormTlu2d):
    def forward(self, x: Tensor) -> Tensor:
        x = _filter_response(self, x, _IDENTITY)
        return x if self.tau is None else torch.maximum(x, self.tau.view(-1, 1, 1).to(x.dtype))


_IDENTITY = nn.Identity()


def _scaled_by_one_number(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    arguments = _affine_arguments(scale.expand(x.shape[1]), bias.expand(x.shape[1]))
    return functional.batch_norm(x, **arguments)


class FusedLearnableAffineBlock(LearnableAffineBlock):
    def forward(self, x: Tensor) -> Tensor:
        return _scaled_by_one_number(x, self.scale, self.bias)


class FusedStarReLU(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return _scaled_by_one_number(functional.squared_relu(x), self.scale, self.bias)


class FusedEcaModule(timm.layers.EcaModule):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return _scaled(x, self.gate(y).view(*x.shape[:2], 1, 1))


class FusedGlobalResponseNorm(GlobalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        norm = functional.vector_norm(x, self.spatial_dim, keepdim=True)
        share = norm / (norm.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        scale = 1 + self.weight.view(self.wb_shape) * share
        return torch.addcmul(self.bias.view(self.wb_shape), x, scale)


class FusedBatchNormAct2d(timm.layers.BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        arguments = modules.batch_norm_arguments(self)
        activation = modules.activation_of_batch_norm(self.act, x)
        if activation is not None and isinstance(self.drop, nn.Identity):
            return functional.batch_norm_act(x, **arguments, **activation)
        return self.act(self.drop(functional.batch_norm(x, **arguments)))


def _norm_drop_act(norm: nn.Module, drop: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    if isinstance(drop, nn.Identity) and not modules.has_hooks(drop):
        return modules.batch_norm_act(norm, act, x)
    return act(drop(norm(x)))  # type: ignore[no-any-return]


def _residual(block: Any, x: Tensor, shortcut: Tensor) -> Tensor:
    """What both blocks of ResNet do after their last normalisation and before their last activation."""
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    x += shortcut
    return x


class FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = _norm_drop_act(self.bn1, self.drop_block, self.act1, self.conv1(x))
        y = self.aa(y)  # type: ignore[misc]
        return self.act2(_residual(self, self.bn2(self.conv2(y)), x))  # type: ignore[no-any-return]


class FusedBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = modules.batch_norm_act(self.bn1, self.act1, self.conv1(x))
        y = _norm_drop_act(self.bn2, self.drop_block, self.act2, self.conv2(y))
        y = self.aa(y)  # type: ignore[misc]
        return self.act3(_residual(self, self.bn3(self.conv3(y)), x))  # type: ignore[no-any-return]


class FusedResNet(ResNet):
    def forward_features(self, x: Tensor) -> Tensor:
        x = modules.batch_norm_act(self.bn1, self.act1, self.conv1(x))
        x = self.maxpool(x)  # type: ignore[operator]
        layers = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(layers, x, flatten=True)  # type: ignore[no-any-return]
        for layer in layers:
            x = layer(x)  # type: ignore[operator]
        return x


class FusedConv2dSame(timm.layers.Conv2dSame):
    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, list(self.weight.shape[-2:]), list(self.stride), list(self.dilation))
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _self_attention(
    self: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    batch, tokens, _ = x.shape
    gate = None if getattr(self, "gate", None) is None else self.gate(x)
    dropout = self.attn_drop.p if self.training else 0.0
    packed = None if self.qkv is None else _qkv(self, x).view(batch, tokens, 3, self.num_heads, self.head_dim)
    plain = rope is None and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
    if plain and packed is not None and not dropout and not is_causal:
        x = functional.qkv_attention(packed, attn_mask, self.scale)
    else:
        if packed is None:
            projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
            query, key, value = (t.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for t in projected)
        else:
            query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            rotate = _rotation(rope, self.num_prefix_tokens, getattr(self, "rotate_half", False))
            query, key = rotate(query).type_as(value), rotate(key).type_as(value)
        x = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout,
            is_causal,
            self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
    x = self.norm(x.flatten(2))
    if gate is not None:
        x = functional._gated_unit(gate, x, "sigmoid")
    return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def _qkv(attention: Any, x: Tensor) -> Tensor:
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)  # type: ignore[no-any-return]
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:
        return attention.qkv(x) + bias  # type: ignore[no-any-return]
    return functional.linear(x, attention.qkv.weight, bias)


def _rotation(rope: Tensor, prefix: int, half: bool) -> Callable[[Tensor], Tensor]:
    """Of all tokens, those of the prefix by nothing: no slices, whose gradients are padded and added."""
    pairs, first = ((2, -1), -2) if half else ((-1, 2), -1)
    sin, cos = rope.chunk(2, -1)
    sin, cos = F.pad(sin, (0, 0, prefix, 0)), F.pad(cos, (0, 0, prefix, 0), value=1.0)
    of_first, of_second = sin.unflatten(-1, pairs).unbind(first)
    sin = torch.stack([-of_first, of_second], first).flatten(-2)
    return lambda x: x * cos + x.unflatten(-1, pairs).flip(first).flatten(-2) * sin


class FusedAttention(timm.layers.Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return _self_attention(self, x, None, attn_mask, is_causal)


class FusedAttentionRope(timm.layers.AttentionRope):
    forward = _self_attention


class FusedEvaAttention(EvaAttention):
    forward = _self_attention


class FusedWindowAttention(WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training and self.attn_drop.p > 0:
            return super().forward(x, mask)
        windows, tokens, _ = x.shape
        qkv = self.qkv(x).view(windows, tokens, 3, self.num_heads, -1)
        # (heads, tokens, tokens), or with the shift's mask (windows of an image, heads, tokens, tokens).
        bias = self._get_rel_pos_bias()[0]
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
            qkv = qkv.unflatten(0, (-1, mask.shape[0]))
        x = functional.qkv_attention(qkv, bias, self.scale)
        return self.proj_drop(self.proj(x.reshape(windows, tokens, -1)))


@functools.lru_cache(maxsize=64)
def _window_order(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The token of the image that each token of the windows is, and the other way round."""
    # The cache outlives every mode, and what these make of a tensor is of no use outside of them.
    with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
        tokens = torch.arange(height * width, device="cpu").view(height, width)
        tokens = tokens.roll((-shift[0], -shift[1]), (0, 1))
        tokens = tokens.view(height // window[0], window[0], width // window[1], window[1])
        order = tokens.transpose(1, 2).reshape(-1)
        return order.to(device), order.argsort().to(device)


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """Shifts and partitions in one copy, and does not pad by nothing."""

    def _attn(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        # Tensor subclasses (FakeTensor, DTensor) do not mix with the ordinary tensors of the cache.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor
        if traced or height % self.window_size[0] or width % self.window_size[1]:
            return super()._attn(x)
        order, inverse = _window_order(height, width, self.window_size, self.shift_size, x.device)
        windows = torch.ops.gradnorm_kernels.permute_rows(x.flatten(1, 2), order, inverse)
        mask = self.get_attn_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        windows = self.attn(windows.view(-1, self.window_area, channels), mask=mask)
        windows = windows.view(batch, height * width, channels)
        return torch.ops.gradnorm_kernels.permute_rows(windows, inverse, order).view_as(x)


def _group_std(x: Tensor, groups: int, eps: float, centred: bool) -> Tensor:
    """Of each sample and group, once for each of its channels: (N * C,)."""
    rows = x.reshape(x.shape[0], groups, -1)
    rows = rows.float() if rows.dtype.itemsize < 4 else rows
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    variance = functional.vector_norm(rows, -1).square() / rows.shape[-1]
    return (variance + eps).sqrt().repeat_interleave(x.shape[1] // groups, 1).flatten().to(x.dtype)


def _evo_norm(self: Any, x: Tensor) -> Tensor:
    """EvoNorm S: an activation, over the standard deviation of each group."""
    batch, channels = x.shape[:2]
    is_always_normalised = isinstance(self, (EvoNorm2dS0a, EvoNorm2dS1a, EvoNorm2dS2a))
    weight, bias = (p.to(x.dtype).repeat(batch) for p in (self.weight, self.bias))
    y = x.contiguous()
    if self.apply_act or is_always_normalised:
        weight = weight / _group_std(y, self.groups, self.eps, not isinstance(self, EvoNorm2dS2))
    if not self.apply_act:
        pass
    elif hasattr(self, "v"):
        y = functional._gated_unit(_scaled(y, self.v.to(x.dtype).view(1, -1, 1, 1)), y, "sigmoid")
    else:
        y = self.act(y)
    # Each sample has its own scales, as if it had its own channels.
    rows = y.reshape(1, batch * channels, *y.shape[2:])
    return functional.batch_norm(rows, **_affine_arguments(weight, bias)).view(x.shape)


def _norm_act(kind: type[nn.Module], norm: type[nn.Module]) -> type[nn.Module]:
    """Of a normalisation with an activation, given the drop-in of the normalisation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(norm.forward(self, x)))  # type: ignore[no-any-return]

    return _subclass(kind, (kind,), {"forward": forward})


def _subclass(kind: type[nn.Module], bases: tuple[type, ...], members: dict[str, Any]) -> type[nn.Module]:
    # Classes of several of timm's files have the same name. By the qualified one pickle looks for it.
    unique = f"Fused{kind.__name__}_{kind.__module__.rpartition('.')[2]}"
    names = {"__module__": __name__, "__qualname__": unique}
    fused: type[nn.Module] = type(f"Fused{kind.__name__}", bases, members | names)
    globals()[unique] = fused
    return fused


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return functional.softmax(input, dim, dtype=dtype)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(input, inplace=True) if inplace else functional.relu(input)


def _scaled(input: Tensor, other: Any) -> Tensor:
    """``input * other``; where one is a scale of the other's channels, or of each sample's, as a batch
    normalisation, whose double backward is one kernel for the five products and their sums."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or torch.compiler.is_compiling():
        return torch.mul(input, other)
    x, scale = (input, other) if input.numel() >= other.numel() else (other, input)
    if x.dtype != scale.dtype or not x.is_floating_point() or not 2 <= x.dim() <= 4 or x.dim() < scale.dim():
        return torch.mul(input, other)
    shape = (1,) * (x.dim() - scale.dim()) + scale.shape
    scaled = [dim for dim, size in enumerate(shape) if size != 1]
    if any(shape[dim] != x.shape[dim] for dim in scaled):
        return torch.mul(input, other)
    if scaled == [x.dim() - 1]:
        rows = x.reshape(-1, x.shape[-1])
    elif x.dim() == 4 and scaled == [1]:
        rows = x
    elif x.dim() == 4 and scaled == [0, 1] and x.is_contiguous():
        rows = x.view(1, -1, *x.shape[2:])
    else:
        return torch.mul(input, other)
    return functional.batch_norm(rows, **_affine_arguments(scale.flatten())).view(x.shape)


# Of PyTorch's functions and methods those that stand for them, with the same parameters.
_OURS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: functional.batch_norm,
    F.conv2d: functional.conv2d,
    F.gelu: functional.gelu,
    F.group_norm: functional.group_norm,
    F.layer_norm: functional.layer_norm,
    F.linear: functional.linear,
    F.normalize: functional.normalize,
    F.relu: _relu,
    F.rms_norm: functional.rms_norm,
    F.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    F.softmax: functional.softmax,
    Tensor.mul: _scaled,
    Tensor.relu: functional.relu,
    Tensor.sigmoid: functional.sigmoid,
    Tensor.softmax: _softmax,
    Tensor.tanh: functional.tanh,
    torch.relu: functional.relu,
    torch.sigmoid: functional.sigmoid,
    torch.softmax: _softmax,
    torch.tanh: functional.tanh,
}
_NAMES = {function.__name__ for function in _OURS} - {"mul"}
# Those that scale channels: by `mul`, which half of all classes call.
_SCALING = {
    "_efficientnet_blocks.SqueezeExcite",
    "beit.Block",
    "convnext.ConvNeXtBlock",
    "edgenext.ConvBlock",
    "edgenext.SplitTransposeBlock",
    "eva.EvaBlock",
    "fastvit.LayerScale2d",
    "inception_next.MetaNeXtBlock",
    "layer_scale.LayerScale",
    "layer_scale.LayerScale2d",
    "metaformer.Scale",
    "mlp_mixer.ResBlock",
    "rdnet.DenseBlock",
    "squeeze_excite.EffectiveSEModule",
    "squeeze_excite.SEModule",
    "swiftformer.LayerScale2d",
}


class _OurFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _OURS.get(func, func)(*args, **(kwargs or {}))


class _CallsOurs(nn.Module):
    """Calls our functions in the place of PyTorch's, and so do the modules in it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _OurFunctions():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _timm_classes() -> Iterator[type[nn.Module]]:
    for name, file in sorted(sys.modules.items()):
        if name.startswith(("timm.layers.", "timm.models.")):
            for kind in vars(file).values():
                if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == name:
                    yield kind


def _calls_ours(kind: type[nn.Module]) -> bool:
    """Whether its own code calls one of these functions, or scales channels.

    Not that of a class that checkpoints what is in it, which is recomputed outside of its ``forward``.
    """
    methods = [f for k, f in vars(kind).items() if isinstance(f, FunctionType) and k != "__init__"]
    checkpoints = any("checkpoint" in used for f in methods for used in f.__code__.co_names)
    if checkpoints or hasattr(kind, "set_grad_checkpointing"):
        return False
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
    return name in _SCALING or any(map(_calls_one, methods))


def _calls_one(function: FunctionType) -> bool:
    if not _NAMES & {*function.__code__.co_names}:
        return False
    # Not a submodule of that name.
    pairs = itertools.pairwise(dis.get_instructions(function))
    return any(after.argval in _NAMES and before.argval != "self" for before, after in pairs)


# Each class of timm's with its drop-in and the attributes that this needs and the original lacks, or has
# with another value. PyTorch's fused attention cannot be differentiated twice.
REPLACEMENTS: dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]] = {
    timm.layers.activations.GELU: (modules.FusedGeLU, {"approximate": "none"}),
    timm.layers.activations.GELUTanh: (modules.FusedGeLU, {"approximate": "tanh"}),
    timm.layers.activations.HardSigmoid: (modules.FusedHardsigmoid, {}),
    timm.layers.activations.HardSwish: (modules.FusedHardswish, {}),
    timm.layers.activations.Mish: (modules.FusedMish, {"inplace": False}),
    timm.layers.activations.QuickGELU: (modules.FusedQuickGELU, {}),
    timm.layers.activations.Sigmoid: (modules.FusedSigmoid, {}),
    timm.layers.activations.Swish: (modules.FusedSiLU, {}),
    timm.layers.activations.Tanh: (modules.FusedTanh, {}),
    timm.layers.Attention: (FusedAttention, {"fused_attn": False}),
    timm.layers.AttentionRope: (FusedAttentionRope, {"fused_attn": False}),
    timm.layers.BatchNormAct2d: (FusedBatchNormAct2d, {}),
    timm.layers.Conv2dSame: (FusedConv2dSame, {}),
    timm.layers.EcaModule: (FusedEcaModule, {}),
    timm.layers.FilterResponseNormAct2d: (FusedFilterResponseNormAct2d, {}),
    timm.layers.FilterResponseNormTlu2d: (FusedFilterResponseNormTlu2d, {}),
    timm.layers.GluMlp: (FusedGluMlp, {}),
    timm.layers.GroupNorm: (FusedTimmGroupNorm, {}),
    timm.layers.GroupNorm1: (FusedGroupNorm1, {}),
    timm.layers.LayerNorm: (FusedTimmLayerNorm, {}),
    timm.layers.LayerNorm2d: (FusedLayerNorm2d, {}),
    timm.layers.RmsNorm: (FusedRmsNorm, {}),
    timm.layers.RmsNorm2d: (FusedRmsNorm2d, {}),
    timm.layers.SwiGLU: (FusedSwiGLU, {}),
    BasicBlock: (FusedBasicBlock, {}),
    Bottleneck: (FusedBottleneck, {}),
    EvaAttention: (FusedEvaAttention, {"fused_attn": False}),
    GatedConvBlock: (FusedGatedConvBlock, {}),
    GlobalResponseNorm: (FusedGlobalResponseNorm, {}),
    LayerNorm2dFp32: (FusedLayerNorm2dFp32, {}),
    LayerNormFp32: (FusedLayerNormFp32, {}),
    LearnableAffineBlock: (FusedLearnableAffineBlock, {}),
    ResNet: (FusedResNet, {}),
    RmsNorm2dFp32: (FusedRmsNorm2dFp32, {}),
    RmsNormFp32: (FusedRmsNormFp32, {}),
    StarReLU: (FusedStarReLU, {}),
    SwinTransformerBlock: (FusedSwinTransformerBlock, {}),
    WindowAttention: (FusedWindowAttention, {"fused_attn": False}),
}

REPLACEMENTS |= {
    kind: (_norm_act(kind, norm), {})
    for kind, norm in {
        norm_act.GroupNorm1Act: modules.FusedGroupNorm,
        norm_act.GroupNormAct: modules.FusedGroupNorm,
        norm_act.LayerNormAct: modules.FusedLayerNorm,
        norm_act.LayerNormAct2d: FusedLayerNorm2d,
        norm_act.LayerNormAct2dFp32: FusedLayerNorm2dFp32,
        norm_act.LayerNormActFp32: FusedLayerNormFp32,
        norm_act.RmsNormAct: FusedRmsNorm,
        norm_act.RmsNormAct2d: FusedRmsNorm2d,
        norm_act.RmsNormAct2dFp32: FusedRmsNorm2dFp32,
        norm_act.RmsNormActFp32: FusedRmsNormFp32,
    }.items()
}
REPLACEMENTS |= {
    kind: (_subclass(kind, (kind,), {"forward": _evo_norm}), {})
    for kind in (EvoNorm2dS0, EvoNorm2dS0a, EvoNorm2dS1, EvoNorm2dS1a, EvoNorm2dS2, EvoNorm2dS2a)
}
for _kind in _timm_classes():
    _base = _kind.__bases__[0]
    if _kind in REPLACEMENTS:
        pass
    elif _base in REPLACEMENTS | modules.REPLACEMENTS and all(name.startswith("__") for name in vars(_kind)):
        # One with other defaults.
        REPLACEMENTS[_kind] = REPLACEMENTS.get(_base) or (modules.REPLACEMENTS[_base], {})
    elif _calls_ours(_kind):
        # XCiT's fused attention leaves out the dropout.
        _flag = {"fused_attn": _kind is not XCA} if "fused_attn" in _kind.__annotations__ else {}
        REPLACEMENTS[_kind] = _subclass(_kind, (_CallsOurs, _kind), {}), _flag
