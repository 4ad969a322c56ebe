"""What is done with finished runs: attacking their models, timing their steps."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .data import load_data
from .evaluation import Robustness, robustness_curve
from .execution import find_device
from .files import checkpoint_path, load_checkpoint, write_text
from .models import load_model
from .options import TrainingError
from .report import text_table
from .trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    """A run's model under attack, at one epsilon or several."""

    checkpoint: Path
    results: list[Robustness]

    def table(self) -> str:
        """Accuracies, a line an epsilon, clean and after each attack."""
        attacks = list(dict.fromkeys(name for result in self.results for name in result.accuracies))
        rows = [["epsilon", "clean", *attacks, "images"]]
        for result in self.results:
            left = (f"{result.accuracies[name]:.2%}" if name in result.accuracies else "" for name in attacks)
            rows.append([f"{result.eps:.4g}", f"{result.clean_accuracy:.2%}", *left, str(result.images)])
        if any(result.is_doubtful for result in self.results):
            doubts = (f"{r.gradient_masking:.1%}" if r.is_doubtful else "" for r in self.results)
            rows = [[*row, doubt] for row, doubt in zip(rows, ["zero gradient", *doubts], strict=True)]
        return text_table(rows)


def evaluate_run(
    checkpoint: Path,
    output: Path | None = None,
    *,
    data: str | None = None,
    attack: str = "autoattack",
    eps: Sequence[float] | None = None,
    norm: str = "Linf",
    n: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Attacks the averaged model of a run on ``n`` held-out images, a fixed sample, or on all of them.

    Writes ``evaluation-<attack>.json`` to ``output`` (the checkpoint's directory) and, while it runs, states
    from which an interrupted AutoAttack goes on.

    Args:
        checkpoint: a run's directory or its checkpoint.
        data: image folder to take instead of the run's.
        eps: radii in pixel units; without them the run's epsilon.
        attack, norm, batch_size, seed, device: as :func:`~.evaluation.evaluate` takes them.

    Raises:
        TrainingError: if the checkpoint or the data cannot be used.
    """
    path = checkpoint_path(checkpoint)
    where = find_device(device)
    saved = load_checkpoint(path)
    config = TrainConfig(**saved["config"] | ({} if data is None else {"data": data}))
    held_out = load_data(config)
    if held_out.classes != saved["classes"]:
        raise TrainingError(f"data: the classes of {config.data} are not those that {path} was trained on")
    images, labels = held_out.evaluation_sample(n or len(held_out.evaluation))
    output = output or path.parent
    states = output / "evaluation" / _digest(*saved["ema"].values(), images, labels, [batch_size, seed])
    states.mkdir(parents=True, exist_ok=True)
    model, radii = load_model(path, where), eps or [config.epsilon]
    options: dict[str, Any] = {"attack": attack, "norm": norm, "batch_size": batch_size, "seed": seed}
    try:
        results = robustness_curve(
            model, images, labels, radii, **options, state_dir=states, progress=progress
        )
    except ValueError as error:
        raise TrainingError(str(error)) from error
    report = {"checkpoint": path.name, "epoch": saved["epoch"], "data": config.data}
    report["results"] = [result.to_dict() for result in results]
    write_text(output / f"evaluation-{attack}.json", json.dumps(report, indent=1))
    return Evaluation(path, results)


def step_seconds(trainers: Mapping[str, Trainer], count: int, warm_up: int = 3) -> dict[str, float]:
    """Median time of a whole training step, the trainers taking turns so that all see the same machine.

    All take the first trainer's first batch.
    """
    first = next(iter(trainers.values())).data.first_batch()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(warm_up + count):
        for name, trainer in trainers.items():
            images, targets = (part.to(trainer.device) for part in first)
            _synchronize(trainer.device)
            start = time.perf_counter()
            trainer.step(images, targets)
            _synchronize(trainer.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _digest(*values: Any) -> str:
    """Of tensors and what JSON can hold: tells apart evaluations of different models and images."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:16]
