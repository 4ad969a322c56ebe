"""The demonstration: one small GELU network trained three ways, then timed, compared and attacked.

Four minutes at most on two CPU cores; the report states the hardware, versions, seed and number of runs.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attacks import input_gradient
from .config import TrainConfig
from .data import load_data, load_digits
from .evaluation import robustness_curve
from .files import load_checkpoint
from .models import load_model
from .report import chart, charts, conditions, gradient_grid, history_charts, page, text_table
from .runs import step_seconds
from .trainer import Trainer, train

EPSILON = 0.1  # of the objective and of the attack in the table, in pixel units
CURVE = (0.025, 0.05, 0.1, 0.15)
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"objective": "natural", "fused": "off"},
    "gradient norm, stock": {"objective": "gradient_norm", "fused": "off"},
    "gradient norm, fused": {"objective": "gradient_norm", "fused": "on"},
}
NATURAL, STOCK, FUSED = VARIANTS
# The two gradient-norm runs nearly coincide, so one is dashed over the other.
DASHED = (FUSED,)


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
        attack = f"APGD-CE, eps {EPSILON:g}"
        rows: list[tuple[str, ...]] = [
            ("training", "step, ms", "ratio to stock", "gradient difference", "clean accuracy", attack)
        ]
        stock = self.results[STOCK].step_seconds
        for name, result in self.results.items():
            speed = f"{result.step_seconds * 1e3:.1f}", f"{result.step_seconds / stock:.2f}"
            difference = f"{self.gradient_difference:.1e}" if name == FUSED else ""
            accuracies = (f"{result.accuracy[epsilon]:.1%}" for epsilon in (0.0, EPSILON))
            rows.append((name, *speed, difference, *accuracies))
        return rows

    def table(self) -> str:
        """The table as text."""
        return text_table(self.rows())


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
    # Steps this small gain nothing from more threads, and on a busy machine wait for them.
    with _threads(1):
        outcome, report = _run(epochs, attack_steps, curve, timed_steps)
    (output / "report.html").write_text(report, encoding="utf-8")
    return outcome


def _run(epochs: int, attack_steps: int, curve: Sequence[float], timed_steps: int) -> tuple[Demo, str]:
    configs = {
        name: TrainConfig(epochs=epochs, epsilon=EPSILON, lr=4e-3, **options)
        for name, options in VARIANTS.items()
    }
    images, targets = (part[:] for part in load_digits()[1].tensors)
    shown = [int((targets == digit).nonzero()[0]) for digit in range(6)]
    with tempfile.TemporaryDirectory() as directory:
        runs = {name: Path(directory) / name for name in configs}
        histories = {name: train(config, runs[name]) for name, config in configs.items()}
        models = {name: load_model(run).requires_grad_(False) for name, run in runs.items()}
        # The fused steps start from the stock run's weights, so that both do the same arithmetic.
        starts = {name: load_checkpoint(runs[STOCK if name == FUSED else name]) for name in configs}
    trainers = {
        name: Trainer(config, load_data(config), saved=starts[name]) for name, config in configs.items()
    }
    difference = _gradient_difference(trainers[STOCK], trainers[FUSED])
    seconds = step_seconds(trainers, timed_steps)

    results = {}
    for name, model in models.items():
        # With one start, as in AutoAttack's standard version.
        attacked = robustness_curve(
            model, images, targets, sorted({0.0, EPSILON, *curve}), attack="apgd-ce", steps=attack_steps
        )
        accuracy = {result.eps: result.robust_accuracy for result in attacked}
        gradients = input_gradient(model, images[shown], targets[shown])
        results[name] = Result(seconds[name], histories[name], accuracy, gradients)
    outcome = Demo(results, difference, attack_steps, len(targets))
    return outcome, _report(outcome, configs[FUSED], images[shown])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gradient_difference(stock: Trainer, fused: Trainer) -> float:
    batch = stock.data.first_batch()
    gradients = []
    for trainer in (stock, fused):
        images, targets = (part.to(trainer.device) for part in batch)
        loss = trainer.objective(trainer.model, images, targets, epoch=trainer.epoch)
        gradients.append(torch.autograd.grad(loss.total, list(trainer.model.parameters())))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True))


def _report(outcome: Demo, config: TrainConfig, shown: Tensor) -> str:
    accuracies = {
        name: [(epsilon, 100 * accuracy) for epsilon, accuracy in result.accuracy.items()]
        for name, result in outcome.results.items()
    }
    attacked = chart(
        accuracies,
        xlabel="APGD-CE's epsilon (pixels in [0, 1])",
        ylabel="accuracy, %",
        top=100,
        dashed=DASHED,
    )
    panels = {
        "cross_entropy": "cross-entropy in training (soft targets), nats",
        "eval_cross_entropy": "cross-entropy held out, nats",
        "gradient_norm": "epsilon x gradient norm in training, nats",
    }
    histories = {name: result.history for name, result in outcome.results.items()}
    gradients = {name: result.input_gradients for name, result in outcome.results.items()}
    sections = [
        (
            "Accuracy against epsilon",
            "Held-out images under attack.",
            charts([attacked]),
        ),
        ("Loss curves", "", history_charts(histories, panels, DASHED)),
        (
            "Input gradients",
            "Held-out images, and below them the gradient of the cross-entropy with respect to their pixels,"
            " each in a colour scale of its own; above it its L1 norm.",
            gradient_grid({"image": shown}, gradients),
        ),
    ]
    return page("One network, trained three ways", outcome.rows(), _conditions(outcome, config), sections)


def _conditions(outcome: Demo, config: TrainConfig) -> str:
    return (
        f"{config.model} on scikit-learn's digits (8x8 pixels in [0, 1]), {config.epochs} epochs in batches"
        f" of {config.batch_size}, learning rate {config.lr:g}, label smoothing {config.label_smoothing:g},"
        f" one run each, seed {config.seed}; gradient norm with epsilon {EPSILON:g} and weights"
        f" {config.ce_weight:g} and {config.gn_weight:g}. Step: median of whole training steps, the three"
        " taking turns in one process; stock and fused start from the same weights. Gradient difference: over"
        " the parameter tensors, the largest max|stock - fused| / max|stock| for the same weights and batch."
        f" Accuracies: averaged weights on {outcome.held_out} held-out images; APGD-CE with"
        f" {outcome.attack_steps} iterations and one start, L-infinity. {conditions()}"
    )
