"""A step's loss and gradients, captured in a CUDA graph: one launch for a step's thousands.

No GPU has run it yet: a step without is the default.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import world_size
from .objectives import Loss, Objective
from .options import TrainingError

# Adds the gradients of a loss, times a weight, to the parameters' ``grad``.
Backward = Callable[[Objective, nn.Module, Tensor, Tensor, float, float], Loss]
# The loss, and each parameter's gradient.
Results = tuple[Loss, list[Tensor | None]]


def capture(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Captures the work that a call queues, which must not wait for the GPU.

    Returns:
        What queues it again, and what the call returned, whose tensors each replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def graphed(backward: Backward, device: torch.device) -> Backward:
    """``backward`` by CUDA graphs.

    Raises:
        TrainingError: where there are none, or another process waits for the gradients.
    """
    if device.type != "cuda":
        raise TrainingError(f"cuda_graph: {device.type} has no CUDA graphs")
    if world_size() > 1:
        raise TrainingError("cuda_graph: several processes' exchange of gradients is not captured")
    return GraphedBackward(backward)


class _Captured(NamedTuple):
    """A step in fixed memory: where it reads its images and targets, and what a replay overwrites."""

    images: Tensor
    targets: Tensor
    replay: Callable[[], None]
    results: Results


class GraphedBackward:
    """Does as the ``backward`` it is given, by a graph from the third step on that is like the one before.

    Shapes, the objective's weights and those of a batch's parts are constants of a graph. Where one of them
    changes (as the norm's weight does, while it rises), the step runs as without; so does the next, from
    which memory and kernels are as a capture needs them.

    Args:
        backward: of the loss and the parameters' gradients.
        capture: stands in for :func:`capture` where there is no GPU.

    Raises:
        TrainingError: where a step does what cannot be captured, such as waiting for the GPU.
    """

    def __init__(self, backward: Backward, capture: Callable[..., Any] = capture) -> None:
        self._backward, self._capture = backward, capture
        self._key: Any = None
        self._seen = 0
        self._captured: _Captured | None = None

    def __call__(
        self,
        objective: Objective,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        epoch: float,
        weight: float,
    ) -> Loss:
        parts = [(t.shape, t.stride(), t.dtype, t.device) for t in (images, targets)]
        key = (objective, id(model), model.training, weight, objective.schedule(epoch), parts)
        if key != self._key:
            self._key, self._seen, self._captured = key, 0, None
        self._seen += 1
        if self._seen <= 2:
            return self._backward(objective, model, images, targets, epoch, weight)
        parameters = list(model.parameters())
        before = [parameter.grad for parameter in parameters]
        if self._captured is None:
            fixed = images.clone(), targets.clone()

            def run() -> Results:
                for parameter in parameters:
                    parameter.grad = None
                loss = self._backward(objective, model, *fixed, epoch, weight)
                return loss, [parameter.grad for parameter in parameters]

            try:
                self._captured = _Captured(*fixed, *self._capture(run))
            except RuntimeError as error:
                raise TrainingError(f"cuda_graph: this step cannot be captured: {error}") from error
        step = self._captured
        step.images.copy_(images)
        step.targets.copy_(targets)
        step.replay()
        # The next replay overwrites its results.
        loss, gradients = step.results
        for parameter, grad, found in zip(parameters, before, gradients, strict=True):
            parameter.grad = grad if found is None else found.clone() if grad is None else grad + found
        named = {name: part.clone() for name, part in loss.parts.items()}
        return Loss(loss.total.clone(), named, loss.logits.clone())
