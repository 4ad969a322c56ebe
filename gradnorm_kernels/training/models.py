"""Builds models that take pixels in [0, 1]: timm's, PreActResNet, a small GELU network for small images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import timm.layers
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from ..fuse import fuse
from .config import TrainConfig
from .files import load_checkpoint
from .options import TrainingError
from .preact_resnet import PreActResNet
from .weights import Weights, read_weights

SMALL_MODEL = "gelu_mixer"
# Blocks a stage, channels of the first, and stride of the first convolution.
PREACT_RESNETS = {
    "preact_resnet18": (2, 64, 1),
    "preact_resnet10": (1, 16, 2),
    "preact_resnet10_w24": (1, 24, 2),
}


class Normalize(nn.Module):
    """Normalises pixels, then applies ``model``: norms and attacks outside it live in pixel space.

    Args:
        model: takes normalised images (B, C, H, W).
        mean: C numbers, in pixel units.
        std: C numbers, in pixel units, above 0.

    Raises:
        ValueError: if ``mean`` and ``std`` differ in length or ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"Normalize: expected positive std, one a mean, got {mean=}, {std=}")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to see: side in pixels, normalisation, share of it evaluated, resampling."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str


def input_spec(name: str, channels: int, size: int | None = None) -> InputSpec:
    """The input of the model called ``name``: timm's numbers for it where they apply.

    Args:
        name: as :func:`create_model` takes it.
        channels: of the images. Where the model was not made for as many, mean and std are 0.5.
        size: height and width in pixels; without it, the model's own. Images of another size than the model's
            own are evaluated whole, without a central crop.

    Raises:
        TrainingError: if timm knows no such model.
    """
    if name == SMALL_MODEL or name in PREACT_RESNETS:
        cfg = PretrainedCfg(input_size=(3, 32, 32), crop_pct=1.0)
    elif timm.is_model(name):
        cfg = get_pretrained_cfg(name) or PretrainedCfg()
    else:
        raise TrainingError(f"model: timm knows no model called {name}")
    own = cfg.input_size[-1]
    half = (0.5,) * channels
    return InputSpec(
        size=size or own,
        mean=cfg.mean if len(cfg.mean) == channels else half,
        std=cfg.std if len(cfg.std) == channels else half,
        crop_pct=cfg.crop_pct if size in (None, own) else 1.0,
        interpolation=cfg.interpolation,
    )


def build_model(
    config: TrainConfig, spec: InputSpec, num_classes: int, device: str | torch.device, *, initial: bool
) -> Normalize:
    """The model of a run, on ``device``, with its initial weights or, without ``initial``, any.

    Raises:
        TrainingError: if it cannot be built.
    """
    weights = {"pretrained": config.pretrained, "init": config.init} if initial else {}
    model = create_model(config.model, spec, num_classes, act=config.act, **weights).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.fused == "on" or (config.fused == "auto" and fuses_on(device)):
        before = [type(module) for module in model.modules()]
        fuse(model)
        if config.fused == "on" and before == [type(module) for module in model.modules()]:
            raise TrainingError(f"fused: there is nothing to fuse in {config.model}")
    return model


def fuses_on(device: str | torch.device) -> bool:
    """Whether the fused kernels are for ``device``; on meta tensors they say the shapes of their results."""
    return torch.device(device).type in ("cpu", "cuda", "meta")


