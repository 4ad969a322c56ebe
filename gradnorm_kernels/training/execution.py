"""How a training step is executed: the device, the precision, compilation, several processes."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .distributed import world_size
from .objectives import Loss
from .options import TrainingError


def find_device(name: str | None) -> torch.device:
    """The torch device called ``name``, or the one to use where none is named.

    Raises:
        TrainingError: if it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise TrainingError(f"device: cannot use {name}: {error}") from error
    return device


class _Autocast(nn.Module):
    """Runs a model under autocast to bfloat16. Derivatives are taken outside, as autocast asks for."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.kind = model, device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16):
            return self.model(images).float()


def for_training(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """What the objective runs: ``model``, whose parameters it shares, with precision and processes added."""
    if config.precision == "bfloat16":
        model = _Autocast(model, device).train(model.training)
    if world_size() == 1:
        return model
    on_gpu = [device] if device.type == "cuda" else None
    # Buffers stay each process's own: a broadcast in the next forward would change what backward has saved.
    return DistributedDataParallel(model, device_ids=on_gpu, broadcast_buffers=False)


def without_exchange(trained: nn.Module) -> AbstractContextManager[None]:
    """Gradients are not exchanged between processes for as long as the block lasts."""
    return trained.no_sync() if isinstance(trained, DistributedDataParallel) else nullcontext()


def tf32(config: TrainConfig) -> bool | None:
    """What a run's steps set these switches to. A finite difference would be rounded away."""
    if config.precision == "tf32":
        return True
    return False if config.engine == "finite_difference" else None


def compiled(backward: Callable[..., Loss]) -> Callable[..., Loss]:
    """``backward`` as one compiled graph, which is what differentiating twice inside it takes."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise TrainingError(f"compile: torch {torch.__version__} cannot trace autograd.grad; a newer one can")
    whole = torch.compile(backward, fullgraph=True)

    def run(*arguments: Any) -> Loss:
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return whole(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(f"compile: this step cannot be compiled: {error}") from error

    return run
