"""Gradient-norm training: the objective here, and a trainer that stands on timm.

:mod:`~gradnorm_kernels.training.objective` needs torch alone. The data, models, trainer and demo need
``pip install 'gradnorm_kernels[train]'``.
"""

from .objective import GradientNormLoss, Loss, NaturalLoss

__all__ = ["GradientNormLoss", "Loss", "NaturalLoss"]
