"""Studies: the same training with one thing varied, every model attacked, one table and one report.

Each asks a question that Rodríguez-Muñoz et al. (https://arxiv.org/abs/2409.20139) leave open.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .._json import by_line
from .config import MAY_CHANGE, TrainConfig, TrainingError, load_recipe
from .data import Data, load_data
from .objectives.edge import edges
from .report import conditions, curves, gradient_figure, page, text_table
from .runs import evaluate_run, input_gradients, step_seconds
from .trainer import CHECKPOINT, Trainer, load_checkpoint, load_model, train, write_file

__all__ = ["STUDIES", "Outcome", "Row", "Study", "study"]


@dataclass(frozen=True)
class Study:
    """What a study varies.

    Attributes:
        rows: options of :class:`~.config.TrainConfig` by the row's name.
        reference: the row against which the cost of a step is given.
        per_epoch: attack the model after every epoch, and watch for collapse.
    """

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    reference: str
    per_epoch: bool = False


# With a gradient norm the mode is the recipe's: eval as published, train where a run begins with random
# weights.
_ADVERSARIAL = {"objective": "adversarial", "mode": "train"}
_FGSM = {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": False}
_FGSM_RANDOM = {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": True}
_NORM = {"objective": "gradient_norm"}
_HYBRID = {"objective": "hybrid", "attack_steps": 1, "attack_random_start": True}

STUDIES = {
    "activations": Study(
        "Gradient norm, from ReLU to GELU",
        {
            act.replace(":", " "): {**_NORM, "act": act}
            for act in (
                "relu",
                "leaky_relu:0.01",
                "leaky_relu:0.1",
                "leaky_relu:0.3",
                "elu",
                "softplus:1",
                "softplus:10",
                "silu",
                "mish",
                "gelu",
            )
        },
        reference="gelu",
    ),
    "objectives": Study(
        "Objectives",
        {
            "natural": {"objective": "natural", "mode": "train"},
            "gradient norm": _NORM,
            "edge": {"objective": "edge", "mode": "train"},
            "edge + gradient norm": {"objective": "edge_gradient_norm"},
            "FGSM": _FGSM,
            "FGSM, random start": _FGSM_RANDOM,
            "PGD-3": {**_ADVERSARIAL, "attack_steps": 3},
            "FGSM + gradient norm": _HYBRID,
        },
        reference="PGD-3",
    ),
    "stability": Study(
        "Long runs",
        {
            "gradient norm": _NORM,
            "FGSM": _FGSM,
            "FGSM, random start": _FGSM_RANDOM,
            "FGSM + gradient norm": _HYBRID,
        },
        reference="gradient norm",
        per_epoch=True,
    ),
}


@dataclass(frozen=True)
class Row:
    """One kind of training. Lists have one entry a seed; accuracies are shares of 1.

    Attributes:
        step_seconds: median time of a training step.
        collapsed: by seed, the epoch in which the run collapsed, where it did: from which accuracy under
            APGD-CE stays below half of its best.
    """

    clean: list[float]
    robust: list[float]
    step_seconds: float
    histories: list[list[dict[str, Any]]] = field(repr=False)
    collapsed: list[int | None]


@dataclass(frozen=True)
class Outcome:
    """A study's rows, with what they have in common."""

    study: Study
    config: TrainConfig
    attack: str
    attacked: int
    rows: dict[str, Row]

    def cells(self) -> list[list[str]]:
        """The table, heading first: means over the seeds, and where there are several, the range."""
        reference = self.rows.get(self.study.reference)
        heading = ["training", "clean", f"{self.attack}, eps {self.config.epsilon:.4g}", "step, ms"]
        if reference:
            heading.append(f"step / {self.study.reference}")
        if self.study.per_epoch:
            heading.append("collapsed in epoch")
        table = [heading]
        for name, row in self.rows.items():
            cells = [name, _spread(row.clean), _spread(row.robust), f"{row.step_seconds * 1e3:.1f}"]
            if reference:
                cells.append(f"{row.step_seconds / reference.step_seconds:.2f}")
            if self.study.per_epoch:
                cells.append(", ".join("no" if epoch is None else str(epoch) for epoch in row.collapsed))
            table.append(cells)
        return table

    def table(self) -> str:
        """The table as text."""
        return text_table(self.cells())

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        return {
            "study": self.study.title,
            "reference": self.study.reference,
            "attack": self.attack,
            "attacked": self.attacked,
            "config": asdict(self.config),
            "rows": {
                name: {**asdict(row), "options": dict(self.study.rows[name])}
                for name, row in self.rows.items()
            },
            "conditions": conditions(),
        }


