"""The training loop: timm's optimiser, schedule and averaged weights around one of our objectives.

A run is a function of its :class:`TrainConfig`: every random number depends on (seed, epoch, step) alone, so
a checkpoint needs no generator's state and a resumed run ends, on a CPU, where the uninterrupted one would
have, to the bit. The output directory holds ``checkpoint.pt``, ``config.json`` and ``metrics.jsonl``, which
has a line an epoch.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from ..fuse import fuse
from .config import TrainConfig, TrainingError
from .data import Data, load_data, seed_everything
from .models import InputSpec, create_model
from .objective import GradientNormLoss, Loss, NaturalLoss, Objective

__all__ = [
    "CHECKPOINT",
    "Interrupted",
    "Trainer",
    "evaluate",
    "load_checkpoint",
    "load_model",
    "resumed_config",
    "train",
]

CHECKPOINT = "checkpoint.pt"

# One stream of random numbers for the initial weights and one for the steps, apart from the data's.
_INITIAL, _STEP = 0, 3


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop)
    """SIGINT stopped the run after it wrote a checkpoint, from which it can resume."""

    def __init__(self, checkpoint: Path, epoch: int, step: int) -> None:
        super().__init__(f"stopped in epoch {epoch + 1} after step {step}; wrote {checkpoint}")


def train(config: TrainConfig, output: Path, *, resume: bool = False) -> list[dict[str, Any]]:
    """Trains a model from the start, or from the checkpoint in ``output``, to the last epoch.

    The first SIGINT ends the run after the current step with a checkpoint; a second one aborts at once.

    Args:
        config: the run.
        output: directory to write to, made if absent.
        resume: go on from ``output``'s checkpoint.

    Returns:
        The lines of ``metrics.jsonl``. For each epoch: means over the training images (losses in nats; the
        norm of the parameters' gradient before clipping), alpha and learning rate at its end, the accuracy of
        the trained weights on the training images as they came and of the averaged weights on the held-out
        images (shares of 1), and the seconds that training took, without evaluation.

    Raises:
        TrainingError: if the run cannot start, or the loss is not finite; an earlier checkpoint is kept.
        Interrupted: on SIGINT.
    """
    path = output / CHECKPOINT
    if resume:
        saved = load_checkpoint(path)
        config.check_same_run(saved["config"])
    elif path.exists():
        raise TrainingError(f"--output: {output} already holds a run; --resume goes on with it")
    trainer = Trainer(config, load_data(config))
    if resume:
        trainer.load_state_dict(saved)

    def write_checkpoint() -> None:
        _write(path, lambda file: torch.save(trainer.state_dict(), file))

    def write_metrics() -> None:
        _write(output / "metrics.jsonl", lambda file: file.write(_json_lines(trainer.history)))

    output.mkdir(parents=True, exist_ok=True)
    _write(output / "config.json", lambda file: file.write(_json_lines([asdict(config)])))
    write_metrics()
    with _interrupts_noted() as interrupted:

        def stop_if_interrupted() -> None:
            if interrupted():
                write_checkpoint()
                raise Interrupted(path, trainer.epoch, trainer.step_in_epoch)

        while trainer.epoch < config.epochs:
            trainer.run_epoch(stop_if_interrupted)
            write_checkpoint()
            write_metrics()
            stop_if_interrupted()
    return trainer.history


class Trainer:
    """One run's model, averaged model, optimiser and progress, and the steps that change them."""

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self.config, self.data, self.device = config, data, _device(config)
        seed_everything(config.seed, _INITIAL)
        self.model: nn.Module = _build_model(config, data.spec, data.num_classes).to(self.device)
        self.model.train(config.mode == "train")
        # Short runs would otherwise evaluate little but their initial weights.
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # fractions are fine
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=data.steps_per_epoch,
        )
        self.objective = _objective(config)
        self.epoch = 0
        self.step_in_epoch = 0
        self.sums = _zero_sums()
        self.history: list[dict[str, Any]] = []

    def run_epoch(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Does what is left of the epoch, evaluates, and adds the epoch to ``history``.

        Args:
            after_step: called between steps, and between the batches of the evaluation, when ``state_dict``
                is a state to resume from.

        Raises:
            TrainingError: if the loss or the gradient is not finite.
        """
        steps = self.data.steps_per_epoch
        batches = self.data.training_batches(self.epoch, self.step_in_epoch)
        with tqdm(
            total=steps,
            initial=self.step_in_epoch,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            unit="step",
            leave=False,
            disable=None,
        ) as bar:
            start = time.perf_counter()
            while self.step_in_epoch < steps:
                images, labels = (part.to(self.device) for part in next(batches))
                seed_everything(self.config.seed, _STEP, self.epoch, self.step_in_epoch)
                loss, gradient_norm = self.step(*self.data.soften(images, labels))
                self._record(loss, labels, gradient_norm)
                self.step_in_epoch += 1
                self.sums["seconds"] += time.perf_counter() - start
                after_step()
                start = time.perf_counter()
                bar.set_postfix(loss=f"{self.sums['loss'] / self.sums['images']:.4f}", refresh=False)
                bar.update()

        held_out = evaluate(self.ema.module, self.data, self.device, after_step)
        self.history.append(self._summary() | held_out)
        tqdm.write(_describe(self.history[-1], self.config.epochs), file=sys.stderr)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, _zero_sums()

    def step(self, images: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
        """One update on a batch of the trainer's device.

        Returns:
            The loss before the update, and the norm of its gradient before clipping.
        """
        self.optimizer.zero_grad()
        progress = self.epoch + self.step_in_epoch / self.data.steps_per_epoch
        loss = self.objective(self.model, images, targets, epoch=progress)
        loss.total.backward()
        # timm's dispatch_clip_grad calls the same and drops the norm.
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        update = self.epoch * self.data.steps_per_epoch + self.step_in_epoch + 1
        self.scheduler.step_update(update)
        self.ema.update(self.model, step=update)
        return loss, gradient_norm

    def state_dict(self) -> dict[str, Any]:
        """All that changes in a run, as tensors and built-in types. The step determines the schedule."""
        return {
            "config": asdict(self.config),
            "num_classes": self.data.num_classes,
            "spec": asdict(self.data.spec),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": dict(self.sums),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.sums, self.history = dict(state["sums"]), list(state["history"])

    def _record(self, loss: Loss, labels: Tensor, gradient_norm: Tensor) -> None:
        correct = (loss.logits.argmax(1) == labels).sum()
        norm = loss.gradient_norm
        # One tensor, so that a GPU is waited for once.
        parts = [loss.total.detach(), loss.cross_entropy, gradient_norm, correct]
        values = torch.stack([part.double() for part in parts + ([] if norm is None else [norm])])
        total, cross_entropy, parameter_gradient_norm, correct_count, *gradient_norms = values.tolist()
        if not (math.isfinite(total) and math.isfinite(parameter_gradient_norm)):
            raise TrainingError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.step_in_epoch + 1}:"
                f" loss {total}, gradient's norm {parameter_gradient_norm}."
                " No checkpoint was written since; a lower --lr or a longer --warmup-epochs may help"
            )
        images = len(labels)
        sums = self.sums
        sums["images"] += images
        sums["loss"] += images * total
        sums["cross_entropy"] += images * cross_entropy
        sums["parameter_gradient_norm"] += images * parameter_gradient_norm
        sums["correct"] += correct_count
        for value in gradient_norms:
            sums["gradient_norm"] += images * value
            sums["gradient_norm_images"] += images
        sums["alpha"] = loss.alpha

    def _summary(self) -> dict[str, Any]:
        sums, images = self.sums, self.sums["images"]
        penalised = sums["gradient_norm_images"]
        return {
            "epoch": self.epoch + 1,
            "loss": sums["loss"] / images,
            "cross_entropy": sums["cross_entropy"] / images,
            "gradient_norm": sums["gradient_norm"] / penalised if penalised else None,
            "alpha": sums["alpha"],
            "parameter_gradient_norm": sums["parameter_gradient_norm"] / images,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_accuracy": sums["correct"] / images,
            "seconds": sums["seconds"],
            "images_per_second": images / sums["seconds"],
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy (share of 1) and mean cross-entropy (nats) of ``model`` on the held-out images."""
    correct, cross_entropy = 0, 0.0
    for images, targets in data.evaluation_batches():
        logits, targets = model(images.to(device)), targets.to(device)
        cross_entropy += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(1) == targets).sum())
        after_batch()
    count = len(data.evaluation)
    return {"eval_cross_entropy": cross_entropy / count, "eval_accuracy": correct / count}


