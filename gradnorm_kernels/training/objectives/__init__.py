"""Training objectives: callables ``(model, images, targets, *, epoch) -> Loss``. They need torch alone.

A new one is a file here that calls :func:`~.registry.register`.
"""

import pkgutil
from importlib import import_module

# The order of --help and config.json is that in which these register.
# isort: off
from .natural import NaturalLoss
from .gradient_norm import GradientNormLoss
from .edge import EdgeLoss
from .adversarial import AdversarialLoss

# isort: on
from .common import Loss, Objective
from .registry import OBJECTIVES, make_objective, objective_options

__all__ = [
    "OBJECTIVES",
    "AdversarialLoss",
    "EdgeLoss",
    "GradientNormLoss",
    "Loss",
    "NaturalLoss",
    "Objective",
    "make_objective",
    "objective_options",
]

for _file in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
