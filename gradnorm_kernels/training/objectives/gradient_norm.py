"""The gradient-norm objective of Rodríguez-Muñoz, Wang and Torralba, "Characterizing Model Robustness via
Natural Input Gradients", ECCV 2024, https://arxiv.org/abs/2409.20139, and three ways to differentiate it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ... import functional as fused
from .common import Batch, Loss, Model, check_choice, check_non_negative, run

__all__ = ["ENGINES", "NORMS", "GradientNormLoss"]


@dataclass(frozen=True)
class GradientNormLoss:
    """Cross-entropy plus the norm of its input gradient (Rodríguez-Muñoz et al., arXiv 2409.20139).

    Averaged over the samples i of the batch::

        ce_weight * CE_i + gn_weight * alpha(epoch) * epsilon * norm(d CE_i / d pixels)

    The norm runs over the sample's pixels and channels. To first order, epsilon times the L1 norm is the most
    by which an L-infinity perturbation of size epsilon can raise CE_i; the L2 norm bounds L2 perturbations
    alike. alpha = min(1, epoch / ramp_epochs).

    The gradient is taken of the *summed* cross-entropy, so each sample has its own, whatever the batch size;
    that holds for models whose samples do not interact (BatchNorm in train mode couples them). Where the
    norm's weight is zero no second derivative is computed.

    Parts of its :class:`Loss`: ``cross_entropy`` and ``gradient_norm`` (epsilon times the norm).

    The engines give the same value of the norm, and its gradient with respect to the parameters by

    - ``double_backprop``: differentiating the backward pass. Exact.
    - ``finite_difference``: (CE(x + h d) - CE(x)) / h along d, the derivative of the norm by the input
      gradient (its sign, for L1), held constant; Finlay and Oberman, https://arxiv.org/abs/1905.11468. No
      operation is differentiated twice. The error is of the order of h, plus that of rounding over h, plus
      kinks (ReLU's) that the step crosses; so it wants float32 throughout, and refuses half-precision images,
      parameters, logits and autocast around it, and TF32.
    - ``forward_over_reverse``: the forward-mode derivative of CE along the same d, differentiated backward.
      Exact. PyTorch's own normalisations are wrong there without a word (LayerNorm, BatchNorm in train
      mode), so this engine runs this package's in their place, and refuses models in which it cannot
      (TorchScript, exported graphs). Operations without a forward-mode derivative raise.

    The last two run the model a second time: random layers (dropout, drop path) draw the same numbers,
    buffers begin as in the first pass, and BatchNorm's running statistics count the batch once.

    Args:
        ce_weight: weight of the cross-entropy, at least 0.
        gn_weight: weight of the gradient norm, at least 0.
        epsilon: size of the perturbation, in pixel units (pixels lie in [0, 1]), at least 0.
        ramp_epochs: epochs over which alpha rises linearly from 0 to 1; 0 for alpha = 1 throughout.
        norm: ``"l1"``, ``"l2"`` or ``"squared_l2"``.
        engine: ``"double_backprop"``, ``"finite_difference"`` or ``"forward_over_reverse"``.
        difference_step: h of ``finite_difference``, in pixel units: the root mean square of the step.

    Raises:
        ValueError: if an argument is negative, not finite or unknown.
    """

    ce_weight: float = 0.8
    gn_weight: float = 1.2
    epsilon: float = 4 / 255
    ramp_epochs: float = 5.0
    norm: str = "l1"
    engine: str = "double_backprop"
    difference_step: float = 1e-4

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type is float:
                check_non_negative(self, item.name, getattr(self, item.name))
        if not self.difference_step:
            raise ValueError("GradientNormLoss: expected difference_step to be above 0, got 0")
        check_choice(self, "norm", self.norm, NORMS)
        check_choice(self, "engine", self.engine, ENGINES)

    def alpha(self, epoch: float) -> float:
        """The ramp at ``epoch`` (epochs since the start of training, fractions count), from 0 to 1."""
        check_non_negative(self, "epoch", epoch)
        return min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs else 1.0

    def schedule(self, epoch: float) -> dict[str, float]:
        """``alpha``."""
        return {"alpha": self.alpha(epoch)}

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss:
        """Computes the loss with a graph that ``total.backward()`` differentiates a second time.

        Args:
            model: maps images to logits (B, C). Normalisation of the pixels belongs inside it
                (:class:`~gradnorm_kernels.training.models.Normalize`): the norm is that of the gradient with
                respect to what is passed here.
            images: (B, ...) with B at least 1, floating point, pixels in [0, 1]. No gradient flows back to
                it.
            targets: (B,) int64 class indices, or (B, C) floating-point class probabilities.
            epoch: epochs since the start of training, fractions count.

        Raises:
            TypeError: if ``images`` or ``targets`` has an unsuitable dtype, or is no tensor.
            ValueError: if a shape, device or value does not fit.
            RuntimeError: if gradients are disabled (``torch.no_grad``), or the engine cannot be right.
        """
        batch = self.run(model, images, targets, epoch)
        total, parts = self.terms(batch, epoch)
        return Loss(total, parts, batch.logits.detach())

    def run(
        self, model: Model, images: Tensor, targets: Tensor, epoch: float, *, input_gradient: bool = False
    ) -> Batch:
        """The forward pass that :meth:`terms` needs at ``epoch``, with an input gradient if asked for."""
        wants_norm = self._weight(epoch) > 0
        return run(
            model,
            images,
            targets,
            input_gradient=input_gradient or wants_norm,
            replayable=wants_norm and self.engine != "double_backprop",
        )

    def terms(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that :meth:`run` ran, and its parts."""
        parts = {"cross_entropy": batch.cross_entropy.detach().mean()}
        if not self._weight(epoch):
            return self.ce_weight * batch.cross_entropy.mean(), parts
        norms = self.norms(batch)
        parts["gradient_norm"] = self.epsilon * norms.detach().mean()
        return self.total(batch.cross_entropy, norms, epoch), parts

    def norms(self, batch: Batch) -> Tensor:
        """The norms (B,) of the input gradients, differentiable by the engine."""
        return ENGINES[self.engine](batch, NORMS[self.norm], self.difference_step)

    def total(self, cross_entropy: Tensor, norms: Tensor, epoch: float) -> Tensor:
        """The loss of samples of these cross-entropies (B,) and norms (B,)."""
        share = 1 / len(norms)  # before the sum, because a mean is a launch more, forward and backward
        weight = share * self._weight(epoch) * self.epsilon
        return torch.add(share * self.ce_weight * cross_entropy, norms, alpha=weight).sum()

    def _weight(self, epoch: float) -> float:
        return self.gn_weight * self.alpha(epoch)


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
        "TF32 matrix products": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "TF32 convolutions": device == "cuda" and torch.backends.cudnn.allow_tf32,
    }
    for what, found in coarse.items():
        if found:
            raise RuntimeError(
                f"finite_difference: {what} would round the difference away; use float32, or another engine"
            )


class _NoNativeNormalisation(TorchDispatchMode):
    """Refuses PyTorch's normalisations, wrong in forward mode, where nothing replaced them (TorchScript)."""

    trusted = False
    refused: RuntimeError | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        names = [argument.name for argument in function._schema.arguments]
        training = dict(zip(names, args, strict=False)).get("training", True)
        if name in _UNSOUND and training and not self.trusted:
            self.refused = RuntimeError(
                f"forward_over_reverse: PyTorch differentiates {name} wrongly in forward mode;"
                " call it through torch.nn.functional, or use another engine"
            )
            raise self.refused
        return function(*args, **kwargs or {})


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