def load_model(path: Path, device: str | torch.device = "cpu") -> nn.Module:
    """The averaged model of a run, in eval mode: from pixels in [0, 1] to logits.

    Args:
        path: the run's output directory, or a checkpoint.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    saved = load_checkpoint(path)
    config, spec = TrainConfig(**saved["config"]), InputSpec(**saved["spec"])
    model = build_model(config, spec, len(saved["classes"]), device, initial=False)
    model.load_state_dict(saved["ema"])
    return model.eval()


def create_model(
    name: str,
    spec: InputSpec,
    num_classes: int,
    *,
    act: str | None = None,
    pretrained: bool = False,
    init: str | None = None,
) -> Normalize:
    """Builds a model of pixels in [0, 1], with random weights from torch's global generator.

    Args:
        name: ``"gelu_mixer"``, one of ``PREACT_RESNETS`` or a timm model. ``gelu_mixer``
            is timm's MLP-Mixer, three blocks of width 32 on 4x4 patches, without normalisation or dropout:
            smooth in its input, and the same function in train and eval mode. ``preact_resnet10`` has half
            the blocks of PreActResNet-18, a quarter of its channels and half its resolution: 0.008 GFLOP an
            image of 32x32 (a multiply-add is 2), and ``preact_resnet10_w24``, with 24 channels for 16, 0.018.
        spec: from :func:`input_spec`; its mean and std are the wrapper's.
        num_classes: C.
        act: as :func:`swap_activations` takes it.
        pretrained: load timm's pretrained weights.
        init: path of weights to load: a checkpoint of a run, whose averaged weights are taken, or any other
            file that :func:`~.weights.read_weights` reads. Of another number of classes, the last layer is
            left out.

    Returns:
        A module from pixels (B, channels, size, size) to logits (B, C).

    Raises:
        TrainingError: if the model cannot be built so; the message names the option.
    """
    if pretrained and (name == SMALL_MODEL or name in PREACT_RESNETS):
        raise TrainingError(f"pretrained: there are no weights for {name}")
    channels = len(spec.mean)
    if name == SMALL_MODEL:
        model = _gelu_mixer(spec.size, channels, num_classes)
    elif name in PREACT_RESNETS:
        model = PreActResNet(*PREACT_RESNETS[name], num_classes, channels)
    else:
        options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
        cfg = get_pretrained_cfg(name)
        if cfg is not None and cfg.fixed_input_size:
            options["img_size"] = spec.size
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"model: timm cannot build {name} with {options}: {error}") from error
    if act:
        swap_activations(model, act)
    wrapped = Normalize(model, spec.mean, spec.std)
    if init:
        load_weights(wrapped, Path(init), option="init", classes_may_differ=True)
    return wrapped


def _gelu_mixer(size: int, channels: int, num_classes: int) -> nn.Module:
    if size % 4:
        raise TrainingError(f"image_size: {SMALL_MODEL} needs a multiple of 4, got {size}")
    blocks: dict[str, Any] = {"num_blocks": 3, "embed_dim": 32, "mlp_ratio": (2.0, 4.0)}
    blocks |= {"patch_size": size // 4, "in_chans": channels, "norm_layer": nn.Identity}
    return MlpMixer(num_classes, size, **blocks)


# By name: the module, and the argument that a number after the name sets.
ACTIVATIONS: dict[str, tuple[Callable[..., nn.Module], str | None]] = {
    "relu": (nn.ReLU, None),
    "leaky_relu": (nn.LeakyReLU, "negative_slope"),
    "elu": (nn.ELU, "alpha"),
    "softplus": (nn.Softplus, "beta"),
    "mish": (nn.Mish, None),
    "silu": (nn.SiLU, None),
    "gelu": (nn.GELU, None),
    "gelu_tanh": (timm.layers.GELUTanh, None),
}
# Gates (sigmoid and its like) are no activations to swap.
_RELU_LIKE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU,
    nn.SiLU, nn.Softplus, timm.layers.GELU, timm.layers.GELUTanh, timm.layers.HardMish,
    timm.layers.HardSwish, timm.layers.Mish, timm.layers.PReLU, timm.layers.QuickGELU, timm.layers.Swish,
)  # fmt: skip


def swap_activations(model: nn.Module, act: str) -> None:
    """Puts one activation in place of all of a model's modules that are like ReLU, and not of its gates.

    Args:
        act: ``relu``, ``leaky_relu``, ``elu``, ``softplus``, ``mish``, ``silu``, ``gelu`` or ``gelu_tanh``; a
            number may follow for Leaky ReLU's slope, ELU's alpha or Softplus's beta, as in ``softplus:10``.

    Raises:
        TrainingError: if there is no such activation, or nothing to swap.
    """
    name, _, number = act.partition(":")
    if name not in ACTIVATIONS:
        raise TrainingError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {name}")
    make, argument = ACTIVATIONS[name]
    arguments = {}
    if number:
        if argument is None:
            raise TrainingError(f"act: {name} takes no number, got {number}")
        try:
            arguments[argument] = float(number)
        except ValueError:
            raise TrainingError(f"act: expected a number after {name}:, got {number}") from None
    found = [(parent, key) for parent in model.modules() for key, child in parent.named_children()
             if isinstance(child, _RELU_LIKE)]  # fmt: skip
    if not found:
        raise TrainingError("act: the model has no activation modules to swap")
    for parent, key in found:
        setattr(parent, key, make(**arguments))


def load_weights(
    model: Normalize,
    path: Path,
    *,
    option: str = "weights",
    classes_may_differ: bool = False,
    partial: bool = False,
) -> Weights:
    """Loads a file's weights, and its mean and std where it has them, as :func:`~.weights.read_weights` finds
    them.

    Args:
        option: what an error calls ``path``.
        classes_may_differ: keep the last layer of ``model`` where the file's is of another shape.
        partial: load what fits, whatever else there is on either side.

    Returns:
        What was read, with what does not fit.

    Raises:
        TrainingError: if the file cannot be read, or does not fit; the message says what it found.
    """
    own = model.model.state_dict()
    try:
        found = read_weights(path, own)
        if classes_may_differ:
            for key in _classifier_keys(model.model):
                if key in found.tensors and found.tensors[key].shape != own[key].shape:
                    found.tensors[key] = own[key]
        if problems := found.problems(own):
            if not partial:
                raise TrainingError(f"{path} does not fit the model: {problems}")
            found.drop_misfits(own)
            if not found.tensors:
                raise TrainingError(f"{path} has nothing that fits the model: {problems}")
    except TrainingError as error:
        raise TrainingError(f"{option}: {error}") from error
    model.model.load_state_dict(found.tensors, strict=False)
    for name, values in found.normalization.items():
        buffer = getattr(model, name)
        if values.numel() == buffer.numel():
            buffer.copy_(values.view_as(buffer))
    return replace(found, left_out=problems)


def _classifier_keys(model: nn.Module) -> list[str]:
    """Of the last layer's weights, or of several such layers', as timm names them."""
    keys = list(model.state_dict())
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or keys[-1].rpartition(".")[0]
    layers = (named,) if isinstance(named, str) else tuple(named)
    return [key for key in keys if key.rpartition(".")[0] in layers]
