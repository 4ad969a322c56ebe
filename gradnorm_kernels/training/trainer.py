"""The training loop: timm's optimiser, schedule and averaged weights around one of our objectives.

A run is a function of its :class:`TrainConfig`: every random number depends on (seed, epoch, step) alone, so
a checkpoint needs no generator's state and a resumed run ends, on a CPU, where the uninterrupted one would
have, to the bit. The output directory holds ``checkpoint.pt``, ``config.json`` and ``metrics.jsonl``, which
has a line an epoch. Under ``torchrun`` the processes share every batch, and the first one writes.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..fuse import fuse
from .config import Interrupted, TrainConfig, TrainingError
from .data import Data, load_data, seed_everything
from .distributed import any_process, process_group, rank, summed, world_size
from .models import InputSpec, create_model
from .objectives import AdversarialLoss, EdgeLoss, GradientNormLoss, Loss, NaturalLoss, Objective

__all__ = [
    "CHECKPOINT",
    "Interrupted",
    "Trainer",
    "accuracy",
    "allow_tf32",
    "find_device",
    "load_checkpoint",
    "load_model",
    "make_objective",
    "resumed_config",
    "train",
    "write_file",
]

CHECKPOINT = "checkpoint.pt"

# One stream of random numbers for the initial weights and one for the steps, apart from the data's.
_INITIAL, _STEP = 0, 3


def train(config: TrainConfig, output: Path, *, resume: bool = False) -> list[dict[str, Any]]:
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


def _train(config: TrainConfig, output: Path, device: torch.device, resume: bool) -> list[dict[str, Any]]:
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
            raise TrainingError(_not_finite(trainer, "weights not finite before the update"))
        if rank() == 0:
            write_file(path, lambda file: torch.save(state, file))

    def write_metrics() -> None:
        if rank() == 0:
            write_file(output / "metrics.jsonl", lambda file: file.write(_json_lines(trainer.history)))
            if config.tensorboard:
                _write_tensorboard(output / "tensorboard", trainer.history)

    if rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_file(output / "config.json", lambda file: file.write(_json_lines([asdict(config)])))
    write_metrics()
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
    return trainer.history


class Trainer:
    """One run's model, averaged model, optimiser and progress, and the steps that change them."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        device: torch.device | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """From the start, or from a state that :meth:`state_dict` gave."""
        self.config, self.data, self.device = config, data, device or find_device(config.device)
        seed_everything(config.seed, _INITIAL)
        begins = replace(config, pretrained=False, init=None) if saved else config
        self.model: nn.Module = _build_model(begins, data.spec, data.num_classes, self.device)
        self.model.train(config.mode == "train")
        self.trained = _for_training(self.model, config, self.device)
        # Short runs would otherwise evaluate little but their initial weights.
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
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
        self._backward = _compiled(_backward) if config.compile else _backward
        self.epoch = 0
        self.step_in_epoch = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.history: list[dict[str, Any]] = []
        if saved:
            self.load_state_dict(saved)

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
            raise TrainingError(_not_finite(self, "held-out cross-entropy that is not finite"))
        if self.config.robust_every and (self.epoch + 1) % self.config.robust_every == 0:
            held_out |= self._robustness()
        self.history.append(self._summary() | held_out)
        if rank() == 0:
            tqdm.write(_describe(self.history[-1], self.config.epochs), file=sys.stderr)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, defaultdict(float)

    def step(self, images: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
        """One update on this process's part of a batch, on the trainer's device.

        Returns:
            The loss before the update, of this process's images, and the norm of the gradient of all
            processes' before clipping.
        """
        with allow_tf32(_tf32(self.config)):
            return self._step(images, targets)

    def _step(self, images: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
        self.optimizer.zero_grad()
        losses = []
        parts = self.config.accumulate
        for i, (part, wanted) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
            with self._without_exchange() if i + 1 < parts else nullcontext():
                losses.append(self.loss(part, wanted, 1 / parts))
        loss = losses[0] if parts == 1 else _mean(losses)
        # timm's dispatch_clip_grad calls the same and drops the norm.
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        update = self.epoch * self.data.steps_per_epoch + self.step_in_epoch + 1
        self.scheduler.step_update(update)
        self.ema.update(self.model, step=update)
        return loss, gradient_norm

    def loss(self, images: Tensor, targets: Tensor, weight: float = 1.0) -> Loss:
        """The loss at the run's progress, its gradient times ``weight`` added to the parameters' ``grad``."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        progress = self.epoch + self.step_in_epoch / self.data.steps_per_epoch
        return self._backward(self.objective, self.trained, images, targets, progress, weight)

    def _without_exchange(self) -> AbstractContextManager[None]:
        trained = self.trained
        return trained.no_sync() if isinstance(trained, DistributedDataParallel) else nullcontext()

    def _robustness(self) -> dict[str, float]:
        """Of the averaged weights, on the first held-out images; every process finds the same."""
        from .evaluation import evaluate
        from .runs import input_gradients

        images, labels = self.data.evaluation_sample(self.config.robust_images)
        model, epsilon, seed = self.ema.module, self.config.epsilon, self.config.seed
        gradients = input_gradients(model, images, labels)
        result = evaluate(model, images, labels, attack="apgd-ce", eps=epsilon, seed=seed)
        return {
            "eval_gradient_norm": epsilon * gradients.abs().flatten(1).sum(1).mean().item(),
            "eval_apgd_accuracy": result.robust_accuracy,
        }

    def state_dict(self) -> dict[str, Any]:
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
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
            raise TrainingError(
                _not_finite(
                    self, f"loss {total / images_now} and gradient's norm {gradient_norm_value}, not finite"
                )
            )
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


def _not_finite(trainer: Trainer, what: str) -> str:
    return (
        f"{what}, in epoch {trainer.epoch + 1}, step {trainer.step_in_epoch + 1}. No checkpoint was written"
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
    model: nn.Module,
    data: Data,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
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


def resumed_config(output: Path, changes: dict[str, Any]) -> TrainConfig:
    """The config of the run in ``output``, with ``changes`` to it.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    return TrainConfig(**{**load_checkpoint(output / CHECKPOINT)["config"], **changes})


def load_model(path: Path, device: str | torch.device = "cpu") -> nn.Module:
    """The averaged model of a run, in eval mode: from pixels in [0, 1] to logits.

    Args:
        path: the run's output directory, or a checkpoint.

    Raises:
        TrainingError: if there is no readable checkpoint.
    """
    saved = load_checkpoint(path / CHECKPOINT if path.is_dir() else path)
    config = TrainConfig(**{**saved["config"], "pretrained": False, "init": None})
    model = _build_model(config, InputSpec(**saved["spec"]), len(saved["classes"]), device)
    model.load_state_dict(saved["ema"])
    return model.eval()


def _build_model(
    config: TrainConfig, spec: InputSpec, num_classes: int, device: torch.device | str
) -> nn.Module:
    model = create_model(
        config.model,
        spec,
        num_classes,
        act=config.act,
        pretrained=config.pretrained,
        init=config.init,
    )
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    on = torch.device(device).type in ("cpu", "cuda") if config.fused == "auto" else config.fused == "on"
    if on:
        before = [type(module) for module in model.modules()]
        fuse(model)
        if config.fused == "on" and before == [type(module) for module in model.modules()]:
            raise TrainingError(f"fused: there is nothing to fuse in {config.model}")
    return model


class _Autocast(nn.Module):
    """Runs a model under autocast to bfloat16. Derivatives are taken outside, as autocast asks for."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.kind = model, device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16):
            return self.model(images).float()


def _for_training(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """What the objective runs: ``model``, whose parameters it shares, with precision and processes added."""
    if config.precision == "bfloat16":
        model = _Autocast(model, device).train(model.training)
    if world_size() == 1:
        return model
    on_gpu = [device] if device.type == "cuda" else None
    # Buffers stay each process's own: a broadcast in the next forward would change what backward has saved.
    return DistributedDataParallel(model, device_ids=on_gpu, broadcast_buffers=False)


@contextmanager
def allow_tf32(allowed: bool | None) -> Iterator[None]:
    """Sets PyTorch's switches of TF32 for as long as the block lasts; None leaves them as they are."""
    if allowed is None:
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _tf32(config: TrainConfig) -> bool | None:
    if config.precision == "tf32":
        return True
    return False if config.engine == "finite_difference" else None


def _compiled(backward: Callable[..., Loss]) -> Callable[..., Loss]:
    """``backward`` as one compiled graph, which is what differentiating twice inside it takes."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise TrainingError(f"compile: torch {torch.__version__} cannot trace autograd.grad; a newer one can")
    compiled = torch.compile(backward, fullgraph=True)

    def run(*arguments: Any) -> Loss:
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(f"compile: this step cannot be compiled: {error}") from error

    return run


def make_objective(config: TrainConfig) -> Objective:
    """The objective that ``config`` names."""
    gradient_norm = GradientNormLoss(
        config.ce_weight, config.gn_weight, config.epsilon, config.ramp_epochs, config.norm, config.engine
    )
    with_norm = gradient_norm if config.objective == "edge_gradient_norm" else None
    edge = EdgeLoss(
        config.edge_start,
        config.edge_rate,
        config.edge_max,
        config.edge_temperature,
        config.edge_variant,
        with_norm,
    )
    natural = NaturalLoss()
    adversarial = AdversarialLoss(
        config.epsilon,
        config.attack_steps,
        config.attack_step_size,
        config.attack_random_start,
        gradient_norm if config.objective == "hybrid" else natural,
    )
    objectives: dict[str, Objective] = {
        "natural": natural,
        "gradient_norm": gradient_norm,
        "edge": edge,
        "edge_gradient_norm": edge,
        "adversarial": adversarial,
        "hybrid": adversarial,
    }
    return objectives[config.objective]


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


def _json_lines(items: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def _write_tensorboard(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes the last epoch's numbers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(f"tensorboard: {error}; run: pip install tensorboard") from error
    epoch = history[-1]["epoch"] if history else 0
    # Purges what an interrupted run wrote of epochs that are done again.
    with SummaryWriter(str(folder), purge_step=epoch) as writer:
        for name, value in history[-1].items() if history else ():
            writer.add_scalar(name, value, epoch)


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
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
        raise TrainingError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise TrainingError(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(state, dict) or not {"config", "classes", "model", "ema"} <= state.keys():
        raise TrainingError(f"cannot read the checkpoint {path}: it is none of a run of this version")
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
