"""Projected gradient descent on the pixels; needs torch alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NORMS", "perturb"]

NORMS = ("Linf", "L2")

Model = Callable[[Tensor], Tensor]


def perturb(
    model: Model,
    images: Tensor,
    targets: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    steps: int,
    step_size: float,
    random_start: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near ``images`` on which the cross-entropy is higher: PGD of Madry et al., arXiv 1706.06083.

    Each step moves every image by ``step_size`` along its gradient's sign (Linf) or its gradient over its
    norm (L2), then projects to the ball of radius ``eps`` and clamps to [0, 1]. One step of ``eps`` without a
    random start is the fast gradient sign method of Goodfellow et al., arXiv 1412.6572. The last step's
    images are returned, whether or not an earlier step's had the higher loss.

    The gradient is that of the summed cross-entropy, in at least float32, with respect to the pixels alone:
    none is taken with respect to parameters and no ``.grad`` changes. The model runs in the mode it is in, so
    batch norm in train mode updates its statistics at every step.

    Args:
        model: maps images to logits (B, C).
        images: (B, ...) with B at least 1, floating point, pixels in [0, 1]. Images of a half type are moved
            in float32, and rounded where the model sees them and on return.
        targets: (B,) int64 class indices, or (B, C) floating-point class probabilities.
        eps: radius, in pixel units, at least 0.
        norm: "Linf" or "L2".
        steps: at least 1.
        step_size: in pixel units, at least 0; Madry et al.'s code takes 2.5 * eps / steps.
        random_start: start from a point uniform in the ball, clamped to [0, 1].
        generator: of the random start, on any device; torch's default if absent.

    Returns:
        New images of the shape, dtype and device of ``images``, without a graph.

    Raises:
        TypeError: if ``images`` or ``targets`` has an unsuitable dtype, or is no tensor.
        ValueError: if another argument, a shape or a value does not fit. Pixels' and class indices' ranges
            are looked at on the CPU only.
    """
    _check_numbers(eps, norm, steps, step_size)
    _check_tensors(images, targets)
    # Half types are too coarse to move in: near 1, bfloat16's neighbours are 1/256 apart.
    center = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    adversarial = center
    if random_start:
        adversarial = (center + _random_perturbation(center, eps, norm, generator)).clamp(0, 1)
    for _ in range(steps):
        gradient = _input_gradient(model, adversarial, targets, images.dtype)
        step = step_size * (gradient.sign() if norm == "Linf" else _unit(gradient))
        adversarial = (center + _project(adversarial - center + step, eps, norm)).clamp(0, 1)
    return adversarial.to(images.dtype, copy=True)


def _input_gradient(model: Model, pixels: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the summed cross-entropy of ``model`` on ``pixels`` rounded to ``dtype``."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(pixels.to(dtype))
        if logits.ndim != 2 or len(logits) != len(pixels):
            raise ValueError(f"model: expected logits of shape ({len(pixels)}, C), got {tuple(logits.shape)}")
        _check_classes(targets, logits.shape[1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


def _random_perturbation(images: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    # A generator's numbers have to be drawn on its own device.
    device = images.device if generator is None else generator.device
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": images.dtype}
    if norm == "Linf":
        return (eps * (2 * torch.rand(images.shape, **options) - 1)).to(images.device)
    direction = _unit(torch.randn(images.shape, **options))
    radius = eps * torch.rand(len(images), **options) ** (1 / images[0].numel())
    return (_per_image(radius, images) * direction).to(images.device)


def _project(perturbation: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "Linf":
        return perturbation.clamp(-eps, eps)
    length = torch.linalg.vector_norm(perturbation.flatten(1), dim=1)
    # Where the length is 0 the quotient is infinite, or 0 / 0.
    factor = torch.where(length > eps, eps / length, 1)
    return perturbation * _per_image(factor, perturbation)


def _unit(vectors: Tensor) -> Tensor:
    """Each image over its L2 norm; zeros stay zeros."""
    tiny = torch.finfo(vectors.dtype).tiny
    # A confident model's gradients are so small that their squares underflow.
    largest = vectors.flatten(1).abs().amax(1).clamp_min(tiny)
    vectors = vectors / _per_image(largest, vectors)
    length = torch.linalg.vector_norm(vectors.flatten(1), dim=1).clamp_min(tiny)
    return vectors / _per_image(length, vectors)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to broadcast over ``images``."""
    return values.view(-1, *[1] * (images.ndim - 1))


def _check_numbers(eps: float, norm: str, steps: int, step_size: float) -> None:
    for name, value in {"eps": eps, "step_size": step_size}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps}")


def _check_tensors(images: Tensor, targets: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, got {kind}")
    if images.ndim < 2 or not images.numel():
        raise ValueError(
            f"images: expected shape (B, ...) with no empty dimension, got {tuple(images.shape)}"
        )
    if _is_looked_at(images) and not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images: expected pixels in [0, 1]")
    if not isinstance(targets, Tensor) or not (targets.is_floating_point() or targets.dtype == torch.int64):
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets: expected int64 or floating-point tensor, got {kind}")
    if targets.device != images.device:
        raise ValueError(f"targets: expected device {images.device}, got {targets.device}")
    if targets.ndim != 1 + targets.is_floating_point() or len(targets) != len(images):
        raise ValueError(
            f"targets: expected class indices of shape ({len(images)},) or class probabilities of shape"
            f" ({len(images)}, C), got {tuple(targets.shape)}"
        )


def _check_classes(targets: Tensor, classes: int) -> None:
    if targets.is_floating_point():
        if targets.shape[1] != classes:
            raise ValueError(f"targets: expected {classes} class probabilities, got {targets.shape[1]}")
    # cross_entropy skips targets of -100 in silence.
    elif _is_looked_at(targets) and not ((targets >= 0) & (targets < classes)).all():
        raise ValueError(f"targets: expected class indices from 0 to {classes - 1}")


def _is_looked_at(values: Tensor) -> bool:
    """Whether the values are checked. On a GPU that would cost a synchronisation; a compiler cannot."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