def study(
    name: str,
    output: Path,
    *,
    data: str | None = None,
    recipe: str = "digits",
    changes: Mapping[str, Any] | None = None,
    seeds: int = 1,
    attack: str = "autoattack",
    n: int = 1000,
    only: Sequence[str] | None = None,
    timed_steps: int = 20,
) -> Outcome:
    """Trains, times and attacks every row of a study; writes ``study.json`` and ``report.html``.

    A run that is finished in ``output`` is not done again, an unfinished one goes on.

    Args:
        name: ``activations``, ``objectives`` or ``stability``.
        output: directory for the runs and the report, made if absent.
        data: image folder; without it, the recipe's.
        recipe: what the rows share, as :func:`~.config.load_recipe` takes it.
        changes: options over the recipe's.
        seeds: runs of each row, with seeds from the recipe's on.
        attack: as :func:`~.evaluation.evaluate` takes it, at the recipe's epsilon.
        n: held-out images to attack, a fixed sample.
        only: names of rows, to leave out the others.
        timed_steps: training steps to time of each row, the rows taking turns.

    Raises:
        TrainingError: if there is no such study, recipe or row, or a run cannot start or go on.
    """
    if name not in STUDIES:
        raise TrainingError(f"study: expected one of {', '.join(STUDIES)}, got {name}")
    chosen = STUDIES[name]
    unknown = [row for row in only or () if row not in chosen.rows]
    if unknown:
        raise TrainingError(f"only: {name} has no row {unknown[0]!r}; it has {', '.join(chosen.rows)}")
    varied = {key for row in chosen.rows.values() for key in row}
    fixed = varied & (changes or {}).keys()
    if fixed:
        raise TrainingError(f"{min(fixed)}: the rows of {name} set it themselves")
    options = {**load_recipe(recipe), **(changes or {})}
    if data is not None:
        options["data"] = data
    if chosen.per_epoch:
        options = {"robust_every": 1, **options}
    shared = TrainConfig(**options)

    configs = {
        row: replace(shared, **varied) for row, varied in chosen.rows.items() if only is None or row in only
    }
    output.mkdir(parents=True, exist_ok=True)
    runs = {
        row: [_trained(replace(config, seed=config.seed + i), output / "runs") for i in range(seeds)]
        for row, config in configs.items()
    }
    held_out = load_data(shared)
    seconds = _step_seconds(configs, {row: paths[0] for row, paths in runs.items()}, timed_steps)
    rows = {}
    for row, paths in runs.items():
        results = [evaluate_run(path, attack=attack, n=n).results[0] for path in paths]
        histories = [load_checkpoint(path / CHECKPOINT)["history"] for path in paths]
        rows[row] = Row(
            [result.clean_accuracy for result in results],
            [result.robust_accuracy for result in results],
            seconds[row],
            histories,
            [_collapse(history, held_out.num_classes) for history in histories],
        )
    attacked = min(n, len(held_out.evaluation))
    outcome = Outcome(chosen, shared, attack, attacked, rows)
    text = by_line(outcome.to_dict()).encode()
    write_file(output / "study.json", lambda file: file.write(text))
    report = _report(outcome, held_out, {row: paths[0] for row, paths in runs.items()}).encode()
    write_file(output / "report.html", lambda file: file.write(report))
    return outcome


