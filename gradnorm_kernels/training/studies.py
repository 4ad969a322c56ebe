"""What the studies vary. :mod:`.study` runs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Study:
    """What a study varies.

    Attributes:
        rows: options of :class:`~.config.TrainConfig` by the row's name. Of these ``init`` names the row
            whose model, of the same seed, the row starts from; ``epsilon`` is a multiple of what the rows
            share.
        reference: the row against which the cost of a step is given.
        per_epoch: attack the model after every epoch, and watch for collapse.
        against_clock: give the time of the whole training too.
        fronts: rows whose names agree up to a colon differ in strength, and are one line of robust against
            clean accuracy.
    """

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    reference: str
    per_epoch: bool = False
    against_clock: bool = False
    fronts: bool = False


# With a gradient norm the mode is the recipe's: eval as published, train where a run begins with random
# weights.
_NATURAL = {"objective": "natural", "mode": "train"}
_ADVERSARIAL = {"objective": "adversarial", "mode": "train"}
_PGD3 = {**_ADVERSARIAL, "attack_steps": 3}
_NORM = {"objective": "gradient_norm"}
_EDGE = {"objective": "edge", "mode": "train"}
_FGSM = {
    "FGSM": {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": False},
    "FGSM, random start": {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": True},
}
_HYBRID = {"FGSM + gradient norm": {"objective": "hybrid", "attack_steps": 1, "attack_random_start": True}}

STUDIES = {
    "activations": Study(
        "Gradient norm, from ReLU to GELU",
        {
            act.replace(":", " "): {**_NORM, "act": act}
            for act in (
                *("relu", "leaky_relu:0.01", "leaky_relu:0.1", "leaky_relu:0.3", "elu"),
                *("softplus:1", "softplus:10", "silu", "mish", "gelu"),
            )
        },
        reference="gelu",
    ),
    "objectives": Study(
        "Objectives",
        {
            "natural": _NATURAL,
            "gradient norm": _NORM,
            "edge": _EDGE,
            "edge + gradient norm": {"objective": "edge_gradient_norm"},
            **_FGSM,
            "PGD-3": _PGD3,
            **_HYBRID,
        },
        reference="PGD-3",
    ),
    "stability": Study(
        "Long runs",
        {"gradient norm": _NORM, **_FGSM, **_HYBRID},
        reference="gradient norm",
        per_epoch=True,
    ),
    "speed": Study(
        "Trainings against the clock",
        {
            "natural": {**_NATURAL, "fused": "off"},
            "gradient norm, PyTorch's ops": {**_NORM, "fused": "off"},
            "gradient norm, fused": {**_NORM, "fused": "on"},
            "PGD-3": {**_PGD3, "fused": "off"},
        },
        reference="PGD-3",
        per_epoch=True,
        against_clock=True,
    ),
    "settings": Study(
        "What the norm, epsilon and the ramp do",
        {
            "L1, as published": _NORM,
            "L2": {**_NORM, "norm": "l2"},
            "L2, weight 10": {**_NORM, "norm": "l2", "gn_weight": 10.0},
            "squared L2": {**_NORM, "norm": "squared_l2"},
            "squared L2, weight 10": {**_NORM, "norm": "squared_l2", "gn_weight": 10.0},
            "squared L2, weight 100": {**_NORM, "norm": "squared_l2", "gn_weight": 100.0},
            "epsilon x 0.5": {**_NORM, "epsilon": 0.5},
            "epsilon x 2": {**_NORM, "epsilon": 2.0},
            "no ramp": {**_NORM, "ramp_epochs": 0.0},
            "ramp of 10 epochs": {**_NORM, "ramp_epochs": 10.0},
        },
        reference="L1, as published",
    ),
    "mode": Study(
        "Gradient norm in train and in eval mode",
        {
            "natural": _NATURAL,
            "eval": {**_NORM, "mode": "eval"},
            "train": {**_NORM, "mode": "train"},
            "natural, then eval": {**_NORM, "mode": "eval", "init": "natural"},
            "natural, then train": {**_NORM, "mode": "train", "init": "natural"},
        },
        reference="eval",
    ),
    "fine_tuning": Study(
        "Gradient norm as fine-tuning",
        {
            "natural": _NATURAL,
            "gradient norm": _NORM,
            "PGD-3": _PGD3,
            "natural, then gradient norm": {**_NORM, "init": "natural"},
            "PGD-3, then gradient norm": {**_NORM, "init": "PGD-3"},
            "PGD-3, then natural": {**_NATURAL, "init": "PGD-3"},
            "natural, then PGD-3": {**_PGD3, "init": "natural"},
        },
        reference="PGD-3",
    ),
    "pareto": Study(
        "Clean against robust accuracy",
        {
            **{f"gradient norm: {w:g}": {**_NORM, "gn_weight": w} for w in (0.15, 0.6, 1.2, 2.4, 4.8)},
            **{f"PGD-3: epsilon x {e:g}": {**_PGD3, "epsilon": e} for e in (0.25, 0.5, 1.0, 1.5)},
            **{
                f"PGD-3 + gradient norm: {w:g}": {"objective": "hybrid", "attack_steps": 3, "gn_weight": w}
                for w in (0.15, 0.6, 1.2)
            },
        },
        reference="PGD-3: epsilon x 1",
        fronts=True,
    ),
    "edges": Study(
        "Edge regularisation from a natural model",
        {
            "natural": _NATURAL,
            "edge, random weights": _EDGE,
            "edge": {**_EDGE, "init": "natural"},
            "edge, weight 0.1": {**_EDGE, "init": "natural", "edge_start": 0.1, "edge_rate": 0.0},
            "edge, weight 10": {**_EDGE, "init": "natural", "edge_start": 10.0, "edge_rate": 0.0},
            "edge, magnitude": {**_EDGE, "init": "natural", "edge_variant": "magnitude"},
            "gradient norm": {**_NORM, "init": "natural"},
            "edge + gradient norm": {"objective": "edge_gradient_norm", "init": "natural"},
            "edge 0.1 + gradient norm": {
                **{"objective": "edge_gradient_norm", "init": "natural"},
                **{"edge_start": 0.1, "edge_rate": 0.0},
            },
        },
        reference="gradient norm",
    ),
}
