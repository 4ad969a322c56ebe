"""Training objectives: callables ``(model, images, targets, *, epoch) -> Loss``. They need torch alone."""

from .adversarial import AdversarialLoss
from .common import Loss, Objective
from .edge import EdgeLoss
from .gradient_norm import GradientNormLoss
from .natural import NaturalLoss

__all__ = ["AdversarialLoss", "EdgeLoss", "GradientNormLoss", "Loss", "NaturalLoss", "Objective"]
