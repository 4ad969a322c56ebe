"""The demonstration: one small GELU network trained three ways, then timed, compared and attacked.

Four minutes at most on two CPU cores; the report states the hardware, versions, seed and number of runs.
"""

import base64
import html
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from .. import __version__
from .._machine import processor_name
from .config import TrainConfig
from .data import load_data, load_digits
from .trainer import CHECKPOINT, Trainer, load_checkpoint, load_model, train

__all__ = ["Demo", "Result", "demo"]

EPSILON = 0.1  # of the objective and of the attack in the table, in pixel units
CURVE = (0.025, 0.05, 0.1, 0.15)
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"objective": "natural", "fused": False},
    "gradient norm, stock": {"objective": "gradient_norm", "fused": False},
    "gradient norm, fused": {"objective": "gradient_norm", "fused": True},
}
NATURAL, STOCK, FUSED = VARIANTS
# The two gradient-norm runs nearly coincide, so one is dashed over the other.
STYLES = {NATURAL: "C0-", STOCK: "C1-", FUSED: "C2--"}


@dataclass(frozen=True)
class Result:
    """One trained model. Accuracies are shares of 1 on the held-out images, of the averaged weights.

    Attributes:
        step_seconds: median time of a training step.
        history: the lines of the run's metrics.jsonl.
        accuracy: from the attack's epsilon to the accuracy under APGD-CE; 0 is the clean accuracy.
        input_gradients: (N, 1, 8, 8), of the cross-entropy with respect to the shown images' pixels.
    """

    step_seconds: float
    history: list[dict[str, Any]]
    accuracy: dict[float, float]
    input_gradients: Tensor


@dataclass(frozen=True)
class Demo:
    """The outcome, by variant.

    Attributes:
        gradient_difference: between the parameter gradients of the stock and the fused objective on the same
            weights and batch: over the parameter tensors, the largest max|stock - fused| / max|stock|.
    """

    results: dict[str, Result]
    gradient_difference: float
    attack_steps: int
    held_out: int

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, heading first."""
        rows: list[tuple[str, ...]] = [
            (
                "training",
                "step, ms",
                "ratio to stock",
                "gradient difference",
                "clean accuracy",
                f"APGD-CE, eps {EPSILON:g}",
            )
        ]
        stock = self.results[STOCK].step_seconds
        for name, result in self.results.items():
            rows.append(
                (
                    name,
                    f"{result.step_seconds * 1e3:.1f}",
                    f"{result.step_seconds / stock:.2f}",
                    f"{self.gradient_difference:.1e}" if name == FUSED else "",
                    f"{result.accuracy[0.0]:.1%}",
                    f"{result.accuracy[EPSILON]:.1%}",
                )
            )
        return rows

    def table(self) -> str:
        """The table as text."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def demo(
    output: Path,
    *,
    epochs: int = 40,
    attack_steps: int = 100,
    curve: Sequence[float] = CURVE,
    timed_steps: int = 40,
) -> Demo:
    """Trains, measures and attacks the three variants on scikit-learn's digits; writes ``report.html``.

    Args:
        output: directory for the report, made if absent.
        epochs: of each training run.
        attack_steps: iterations of APGD-CE.
        curve: the attack's epsilons to plot, in pixel units; the table's own is added.
        timed_steps: training steps to time of each variant.
    """
    output.mkdir(parents=True, exist_ok=True)
    configs = {
        name: TrainConfig(epochs=epochs, epsilon=EPSILON, lr=4e-3, **options)
        for name, options in VARIANTS.items()
    }
    images, targets = (part[:] for part in load_digits()[1].tensors)
    shown = [int((targets == digit).nonzero()[0]) for digit in range(6)]
    with tempfile.TemporaryDirectory() as directory:
        histories, models, states = {}, {}, {}
        for name, config in configs.items():
            run = Path(directory) / name
            histories[name] = train(config, run)
            models[name] = load_model(run).requires_grad_(False)
            states[name] = load_checkpoint(run / CHECKPOINT)

    # The fused steps start from the stock run's weights, so that both do the same arithmetic.
    states[FUSED] = states[STOCK]
    trainers = {}
    for name, config in configs.items():
        trainers[name] = Trainer(config, load_data(config))
        trainers[name].load_state_dict(states[name])
    data = trainers[STOCK].data
    batch = data.soften(*next(data.training_batches(epoch=0, start=0)))
    difference = _gradient_difference(trainers[STOCK], trainers[FUSED], *batch)
    seconds = _step_seconds(trainers, *batch, timed_steps)

    results = {}
    for name, model in models.items():
        epsilons = sorted({0.0, EPSILON, *curve})
        results[name] = Result(
            seconds[name],
            histories[name],
            {epsilon: _accuracy(model, images, targets, epsilon, attack_steps) for epsilon in epsilons},
            _input_gradients(model, images[shown], targets[shown]),
        )
    outcome = Demo(results, difference, attack_steps, len(targets))
    report = _report(outcome, configs[FUSED], images[shown])
    (output / "report.html").write_text(report, encoding="utf-8")
    return outcome


def _gradient_difference(stock: Trainer, fused: Trainer, images: Tensor, targets: Tensor) -> float:
    gradients = []
    for trainer in (stock, fused):
        images, targets = images.to(trainer.device), targets.to(trainer.device)
        loss = trainer.objective(trainer.model, images, targets, epoch=trainer.epoch)
        gradients.append(torch.autograd.grad(loss.total, list(trainer.model.parameters())))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True))


