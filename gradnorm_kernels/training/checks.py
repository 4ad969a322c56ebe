"""Checks of what models are given and what they return, for objectives, attacks and evaluation alike.

Each raises a TypeError or ValueError that begins with the argument's name.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_images(images: Any, *, planes: bool = False) -> None:
    """Floating point, (B, ...) or, with ``planes``, (B, C, H, W), without an empty dimension."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"images: expected a floating-point tensor with pixels in [0, 1], got {_kind(images)}"
        )
    if not (images.ndim == 4 if planes else images.ndim >= 2) or not images.numel():
        shape = "(B, C, H, W)" if planes else "(B, ...)"
        found = tuple(images.shape)
        raise ValueError(f"images: expected shape {shape} with no empty dimension, got {found}")


def check_pixels(images: Tensor) -> None:
    """In [0, 1]; a NaN is not."""
    low, high = (bound.item() for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images: expected pixels in [0, 1], got {low} to {high}")


def check_logits(logits: Any, images: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected it to return a tensor of logits, got {_kind(logits)}")
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"model: expected logits of shape ({len(images)}, C), got {tuple(logits.shape)}")


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Class indices (B,), int64, or class probabilities (B, C), floating point, for logits (B, C)."""
    if not isinstance(targets, Tensor) or not (targets.is_floating_point() or targets.dtype == torch.int64):
        wanted = "int64 class indices or floating-point class probabilities"
        raise TypeError(f"targets: expected {wanted}, got {_kind(targets)}")
    if targets.device != logits.device:
        raise ValueError(f"targets: expected device {logits.device}, got {targets.device}")
    batch, classes = logits.shape
    if targets.shape != (logits.shape if targets.is_floating_point() else (batch,)):
        raise ValueError(
            f"targets: expected class indices of shape ({batch},) or class probabilities of shape"
            f" {(batch, classes)}, got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or not looked_at(targets):
        return
    # cross_entropy skips targets of -100 in silence.
    if not ((targets >= 0) & (targets < classes)).all():
        raise ValueError(f"targets: expected class indices from 0 to {classes - 1}, got {targets.tolist()}")


def looked_at(values: Tensor) -> bool:
    """Whether values are checked. On a GPU that would cost a synchronisation; a compiler cannot."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _kind(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
