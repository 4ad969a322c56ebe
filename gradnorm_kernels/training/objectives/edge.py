"""Edge regularisation: input gradients that look like the image's edges.

From section 5 of Rodríguez-Muñoz, Wang and Torralba, "Characterizing Model Robustness via Natural Input
Gradients", ECCV 2024, https://arxiv.org/abs/2409.20139.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Loss, Model, check_choice, check_images, check_non_negative, run
from .gradient_norm import GradientNormLoss

__all__ = ["EdgeLoss", "edges"]

VARIANTS = ("signed", "magnitude")


@dataclass(frozen=True)
class EdgeLoss:
    """Cross-entropy plus the squared distance between an input gradient and the image's edges::

        CE + weight(epoch) * MSE(gradient / rms(gradient), edges / rms(edges))

    The gradient is that of one logit by the pixels, of a class drawn from softmax(logits / temperature) for
    each sample; :func:`edges` are the target. The root mean squares are over the batch; the loss is
    differentiated through the gradient's. weight = min(start + rate * epoch, maximum).

    Parts of its :class:`Loss`: ``cross_entropy``, ``edge`` (the mean squared error), and those of
    ``gradient_norm``.

    Args:
        start: weight at the start of training, at least 0.
        rate: growth of the weight per epoch, at least 0.
        maximum: largest weight, at least 0.
        temperature: above 0; divides the logits from which the class is drawn.
        variant: ``"signed"`` compares the gradient of every channel; ``"magnitude"`` its largest absolute
            value over the channels, pixel by pixel.
        gradient_norm: adds this objective's norm; its ``ce_weight`` then weighs the cross-entropy.

    Raises:
        ValueError: if an argument is negative, not finite or unknown.
    """

    start: float = 1.0
    rate: float = 0.09
    maximum: float = 19.0
    temperature: float = 0.5
    variant: str = "signed"
    gradient_norm: GradientNormLoss | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type is float:
                check_non_negative(self, item.name, getattr(self, item.name))
        if not self.temperature:
            raise ValueError("EdgeLoss: expected temperature to be above 0, got 0")
        check_choice(self, "variant", self.variant, VARIANTS)

    def weight(self, epoch: float) -> float:
        """The weight of the edge term at ``epoch`` (fractions count)."""
        check_non_negative(self, "epoch", epoch)
        return min(self.start + self.rate * epoch, self.maximum)

    def schedule(self, epoch: float) -> dict[str, float]:
        """``edge_weight``, and the schedule of ``gradient_norm``."""
        inner = {} if self.gradient_norm is None else self.gradient_norm.schedule(epoch)
        return {**inner, "edge_weight": self.weight(epoch)}

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss:
        """Takes and raises what :class:`GradientNormLoss` does; ``images`` must be (B, C, H, W).

        The classes are drawn from torch's global generator.
        """
        check_images(images)
        if images.ndim != 4:
            raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")
        parts: dict[str, Tensor]
        if self.gradient_norm is None:
            batch = run(model, images, targets, input_gradient=True)
            mean = batch.cross_entropy.mean()
            rest, parts = mean, {"cross_entropy": mean.detach()}
        else:
            batch = self.gradient_norm.run(model, images, targets, epoch, input_gradient=True)
            rest, parts = self.gradient_norm.terms(batch, epoch)

        probabilities = (batch.logits.detach().float() / self.temperature).softmax(1)
        # A loss that is not finite is for the caller to see.
        classes = torch.multinomial(probabilities.nan_to_num(1.0), 1)
        drawn = batch.logits.gather(1, classes).sum()
        gradient = batch.input_gradient(drawn, create_graph=True).float()
        target = edges(images.detach().float())
        if self.variant == "magnitude":
            gradient = gradient.abs().amax(1, keepdim=True)
        else:
            target = target.expand_as(gradient)
        error = F.mse_loss(_unit_rms(gradient), _unit_rms(target))
        weight = self.weight(epoch)
        return Loss(
            rest + weight * error,
            {**parts, "edge": error.detach()},
            batch.logits.detach(),
        )


def edges(images: Tensor) -> Tensor:
    """Edge strength of images (B, C, H, W): (B, 1, H, W), at least 0.

    Blurred (Gaussian, standard deviation 1 pixel), 3x3 Sobel derivatives, the root of their squares' sum over
    directions and channels, blurred again. The border is continued by its nearest pixel.
    """
    channels = images.shape[1]
    sobel = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([sobel, sobel.T]).unsqueeze(1).repeat(channels, 1, 1, 1)
    derivatives = F.conv2d(F.pad(_blur(images), (1, 1, 1, 1), "replicate"), kernels, groups=channels)
    return _blur(torch.linalg.vector_norm(derivatives, dim=1, keepdim=True))


def _blur(images: Tensor) -> Tensor:
    radius = 3  # three standard deviations
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-offsets.square() / 2)
    weights = (weights / weights.sum()).repeat(images.shape[1], 1, 1, 1)
    padded = F.pad(images, (radius,) * 4, "replicate")
    return F.conv2d(F.conv2d(padded, weights, groups=images.shape[1]), weights.mT, groups=images.shape[1])


def _unit_rms(x: Tensor) -> Tensor:
    tiny = torch.finfo(x.dtype).tiny  # a constant image has no edges
    return x / x.square().mean().clamp_min(tiny).sqrt()
