"""The options of a training run, and the recipes that set them: one definition for Python, the command line,
recipe files and checkpoints. Those of the objectives stand in the objectives' own files.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from .objectives import OBJECTIVES, objective_options
from .objectives.common import epsilon_option
from .options import TrainingError, as_type, check_options, option

# Options that do not change what a run computes, and so may differ when it resumes.
MAY_CHANGE = frozenset({"checkpoint", "device", "workers", "tensorboard"})


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop)
    """SIGINT stopped the run after it wrote a checkpoint, from which it can resume."""

    def __init__(self, checkpoint: Path, epoch: int, step: int) -> None:
        super().__init__(f"stopped in epoch {epoch + 1} after step {step}; wrote {checkpoint}")


@dataclass(frozen=True)
class _DataAndModel:
    """The options that come before those of the objectives."""

    data: str | None = option(
        None, "image folder holding train/<class>/* and val/, validation/ or test/<class>/*;"
        " without it, scikit-learn's 1,797 digits of 8x8 pixels"
    )  # fmt: skip
    model: str = option(
        "gelu_mixer",
        "gelu_mixer (small, no normalisation), preact_resnet18, preact_resnet10 (small),"
        " preact_resnet10_w24, or timm's",
    )
    act: str | None = option(
        None, "activation to put in place of every ReLU-like one of the model: relu, leaky_relu, elu,"
        " softplus, mish, silu, gelu or gelu_tanh; with a number, Leaky ReLU's slope, ELU's alpha or"
        " Softplus's beta: softplus:10"
    )  # fmt: skip
    pretrained: bool = option(False, "start from timm's pretrained weights")
    init: str | None = option(
        None, "start from the weights in this file: a checkpoint of a run (its averaged weights), or a"
        " state_dict of the timm model"
    )  # fmt: skip
    image_size: int | None = option(
        None, "height and width of the images, in pixels; without it, the model's own", minimum=1
    )
    crop_min: float = option(
        1.0,
        "smallest share of an image's area that a random crop keeps in training; 1: no crop",
        above=0,
        maximum=1,
    )
    hflip: float = option(0.0, "probability of a horizontal flip in training", minimum=0, maximum=1)
    interpolation: str | None = option(
        None, "how training images are resized; without it, the model's own",
        choices=("bicubic", "bilinear", "nearest", "random"),
    )  # fmt: skip
    color_jitter: float = option(0.0, "strength of colour jitter; auto_augment replaces it", minimum=0)
    auto_augment: str | None = option(None, "timm's auto-augmentation, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "probability of random erasing", minimum=0, maximum=1)
    remode: str = option(
        "pixel", "what random erasing fills with: a constant, a random colour, random pixels",
        choices=("const", "rand", "pixel"),
    )  # fmt: skip
    mixup: float = option(0.0, "mixup's alpha; 0: no mixup", minimum=0)
    cutmix: float = option(0.0, "cutmix's alpha; 0: no cutmix", minimum=0)
    label_smoothing: float = option(
        0.1, "share of each target spread evenly over the classes", minimum=0, below=1
    )
    objective: str = option(
        "gradient_norm", "; ".join(f"{name}: {row.help}" for name, row in OBJECTIVES.items()),
        choices=tuple(OBJECTIVES),
    )  # fmt: skip
    epsilon: float = epsilon_option()


_WithObjectives: Any = make_dataclass(
    "_WithObjectives",
    [
        (name, item.type, field(default=item.default, metadata=item.metadata))
        for name, item in dict(objective_options()).items()
        if name not in _DataAndModel.__dataclass_fields__
    ],
    bases=(_DataAndModel,),
    frozen=True,
)


@dataclass(frozen=True)
class TrainConfig(_WithObjectives):
    """What a run computes. ``gradnorm train --help`` describes each option and gives its unit.

    Raises:
        TrainingError: if a value is out of range; the message names the option.
    """

    mode: str = option(
        "eval", "the model's mode in training; published: eval (BatchNorm frozen, no dropout) with a gradient"
        " norm, train with edge regularisation alone",
        choices=("eval", "train"),
    )  # fmt: skip
    fused: str = option(
        "auto", "this package's fused kernels: auto uses them where the device has them, on fails where"
        " nothing can be fused",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    precision: str = option(
        "float32", "of matrix products and activations: float32, tf32 (NVIDIA GPUs) or bfloat16 autocast;"
        " parameters and the sum of the gradient norm stay float32",
        choices=("float32", "tf32", "bfloat16"),
    )  # fmt: skip
    channels_last: bool = option(False, "keep images and convolutions in channels_last memory format")
    checkpoint: bool = option(
        False,
        "compute the model's repeated blocks again in each backward pass instead of keeping their results",
    )
    compile: bool = option(False, "compile the step's loss and gradients as a whole with torch.compile")
    cuda_graph: bool = option(
        False,
        "capture the step's loss and gradients in a CUDA graph once the norm's weight stays the same; no GPU"
        " has run it yet",
    )
    epochs: int = option(30, "passes over the training images", minimum=1)
    batch_size: int = option(128, "images per step, over all processes", minimum=1)
    accumulate: int = option(1, "parts that each process works a step's images off in", minimum=1)
    lr: float = option(1e-3, "peak learning rate, before lr_batch", above=0)
    lr_batch: int | None = option(
        None,
        "batch size that lr is meant for: the peak is lr * batch_size / lr_batch; published: 512",
        minimum=1,
    )
    warmup_epochs: float = option(5.0, "epochs of linear warm-up, part of epochs", minimum=0)
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", minimum=0)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", minimum=0)
    opt: str = option("adamw", "timm's name of the optimiser")
    weight_decay: float = option(0.05, "weight decay", minimum=0)
    clip_norm: float | None = option(
        1.0, "norm to which the parameters' gradient is clipped; none: not at all", above=0
    )
    ema_decay: float = option(
        0.9998, "decay per step of the averaged weights, which are the ones evaluated", minimum=0, below=1
    )
    robust_every: int = option(0, "epochs between evaluations under APGD-CE at epsilon; 0: none", minimum=0)
    robust_images: int = option(256, "held-out images, a fixed sample, that are attacked there", minimum=1)
    seed: int = option(0, "seed of everything random", minimum=0)
    device: str | None = option(None, "torch device; without it, cuda where there is one, else cpu")
    workers: int = option(4, "processes that load an image folder (digits need none)", minimum=0)
    tensorboard: bool = option(False, "also write the epochs' numbers for TensorBoard")

    def __post_init__(self) -> None:
        check_options(self, TrainingError)
        if self.pretrained and self.init:
            raise TrainingError("init: the run starts from timm's pretrained weights already (pretrained)")
        if self.checkpoint and self.compile:
            raise TrainingError("checkpoint: a compiled step decides by itself what it computes again")
        if self.cuda_graph:
            # The others draw numbers, or copy the generators' states, where a graph would freeze them.
            if self.compile or self.checkpoint:
                name = "compile" if self.compile else "checkpoint"
                raise TrainingError(f"cuda_graph: cannot go with {name}")
            if self.objective not in ("natural", "gradient_norm") or self.engine != "double_backprop":
                raise TrainingError(
                    "cuda_graph: captures the objectives natural and gradient_norm, by double_backprop"
                )
        for row in OBJECTIVES.values():
            row.check(self)
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
        # A checkpoint older than an option ran with its default.
        before = {item.name: item.default for item in fields(self)} | dict(saved)
        for name, value in asdict(self).items():
            if name not in MAY_CHANGE and before[name] != value:
                raise TrainingError(f"{name}: {value} conflicts with the checkpoint's {before[name]}")


for _name, _item in objective_options():
    _own = TrainConfig.__dataclass_fields__[_name]
    if (_own.default, _own.metadata) != (_item.default, _item.metadata):
        raise ValueError(f"{_name}: two options of this name differ in default, limits or help")

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
    return {key: as_type(key, value, hints[key]) for key, value in options.items()}


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]}?" if found else ""
