"""The options of a training run, and the recipes that set them: one definition for Python, the command line,
recipe files and checkpoints.
"""

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

__all__ = [
    "MAY_CHANGE",
    "Interrupted",
    "TrainConfig",
    "TrainingError",
    "as_options",
    "describe_options",
    "load_recipe",
    "parse_settings",
    "recipe_names",
]

# Options that do not change what a run computes, and so may differ when it resumes.
MAY_CHANGE = frozenset({"device", "workers", "tensorboard"})


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and names the option or path to mend."""


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop)
    """SIGINT stopped the run after it wrote a checkpoint, from which it can resume."""

    def __init__(self, checkpoint: Path, epoch: int, step: int) -> None:
        super().__init__(f"stopped in epoch {epoch + 1} after step {step}; wrote {checkpoint}")


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    limits = {"help": help, "choices": choices, "minimum": minimum, "above": above, "below": below}
    return field(default=default, metadata=limits)


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
    model: str = _option(
        "gelu_mixer", "gelu_mixer (small, no normalisation), preact_resnet18, preact_resnet10, or timm's"
    )
    act: str | None = _option(
        None, "activation to put in place of every ReLU-like one of the model: relu, leaky_relu, elu,"
        " softplus, mish, silu, gelu or gelu_tanh; with a number, Leaky ReLU's slope, ELU's alpha or"
        " Softplus's beta: softplus:10"
    )  # fmt: skip
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    init: str | None = _option(
        None, "start from the weights in this file: a checkpoint of a run (its averaged weights), or a"
        " state_dict of the timm model"
    )  # fmt: skip
    image_size: int | None = _option(
        None, "height and width of the images, in pixels; without it, the model's own", minimum=1
    )
    crop_min: float = _option(
        1.0, "smallest share of an image's area that a random crop keeps in training; 1: no crop", above=0
    )
    hflip: float = _option(0.0, "probability of a horizontal flip in training", minimum=0)
    interpolation: str | None = _option(
        None, "how training images are resized; without it, the model's own",
        choices=("bicubic", "bilinear", "nearest", "random"),
    )  # fmt: skip
    color_jitter: float = _option(0.0, "strength of colour jitter; auto_augment replaces it", minimum=0)
    auto_augment: str | None = _option(None, "timm's auto-augmentation, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = _option(0.0, "probability of random erasing", minimum=0)
    remode: str = _option(
        "pixel", "what random erasing fills with: a constant, a random colour, random pixels",
        choices=("const", "rand", "pixel"),
    )  # fmt: skip
    mixup: float = _option(0.0, "mixup's alpha; 0: no mixup", minimum=0)
    cutmix: float = _option(0.0, "cutmix's alpha; 0: no cutmix", minimum=0)
    label_smoothing: float = _option(
        0.1, "share of each target spread evenly over the classes", minimum=0, below=1
    )
    objective: str = _option(
        "gradient_norm", "natural: cross-entropy; gradient_norm: with the norm of its input gradient; edge:"
        " cross-entropy with edge regularisation; edge_gradient_norm: with both; adversarial: cross-entropy"
        " of images perturbed by PGD; hybrid: gradient_norm of such images",
        choices=("natural", "gradient_norm", "edge", "edge_gradient_norm", "adversarial", "hybrid"),
    )  # fmt: skip
    epsilon: float = _option(
        4 / 255, "perturbation that the gradient norm guards against and that adversarial training is given,"
        " in pixel units (pixels lie in [0, 1])",
        minimum=0,
    )  # fmt: skip
    ce_weight: float = _option(0.8, "weight of the cross-entropy beside a gradient norm (else 1)", minimum=0)
    gn_weight: float = _option(1.2, "weight of the gradient norm", minimum=0)
    ramp_epochs: float = _option(5.0, "epochs over which the gradient norm's weight rises from 0", minimum=0)
    norm: str = _option("l1", "norm of the input gradient", choices=("l1", "l2", "squared_l2"))
    engine: str = _option(
        "double_backprop", "how the gradient norm is differentiated; double_backprop and forward_over_reverse"
        " are exact",
        choices=("double_backprop", "finite_difference", "forward_over_reverse"),
    )  # fmt: skip
    edge_start: float = _option(1.0, "weight of the edge term at the start", minimum=0)
    edge_rate: float = _option(0.09, "growth of that weight per epoch", minimum=0)
    edge_max: float = _option(19.0, "largest weight of the edge term", minimum=0)
    edge_temperature: float = _option(
        0.5, "temperature at which the logit to differentiate is drawn", above=0
    )
    edge_variant: str = _option(
        "signed", "what is compared with the edges: every channel's gradient, or its largest magnitude",
        choices=("signed", "magnitude"),
    )  # fmt: skip
    attack_steps: int = _option(3, "gradients of the attack in adversarial training (1: FGSM)", minimum=1)
    attack_step_size: float | None = _option(
        None, "step of that attack, in pixel units; without it 2 epsilon / attack_steps, for one step"
        " epsilon, from a random start 1.25 epsilon",
        minimum=0,
    )  # fmt: skip
    attack_random_start: bool = _option(True, "start that attack at a random point of the ball")
    mode: str = _option(
        "eval", "the model's mode in training; published: eval (BatchNorm frozen, no dropout) with a gradient"
        " norm, train with edge regularisation alone",
        choices=("eval", "train"),
    )  # fmt: skip
    fused: str = _option(
        "auto", "this package's fused kernels: auto uses them where the device has them, on fails where"
        " nothing can be fused",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    precision: str = _option(
        "float32", "of matrix products and activations: float32, tf32 (NVIDIA GPUs) or bfloat16 autocast;"
        " parameters and the sum of the gradient norm stay float32",
        choices=("float32", "tf32", "bfloat16"),
    )  # fmt: skip
    channels_last: bool = _option(False, "keep images and convolutions in channels_last memory format")
    compile: bool = _option(False, "compile the step's loss and gradients as a whole with torch.compile")
    epochs: int = _option(30, "passes over the training images", minimum=1)
    batch_size: int = _option(128, "images per step, over all processes", minimum=1)
    accumulate: int = _option(1, "parts that each process works a step's images off in", minimum=1)
    lr: float = _option(1e-3, "peak learning rate, before lr_batch", above=0)
    lr_batch: int | None = _option(
        None,
        "batch size that lr is meant for: the peak is lr * batch_size / lr_batch; published: 512",
        minimum=1,
    )
    warmup_epochs: float = _option(5.0, "epochs of linear warm-up, part of epochs", minimum=0)
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up", minimum=0)
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine", minimum=0)
    opt: str = _option("adamw", "timm's name of the optimiser")
    weight_decay: float = _option(0.05, "weight decay", minimum=0)
    clip_norm: float | None = _option(
        1.0, "norm to which the parameters' gradient is clipped; none: not at all", above=0
    )
    ema_decay: float = _option(
        0.9998, "decay per step of the averaged weights, which are the ones evaluated", minimum=0, below=1
    )
    robust_every: int = _option(0, "epochs between evaluations under APGD-CE at epsilon; 0: none", minimum=0)
    robust_images: int = _option(256, "held-out images, a fixed sample, that are attacked there", minimum=1)
    seed: int = _option(0, "seed of everything random", minimum=0)
    device: str | None = _option(None, "torch device; without it, cuda where there is one, else cpu")
    workers: int = _option(4, "processes that load an image folder (digits need none)", minimum=0)
    tensorboard: bool = _option(False, "also write the epochs' numbers for TensorBoard")

    def __post_init__(self) -> None:
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata
            if value is None:
                continue
            if limits["choices"] and value not in limits["choices"]:
                raise TrainingError(
                    f"{item.name}: expected one of {', '.join(limits['choices'])}, got {value}"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingError(f"{item.name}: expected a finite number, got {value}")
            if limits["minimum"] is not None and value < limits["minimum"]:
                raise TrainingError(f"{item.name}: expected at least {limits['minimum']}, got {value}")
            if limits["above"] is not None and value <= limits["above"]:
                raise TrainingError(f"{item.name}: expected more than {limits['above']}, got {value}")
            if limits["below"] is not None and value >= limits["below"]:
                raise TrainingError(f"{item.name}: expected less than {limits['below']}, got {value}")
        for name in ("crop_min", "hflip", "reprob"):
            if getattr(self, name) > 1:
                raise TrainingError(f"{name}: expected at most 1, got {getattr(self, name)}")
        if self.pretrained and self.init:
            raise TrainingError("init: the run starts from timm's pretrained weights already (pretrained)")
        if self.engine != "double_backprop" and self.compile:
            raise TrainingError(f"compile: {self.engine} runs the model twice, which cannot be compiled")
        if self.engine == "finite_difference" and self.precision != "float32":
            raise TrainingError(f"engine: finite_difference needs float32, not {self.precision}")
        if self.data is None:
            for name in _AUGMENTATION:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise TrainingError(
                        f"{name}: the digits are not augmented; give an image folder (--data)"
                    )

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr

    def check_same_run(self, saved: Mapping[str, Any]) -> None:
        """Raises a TrainingError naming the first option that differs from a checkpoint's config."""
        for name, value in asdict(self).items():
            if name not in MAY_CHANGE and saved.get(name) != value:
                raise TrainingError(f"{name}: {value} conflicts with the checkpoint's {saved.get(name)}")


