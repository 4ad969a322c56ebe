"""The training loop: timm's optimiser, schedule and averaged weights around one of our objectives.

A run is a function of its :class:`TrainConfig`: every random number depends on (seed, epoch, step) alone, so
a checkpoint needs no generator's state and a resumed run ends, on a CPU, where the uninterrupted one would
have, to the bit. The output directory holds ``checkpoint.pt``, ``config.json``, ``metrics.jsonl``, which has
a line an epoch, and at the end ``report.html``. Under ``torchrun`` the processes share every batch, and the
first one writes.
"""

import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from .._tf32 import allow_tf32
from ..checkpoint import checkpoint_modules
from ..diagnose import diagnose
from .attacks import input_gradient
from .config import Interrupted, TrainConfig
from .data import Data, load_data, seed_everything
from .distributed import any_process, process_group, rank, summed, world_size
from .execution import compiled, find_device, for_training, tf32, without_exchange
from .files import CHECKPOINT, load_checkpoint, write_file, write_lines, write_tensorboard, write_text
from .graph import graphed
from .models import build_model
from .objectives import OBJECTIVES, Loss, Objective, make_objective
from .objectives.common import evaluated
from .options import TrainingError
from .report import duration, run_report

# One stream of random numbers for the initial weights and one for the steps, apart from the data's.
_INITIAL, _STEP = 0, 3

State = dict[str, Any]


def train(config: TrainConfig, output: Path, *, resume: bool = False) -> list[State]:
    """Trains a model from the start, or from the checkpoint in ``output``, to the last epoch.

    The first SIGINT ends the run after the current step with a checkpoint; a second one aborts at once.

    Args:
        config: the run.
        output: directory to write to, made if absent.
        resume: go on from ``output``'s checkpoint.

    Returns:
        The lines of ``metrics.jsonl``. For each epoch: means over the training images (losses in nats; the
        objective's parts by their names; the norm of the parameters' gradient before clipping); at its end
        the objective's weights that change and the learning rate; the accuracy of the trained weights on the
        training images as they came, and of the averaged weights on the held-out images (shares of 1); where
        asked for, these weights' accuracy under APGD-CE and epsilon times their input gradient's L1 norm; and
        the seconds that training took, without evaluation.

    Raises:
        TrainingError: if the run cannot start, or the loss is not finite; an earlier checkpoint is kept.
        Interrupted: on SIGINT.
    """
    device = find_device(config.device)
    with process_group(device):
        return _train(config, output, device, resume)


def _train(config: TrainConfig, output: Path, device: torch.device, resume: bool) -> list[State]:
    path = output / CHECKPOINT
    saved = load_checkpoint(path) if resume else None
    if saved:
        try:
            config.check_same_run(saved["config"])
        except TrainingError as error:
            raise TrainingError(f"{error} in {output}") from None
    elif path.exists():
        raise TrainingError(f"--output: {output} already holds a run; --resume goes on with it")
    trainer = Trainer(config, load_data(config), device, saved)

    def write_checkpoint() -> None:
        state = trainer.state_dict()
        if not all(value.isfinite().all() for value in (*state["model"].values(), *state["ema"].values())):
            raise trainer.not_finite("weights not finite before the update")
        if rank() == 0:
            write_file(path, lambda file: torch.save(state, file))

    def write_metrics() -> None:
        if rank() == 0:
            write_lines(output / "metrics.jsonl", trainer.history)
            if config.tensorboard:
                write_tensorboard(output / "tensorboard", trainer.history)

    if rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_lines(output / "config.json", [asdict(config)])
    write_metrics()
    if rank() == 0 and (trainer.epoch, trainer.step_in_epoch) == (0, 0):
        trainer.warn_of_short_run()
        trainer.warn_of_double_backward()
    with _interrupts_noted() as interrupted:

        def stop_if_interrupted() -> None:
            if any_process(interrupted(), device):
                write_checkpoint()
                raise Interrupted(path, trainer.epoch, trainer.step_in_epoch)

        while trainer.epoch < config.epochs:
            trainer.run_epoch(stop_if_interrupted)
            write_checkpoint()
            write_metrics()
            stop_if_interrupted()
    if rank() == 0:
        write_text(output / "report.html", run_report(config, trainer.history))
    return trainer.history