def _step_seconds(
    trainers: dict[str, Trainer], images: Tensor, targets: Tensor, count: int
) -> dict[str, float]:
    """Median time of a whole training step, the trainers taking turns so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    warm_up = 3
    for _ in range(warm_up + count):
        for name, trainer in trainers.items():
            images, targets = images.to(trainer.device), targets.to(trainer.device)
            _synchronize(trainer.device)
            start = time.perf_counter()
            trainer.step(images, targets)
            _synchronize(trainer.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _accuracy(model: nn.Module, images: Tensor, targets: Tensor, epsilon: float, steps: int) -> float:
    """Accuracy under APGD-CE (Croce and Hein, 2020) with one start, as in AutoAttack's standard version."""
    if epsilon:
        attack = APGDAttack(
            model, n_iter=steps, norm="Linf", n_restarts=1, eps=epsilon, seed=0, loss="ce", device="cpu"
        )
        images = attack.perturb(images, targets)
    with torch.no_grad():
        return (model(images).argmax(1) == targets).float().mean().item()


def _input_gradients(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    pixels = images.clone().requires_grad_()
    loss = F.cross_entropy(model(pixels), targets, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


def _report(outcome: Demo, config: TrainConfig, shown: Tensor) -> str:
    heading, *rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in outcome.rows())
    sections = [
        ("Accuracy against epsilon", "Held-out images under attack.", _accuracy_figure(outcome)),
        ("Loss curves", "", _loss_figure(outcome)),
        (
            "Input gradients",
            "Held-out images, and below them the gradient of the cross-entropy with respect to their pixels,"
            " each in a colour scale of its own; above it its L1 norm.",
            _gradient_figure(outcome, shown),
        ),
    ]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>gradnorm demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc; }}
td:first-child {{ text-align: left; }}
tr:first-child {{ font-weight: bold; }}
img {{ max-width: 100%; }}
</style>
<h1>One network, trained three ways</h1>
<table><tr>{heading}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>
<p>{html.escape(_conditions(outcome, config))}</p>
{"".join(f"<h2>{title}</h2><p>{text}</p>{_image(figure)}" for title, text, figure in sections)}
</html>
"""


def _conditions(outcome: Demo, config: TrainConfig) -> str:
    device = f"{processor_name()} ({os.cpu_count()} CPUs), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return (
        f"{config.model} on scikit-learn's digits (8x8 pixels in [0, 1]), {config.epochs} epochs in batches"
        f" of {config.batch_size}, learning rate {config.lr:g}, label smoothing {config.label_smoothing:g},"
        f" one run each, seed {config.seed}; gradient norm with epsilon {EPSILON:g} and weights"
        f" {config.ce_weight:g} and {config.gn_weight:g}. Step: median of whole training steps, the three"
        " taking turns in one process; stock and fused start from the same weights. Gradient difference: over"
        " the parameter tensors, the largest max|stock - fused| / max|stock| for the same weights and batch."
        f" Accuracies: averaged weights on {outcome.held_out} held-out images; APGD-CE with"
        f" {outcome.attack_steps} iterations and one start, L-infinity. {device}; Python"
        f" {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, pyautoattack"
        f" {pyautoattack.__version__}, gradnorm_kernels {__version__}."
    )


def _accuracy_figure(outcome: Demo) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in outcome.results.items():
        epsilons = list(result.accuracy)
        accuracies = [100 * result.accuracy[epsilon] for epsilon in epsilons]
        axes.plot(epsilons, accuracies, STYLES[name], marker="o", label=name)
    axes.set(xlabel="APGD-CE's epsilon (pixels in [0, 1])", ylabel="accuracy, %", ylim=(0, 100))
    axes.legend()
    return figure


def _loss_figure(outcome: Demo) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {
        "cross_entropy": "cross-entropy in training (soft targets), nats",
        "eval_cross_entropy": "cross-entropy held out, nats",
        "gradient_norm": "epsilon x gradient norm in training, nats",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, result in outcome.results.items():
            points = [(line["epoch"], line[key]) for line in result.history if line[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), STYLES[name], label=name)
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.set_title(label, fontsize="small")
    figure.axes[0].legend()
    return figure


def _gradient_figure(outcome: Demo, shown: Tensor) -> Figure:
    figure = Figure(figsize=(1.5 * len(shown), 1.6 * (1 + len(outcome.results))), layout="constrained")
    rows = {"image": shown} | {name: r.input_gradients for name, r in outcome.results.items()}
    grid: np.ndarray = figure.subplots(len(rows), len(shown))
    for cells, (name, tensors) in zip(grid, rows.items(), strict=True):
        for axes, values in zip(cells, tensors[:, 0].numpy(), strict=True):
            if name == "image":
                axes.imshow(values, cmap="gray", vmin=0, vmax=1)
            else:
                largest = np.abs(values).max() or 1.0
                axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest)
                axes.set_title(f"L1 {np.abs(values).sum():.2g}", fontsize="small")
            axes.set(xticks=[], yticks=[])
        cells[0].set_ylabel(name.replace(", ", ",\n"), fontsize="small")
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
