"""Studies: the same training with one thing varied, every model attacked, one table and one report.

Each asks a question that Rodríguez-Muñoz et al. (https://arxiv.org/abs/2409.20139) leave open.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .._json import by_line
from .attacks import input_gradient
from .config import MAY_CHANGE, TrainConfig, load_recipe
from .data import Data, load_data
from .evaluation import FEW_CLASSES
from .files import CHECKPOINT, load_checkpoint, write_text
from .models import load_model
from .objectives.edge import edges
from .options import TrainingError
from .report import chart, charts, conditions, gradient_grid, history_charts, page, text_table
from .runs import evaluate_run, step_seconds
from .trainer import Trainer, train


@dataclass(frozen=True)
class Study:
    """What a study varies.

    Attributes:
        rows: options of :class:`~.config.TrainConfig` by the row's name.
        reference: the row against which the cost of a step is given.
        per_epoch: attack the model after every epoch, and watch for collapse.
        against_clock: give the time of the whole training too.
    """

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    reference: str
    per_epoch: bool = False
    against_clock: bool = False


# The history's measure of robustness.
_ATTACKED, _LABEL_ATTACKED = "eval_apgd_accuracy", "accuracy under APGD-CE, %"

# With a gradient norm the mode is the recipe's: eval as published, train where a run begins with random
# weights.
_ADVERSARIAL = {"objective": "adversarial", "mode": "train"}
_NORM = {"objective": "gradient_norm"}
_FGSM = {
    "FGSM": {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": False},
    "FGSM, random start": {**_ADVERSARIAL, "attack_steps": 1, "attack_random_start": True},
}
_HYBRID = {"FGSM + gradient norm": {"objective": "hybrid", "attack_steps": 1, "attack_random_start": True}}

STUDIES = {
    "activations": Study(
        "Gradient norm, from ReLU to GELU",
        {
            act.replace(":", " "): {**_NORM, "act": act}
            for act in (
                *("relu", "leaky_relu:0.01", "leaky_relu:0.1", "leaky_relu:0.3", "elu"),
                *("softplus:1", "softplus:10", "silu", "mish", "gelu"),
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
            **_FGSM,
            "PGD-3": {**_ADVERSARIAL, "attack_steps": 3},
            **_HYBRID,
        },
        reference="PGD-3",
    ),
    "stability": Study(
        "Long runs",
        {"gradient norm": _NORM, **_FGSM, **_HYBRID},
        reference="gradient norm",
        per_epoch=True,
    ),
    "speed": Study(
        "Trainings against the clock",
        {
            "natural": {"objective": "natural", "mode": "train", "fused": "off"},
            "gradient norm, PyTorch's ops": {**_NORM, "fused": "off"},
            "gradient norm, fused": {**_NORM, "fused": "on"},
            "PGD-3": {**_ADVERSARIAL, "attack_steps": 3, "fused": "off"},
        },
        reference="PGD-3",
        per_epoch=True,
        against_clock=True,
    ),
}


@dataclass(frozen=True)
class Row:
    """One kind of training. Lists have one entry a seed; accuracies are shares of 1.

    Attributes:
        gradient_masking: :attr:`~.evaluation.Robustness.gradient_masking`; where it is not 0, the robust
            accuracies are upper bounds.
        step_seconds: median time of a training step.
        training_seconds: of the whole training, without evaluation.
        collapsed: by seed, the epoch in which the run collapsed, where it did: from which accuracy under
            APGD-CE stays below half of its best.
    """

    clean: list[float]
    robust: list[float]
    gradient_masking: list[float]
    step_seconds: float
    training_seconds: list[float]
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
        attack = f"{self.attack}, eps {self.config.epsilon:.4g}"
        columns: dict[str, Callable[[Row], str]] = {
            "clean": lambda row: _spread(row.clean),
            attack: lambda row: _spread(row.robust),
            "step, ms": lambda row: f"{row.step_seconds * 1e3:.1f}",
        }
        if reference := self.rows.get(self.study.reference):
            per_step = reference.step_seconds
            columns[f"step / {self.study.reference}"] = lambda row: f"{row.step_seconds / per_step:.2f}"
        if self.study.against_clock:
            columns["training, s"] = lambda row: f"{statistics.mean(row.training_seconds):.0f}"
            if reference:
                whole = statistics.mean(reference.training_seconds)
                columns[f"training / {self.study.reference}"] = lambda row: (
                    f"{statistics.mean(row.training_seconds) / whole:.2f}"
                )
        if any(map(any, (row.gradient_masking for row in self.rows.values()))):
            columns["zero gradient"] = lambda row: _spread(row.gradient_masking)
        if self.study.per_epoch:
            columns["collapsed in epoch"] = lambda row: ", ".join(str(at or "no") for at in row.collapsed)
        cells = [[name, *(cell(row) for cell in columns.values())] for name, row in self.rows.items()]
        return [["training", *columns], *cells]

    def table(self) -> str:
        """The table as text."""
        return text_table(self.cells())

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        rows = {
            name: {**asdict(row), "options": dict(self.study.rows[name])} for name, row in self.rows.items()
        }
        return {
            "study": self.study.title,
            "reference": self.study.reference,
            "attack": self.attack,
            "attacked": self.attacked,
            "config": asdict(self.config),
            "rows": rows,
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
        name: ``activations``, ``objectives``, ``stability`` or ``speed``, whose times mean something only
            if nothing else runs and no run was interrupted.
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
    held_out = load_data(shared)
    # Before the trainings, which take hours.
    if attack == "autoattack" and held_out.num_classes < 4:
        raise TrainingError(f"attack: {FEW_CLASSES.format(held_out.num_classes)}")

    configs = {
        row: replace(shared, **varied) for row, varied in chosen.rows.items() if only is None or row in only
    }
    output.mkdir(parents=True, exist_ok=True)
    runs = {
        row: [
            _trained(replace(config, seed=config.seed + i), chosen.rows[row], output / "runs")
            for i in range(seeds)
        ]
        for row, config in configs.items()
    }
    first = {row: paths[0] for row, paths in runs.items()}
    # From their ends, since a fresh run's ramp would begin without the gradient norm.
    trainers = {
        row: Trainer(config, load_data(config), saved=load_checkpoint(first[row]))
        for row, config in configs.items()
    }
    seconds = step_seconds(trainers, timed_steps)
    rows = {}
    for row, paths in runs.items():
        results = [evaluate_run(path, attack=attack, n=n).results[0] for path in paths]
        clean = [result.clean_accuracy for result in results]
        robust = [result.robust_accuracy for result in results]
        masking = [result.gradient_masking for result in results]
        histories = [load_checkpoint(path)["history"] for path in paths]
        trained = [sum(line["seconds"] for line in history) for history in histories]
        collapsed = [_collapse(history, held_out.num_classes) for history in histories]
        rows[row] = Row(clean, robust, masking, seconds[row], trained, histories, collapsed)
    outcome = Outcome(chosen, shared, attack, min(n, len(held_out.evaluation)), rows)
    write_text(output / "study.json", by_line(outcome.to_dict()))
    write_text(output / "report.html", _report(outcome, held_out, first))
    return outcome


def _trained(config: TrainConfig, varied: Mapping[str, Any], runs: Path) -> Path:
    """The directory of the run, which is trained as far as it is not."""
    facts = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE or key in varied}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    named = [config.objective, *([config.act.replace(":", "_")] if config.act else []), f"seed{config.seed}"]
    path = runs / "-".join([*named, digest])
    train(config, path, resume=(path / CHECKPOINT).exists())
    return path


def _collapse(history: list[dict[str, Any]], num_classes: int) -> int | None:
    """The epoch from which accuracy under attack stays below half its best, that having been above chance."""
    watched = [(line["epoch"], line[_ATTACKED]) for line in history if _ATTACKED in line]
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
    panels = [{"eval_accuracy": "accuracy held out, %", "eval_cross_entropy": "cross-entropy held out, nats"}]
    if outcome.study.per_epoch:
        norm = "epsilon x gradient norm held out, nats"
        panels.append({_ATTACKED: _LABEL_ATTACKED, "eval_gradient_norm": norm})
    histories = {name: row.histories[0] for name, row in outcome.rows.items()}
    sections = [
        (
            "By epoch: " + " and ".join(label.split(",")[0] for label in keys.values()),
            "First seed.",
            history_charts(histories, keys),
        )
        for keys in panels
    ]
    if outcome.study.against_clock:
        sections.append(
            (
                "Robust accuracy against time",
                "First seed. The time is the training's so far, without evaluation.",
                charts([_against_time(histories)]),
            )
        )
    images, labels = data.evaluation_sample(6)
    gradients = {row: input_gradient(load_model(path), images, labels) for row, path in runs.items()}
    sections.append(
        (
            "Input gradients",
            "Held-out images, their edges (blurred Sobel magnitude), and the gradient of the cross-entropy"
            " with respect to the pixels, channels summed, each in its own colour scale under its L1 norm.",
            gradient_grid({"image": images, "edges": edges(images)}, gradients),
        )
    )
    return page(outcome.study.title, outcome.cells(), notes, sections)


def _against_time(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    points = {}
    for name, history in histories.items():
        seconds = itertools.accumulate(line["seconds"] for line in history)
        lines = zip(seconds, history, strict=True)
        points[name] = [(s, 100 * line[_ATTACKED]) for s, line in lines if _ATTACKED in line]
    return chart(points, xlabel="training time, s", ylabel=_LABEL_ATTACKED)