class Trainer:
    """One run's model, averaged model, optimiser and progress, and the steps that change them."""

    def __init__(
        self, config: TrainConfig, data: Data, device: torch.device | None = None, saved: State | None = None
    ) -> None:
        """From the start, or from a state that :meth:`state_dict` gave."""
        self.config, self.data, self.device = config, data, device or find_device(config.device)
        seed_everything(config.seed, _INITIAL)
        self.model = build_model(config, data.spec, data.num_classes, self.device, initial=not saved)
        self.model.train(config.mode == "train")
        self.trained = for_training(self.model, config, self.device)
        # Short runs would otherwise evaluate little but their initial weights.
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        if config.checkpoint:
            # After the averaged weights, which are evaluated without.
            try:
                checkpoint_modules(self.model)
            except ValueError:
                raise TrainingError(f"checkpoint: there are no repeated blocks in {config.model}") from None
        try:
            self.optimizer = create_optimizer_v2(
                self.model, opt=config.opt, lr=config.peak_lr, weight_decay=config.weight_decay
            )
        except (AssertionError, TypeError, ValueError) as error:
            raise TrainingError(f"opt: timm cannot make {config.opt}: {error}") from error
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
        self.objective = make_objective(config)
        self._backward = compiled(_backward) if config.compile else _backward
        if config.cuda_graph:
            self._backward = graphed(_backward, self.device)
        self.epoch, self.step_in_epoch = 0, 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.history: list[State] = []
        if saved:
            self.load_state_dict(saved)

    def warn_of_short_run(self) -> None:
        """Says on stderr if the run ends before the learning rate, or the norm's weight, is at its full."""
        config = self.config
        # The last update is that many epochs after the start, less one step.
        if config.epochs <= config.warmup_epochs:
            what = f"epochs: {config.epochs} end within the {config.warmup_epochs:g} of warmup_epochs"
            print(f"{what}; the learning rate never reaches {config.peak_lr:.3g}", file=sys.stderr)
        weighs = OBJECTIVES[config.objective].differentiates_twice and config.objective != "edge"
        if weighs and config.epochs <= config.ramp_epochs:
            what = f"epochs: {config.epochs} end within the {config.ramp_epochs:g} of ramp_epochs"
            print(f"{what}; the gradient norm never has its full weight", file=sys.stderr)

    def warn_of_double_backward(self) -> None:
        """Says on stderr what :func:`~..diagnose.diagnose` finds harmful, if a run differentiates twice."""
        config, shape = self.config, (2, len(self.data.spec.mean), self.data.spec.size, self.data.spec.size)
        if not OBJECTIVES[config.objective].differentiates_twice or config.engine != "double_backprop":
            return
        with evaluated(self.model):
            harmful = diagnose(self.model, torch.rand(shape, device=self.device)).harmful
        if harmful:
            print(f"differentiating this model twice:\n{harmful}", file=sys.stderr)

    def run_epoch(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Does what is left of the epoch, evaluates, and adds the epoch to ``history``.

        Args:
            after_step: called between steps, and between the batches of the evaluation, when ``state_dict``
                is a state to resume from.

        Raises:
            TrainingError: if the loss or the gradient is not finite.
        """
        steps = self.data.steps_per_epoch
        begun, at_first = time.perf_counter(), self.step_in_epoch
        batches = self.data.training_batches(self.epoch, self.step_in_epoch)
        with tqdm(
            total=steps,
            initial=self.step_in_epoch,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            unit="step",
            leave=False,
            disable=None if rank() == 0 else True,
        ) as bar:
            start = time.perf_counter()
            while self.step_in_epoch < steps:
                images, labels = (part.to(self.device) for part in next(batches))
                seed_everything(self.config.seed, _STEP, self.epoch, self.step_in_epoch, rank())
                loss, gradient_norm = self.step(*self.data.soften(images, labels))
                self._record(loss, labels, gradient_norm)
                self.step_in_epoch += 1
                self.sums["seconds"] += time.perf_counter() - start
                after_step()
                start = time.perf_counter()
                bar.set_postfix(loss=f"{self.sums['loss'] / self.sums['images']:.4f}", refresh=False)
                bar.update()

        # Of several processes each has its own number of batches, between which none may wait for another.
        alone = world_size() == 1
        held_out = accuracy(self.ema.module, self.data, self.device, after_step if alone else lambda: None)
        if not math.isfinite(held_out["eval_cross_entropy"]):
            raise self.not_finite("held-out cross-entropy that is not finite")
        if self.config.robust_every and (self.epoch + 1) % self.config.robust_every == 0:
            held_out |= self._robustness()
        self.history.append(self._summary() | held_out)
        if rank() == 0:
            # What this epoch took, evaluation included, is the best guess of each of the next.
            left = self.config.epochs - self.epoch - 1
            seconds = (time.perf_counter() - begun) * left * steps / max(steps - at_first, 1)
            line = _describe(self.history[-1], self.config.epochs)
            tqdm.write(f"{line}, {duration(seconds)} left" if left else line, file=sys.stderr)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, defaultdict(float)

    def step(self, images: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
        """One update on this process's part of a batch, on the trainer's device.

        Returns:
            The loss before the update, of this process's images, and the norm of the gradient of all
            processes' before clipping.
        """
        parts = self.config.accumulate
        # timm's dispatch_clip_grad calls the same as below and drops the norm.
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        update = self.epoch * self.data.steps_per_epoch + self.step_in_epoch + 1
        self.optimizer.zero_grad()
        losses = []
        with allow_tf32(tf32(self.config)):
            for i, (part, wanted) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
                with without_exchange(self.trained) if i + 1 < parts else nullcontext():
                    losses.append(self.loss(part, wanted, 1 / parts))
            gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
        self.scheduler.step_update(update)
        self.ema.update(self.model, step=update)
        return losses[0] if parts == 1 else _mean(losses), gradient_norm

    def loss(self, images: Tensor, targets: Tensor, weight: float = 1.0) -> Loss:
        """The loss at the run's progress, its gradient times ``weight`` added to the parameters' ``grad``."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        progress = self.epoch + self.step_in_epoch / self.data.steps_per_epoch
        return self._backward(self.objective, self.trained, images, targets, progress, weight)

    def _robustness(self) -> dict[str, float]:
        """Of the averaged weights, on the first held-out images; every process finds the same."""
        from .evaluation import evaluate  # wants a package that other runs do without

        images, labels = self.data.evaluation_sample(self.config.robust_images)
        model, epsilon, seed = self.ema.module, self.config.epsilon, self.config.seed
        gradients = input_gradient(model, images.to(self.device), labels.to(self.device))
        result = evaluate(model, images, labels, attack="apgd-ce", eps=epsilon, seed=seed)
        return {
            "eval_gradient_norm": epsilon * gradients.abs().flatten(1).sum(1).mean().item(),
            "eval_apgd_accuracy": result.robust_accuracy,
            "eval_gradient_masking": result.gradient_masking,
        }

    def state_dict(self) -> State:
        """All that changes in a run, as tensors and built-in types. The step determines the schedule."""
        return {
            "config": asdict(self.config),
            "classes": self.data.classes,
            "spec": asdict(self.data.spec),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": dict(self.sums),
            "history": list(self.history),
        }

    def load_state_dict(self, state: State) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.sums, self.history = defaultdict(float, state["sums"]), list(state["history"])

    def _record(self, loss: Loss, labels: Tensor, gradient_norm: Tensor) -> None:
        images = len(labels)
        # Of all processes' images; one tensor, so that a GPU is waited for once.
        correct = (loss.logits.argmax(1) == labels).sum()
        means = torch.stack([part.double() for part in (loss.total.detach(), *loss.parts.values())])
        over_images = summed(torch.cat([means * images, correct.view(1), labels.new_tensor([images])]))
        *sums, images_now, gradient_norm_value = torch.cat([over_images, gradient_norm.view(1)]).tolist()
        total = sums[0]
        if not (math.isfinite(total) and math.isfinite(gradient_norm_value)):
            what = f"loss {total / images_now} and gradient's norm {gradient_norm_value}, not finite"
            raise self.not_finite(what)
        named = dict(zip(("loss", *loss.parts, "train_accuracy"), sums, strict=True))
        named["parameter_gradient_norm"] = images_now * gradient_norm_value
        for name, value in named.items():
            self.sums[name] += value
            self.sums[_images_of(name)] += images_now
        self.sums["images"] += images_now

    def _summary(self) -> dict[str, Any]:
        sums, images, seconds = self.sums, self.sums["images"], self.sums["seconds"]
        last = self.data.steps_per_epoch - 1
        parts = {name: sums[name] / sums[_images_of(name)] for name in sums if _images_of(name) in sums}
        return {
            "epoch": self.epoch + 1,
            **parts,
            **self.objective.schedule(self.epoch + last / self.data.steps_per_epoch),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": images / seconds,
        }

    def not_finite(self, what: str) -> TrainingError:
        """The error to raise of ``what`` in the current step."""
        return TrainingError(
            f"{what}, in epoch {self.epoch + 1}, step {self.step_in_epoch + 1}. No checkpoint was written"
            " since; a lower lr or a longer warmup_epochs may help"
        )


def _backward(
    objective: Objective, model: nn.Module, images: Tensor, targets: Tensor, epoch: float, weight: float
) -> Loss:
    loss = objective(model, images, targets, epoch=epoch)
    (loss.total * weight).backward()
    return loss._replace(total=loss.total.detach())


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Data, device: torch.device, after_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Accuracy (share of 1) and mean cross-entropy (nats) of ``model`` on the held-out images."""
    totals = torch.zeros(2, dtype=torch.float64)
    for images, targets in data.evaluation_batches():
        logits, targets = model(images.to(device)), targets.to(device)
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum").item()
        totals += torch.tensor([cross_entropy, (logits.argmax(1) == targets).sum().item()])
        after_batch()
    cross_entropy, correct = (summed(totals.to(device)) / len(data.evaluation)).tolist()
    return {"eval_cross_entropy": cross_entropy, "eval_accuracy": correct}


def _mean(losses: list[Loss]) -> Loss:
    """Of the parts of a batch, which are equally large."""
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).mean() for name in losses[0].parts}
    total = torch.stack([loss.total for loss in losses]).mean()
    return Loss(total, parts, torch.cat([loss.logits for loss in losses]))


def _images_of(name: str) -> str:
    """The key of the number of images over which ``name`` was summed."""
    return f"images with {name}"


def _describe(metrics: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {metrics['epoch']}/{epochs}: loss {metrics['loss']:.4f},"
        f" accuracy {metrics['train_accuracy']:.1%} in training,"
        f" {metrics['eval_accuracy']:.1%} held out, {metrics['images_per_second']:.0f} images/s"
    )


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
