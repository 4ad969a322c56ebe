"""Several processes, one a GPU, as ``torchrun`` starts them; a process by itself is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _is_active() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _is_active() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started, for the length of the block: NCCL on GPUs, else Gloo."""
    if _is_active() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
        dist.barrier()  # Gloo aborts a process whose peer is gone
    finally:
        dist.destroy_process_group()


def summed(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in any of the processes, so that all take the same turn."""
    return bool(summed(torch.tensor(float(flag), device=device)).item()) if world_size() > 1 else flag


def _is_active() -> bool:
    return dist.is_available() and dist.is_initialized()
