"""Edge regularisation: input gradients that look like the image's edges.

From section 5 of Rodríguez-Muñoz, Wang and Torralba, "Characterizing Model Robustness via Natural Input
Gradients", ECCV 2024, https://arxiv.org/abs/2409.20139.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_images, check_non_negative
from ..options import check_options, option
from .common import Loss, Model, run
from .gradient_norm import GradientNormLoss
from .registry import register


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
        start, rate, maximum: of the weight, at least 0; the rate per epoch.
        temperature: above 0.
        variant: ``"signed"`` compares the gradient of every channel; ``"magnitude"`` its largest absolute
            value over the channels, pixel by pixel.
        gradient_norm: adds this objective's norm; its ``ce_weight`` then weighs the cross-entropy.

    Raises:
        ValueError: if an argument is negative, not finite or unknown.
    """

    start: float = option(1.0, "weight of the edge term at the start", name="edge_start", minimum=0)
    rate: float = option(0.09, "growth of that weight per epoch", name="edge_rate", minimum=0)
    maximum: float = option(19.0, "largest weight of the edge term", name="edge_max", minimum=0)
    temperature: float = option(
        0.5, "temperature at which the logit to differentiate is drawn", name="edge_temperature", above=0
    )
    variant: str = option(
        "signed", "what is compared with the edges: every channel's gradient, or its largest magnitude",
        name="edge_variant", choices=("signed", "magnitude"),
    )  # fmt: skip
    gradient_norm: GradientNormLoss | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def weight(self, epoch: float) -> float:
        """The weight of the edge term at ``epoch`` (fractions count)."""
        check_non_negative(epoch=epoch)
        return min(self.start + self.rate * epoch, self.maximum)

    def schedule(self, epoch: float) -> dict[str, float]:
        """``edge_weight``, and the schedule of ``gradient_norm``."""
        inner = {} if self.gradient_norm is None else self.gradient_norm.schedule(epoch)
        return {**inner, "edge_weight": self.weight(epoch)}

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss:
        """Takes and raises what :class:`GradientNormLoss` does; ``images`` must be (B, C, H, W).

        The classes are drawn from torch's global generator.
        """
        check_images(images, planes=True)
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
        return Loss(
            rest + self.weight(epoch) * error, {**parts, "edge": error.detach()}, batch.logits.detach()
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


register("edge", EdgeLoss, "cross-entropy with edge regularisation")
register("edge_gradient_norm", EdgeLoss, "with both", gradient_norm="gradient_norm")
