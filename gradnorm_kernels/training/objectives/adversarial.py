"""Adversarial training: any objective, on images perturbed to raise the cross-entropy.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
https://arxiv.org/abs/1706.06083 (PGD); Wong, Rice and Kolter, "Fast is better than free", ICLR 2020,
https://arxiv.org/abs/2001.03994 (one step from a random start).
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..attacks import perturb
from ..checks import check_images
from ..options import check_options, option
from .common import Loss, Model, Objective, epsilon_option, evaluated
from .natural import NaturalLoss
from .registry import register


@dataclass(frozen=True)
class AdversarialLoss:
    """An objective at images within an L-infinity ball, found by projected gradient ascent (PGD).

    ``steps=1, random_start=False`` is FGSM; ``objective=GradientNormLoss()`` the hybrid of adversarial
    training and gradient norm, whose norm is taken at the perturbed images. The search sees the model in eval
    mode, leaves it as it was, and accumulates no gradient. Parts of its :class:`Loss` are the objective's.

    Args:
        epsilon: radius in pixel units (pixels lie in [0, 1]), at least 0.
        steps: gradients of the search, at least 1.
        step_size: in pixel units; without it 2 * epsilon / steps, for one step epsilon, from a random start
            1.25 * epsilon (Wong et al.).
        random_start: begin at a uniformly random point of the ball, from torch's global generator.
        objective: what is minimised there.

    Raises:
        ValueError: if an argument is out of range.
    """

    epsilon: float = epsilon_option()
    steps: int = option(
        3, "gradients of the attack in adversarial training (1: FGSM)", name="attack_steps", minimum=1
    )
    step_size: float | None = option(
        None, "step of that attack, in pixel units; without it 2 epsilon / attack_steps, for one step"
        " epsilon, from a random start 1.25 epsilon",
        name="attack_step_size", minimum=0,
    )  # fmt: skip
    random_start: bool = option(
        True, "start that attack at a random point of the ball", name="attack_random_start"
    )
    objective: Objective = field(default_factory=NaturalLoss)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss:
        """Takes and raises what ``objective`` does."""
        check_images(images)
        step_size = self.step_size
        if step_size is None:
            single = 1.25 if self.random_start else 1.0
            step_size = self.epsilon * (single if self.steps == 1 else 2 / self.steps)
        with evaluated(model):
            perturbed = perturb(
                model,
                images,
                targets,
                eps=self.epsilon,
                steps=self.steps,
                step_size=step_size,
                random_start=self.random_start,
            )
        return self.objective(model, perturbed, targets, epoch=epoch)

    def schedule(self, epoch: float) -> dict[str, float]:
        """That of ``objective``."""
        return self.objective.schedule(epoch)


register(
    "adversarial", AdversarialLoss, "cross-entropy of images perturbed by PGD", differentiates_twice=False
)
register("hybrid", AdversarialLoss, "gradient_norm of such images", objective="gradient_norm")
