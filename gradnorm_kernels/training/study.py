"""Studies: the same training with one thing varied, every model attacked, one table and one report.

Each asks a question that Rodríguez-Muñoz et al. (https://arxiv.org/abs/2409.20139) leave open.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .._json import by_line
from .attacks import input_gradient, loss_surface
from .config import MAY_CHANGE, TrainConfig, load_recipe
from .data import Data, load_data
from .evaluation import FEW_CLASSES
from .files import CHECKPOINT, load_checkpoint, write_text
from .models import load_model
from .objectives.edge import edges
from .options import TrainingError
from .report import (
    chart,
    charts,
    conditions,
    gradient_grid,
    history_charts,
    page,
    surface_grid,
    text_table,
)
from .runs import evaluate_run, step_flops, step_seconds
from .studies import STUDIES, Study
from .trainer import Trainer, train

# The history's measure of robustness.
_ATTACKED, _LABEL_ATTACKED = "eval_apgd_accuracy", "accuracy under APGD-CE, %"

# Of the shared epsilon: where accuracy under APGD-CE is drawn.
_CURVE = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Row:
    """One kind of training. Lists have one entry a seed; accuracies are shares of 1.

    Attributes:
        gradient_masking: :attr:`~.evaluation.Robustness.gradient_masking`; where it is not 0, the robust
            accuracies are upper bounds.
        curve: of the first seed, pairs of epsilon and the accuracy under APGD-CE.
        step_flops: floating-point operations of a training step's matrix products and convolutions, counted.
        training_flops: those of the whole training, and of the one that it started from.
        step_seconds: median time of a training step; 0 if not timed.
        training_seconds: of the whole training, without evaluation; empty if not timed.
        collapsed: by seed, the epoch in which the run collapsed, where it did: from which accuracy under
            APGD-CE stays below half of its best.
    """

    clean: list[float]
    robust: list[float]
    gradient_masking: list[float]
    curve: list[tuple[float, float]]
    step_flops: int
    training_flops: int
    step_seconds: float
    training_seconds: list[float]
    histories: list[list[dict[str, Any]]] = field(repr=False)
    collapsed: list[int | None]


# Left out of what was not timed, as are those of a history's lines.
_TIMES = ("step_seconds", "training_seconds", "seconds", "images_per_second")


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
        }
        if reference := self.rows.get(self.study.reference):
            products = reference.step_flops
            columns[f"products / {self.study.reference}"] = lambda row: f"{row.step_flops / products:.2f}"
        timed = all(row.step_seconds for row in self.rows.values())
        if timed:
            columns["step, ms"] = lambda row: f"{row.step_seconds * 1e3:.1f}"
        if timed and reference:
            per_step = reference.step_seconds
            columns[f"step / {self.study.reference}"] = lambda row: f"{row.step_seconds / per_step:.2f}"
        if timed and self.study.against_clock:
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
            name: {
                **{key: value for key, value in asdict(row).items() if row.step_seconds or key not in _TIMES},
                "options": dict(self.study.rows[name]),
            }
            for name, row in self.rows.items()
        }
        return {
            "study": self.study.title,
            "reference": self.study.reference,
            "against_clock": self.study.against_clock,
            "attack": self.attack,
            "attacked": self.attacked,
            # Of the folder its name alone: where it lay is of no interest elsewhere.
            "config": {**asdict(self.config), "data": self.config.data and Path(self.config.data).name},
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
        name: one of ``STUDIES``. Times, of which ``speed`` is about, mean something only if nothing else runs
            and no run was interrupted.
        output: directory for the runs and the report, made if absent.
        data: image folder; without it, the recipe's.
        recipe: what the rows share, as :func:`~.config.load_recipe` takes it.
        changes: options over the recipe's.
        seeds: runs of each row, with seeds from the recipe's on.
        attack: as :func:`~.evaluation.evaluate` takes it, at the recipe's epsilon.
        n: held-out images to attack, a fixed sample.
        only: names of rows, to leave out the others.
        timed_steps: training steps to time of each row, the rows taking turns; 0 leaves all times out, as
            they should be where something else runs.

    Raises:
        TrainingError: if there is no such study, recipe or row, or a run cannot start or go on.
    """
    if name not in STUDIES:
        raise TrainingError(f"study: expected one of {', '.join(STUDIES)}, got {name}")
    chosen = STUDIES[name]
    unknown = [row for row in only or () if row not in chosen.rows]
    if unknown:
        raise TrainingError(f"only: {name} has no row {unknown[0]!r}; it has {', '.join(chosen.rows)}")
    # Rows multiply the epsilon that they share.
    varied = {key for row in chosen.rows.values() for key in row if key != "epsilon"}
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

    names = [row for row in chosen.rows if only is None or row in only]
    folder = output / "runs"
    configs = {row: _config(chosen, row, shared, folder) for row in names}
    output.mkdir(parents=True, exist_ok=True)
    runs = {
        row: [_trained(chosen, row, replace(shared, seed=shared.seed + i), folder) for i in range(seeds)]
        for row in names
    }
    first = {row: paths[0] for row, paths in runs.items()}
    seconds: dict[str, float] = {}
    if timed_steps:
        # From their ends, since a fresh run's ramp would begin without the gradient norm.
        trainers = {
            row: Trainer(config, load_data(config), saved=load_checkpoint(first[row]))
            for row, config in configs.items()
        }
        seconds = step_seconds(trainers, timed_steps)
    curve = [factor * shared.epsilon for factor in _CURVE]
    options = {"n": n, "eps": [shared.epsilon]}
    rows = {}
    for row, paths in runs.items():
        results = [evaluate_run(path, attack=attack, **options).results[0] for path in paths]
        attacked = evaluate_run(paths[0], attack="apgd-ce", n=n, eps=curve).results
        histories = [load_checkpoint(path)["history"] for path in paths]
        rows[row] = Row(
            clean=[result.clean_accuracy for result in results],
            robust=[result.robust_accuracy for result in results],
            gradient_masking=[result.gradient_masking for result in results],
            curve=[(0.0, results[0].clean_accuracy), *((r.eps, r.robust_accuracy) for r in attacked)],
            step_flops=step_flops(configs[row]),
            training_flops=_training_flops(chosen, row, shared, folder),
            step_seconds=seconds.get(row, 0.0),
            training_seconds=[sum(line["seconds"] for line in history) for history in histories if seconds],
            histories=histories if seconds else [_untimed(history) for history in histories],
            collapsed=[_collapse(history, held_out.num_classes) for history in histories],
        )
    outcome = Outcome(chosen, shared, attack, min(n, len(held_out.evaluation)), rows)
    write_text(output / "study.json", by_line(outcome.to_dict()))
    write_text(output / "report.html", _report(outcome, held_out, first))
    return outcome