_AUGMENTATION = (
    "crop_min",
    "hflip",
    "interpolation",
    "color_jitter",
    "auto_augment",
    "reprob",
    "mixup",
    "cutmix",
)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Options of :class:`TrainConfig` by name, from texts ``key=value``.

    Numbers may be fractions such as 4/255; ``none`` stands for no value.

    Raises:
        TrainingError: if a text has no ``=``, or its key or value is unsuitable.
    """
    pairs = (setting.partition("=") for setting in settings)
    options = {}
    for key, equals, value in pairs:
        if not equals:
            raise TrainingError(f"--set: expected key=value, got {key!r}")
        options[key.strip()] = value.strip()
    return as_options(options)


def load_recipe(name: str, folder: Path = Path()) -> dict[str, Any]:
    """The options that a recipe sets.

    A recipe is a YAML table of options; its key ``base`` names another recipe, whose options it takes
    over and changes.

    Args:
        name: one of :func:`recipe_names`, or the path of a YAML file.
        folder: where a relative path begins; a base's begins where the recipe is.

    Raises:
        TrainingError: if there is no such recipe, or an option in it is unknown or unsuitable.
    """
    import yaml

    try:
        options = yaml.safe_load(_recipe_text(name, folder)) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"recipe: {name} is no YAML: {error}") from error
    if not isinstance(options, dict):
        raise TrainingError(f"recipe: {name} is no table of options")
    base = options.pop("base", None)
    try:
        own = as_options(options)
    except TrainingError as error:
        raise TrainingError(f"recipe {name}: {error}") from error
    if base is None:
        return own
    try:
        return {**load_recipe(str(base), (folder / name).parent), **own}
    except RecursionError:
        raise TrainingError(f"recipe {name}: its base {base} leads back to it") from None


def _recipe_text(name: str, folder: Path) -> str:
    path = folder / name
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise TrainingError(f"recipe: there is no file {path}")
        return path.read_text(encoding="utf-8")
    if name not in recipe_names():
        raise TrainingError(f"recipe: there is none called {name}{_nearest(name, recipe_names())}")
    return (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(item.stem for item in _RECIPES.glob("*.yaml"))


_RECIPES = Path(__file__).parent.parent / "recipes"


def describe_options() -> str:
    """A line for each option: name, default, meaning."""
    return "\n".join(f"{item.name} ({_shown(item)}): {item.metadata['help']}" for item in fields(TrainConfig))


def _shown(item: "Field[Any]") -> str:
    if item.name == "epsilon":
        return "4/255"
    return "none" if item.default is None else str(item.default).lower()


def as_options(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options of :class:`TrainConfig` with the types that it wants, from texts or what YAML makes of them.

    Raises:
        TrainingError: if one is unknown or unsuitable.
    """
    hints = get_type_hints(TrainConfig)
    unknown = [key for key in options if key not in hints]
    if unknown:
        raise TrainingError(f"there is no option {unknown[0]}{_nearest(str(unknown[0]), hints)}")
    return {key: _as_type(key, value, hints[key]) for key, value in options.items()}


def _as_type(key: str, value: Any, hint: Any) -> Any:
    optional = isinstance(hint, types.UnionType)
    kind = get_args(hint)[0] if optional else hint
    # YAML reads no as false.
    if optional and (value is None or value is False or value in ("none", "null")):
        return None
    text = str(value)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is str:
            if isinstance(value, bool):  # what YAML makes of on and off
                return "on" if value else "off"
            if not isinstance(value, str):
                raise ValueError
            return value
        number = Fraction(text) if "/" in text else kind(text)
        if number != number or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (KeyError, ValueError, ZeroDivisionError):
        expected = {bool: "true or false", int: "a whole number", str: "a text"}
        wanted = expected.get(kind, "a number or a fraction such as 4/255")
        raise TrainingError(f"{key}: expected {wanted}, got {value!r}") from None


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]}?" if found else ""
