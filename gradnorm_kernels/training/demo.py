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
from matplotlib.figure import Figure
from torch import Tensor, nn

from .config import TrainConfig
from .data import load_data, load_digits
from .evaluation import evaluate
from .report import conditions, curves, gradient_figure, page, text_table
from .runs import input_gradients, step_seconds
from .trainer import CHECKPOINT, Trainer, load_checkpoint, load_model, train

__all__ = ["Demo", "Result", "demo"]

EPSILON = 0.1  # of the objective and of the attack in the table, in pixel units
CURVE = (0.025, 0.05, 0.1, 0.15)
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"objective": "natural", "fused": "off"},
    "gradient norm, stock": {"objective": "gradient_norm", "fused": "off"},
    "gradient norm, fused": {"objective": "gradient_norm", "fused": "on"},
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
    seconds = step_seconds(trainers, *batch, timed_steps)

    results = {}
    for name, model in models.items():
        epsilons = sorted({0.0, EPSILON, *curve})
        results[name] = Result(
            seconds[name],
            histories[name],
            {epsilon: _accuracy(model, images, targets, epsilon, attack_steps) for epsilon in epsilons},
            input_gradients(model, images[shown], targets[shown]),
        )
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


def _gradient_difference(stock: Trainer, fused: Trainer, images: Tensor, targets: Tensor) -> float:
    gradients = []
    for trainer in (stock, fused):
        images, targets = images.to(trainer.device), targets.to(trainer.device)
        loss = trainer.objective(trainer.model, images, targets, epoch=trainer.epoch)
        gradients.append(torch.autograd.grad(loss.total, list(trainer.model.parameters())))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True))


def _accuracy(model: nn.Module, images: Tensor, targets: Tensor, epsilon: float, steps: int) -> float:
    """Accuracy under APGD-CE (Croce and Hein, 2020) with one start, as in AutoAttack's standard version."""
    return evaluate(model, images, targets, attack="apgd-ce", eps=epsilon, steps=steps).robust_accuracy


def _report(outcome: Demo, config: TrainConfig, shown: Tensor) -> str:
    gradients = {name: result.input_gradients for name, result in outcome.results.items()}
    sections = [
        ("Accuracy against epsilon", "Held-out images under attack.", _accuracy_figure(outcome)),
        ("Loss curves", "", _loss_figure(outcome)),
        (
            "Input gradients",
            "Held-out images, and below them the gradient of the cross-entropy with respect to their pixels,"
            " each in a colour scale of its own; above it its L1 norm.",
            gradient_figure({"image": shown}, gradients),
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


def _accuracy_figure(outcome: Demo) -> Figure:
    points = {
        name: [(epsilon, 100 * accuracy) for epsilon, accuracy in result.accuracy.items()]
        for name, result in outcome.results.items()
    }
    return curves(
        points,
        styles=STYLES,
        xlabel="APGD-CE's epsilon (pixels in [0, 1])",
        ylabel="accuracy, %",
        ylim=(0, 100),
    )


def _loss_figure(outcome: Demo) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {
        "cross_entropy": "cross-entropy in training (soft targets), nats",
        "eval_cross_entropy": "cross-entropy held out, nats",
        "gradient_norm": "epsilon x gradient norm in training, nats",
    }
    for which, (key, label) in enumerate(panels.items()):
        points = {
            name: [(line["epoch"], line[key]) for line in result.history if key in line]
            for name, result in outcome.results.items()
        }
        panel = (figure, len(panels), which)
        curves(points, styles=STYLES, panel=panel, title=label, xlabel="epoch", ylim=(0, None))
    return figure