def _config(study: Study, row: str, shared: TrainConfig, runs: Path) -> TrainConfig:
    """What a row's run computes, with the seed of ``shared``."""
    varied = dict(study.rows[row])
    if "init" in varied:
        start = _config(study, varied["init"], shared, runs)
        varied["init"] = str(_directory(start, study.rows[varied["init"]], runs) / CHECKPOINT)
    if "epsilon" in varied:
        varied["epsilon"] *= shared.epsilon
    return replace(shared, **varied)


def _directory(config: TrainConfig, varied: Mapping[str, Any], runs: Path) -> Path:
    facts = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE or key in varied}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    named = [config.objective, *([config.act.replace(":", "_")] if config.act else []), f"seed{config.seed}"]
    return runs / "-".join([*named, digest])


def _trained(study: Study, row: str, shared: TrainConfig, runs: Path) -> Path:
    """The directory of the row's run, which is trained as far as it is not, after that it starts from."""
    if start := study.rows[row].get("init"):
        _trained(study, start, shared, runs)
    config = _config(study, row, shared, runs)
    path = _directory(config, study.rows[row], runs)
    train(config, path, resume=(path / CHECKPOINT).exists())
    return path


def _training_flops(study: Study, row: str, shared: TrainConfig, runs: Path) -> int:
    """Of all steps of the row's run and of that it starts from."""
    config, start = _config(study, row, shared, runs), study.rows[row].get("init")
    before = _training_flops(study, start, shared, runs) if start else 0
    return before + step_flops(config) * config.epochs * load_data(config).steps_per_epoch


