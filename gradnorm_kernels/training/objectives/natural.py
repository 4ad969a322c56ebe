"""Cross-entropy alone."""

from dataclasses import dataclass

from torch import Tensor

from .common import Loss, Model, run
from .registry import register


@dataclass(frozen=True)
class NaturalLoss:
    """Cross-entropy, averaged over the batch. Its one part is ``cross_entropy``."""

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float = 0.0) -> Loss:
        """Takes and raises what :class:`GradientNormLoss` does; ``epoch`` changes nothing."""
        batch = run(model, images, targets)
        mean = batch.cross_entropy.mean()
        return Loss(mean, {"cross_entropy": mean.detach()}, batch.logits.detach())

    def schedule(self, epoch: float) -> dict[str, float]:
        """Nothing changes with the epoch."""
        return {}


register("natural", NaturalLoss, "cross-entropy", differentiates_twice=False)
