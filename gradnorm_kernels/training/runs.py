"""What is done with finished runs: attacking their models, timing their steps."""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .config import TrainConfig
from .data import Data, load_data
from .evaluation import Robustness, robustness_curve
from .execution import find_device
from .files import checkpoint_path, load_checkpoint, write_text
from .models import build_model, load_model, load_weights
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
    checkpoint: Path, output: Path | None = None, *, data: str | None = None, **options: Any
) -> Evaluation:
    """Attacks the averaged model of a run on held-out images.

    Writes ``evaluation-<attack>.json`` to ``output`` (the checkpoint's directory) and, while it runs, states
    from which an interrupted AutoAttack goes on.

    Args:
        checkpoint: a run's directory or its checkpoint.
        data: image folder to take instead of the run's.
        options: of :func:`_evaluate`.

    Raises:
        TrainingError: if the checkpoint or the data cannot be used.
    """
    path = checkpoint_path(checkpoint)
    saved = load_checkpoint(path)
    config = TrainConfig(**saved["config"] | ({} if data is None else {"data": data}))
    held_out = load_data(config)
    if held_out.classes != saved["classes"]:
        raise TrainingError(f"data: the classes of {config.data} are not those that {path} was trained on")
    facts = {"checkpoint": path.name, "epoch": saved["epoch"]}
    return _evaluate(partial(load_model, path), held_out, path, output, facts, **options)


def evaluate_weights(
    weights: Path,
    config: TrainConfig,
    output: Path | None = None,
    *,
    partial_weights: bool = False,
    **options: Any,
) -> Evaluation:
    """Attacks a model whose weights are in a file that no run of this package need have written.

    Writes what :func:`evaluate_run` does, by default beside the file.

    Args:
        weights: as :func:`~.models.load_weights` takes them; logits are in the order of the classes' names.
        config: names the model and the data; its normalisation is the file's or else that of timm's model.
        partial_weights: load what fits, and say on stderr what does not.
        options: of :func:`_evaluate`.

    Raises:
        TrainingError: if the file does not fit the model, or the model or the data cannot be used.
    """
    held_out = load_data(config)

    def model(device: torch.device) -> nn.Module:
        built = build_model(config, held_out.spec, held_out.num_classes, device, initial=False)
        loaded = load_weights(built, weights, partial=partial_weights)
        if loaded.left_out:
            print(f"{weights} fits in part; {loaded.left_out}", file=sys.stderr)
        facts.update(table=loaded.table, left_out=loaded.left_out)
        return built.eval()

    facts: dict[str, Any] = {"weights": weights.name, "model": config.model}
    return _evaluate(model, held_out, weights, output, facts, **options)


def _evaluate(
    make_model: Callable[[torch.device], nn.Module],
    data: Data,
    path: Path,
    output: Path | None,
    facts: dict[str, Any],
    *,
    attack: str = "autoattack",
    eps: Sequence[float] | None = None,
    norm: str = "Linf",
    n: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Attacks a model and writes what came of it.

    Args:
        path: the file of its weights.
        facts: of the model, for the JSON.
        eps: radii in pixel units; without them the config's epsilon.
        n: held-out images to attack, a fixed sample; without it, all.
        attack, norm, batch_size, seed, device: as :func:`~.evaluation.evaluate` takes them.
    """
    model = make_model(find_device(device))
    images, labels = data.evaluation_sample(n or len(data.evaluation))
    output = output or path.parent
    state = [value.cpu() for value in model.state_dict().values()]
    states = output / "evaluation" / _digest(*state, images, labels, [batch_size, seed])
    states.mkdir(parents=True, exist_ok=True)
    radii = eps or [data.config.epsilon]
    options: dict[str, Any] = {"attack": attack, "norm": norm, "batch_size": batch_size, "seed": seed}
    try:
        results = robustness_curve(
            model, images, labels, radii, **options, state_dir=states, progress=progress
        )
    except ValueError as error:
        raise TrainingError(str(error)) from error
    report = {**facts, "data": data.config.data, "results": [result.to_dict() for result in results]}
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
            synchronize(trainer.device)
            start = time.perf_counter()
            trainer.step(images, targets)
            synchronize(trainer.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def step_flops(config: TrainConfig) -> int:
    """Floating-point operations of the matrix products and convolutions of a training step, counted.

    As PyTorch's own ops do it, with the gradient norm at full weight; a multiply-add is 2.
    """
    plain: dict[str, Any] = {
        "fused": "off",
        "compile": False,
        "checkpoint": False,
        "pretrained": False,
        "init": None,
    }
    trainer = Trainer(replace(config, **plain), load_data(config))
    trainer.epoch = config.epochs - 1
    images, targets = (part.to(trainer.device) for part in trainer.data.first_batch())
    with _Flops() as counted:
        trainer.step(images, targets)
    return counted.total


class _Flops(TorchDispatchMode):
    """Counts; PyTorch's FlopCounterMode also follows modules, with hooks that refuse an input gradient."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def synchronize(device: torch.device) -> None:
    """Waits for what was started on ``device``."""
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
