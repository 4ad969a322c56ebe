"""Drop-ins for ``torch.nn`` modules, built on :mod:`gradnorm_kernels.functional`.

Each is a subclass of the module that it replaces, with its arguments, attributes and ``state_dict``. The
activations also serve as timm's ``act_layer``: they take ``inplace``, and always return a new tensor, since
every derivative is computed from the input.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from . import functional

__all__ = [
    "FusedBatchNorm1d",
    "FusedBatchNorm2d",
    "FusedBatchNorm3d",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedELU",
    "FusedGeLU",
    "FusedGroupNorm",
    "FusedHardsigmoid",
    "FusedHardswish",
    "FusedInstanceNorm1d",
    "FusedInstanceNorm2d",
    "FusedInstanceNorm3d",
    "FusedLayerNorm",
    "FusedLeakyReLU",
    "FusedMish",
    "FusedRMSNorm",
    "FusedReLU",
    "FusedReLU6",
    "FusedSiLU",
    "FusedSigmoid",
    "FusedSoftmax",
    "FusedSoftplus",
    "FusedTanh",
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


class FusedSoftmax(nn.Softmax):
    """:class:`torch.nn.Softmax` with a fused double backward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim) if self.dim is None else functional.softmax(input, self.dim)


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


# What fuse() swaps.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    fused.__bases__[-1]: fused
    for fused in (
        FusedBatchNorm1d,
        FusedBatchNorm2d,
        FusedBatchNorm3d,
        FusedConv1d,
        FusedConv2d,
        FusedConv3d,
        FusedELU,
        FusedGeLU,
        FusedGroupNorm,
        FusedHardsigmoid,
        FusedHardswish,
        FusedInstanceNorm1d,
        FusedInstanceNorm2d,
        FusedInstanceNorm3d,
        FusedLayerNorm,
        FusedLeakyReLU,
        FusedMish,
        FusedRMSNorm,
        FusedReLU,
        FusedReLU6,
        FusedSiLU,
        FusedSigmoid,
        FusedSoftmax,
        FusedSoftplus,
        FusedTanh,
    )
}
