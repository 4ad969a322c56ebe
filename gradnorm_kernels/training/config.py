"""The options of a training run: one definition for Python, the command line and the checkpoint."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["MAY_CHANGE", "TrainConfig", "TrainingError", "option_name"]

# Options that do not change what a run computes, and so may differ when it resumes.
MAY_CHANGE = frozenset({"device", "workers"})


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and names the option or path to mend."""


def option_name(field_name: str) -> str:
    """The command-line spelling of a :class:`TrainConfig` field."""
    return "--" + field_name.replace("_", "-")


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
) -> Any:
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """What a run computes. ``gradnorm train --help`` describes each option and gives its unit.

    Raises:
        TrainingError: if a value is out of range; the message names the option.
    """

    data: str | None = _option(
        None, "image folder holding train/<class>/* and val/, validation/ or test/<class>/*;"
        " without it, scikit-learn's 1,797 digits of 8x8 pixels"
    )  # fmt: skip
    model: str = _option("gelu_mixer", "gelu_mixer (small, normalisation-free) or any timm model")
    activation: str | None = _option(None, "timm activation to build the model with, e.g. gelu")
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    image_size: int | None = _option(
        None, "height and width of the images, in pixels; without it, the model's own", minimum=1
    )
    augment: str | None = _option(
        None, "recipe: RandAugment, random erasing, mixup 0.8 and cutmix 1.0, as published; light: random"
        " crop and flip; none. Without it, recipe for an image folder, none for digits (which know no other)",
        choices=("recipe", "light", "none"),
    )  # fmt: skip
    label_smoothing: float = _option(0.1, "share of each target spread evenly over the classes", minimum=0)
    objective: str = _option(
        "gradient_norm", "cross-entropy alone, or with the norm of its input gradient",
        choices=("natural", "gradient_norm"),
    )  # fmt: skip
    epsilon: float = _option(
        4 / 255, "perturbation that the gradient norm guards against, in pixel units (pixels lie in [0, 1])",
        minimum=0,
    )  # fmt: skip
    ce_weight: float = _option(0.8, "weight of the cross-entropy in gradient_norm (1 in natural)", minimum=0)
    gn_weight: float = _option(1.2, "weight of the gradient norm", minimum=0)
    ramp_epochs: float = _option(5.0, "epochs over which the gradient norm's weight rises from 0", minimum=0)
    mode: str = _option(
        "eval", "the model's mode in training; published: eval (BatchNorm frozen, no dropout)",
        choices=("eval", "train"),
    )  # fmt: skip
    fused: bool = _option(True, "use this package's fused kernels")
    epochs: int = _option(30, "passes over the training images", minimum=1)
    batch_size: int = _option(128, "images per step", minimum=1)
    lr: float = _option(1e-3, "peak learning rate; published: 1.25e-3 at batch 256", above=0)
    warmup_epochs: float = _option(5.0, "epochs of linear warm-up, part of --epochs", minimum=0)
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up", minimum=0)
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine", minimum=0)
    weight_decay: float = _option(0.05, "AdamW's weight decay", minimum=0)
    clip_norm: float = _option(1.0, "norm to which the parameters' gradient is clipped", above=0)
    ema_decay: float = _option(
        0.9998, "decay per step of the averaged weights, which are the ones evaluated", minimum=0
    )
    seed: int = _option(0, "seed of everything random", minimum=0)
    device: str | None = _option(None, "torch device; without it, cuda where there is one, else cpu")
    workers: int = _option(4, "processes that load an image folder (digits need none)", minimum=0)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata
            name = option_name(item.name)
            if value is None:
                continue
            if limits["choices"] and value not in limits["choices"]:
                raise TrainingError(f"{name}: expected one of {', '.join(limits['choices'])}, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingError(f"{name}: expected a finite number, got {value}")
            if limits["minimum"] is not None and value < limits["minimum"]:
                raise TrainingError(f"{name}: expected at least {limits['minimum']}, got {value}")
            if limits["above"] is not None and value <= limits["above"]:
                raise TrainingError(f"{name}: expected more than {limits['above']}, got {value}")
        for name in ("label_smoothing", "ema_decay"):
            if getattr(self, name) >= 1:
                raise TrainingError(f"{option_name(name)}: expected less than 1, got {getattr(self, name)}")
        if self.data is None and self.augment not in (None, "none"):
            raise TrainingError(f"--augment: {self.augment} needs an image folder (--data)")

    @property
    def augmentation(self) -> str:
        """``augment`` with its default filled in."""
        return self.augment or ("recipe" if self.data else "none")

    def check_same_run(self, saved: dict[str, Any]) -> None:
        """Raises a TrainingError naming the first option that differs from a checkpoint's config."""
        for name, value in asdict(self).items():
            if name not in MAY_CHANGE and saved.get(name) != value:
                raise TrainingError(
                    f"{option_name(name)}: {value} conflicts with the checkpoint's {saved.get(name)}"
                )
