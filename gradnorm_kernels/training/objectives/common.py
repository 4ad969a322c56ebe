"""What the objectives share: the protocol, one forward pass, and the checks of its arguments."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Batch",
    "Loss",
    "Model",
    "Objective",
    "check_choice",
    "check_images",
    "check_non_negative",
    "evaluated",
    "run",
]

Model = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """A training loss and its parts. Means are over the batch; losses are in nats.

    Attributes:
        total: scalar to call ``backward`` on.
        parts: by name, scalars without a graph: the terms of the loss, without their weights. A term that had
            no weight was not computed and is absent.
        logits: (B, C), detached, of the images that the cross-entropy was taken of.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    logits: Tensor


class Objective(Protocol):
    """What the trainer minimises; ``epoch`` counts from the start of training, fractions included."""

    def __call__(self, model: Model, images: Tensor, targets: Tensor, *, epoch: float) -> Loss: ...

    def schedule(self, epoch: float) -> dict[str, float]:
        """The weights that change with the epoch, by name."""
        ...


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        model: what was run.
        pixels: (B, ...), a leaf of its own; it requires grad where :func:`run` was asked for that.
        targets: (B,) int64 or (B, C) floating point.
        logits: (B, C).
        cross_entropy: (B,), per sample.
        before: the generators' state and the model's buffers before the pass, where :func:`run` was asked.
    """

    model: Model
    pixels: Tensor
    targets: Tensor
    logits: Tensor
    cross_entropy: Tensor
    before: "_Before | None"

    def input_gradient(self, output: Tensor, *, create_graph: bool) -> Tensor:
        """Gradient of the sum of ``output`` with respect to the pixels; the graph is kept for later."""
        (gradient,) = torch.autograd.grad(
            output, self.pixels, torch.ones_like(output), create_graph=create_graph, retain_graph=True
        )
        return gradient

    def logits_at(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of a second pass over other pixels: the same function as in the first.

        With its random numbers, and from the buffers that it began with (BatchNorm's running statistics);
        the model's own stay as the first pass left them. To be called once.
        """
        assert self.before is not None
        with torch.random.fork_rng(_generators(pixels)):
            _set_random_state(self.before.random_state, pixels)
            if isinstance(self.model, nn.Module):
                return torch.func.functional_call(self.model, self.before.buffers, (pixels,))
            return self.model(pixels)


class _Before(NamedTuple):
    random_state: tuple[Tensor, ...]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: Model, images: Tensor) -> "_Before":
        named = model.named_buffers() if isinstance(model, nn.Module) else ()
        return cls(_random_state(images), {name: buffer.clone() for name, buffer in named})


def run(
    model: Model,
    images: Tensor,
    targets: Tensor,
    *,
    input_gradient: bool = False,
    replayable: bool = False,
) -> Batch:
    """Runs the model on a batch, after checking it.

    Args:
        input_gradient: the pixels require grad.
        replayable: :meth:`Batch.logits_at` will be called.

    Raises:
        TypeError: if ``images`` or ``targets`` has an unsuitable dtype, or is no tensor.
        ValueError: if a shape, device or value does not fit.
        RuntimeError: if an input gradient is asked for while gradients are disabled (``torch.no_grad``).
    """
    check_images(images)
    if input_gradient and not torch.is_grad_enabled():
        raise RuntimeError("gradients are disabled, yet the objective needs the gradient of its input")
    before = _Before.of(model, images) if replayable else None
    pixels = images.detach()
    if input_gradient:
        pixels.requires_grad_()
    logits = model(pixels)
    _check_targets(targets, logits)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return Batch(model, pixels, targets, logits, cross_entropy, before)


def _generators(images: Tensor) -> list[torch.device]:
    return [images.device] if images.device.type == "cuda" else []


def _random_state(images: Tensor) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _generators(images)))


def _set_random_state(state: tuple[Tensor, ...], images: Tensor) -> None:
    cpu, *others = state
    torch.set_rng_state(cpu)
    for device, other in zip(_generators(images), others, strict=True):
        torch.cuda.set_rng_state(other, device)


@contextmanager
def evaluated(model: Model) -> Iterator[None]:
    """The model in eval mode, for as long as the block lasts."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_non_negative(owner: object, name: str, value: float) -> None:
    """Raises a ValueError that names the argument."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{type(owner).__name__}: expected {name} to be finite and at least 0, got {value}")


def check_choice(
    owner: object, name: str, value: str, choices: Mapping[str, object] | tuple[str, ...]
) -> None:
    """Raises a ValueError that names the argument."""
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}: expected {name} to be one of {', '.join(choices)}, got {value!r}"
        )


def check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor with pixels in [0, 1], got {kind}")
    if images.ndim < 2 or not images.numel():
        raise ValueError(
            f"images: expected shape (B, ...) with no empty dimension, got {tuple(images.shape)}"
        )


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if logits.ndim != 2:
        raise ValueError(f"model: expected logits of shape (B, C), got {tuple(logits.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets: expected device {logits.device}, got {targets.device}")
    batch, classes = logits.shape
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets: expected class probabilities of shape {(batch, classes)},"
                f" got {tuple(targets.shape)}"
            )
    elif targets.dtype != torch.int64:
        raise TypeError(
            "targets: expected int64 class indices or floating-point class probabilities,"
            f" got {targets.dtype}"
        )
    elif targets.shape != (batch,):
        raise ValueError(f"targets: expected class indices of shape {(batch,)}, got {tuple(targets.shape)}")
    # cross_entropy skips targets of -100 in silence. On a GPU the look would cost a synchronisation.
    elif (
        targets.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not ((targets >= 0) & (targets < classes)).all()
    ):
        raise ValueError(f"targets: expected class indices from 0 to {classes - 1}, got {targets.tolist()}")
