"""Gradient-norm training: the objective here, and a trainer that stands on timm.

:mod:`~gradnorm_kernels.training.objectives` needs torch alone. The data, models, trainer and demo need
``pip install 'gradnorm_kernels[train]'``.
"""

from .objectives import AdversarialLoss, EdgeLoss, GradientNormLoss, Loss, NaturalLoss

__all__ = ["AdversarialLoss", "EdgeLoss", "GradientNormLoss", "Loss", "NaturalLoss"]
