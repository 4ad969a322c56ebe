"""Gradients by the pixels, and projected gradient descent along them; needs torch alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_choice,
    check_count,
    check_images,
    check_logits,
    check_non_negative,
    check_pixels,
    check_targets,
    looked_at,
)

NORMS = ("Linf", "L2")
ATTACKS = ("autoattack", "apgd-ce", "pgd", "fgsm")  # of ``evaluation``

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
    check_non_negative(eps=eps, step_size=step_size)
    check_choice("norm", norm, NORMS)
    check_count(steps=steps)
    check_images(images)
    if looked_at(images):
        check_pixels(images)
    # Half types are too coarse to move in: near 1, bfloat16's neighbours are 1/256 apart.
    center = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    adversarial = center
    if random_start:
        adversarial = (center + _random_perturbation(center, eps, norm, generator)).clamp(0, 1)
    for _ in range(steps):
        gradient = input_gradient(model, adversarial, targets, images.dtype)
        step = step_size * (gradient.sign() if norm == "Linf" else _unit(gradient))
        adversarial = (center + _project(adversarial - center + step, eps, norm)).clamp(0, 1)
    return adversarial.to(images.dtype, copy=True)


def input_gradient(model: Model, pixels: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gradient of the summed cross-entropy by ``pixels``, which ``model`` is given in ``dtype``."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(pixels.to(dtype or pixels.dtype))
        check_logits(logits, pixels)
    return cross_entropy_gradient(logits, pixels, targets)


@torch.no_grad()
def loss_surface(
    model: Model, images: Tensor, labels: Tensor, radius: float, *, points: int = 41, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The cross-entropy in a plane through each image, and whether the class is right there.

    The plane is spanned by the sign of the input gradient, along the last dimension, and by random signs,
    along the one before, each from ``-radius`` to ``radius``; pixels are clamped to [0, 1].

    Args:
        model: maps images to logits (B, C).
        images: (B, ...), floating point, pixels in [0, 1].
        labels: (B,) int64.
        radius: in pixel units.
        points: along each direction, at least 2.
        seed: of the random signs.

    Returns:
        (B, points, points) in nats, and bool.
    """
    check_count(points=points - 1)
    signs = input_gradient(model, images, labels).sign()
    random = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(seed)).to(images) * 2 - 1
    offsets = torch.linspace(-radius, radius, points, device=images.device, dtype=images.dtype)
    lines = images.unsqueeze(1) + offsets.view(-1, *[1] * (images.ndim - 1)) * signs.unsqueeze(1)
    wanted = labels.repeat_interleave(points)
    losses, right = [], []
    # A line of each image at a time: whole planes of large images would not fit.
    for up in offsets:
        logits = model((lines + up * random.unsqueeze(1)).clamp(0, 1).flatten(0, 1)).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none").view(-1, points))
        right.append((logits.argmax(1) == wanted).view(-1, points))
    return torch.stack(losses, 1), torch.stack(right, 1)


def cross_entropy_gradient(logits: Tensor, pixels: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy by ``pixels``, from which ``logits`` were computed."""
    check_targets(targets, logits)
    with torch.enable_grad():
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