def _untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in history]


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
    config, rows = outcome.config, outcome.rows
    seeds = len(next(iter(rows.values())).clean)
    timed = all(row.step_seconds for row in rows.values())
    notes = (
        f"{config.model} on {config.data or 'scikit-learn digits'}, {config.epochs} epochs in batches of"
        f" {config.batch_size}; {seeds} run{'s' if seeds > 1 else ''} a row{_RANGE if seeds > 1 else ''}."
        f" Accuracies of the averaged weights on {outcome.attacked} held-out images, {outcome.attack},"
        f" L-infinity, epsilon {config.epsilon:.4g} (pixels in [0, 1]). Products: floating-point operations"
        f" of a step's matrix products and convolutions, counted. {_STEP if timed else ''}{conditions()}"
    )
    histories = {name: row.histories[0] for name, row in rows.items()}
    models = {row: load_model(path).requires_grad_(False) for row, path in runs.items()}
    images, labels = data.evaluation_sample(6)
    gradients = {row: input_gradient(model, images, labels) for row, model in models.items()}
    surfaces = {
        row: loss_surface(model, images, labels, 2 * config.epsilon, seed=config.seed)
        for row, model in models.items()
    }
    curves = {name: [(eps, 100 * share) for eps, share in row.curve] for name, row in rows.items()}
    unlearnt = _unlearnt(outcome)
    costs = (
        "Robust accuracy against the matrix products of the whole training, a start from another row's"
        " model included, and against clean accuracy. Means over the seeds."
    )
    if unlearnt:
        costs += f" Not in the last figure, as less than half the best is right: {', '.join(unlearnt)}."
    sections = [
        (
            "Accuracy against epsilon",
            f"First seed, {outcome.attacked} held-out images under APGD-CE; at 0, as they are.",
            charts([chart(curves, xlabel="epsilon (pixels in [0, 1])", ylabel="accuracy, %", top=100)]),
        ),
        (
            "What robustness costs",
            costs,
            _costs(outcome, unlearnt),
        ),
    ]
    if outcome.study.against_clock and timed:
        sections.append(
            (
                "Robust accuracy against time",
                "First seed. The time is the training's so far, without evaluation.",
                charts([_against_time(histories)]),
            )
        )
    sections += [
        (
            "Input gradients",
            "Held-out images, their edges (blurred Sobel magnitude), and the gradient of the cross-entropy"
            " with respect to the pixels, channels summed, each in its own colour scale over its L1 norm.",
            gradient_grid({"image": images, "edges": edges(images)}, gradients),
        ),
        (
            "Loss surfaces",
            "Cross-entropy around the images, to the right along the sign of its gradient, upwards along"
            " random signs, as far as twice epsilon; the frame is at epsilon, pixels stay in [0, 1]. Blue"
            " where the image is classified correctly, red where not; the deeper, the higher the loss."
            " Below, the largest loss within the frame.",
            surface_grid(images, surfaces),
        ),
    ]
    panels = [{"eval_accuracy": "accuracy held out, %", "eval_cross_entropy": "cross-entropy held out, nats"}]
    if outcome.study.per_epoch:
        norm = "epsilon x gradient norm held out, nats"
        panels.append({_ATTACKED: _LABEL_ATTACKED, "eval_gradient_norm": norm})
    sections += [
        (
            "By epoch: " + " and ".join(label.split(",")[0] for label in keys.values()),
            "First seed.",
            history_charts(histories, keys),
        )
        for keys in panels
    ]
    return page(outcome.study.title, outcome.cells(), notes, sections)


_RANGE = ", mean and range over the seeds"
_STEP = "Step: median of whole training steps, the rows taking turns in one process. "


def _unlearnt(outcome: Outcome) -> list[str]:
    """The rows of a front that are below half the best clean accuracy, and would press it into a corner."""
    clean = {name: statistics.mean(row.clean) for name, row in outcome.rows.items()}
    return [name for name in clean if outcome.study.fronts and 2 * clean[name] < max(clean.values())]


def _costs(outcome: Outcome, unlearnt: Collection[str]) -> str:
    """Robust accuracy over what it took: computation, and, but for the unlearnt rows, clean accuracy."""
    strengths: dict[str, list[str]] = {}
    computed: dict[str, list[tuple[float, float]]] = {}
    clean: dict[str, list[tuple[float, float]]] = {}
    for name, row in outcome.rows.items():
        group, _, strength = name.partition(": ") if outcome.study.fronts else (name, "", "")
        robust = 100 * statistics.mean(row.robust)
        computed.setdefault(group, []).append((row.training_flops / 1e12, robust))
        # A group whose rows are all left out still has its colour.
        labels, points = strengths.setdefault(group, []), clean.setdefault(group, [])
        if name not in unlearnt:
            labels.append(strength)
            points.append((100 * statistics.mean(row.clean), robust))
    label, fronts = f"accuracy under {outcome.attack}, %", outcome.study.fronts
    products = "the training's matrix products, TFLOP"
    return charts(
        [
            chart(computed, xlabel=products, ylabel=label, lines=False, left=0.0),
            chart(
                clean,
                xlabel="clean accuracy, %",
                ylabel=label,
                bottom=None if fronts else 0.0,
                lines=fronts,
                labels=strengths,
            ),
        ]
    )


def _against_time(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    points = {}
    for name, history in histories.items():
        seconds = itertools.accumulate(line["seconds"] for line in history)
        lines = zip(seconds, history, strict=True)
        points[name] = [(s, 100 * line[_ATTACKED]) for s, line in lines if _ATTACKED in line]
    return chart(points, xlabel="training time, s", ylabel=_LABEL_ATTACKED)
