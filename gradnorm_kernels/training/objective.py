"""Training objectives: callables ``(model, images, targets, *, epoch) -> Loss``.

The gradient-norm objective is that of Rodríguez-Muñoz, Wang and Torralba, "Characterizing Model Robustness
via Natural Input Gradients", ECCV 2024, https://arxiv.org/abs/2409.20139.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GradientNormLoss", "Loss", "NaturalLoss", "Objective"]

Model = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """A training loss and its parts. Means are over the batch; losses are in nats.

    Attributes:
        total: scalar to call ``backward`` on.
        cross_entropy: scalar, detached, without its weight.
        gradient_norm: scalar, detached: the mean of epsilon * ||d CE_i / d pixels||_1, without its weight and
            ramp; ``None`` where it had no weight, and so was not computed.
        alpha: the ramp's value, from 0 to 1.
        logits: (B, C), detached.
    """

    total: Tensor
    cross_entropy: Tensor
    gradient_norm: Tensor | None
    alpha: float
    logits: Tensor


class Objective(Protocol):
    """What the trainer minimises."""

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss: ...


@dataclass(frozen=True)
class NaturalLoss:
    """Cross-entropy alone, averaged over the batch."""

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float = 0.0) -> Loss:
        """Takes what :class:`GradientNormLoss` takes and raises what it raises; ``epoch`` changes nothing."""
        _check_images(images)
        logits = model(images)
        cross_entropy = _cross_entropy(logits, targets).mean()
        return Loss(cross_entropy, cross_entropy.detach(), None, 0.0, logits.detach())


@dataclass(frozen=True)
class GradientNormLoss:
    """Cross-entropy plus the L1 norm of its input gradient (Rodríguez-Muñoz et al., arXiv 2409.20139).

    Averaged over the samples i of the batch::

        ce_weight * CE_i + gn_weight * alpha(epoch) * epsilon * sum |d CE_i / d pixels|

    The sum runs over the sample's pixels and channels. To first order, epsilon times that norm is the most by
    which an L-infinity perturbation of size epsilon can raise CE_i. alpha = min(1, epoch / ramp_epochs).

    The gradient is taken of the *summed* cross-entropy, so each sample has its own, whatever the batch size;
    that holds for models whose samples do not interact (BatchNorm in train mode couples them). Where the
    norm's weight is zero no second derivative is computed.

    Args:
        ce_weight: weight of the cross-entropy, at least 0.
        gn_weight: weight of the gradient norm, at least 0.
        epsilon: size of the perturbation, in pixel units (pixels lie in [0, 1]), at least 0.
        ramp_epochs: epochs over which alpha rises linearly from 0 to 1; 0 for alpha = 1 throughout.

    Raises:
        ValueError: if an argument is negative or not finite.
    """

    ce_weight: float = 0.8
    gn_weight: float = 1.2
    epsilon: float = 4 / 255
    ramp_epochs: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_non_negative("GradientNormLoss", name, value)

    def alpha(self, epoch: float) -> float:
        """The ramp at ``epoch`` (epochs since the start of training, fractions count), from 0 to 1."""
        _check_non_negative("GradientNormLoss", "epoch", epoch)
        return min(1.0, epoch / self.ramp_epochs) if self.ramp_epochs else 1.0

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
            RuntimeError: if gradients are disabled (``torch.no_grad``).
        """
        alpha = self.alpha(epoch)
        _check_images(images)
        weight = self.gn_weight * alpha
        if not weight:
            logits = model(images)
            mean = _cross_entropy(logits, targets).mean()
            return Loss(self.ce_weight * mean, mean.detach(), None, alpha, logits.detach())

        if not torch.is_grad_enabled():
            raise RuntimeError("GradientNormLoss: gradients are disabled, yet the norm needs them")
        pixels = images.detach().requires_grad_()
        logits = model(pixels)
        cross_entropy = _cross_entropy(logits, targets)
        (gradient,) = torch.autograd.grad(cross_entropy.sum(), pixels, create_graph=True)
        # A half-precision sum over 150,528 pixels would overflow or round.
        sum_dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm = self.epsilon * gradient.abs().flatten(1).sum(1, dtype=sum_dtype).mean()
        mean = cross_entropy.mean()
        total = self.ce_weight * mean + weight * norm
        return Loss(total, mean.detach(), norm.detach(), alpha, logits.detach())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per sample, (B,)."""
    _check_targets(targets, logits)
    return F.cross_entropy(logits, targets, reduction="none")


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor with pixels in [0, 1], got {kind}")
    if images.ndim < 2 or not images.numel():
        raise ValueError(
            f"images: expected shape (B, ...) with no empty dimension, got {tuple(images.shape)}"
        )


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if logits.ndim != 2:
        raise ValueError(f"model: expected logits of shape (B, C), got {tuple(logits.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets: expected device {logits.device}, got {targets.device}")
    batch, classes = logits.shape
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets: expected class probabilities of shape {(batch, classes)},"
                f" got {tuple(targets.shape)}"
            )
    elif targets.dtype != torch.int64:
        raise TypeError(
            "targets: expected int64 class indices or floating-point class probabilities,"
            f" got {targets.dtype}"
        )
    elif targets.shape != (batch,):
        raise ValueError(f"targets: expected class indices of shape {(batch,)}, got {tuple(targets.shape)}")
    # cross_entropy skips targets of -100 in silence. On a GPU the look would cost a synchronisation.
    elif targets.device.type == "cpu" and not ((targets >= 0) & (targets < classes)).all():
        raise ValueError(f"targets: expected class indices from 0 to {classes - 1}, got {targets.tolist()}")


def _check_non_negative(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{owner}: expected {name} to be finite and at least 0, got {value}")
