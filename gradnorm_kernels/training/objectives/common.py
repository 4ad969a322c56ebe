"""What the objectives share: the protocol, and one forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_images, check_logits, check_targets
from ..options import option

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
    model: Model, images: Tensor, targets: Tensor, *, input_gradient: bool = False, replayable: bool = False
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
    check_logits(logits, images)
    check_targets(targets, logits)
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


def epsilon_option() -> Any:
    """The size of a perturbation, which the objectives and a run's evaluation have in common."""
    return option(
        4 / 255, "perturbation that the gradient norm guards against and that adversarial training is given,"
        " in pixel units (pixels lie in [0, 1])",
        minimum=0,
    )  # fmt: skip
