"""Models that take pixels in [0, 1]: timm's, and a small GELU network for small images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import get_act_layer
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from .config import TrainingError

__all__ = ["SMALL_MODEL", "InputSpec", "Normalize", "create_model", "input_spec"]

SMALL_MODEL = "gelu_mixer"


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
    if name == SMALL_MODEL:
        cfg = PretrainedCfg(input_size=(3, 32, 32), crop_pct=1.0)
    elif timm.is_model(name):
        cfg = get_pretrained_cfg(name) or PretrainedCfg()
    else:
        raise TrainingError(f"--model: timm knows no model called {name}")
    own = cfg.input_size[-1]
    half = (0.5,) * channels
    return InputSpec(
        size=size or own,
        mean=cfg.mean if len(cfg.mean) == channels else half,
        std=cfg.std if len(cfg.std) == channels else half,
        crop_pct=cfg.crop_pct if size in (None, own) else 1.0,
        interpolation=cfg.interpolation,
    )


def create_model(
    name: str,
    spec: InputSpec,
    num_classes: int,
    *,
    activation: str | None = None,
    pretrained: bool = False,
) -> Normalize:
    """Builds a model of pixels in [0, 1], with random weights from torch's global generator.

    Args:
        name: ``"gelu_mixer"`` or a timm model. ``gelu_mixer`` is timm's MLP-Mixer, three blocks of width 32
            on 4x4 patches, without normalisation or dropout: smooth in its input, and the same function in
            train and eval mode.
        spec: from :func:`input_spec`; its mean and std are the wrapper's.
        num_classes: C.
        activation: timm's name of the activation to use instead of the model's own.
        pretrained: load timm's pretrained weights.

    Returns:
        A module from pixels (B, channels, size, size) to logits (B, C).

    Raises:
        TrainingError: if the model cannot be built so; the message names the option.
    """
    channels = len(spec.mean)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if activation:
        try:
            options["act_layer"] = get_act_layer(activation)
        except (AssertionError, KeyError):
            raise TrainingError(f"--activation: timm knows none called {activation}") from None
    if name == SMALL_MODEL:
        if pretrained:
            raise TrainingError(f"--pretrained: there are no weights for {name}")
        if spec.size % 4:
            raise TrainingError(f"--image-size: {name} needs a multiple of 4, got {spec.size}")
        model: nn.Module = MlpMixer(
            img_size=spec.size,
            patch_size=spec.size // 4,
            num_blocks=3,
            embed_dim=32,
            mlp_ratio=(2.0, 4.0),
            norm_layer=nn.Identity,
            **options,
        )
    else:
        cfg = get_pretrained_cfg(name)
        if cfg is not None and cfg.fixed_input_size:
            options["img_size"] = spec.size
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"--model: timm cannot build {name} with {options}: {error}") from error
    return Normalize(model, spec.mean, spec.std)