def _trained(config: TrainConfig, runs: Path) -> Path:
    """The directory of the run, which is trained as far as it is not."""
    facts = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    named = [config.objective, *([config.act.replace(":", "_")] if config.act else []), f"seed{config.seed}"]
    path = runs / "-".join([*named, digest])
    train(config, path, resume=(path / CHECKPOINT).exists())
    return path


def _step_seconds(
    configs: Mapping[str, TrainConfig], runs: Mapping[str, Path], count: int
) -> dict[str, float]:
    trainers = {}
    for row, config in configs.items():
        # A fresh run's ramp would begin without the gradient norm.
        saved = load_checkpoint(runs[row] / CHECKPOINT)
        trainers[row] = Trainer(config, load_data(config), saved=saved)
    data = next(iter(trainers.values())).data
    batch = data.soften(*next(data.training_batches(epoch=0, start=0)))
    return step_seconds(trainers, *batch, count)


def _collapse(history: list[dict[str, Any]], num_classes: int) -> int | None:
    """The epoch from which accuracy under attack stays below half its best, that having been above chance."""
    watched = [
        (line["epoch"], line["eval_apgd_accuracy"]) for line in history if "eval_apgd_accuracy" in line
    ]
    best = max((accuracy for _, accuracy in watched), default=0.0)
    if best <= 2 / num_classes:
        return None
    low: list[int] = []
    for epoch, accuracy in watched:
        low = [*low, epoch] if accuracy < best / 2 else []
    reached = next(epoch for epoch, accuracy in watched if accuracy == best)
    return low[0] if low and low[0] > reached else None


def _spread(shares: list[float]) -> str:
    mean = f"{statistics.mean(shares):.1%}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.1%} to {max(shares):.1%})"


def _report(outcome: Outcome, data: Data, runs: Mapping[str, Path]) -> str:
    config = outcome.config
    seeds = len(next(iter(outcome.rows.values())).clean)
    notes = (
        f"{config.model} on {config.data or 'scikit-learn digits'}, {config.epochs} epochs in batches of"
        f" {config.batch_size}; {seeds} run{'s' if seeds > 1 else ''} a row, mean and range over the seeds."
        f" Accuracies of the averaged weights on {outcome.attacked} held-out images, {outcome.attack},"
        f" L-infinity, epsilon {config.epsilon:.4g} (pixels in [0, 1]). Step: median of whole training steps,"
        f" the rows taking turns in one process. {conditions()}"
    )
    sections = [_history_section(outcome, keys) for keys in _panels(outcome)]
    images, labels = data.evaluation_sample(6)
    gradients = {row: input_gradients(load_model(path), images, labels) for row, path in runs.items()}
    sections.append(
        (
            "Input gradients",
            "Held-out images, their edges (blurred Sobel magnitude), and the gradient of the cross-entropy"
            " with respect to the pixels, channels summed, each in its own colour scale under its L1 norm.",
            gradient_figure({"image": images, "edges": edges(images)}, gradients),
        )
    )
    return page(outcome.study.title, outcome.cells(), notes, sections)


def _panels(outcome: Outcome) -> list[dict[str, str]]:
    panels = [{"eval_accuracy": "accuracy held out, %", "eval_cross_entropy": "cross-entropy held out, nats"}]
    if outcome.study.per_epoch:
        panels.append(
            {
                "eval_apgd_accuracy": "accuracy under APGD-CE, %",
                "eval_gradient_norm": "epsilon x gradient norm held out, nats",
            }
        )
    return panels


def _history_section(outcome: Outcome, keys: Mapping[str, str]) -> tuple[str, str, Figure]:
    figure = Figure(figsize=(11, 4), layout="constrained")
    for which, (key, label) in enumerate(keys.items()):
        scale = 100 if label.endswith("%") else 1
        points = {
            name: [(line["epoch"], scale * line[key]) for line in row.histories[0] if key in line]
            for name, row in outcome.rows.items()
        }
        curves(points, panel=(figure, len(keys), which), title=label, xlabel="epoch", ylim=(0, None))
    return (
        "By epoch: " + " and ".join(label.split(",")[0] for label in keys.values()),
        "First seed.",
        figure,
    )