def resumed_config(output: Path, changes: dict[str, Any]) -> TrainConfig:
    """The config of the run in ``output``, with ``changes`` to it.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    return TrainConfig(**{**load_checkpoint(output / CHECKPOINT)["config"], **changes})


def load_model(output: Path, device: str | torch.device = "cpu") -> nn.Module:
    """The averaged model of the run in ``output``, in eval mode: from pixels in [0, 1] to logits.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    saved = load_checkpoint(output / CHECKPOINT)
    config = TrainConfig(**{**saved["config"], "pretrained": False})
    model = _build_model(config, InputSpec(**saved["spec"]), saved["num_classes"])
    model.load_state_dict(saved["ema"])
    return model.eval().to(device)


def _build_model(config: TrainConfig, spec: InputSpec, num_classes: int) -> nn.Module:
    model = create_model(
        config.model,
        spec,
        num_classes,
        activation=config.activation,
        pretrained=config.pretrained,
    )
    return fuse(model) if config.fused else model


def _objective(config: TrainConfig) -> Objective:
    if config.objective == "natural":
        return NaturalLoss()
    return GradientNormLoss(config.ce_weight, config.gn_weight, config.epsilon, config.ramp_epochs)


def _device(config: TrainConfig) -> torch.device:
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise TrainingError(f"--device: cannot use {config.device}: {error}") from error
    return device


def _zero_sums() -> dict[str, float]:
    names = (
        "images loss cross_entropy gradient_norm gradient_norm_images alpha"
        " parameter_gradient_norm correct seconds"
    )
    return dict.fromkeys(names.split(), 0.0)


def _describe(metrics: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {metrics['epoch']}/{epochs}: loss {metrics['loss']:.4f},"
        f" accuracy {metrics['train_accuracy']:.1%} in training,"
        f" {metrics['eval_accuracy']:.1%} held out, {metrics['images_per_second']:.0f} images/s"
    )


def _json_lines(items: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :meth:`Trainer.state_dict` gave when ``path`` was written.

    Raises:
        TrainingError: if there is no such file, or it cannot be read.
    """
    if not path.exists():
        raise TrainingError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise TrainingError(f"cannot read the checkpoint {path}: {error}") from error
    return state


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT arrived; a second SIGINT raises KeyboardInterrupt."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        # A handler may interrupt a print, so it must not print.
        os.write(2, b"\nfinishing the step; interrupt again to abort\n")

    # Only the main thread may choose a handler, and only there do signals arrive.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, previous)
