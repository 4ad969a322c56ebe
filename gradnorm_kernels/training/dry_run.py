"""What a run would be, without training: its model, the swaps, and a step's memory and time."""

import time
from dataclasses import replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from ..checkpoint import checkpoint_modules
from ..fuse import fuse
from .config import TrainConfig
from .data import Data, load_data
from .execution import find_device, for_training
from .memory import HELD, MemoryMode
from .models import build_model, fuses_on
from .objectives import make_objective
from .report import duration
from .runs import synchronize
from .trainer import Trainer

# The step that is timed has so many images at first, and more until it takes so many seconds.
_FEWEST, _LONG_ENOUGH = 8, 0.5
_RANDOM_WEIGHTS: dict[str, Any] = {"pretrained": False, "init": None}


def dry_run(config: TrainConfig) -> None:
    """Prints the model of a run, what :func:`~..fuse.fuse` swaps in it, and estimates of memory and time.

    Memory is counted on meta tensors, of a whole step of one process with all its images: parameters, their
    averages and gradients, the optimiser's state, and the results of ops, but not what an op needs only while
    it runs. Time is measured: one step of random images on the run's device, with the norm at
    full weight. Where the whole batch would take long, a part of it is timed, and the rest is in proportion.
    Pretrained weights are not loaded for it.

    Raises:
        TrainingError: if the run could not start.
    """
    device = find_device(config.device)
    data = load_data(config)
    plain = replace(config, **_RANDOM_WEIGHTS)
    trainer = Trainer(replace(plain, batch_size=min(_FEWEST, config.batch_size), accumulate=1), data, device)
    # Where the norm is at its full weight.
    trainer.epoch = config.epochs - 1
    trainer.warn_of_short_run()
    trainer.warn_of_double_backward()
    print(_facts(config, data, trainer, device))
    _print_swaps(plain, data, device)
    print(f"memory: {_memory(plain, data)}")
    print(f"time: {_time(config, trainer)}")


def _facts(config: TrainConfig, data: Data, trainer: Trainer, device: torch.device) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    side, channels = data.spec.size, len(data.spec.mean)
    start = config.init or ("timm's pretrained weights" if config.pretrained else "random weights")
    act = f" with {config.act}" if config.act else ""
    return (
        f"model: {config.model}{act}, {parameters / 1e6:.3g} million parameters, images of"
        f" {channels}x{side}x{side}, {data.num_classes} classes, from {start}, in {config.mode} mode,"
        f" on {device}\nrun: {config.objective}, {config.epochs} epochs of {data.steps_per_epoch} steps of"
        f" {config.batch_size} of {len(data.train)} images; {len(data.evaluation)} held out"
    )


def _print_swaps(config: TrainConfig, data: Data, device: torch.device) -> None:
    if config.fused == "off" or not (config.fused == "on" or fuses_on(device)):
        print(f"fused: {config.fused}; nothing is swapped on {device.type}")
        return
    stock = replace(config, fused="off")
    fuse(build_model(stock, data.spec, data.num_classes, "meta", initial=False), dry_run=True)


def _memory(config: TrainConfig, data: Data) -> str:
    if config.compile:
        return "not counted: a compiled step decides what it keeps"
    try:
        model = build_model(config, data.spec, data.num_classes, "meta", initial=False)
        weights = [*model.parameters(), *model.buffers()]
        averages = sum(value.nbytes for value in weights)
        trained = for_training(model.train(config.mode == "train"), config, torch.device("meta"))
        if config.checkpoint:
            checkpoint_modules(model)
        optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.peak_lr)
        objective, batch = make_objective(config), _batch(data, config.batch_size, torch.device("meta"))

        def step() -> None:
            optimizer.zero_grad()
            for part in zip(*(values.chunk(config.accumulate) for values in batch), strict=True):
                objective(trained, *part, epoch=config.epochs - 1).total.backward()
            optimizer.step()

        # The first step makes the optimiser's state.
        step()
        with MemoryMode() as counted:
            counted.memory.hold([*weights, *batch])
            for state in optimizer.state.values():
                counted.memory.hold(value for value in state.values() if isinstance(value, Tensor))
            step()
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"cannot be counted on meta tensors: {str(error).partition(chr(10))[0]}"
    peak = counted.memory.peak()
    peak[HELD] += averages
    return (
        f"{peak.total() / 2**30:.3g} GiB at the step's peak, of which {peak[HELD] / 2**30:.3g} are weights,"
        " their averages, the optimiser's state and images; counted, without what an op needs while it runs"
    )


def _time(config: TrainConfig, trainer: Trainer) -> str:
    size = min(_FEWEST, config.batch_size)
    _step_seconds(trainer, size)  # the first step makes what later ones find
    while (seconds := _step_seconds(trainer, size)) < _LONG_ENOUGH and size < config.batch_size:
        size = min(4 * size, config.batch_size)
    step = seconds * config.batch_size / size
    epoch = step * trainer.data.steps_per_epoch
    return (
        f"about {step:.3g} s a step, {duration(epoch)} an epoch, {duration(epoch * config.epochs)} in all,"
        f" without loading and evaluation; measured: {seconds:.3g} s, one step of {size} images"
    )


def _step_seconds(trainer: Trainer, size: int) -> float:
    batch = _batch(trainer.data, size, trainer.device)
    synchronize(trainer.device)
    start = time.perf_counter()
    trainer.step(*batch)
    synchronize(trainer.device)
    return time.perf_counter() - start


def _batch(data: Data, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and soft targets, which mixing makes of labels."""
    images = torch.rand(size, len(data.spec.mean), data.spec.size, data.spec.size, device=device)
    return images, torch.full((size, data.num_classes), 1 / data.num_classes, device=device)
