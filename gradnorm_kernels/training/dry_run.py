"""What a run would be, without training: its model, the swaps, and a step's memory and time."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..fuse import fuse
from .config import TrainConfig
from .data import Data, load_data
from .execution import find_device
from .memory import MemoryMode
from .models import build_model, fuses_on
from .options import TrainingError
from .report import duration
from .runs import synchronize
from .trainer import Trainer

# Images of the step that is timed; a divisor of any number of processes is not needed, as there is one.
_TIMED = 8


def dry_run(config: TrainConfig) -> None:
    """Prints the model of a run, what :func:`~..fuse.fuse` swaps in it, and estimates of memory and time.

    Memory is counted on meta tensors, of a whole step of one process with all its images: parameters, their
    averages and gradients, the optimiser's state, and the results of ops, but not what an op needs only while
    it runs. Time is that of a step of a few random images on the run's device, the last epoch's with the norm
    at full weight, scaled to the batch in proportion: the data's loading and evaluations come on top. Pretrained
    weights are not loaded for it.

    Raises:
        TrainingError: if the run could not start.
    """
    device = find_device(config.device)
    data = load_data(config)
    plain = replace(config, pretrained=False, init=None)
    trainer = _trainer(replace(plain, batch_size=_TIMED, accumulate=1), data, device)
    trainer.warn_of_short_run()
    trainer.warn_of_double_backward()
    for line in (*_facts(config, data, trainer, device), *_swaps(plain, data, device)):
        print(line)
    print(f"memory: {_memory(plain, data)}")
    print(f"time: {_time(config, trainer)}")


def _facts(config: TrainConfig, data: Data, trainer: Trainer, device: torch.device) -> Iterator[str]:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    side, channels = data.spec.size, len(data.spec.mean)
    start = config.init or ("timm's pretrained weights" if config.pretrained else "random weights")
    act = f" with {config.act}" if config.act else ""
    yield (
        f"model: {config.model}{act}, {parameters / 1e6:.3g} million parameters, images of"
        f" {channels}x{side}x{side}, {data.num_classes} classes, from {start}, in {config.mode} mode on {device}"
    )
    yield (
        f"run: {config.objective}, {config.epochs} epochs of {data.steps_per_epoch} steps of"
        f" {config.batch_size} of {len(data.train)} images; {len(data.evaluation)} held out"
    )


def _swaps(config: TrainConfig, data: Data, device: torch.device) -> Iterator[str]:
    if config.fused == "off" or not (config.fused == "on" or fuses_on(device)):
        yield f"fused: {config.fused}, nothing is swapped on {device.type}"
        return
    fuse(
        build_model(replace(config, fused="off"), data.spec, data.num_classes, "meta", initial=False),
        dry_run=True,
    )


def _memory(config: TrainConfig, data: Data) -> str:
    if config.compile:
        return "not counted: a compiled step decides what it keeps"
    try:
        trainer = _trainer(config, data, torch.device("meta"))
        batch = _batch(trainer, config.batch_size)
        # The first step makes the optimiser's state.
        trainer.step(*batch)
        with MemoryMode() as counted:
            counted.memory.hold(_kept(trainer))
            counted.memory.hold(batch)
            trainer.step(*batch)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"cannot be counted on meta tensors: {str(error).partition(chr(10))[0]}"
    peak = counted.memory.peak()
    return (
        f"{peak.total() / 2**30:.3g} GiB at the step's peak, of which {peak['held'] / 2**30:.3g} are weights, their"
        " averages, the optimiser's state and the images; counted, without what an op needs while it runs"
    )


def _kept(trainer: Trainer) -> Iterator[Tensor]:
    for module in (trainer.model, trainer.ema.module):
        yield from module.parameters()
        yield from module.buffers()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _time(config: TrainConfig, trainer: Trainer) -> str:
    batch = _batch(trainer, _TIMED)
    seconds = []
    for _ in range(2):
        synchronize(trainer.device)
        start = time.perf_counter()
        trainer.step(*batch)
        synchronize(trainer.device)
        seconds.append(time.perf_counter() - start)
    step = seconds[-1] * config.batch_size / _TIMED
    epoch = step * trainer.data.steps_per_epoch
    return (
        f"about {step:.3g} s a step, {duration(epoch)} an epoch, {duration(epoch * config.epochs)} in all, without"
        f" loading and evaluation; one step of {_TIMED} images took {seconds[-1]:.3g} s here, the rest is proportion"
    )


def _trainer(config: TrainConfig, data: Data, device: torch.device) -> Trainer:
    """At the beginning of the last epoch, where the norm is at its full weight."""
    trainer = Trainer(config, data, device)
    trainer.epoch = config.epochs - 1
    return trainer


def _batch(trainer: Trainer, size: int) -> tuple[Tensor, Tensor]:
    """Random images and soft targets, which mixing makes of labels."""
    spec, classes = trainer.data.spec, trainer.data.num_classes
    shape: tuple[Any, ...] = (size, len(spec.mean), spec.size, spec.size)
    images = torch.rand(shape, device=trainer.device)
    return images, torch.full((size, classes), 1 / classes, device=trainer.device)
