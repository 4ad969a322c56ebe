"""Norms of an input gradient, and three ways to differentiate them with respect to the parameters."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ... import functional as fused
from ..._tf32 import has_tf32_convolutions, has_tf32_products
from .common import Batch

# Of a gradient (B, ...), per sample. A half-precision sum over 150,528 pixels would overflow or round.
Norm = Callable[[Tensor], Tensor]


def _l1(gradient: Tensor) -> Tensor:
    return _flat(gradient).abs().sum(1)


def _l2(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_flat(gradient), dim=1)  # whose derivative at 0 is 0


def _squared_l2(gradient: Tensor) -> Tensor:
    return _flat(gradient).square().sum(1)


def _flat(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))


NORMS: dict[str, Norm] = {"l1": _l1, "l2": _l2, "squared_l2": _squared_l2}


def _double_backprop(batch: Batch, norm: Norm, step: float) -> Tensor:
    return norm(batch.input_gradient(batch.cross_entropy, create_graph=True))


def _finite_difference(batch: Batch, norm: Norm, step: float) -> Tensor:
    _check_precision(batch)
    values, direction = _norm_and_direction(batch, norm)
    # One for the batch, whose samples BatchNorm may couple.
    size = direction.square().mean().sqrt().clamp_min(torch.finfo(direction.dtype).tiny)
    logits = batch.logits_at(batch.pixels.detach() + step * direction / size)
    moved = F.cross_entropy(logits, batch.targets, reduction="none")
    return _with_value((moved - batch.cross_entropy) * (size / step), values)


def _forward_over_reverse(batch: Batch, norm: Norm, step: float) -> Tensor:
    values, direction = _norm_and_direction(batch, norm)
    with forward_ad.dual_level(), _NoNativeNormalisation() as native, _FusedNormalisation(native):
        try:
            logits = batch.logits_at(forward_ad.make_dual(batch.pixels.detach(), direction))
        except RuntimeError as error:
            # TorchScript drops the message.
            raise (native.refused or error) from None
        targets = batch.targets
        if not targets.is_floating_point():
            targets = F.one_hot(targets, logits.shape[1])
        cross_entropy = -(targets * logits.log_softmax(1)).sum(1)
        along = forward_ad.unpack_dual(cross_entropy).tangent
    if along is None:
        raise RuntimeError("forward_over_reverse: the model's output does not depend on its input")
    return _with_value(along, values)


Engine = Callable[[Batch, Norm, float], Tensor]
ENGINES: dict[str, Engine] = {
    "double_backprop": _double_backprop,
    "finite_difference": _finite_difference,
    "forward_over_reverse": _forward_over_reverse,
}


def _norm_and_direction(batch: Batch, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norms (B,) of the input gradients and their derivative by the gradients (B, ...), both constant."""
    gradient = batch.input_gradient(batch.cross_entropy, create_graph=False).requires_grad_()
    values = norm(gradient)
    (direction,) = torch.autograd.grad(values.sum(), gradient)
    return values.detach(), direction


def _with_value(derivative: Tensor, value: Tensor) -> Tensor:
    """``value``, with the graph of ``derivative``."""
    return derivative - derivative.detach() + value


def _check_precision(batch: Batch) -> None:
    device = batch.pixels.device.type
    parameters = batch.model.parameters() if isinstance(batch.model, nn.Module) else ()
    dtypes = {batch.pixels.dtype, batch.logits.dtype, *(parameter.dtype for parameter in parameters)}
    coarse = {
        "autocast": torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device),
        **{f"{dtype} in model or images": dtype.itemsize < 4 for dtype in dtypes if dtype.is_floating_point},
        "TF32 matrix products": device == "cuda" and has_tf32_products(),
        "TF32 convolutions": device == "cuda" and has_tf32_convolutions(),
    }
    for what, found in coarse.items():
        if found:
            raise RuntimeError(
                f"finite_difference: {what} would round the difference away; use float32, or another engine"
            )


class _NoNativeNormalisation(TorchDispatchMode):
    """Refuses what is wrong in forward mode: PyTorch's normalisations, where nothing replaced them
    (TorchScript), and activation checkpointing, which computes again without the tangents.
    """

    trusted = False
    refused: RuntimeError | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        names = [argument.name for argument in function._schema.arguments]
        training = dict(zip(names, args, strict=False)).get("training", True)
        if name in _UNSOUND and training and not self.trusted:
            self._refuse(
                f"PyTorch differentiates {name} wrongly in forward mode; call it through torch.nn.functional"
            )
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks and hooks[0].__module__ == "torch.utils.checkpoint":
            self._refuse("activation checkpointing loses forward-mode derivatives; switch it off")
        return function(*args, **kwargs or {})

    def _refuse(self, why: str) -> None:
        self.refused = RuntimeError(f"forward_over_reverse: {why}, or use another engine")
        raise self.refused


class _FusedNormalisation(TorchFunctionMode):
    """Runs this package's normalisations, right in forward mode, for PyTorch's own."""

    def __init__(self, native: _NoNativeNormalisation) -> None:
        super().__init__()
        self.native = native

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = _SOUND.get(function, function)
        # BatchNorm's running statistics are still PyTorch's to update.
        self.native.trusted = (
            ours is not function or getattr(function, "__module__", None) == "torch._ops.gradnorm_kernels"
        )
        try:
            return ours(*args, **kwargs or {})
        finally:
            self.native.trusted = False


def _softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    return fused.softmax(input, dim, dtype=dtype)


def _log_softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    input = input if dtype is None else input.to(dtype)
    shifted = input - input.detach().amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


# PyTorch's layer_norm, and batch_norm and instance_norm over the batch's statistics, give a wrong gradient of
# their forward-mode derivative; its softmax, log_softmax, attention and hardsigmoid none.
_SOUND: dict[Any, Callable[..., Any]] = {
    F.layer_norm: fused.layer_norm,
    F.batch_norm: fused.batch_norm,
    F.instance_norm: fused.instance_norm,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    F.scaled_dot_product_attention: fused.scaled_dot_product_attention,
    F.hardsigmoid: fused.hardsigmoid,
}
_UNSOUND = {
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}
