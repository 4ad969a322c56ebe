"""The ``gradnorm`` command: gradient-norm training, its evaluation, and studies of both."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .training.attacks import ATTACKS, NORMS
from .training.config import (
    Interrupted,
    TrainConfig,
    as_options,
    describe_options,
    load_recipe,
    parse_settings,
    recipe_names,
)
from .training.options import TrainingError
from .training.studies import STUDIES

__all__ = ["main"]

# Each is imported only by what needs it, after the arguments are parsed.
OPTIONAL_PACKAGES = {
    *("PIL", "numpy", "pyautoattack", "sklearn"),
    *("tensorboard", "timm", "torchvision", "tqdm", "yaml"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (without it, the process's own).

    Returns:
        The exit status: 0, 1 for a run that cannot start or go on, 130 after an interrupt. Unsuitable
        arguments exit with 2.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except (OSError, TrainingError) as error:
        print(f"gradnorm: error: {_without_traceback(error)}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"gradnorm: {interrupted}\nthe same command goes on from there", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL_PACKAGES:
            raise
        remedy = "run: pip install 'gradnorm_kernels[train]'"
        print(f"gradnorm: error: the package {error.name} is missing; {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gradnorm: aborted", file=sys.stderr)
        return 130


def _without_traceback(error: Exception) -> str:
    """The message, without what a data loader's process puts before it."""
    message = str(error)
    if message.startswith("Caught "):
        return message.strip().splitlines()[-1].partition(": ")[2]
    return message


def _train(
    recipe: str | None, output: Path, resume: bool, dry_run: bool, settings: list[str], **options: Any
) -> int:
    from .training.files import resumed_config
    from .training.trainer import train

    changes = {**(load_recipe(recipe) if recipe else {}), **parse_settings(settings), **as_options(options)}
    config = resumed_config(output, changes) if resume else TrainConfig(**changes)
    if dry_run:
        from .training.dry_run import dry_run as describe

        describe(config)
        return 0
    try:
        train(config, output, resume=resume)
    except Interrupted as interrupted:
        again = f"gradnorm train --resume --output {shlex.quote(str(output))}"
        print(f"gradnorm: {interrupted}\nresume with: {again}", file=sys.stderr)
        return 130
    return 0


def _evaluate(
    checkpoint: Path | None,
    weights: Path | None,
    output: Path | None,
    settings: list[str],
    partial: bool,
    model: str | None = None,
    data: str | None = None,
    **options: Any,
) -> int:
    from .training.runs import evaluate_run, evaluate_weights

    if (checkpoint is None) == (weights is None):
        raise TrainingError("evaluate: expected a run's CHECKPOINT, or --weights and --model")
    if checkpoint is not None:
        if model or settings or partial:
            raise TrainingError("evaluate: --model, --set and --partial go with --weights; a run has its own")
        report = evaluate_run(checkpoint, output, data=data, **options)
    else:
        assert weights is not None  # for the type checker
        if model is None:
            raise TrainingError("--model: --weights needs the model's name")
        config = TrainConfig(**{**parse_settings(settings), "model": model, "data": data})
        report = evaluate_weights(weights, config, output, partial_weights=partial, **options)
    print(report.table())
    return 0


def _study(name: str, output: Path | None, settings: list[str], **options: Any) -> int:
    from .training.study import study

    output = output or Path("study") / name
    outcome = study(name, output, changes=parse_settings(settings), **options)
    print(outcome.table())
    print(f"\nplots and details: {output / 'report.html'}")
    return 0


def _demo(output: Path) -> int:
    from .training.demo import demo

    print(demo(output).table())
    print(f"\nplots and details: {output / 'report.html'}")
    return 0


def _diagnose(model: str, size: int | None, fused: bool) -> int:
    import torch

    from .diagnose import diagnose
    from .fuse import fuse
    from .training.models import create_model, input_spec

    spec = input_spec(model, 3, size)
    network = create_model(model, spec, 10).eval()
    print(diagnose(fuse(network) if fused else network, torch.rand(2, 3, spec.size, spec.size)))
    return 0


def _recipes(name: str | None) -> int:
    if name is None:
        print("\n".join(recipe_names()))
    else:
        for key, value in load_recipe(name).items():
            print(f"{key}: {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradnorm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # What is not given is left to the functions' own defaults, or to the recipe.
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}

    def command(
        name: str, run: Callable[..., int], help: str, description: str | None = None, **options: Any
    ) -> Any:
        added = commands.add_parser(name, help=help, description=description, **options)
        added.set_defaults(command=run)
        return added.add_argument

    def add_data(add: Callable[..., Any]) -> None:
        help = "image folder holding train/<class>/* and val/, validation/ or test/<class>/*"
        add("--data", metavar="DIR", help=help, **unset)

    def add_settings(add: Callable[..., Any]) -> None:
        help = "options of `gradnorm train --help`, over the recipe's"
        add("--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)

    add = command(
        "train",
        _train,
        "train a model",
        "Trains a classifier by a recipe, by default on scikit-learn's digits. An interrupt (Ctrl-C) stops it"
        " with a checkpoint.",
        epilog="options to --set, with their defaults:\n" + _indented(describe_options()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "a recipe of `gradnorm recipes`, or a YAML file of options; without it, the defaults below"
    add("recipe", nargs="?", metavar="RECIPE", help=help)
    help = "directory for the checkpoint, metrics.jsonl, config.json and report.html (default: %(default)s)"
    add("--output", type=Path, default=Path("run"), metavar="DIR", help=help)
    add("--resume", action="store_true", help="go on with the run in --output, whose options it keeps")
    help = "train nothing; print the model, its fused modules, a step's estimated memory and time"
    add("--dry-run", action="store_true", help=help)
    add_settings(add)
    add_data(add)
    # Shorthands of --set for what differs from run to run.
    add("--epochs", type=_count, metavar="N", help="passes over the training images", **unset)
    add("--act", metavar="NAME", help="activation, as act below", **unset)
    add("--fused", choices=("auto", "on", "off"), help="fused kernels", **unset)
    add("--init", metavar="CHECKPOINT", help="weights to start from", **unset)
    add("--compile", action="store_true", help="compile the whole step", **unset)
    add("--device", metavar="NAME", help="torch device", **unset)

    add = command(
        "evaluate",
        _evaluate,
        "attack a trained model",
        "Measures a checkpoint's accuracy on held-out images, clean and under attack, as a table and as JSON"
        " beside the checkpoint. An interrupted AutoAttack goes on where it was.",
    )
    help = "a run's directory or checkpoint"
    add("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help=help)
    help = "instead of a run, weights of any origin: a .pth of timm's, RobustBench's ..., or safetensors"
    add("--weights", type=Path, metavar="FILE", help=help)
    add(
        "--model",
        metavar="NAME",
        help="whose weights these are, as model of `gradnorm train --help`",
        **unset,
    )
    add("--partial", action="store_true", help="take of --weights what fits, and list what does not")
    add_settings(add)
    add_data(add)
    help = "(default: %(default)s, the standard version)"
    add("--attack", choices=ATTACKS, default="autoattack", help=help)
    help = "radius in pixel units, such as 4/255; several make a curve (default: the run's, or 4/255)"
    add("--eps", type=_number, nargs="+", metavar="X", help=help)
    add("--norm", choices=NORMS, default="Linf", help="(default: %(default)s)")
    add("--n", type=_count, metavar="N", help="held-out images to attack, a fixed sample (default: all)")
    add("--batch-size", type=_count, default=250, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--device", metavar="NAME", help="torch device (default: cuda where there is one)")
    add("--output", type=Path, metavar="DIR", help="where the JSON goes (default: beside the checkpoint)")

    add = command(
        "study",
        _study,
        "train and attack several models, and report",
        "Runs every training run of a study, attacks the models, and writes study.json and report.html. What"
        " is finished in --output is not done again.",
    )
    add("name", choices=STUDIES)
    add_data(add)
    add("--recipe", metavar="RECIPE", help="what the runs share (default: digits)", **unset)
    add("--seeds", type=_count, metavar="N", help="runs of each row (default: 1)", **unset)
    add("--attack", choices=ATTACKS, help="at the recipe's epsilon (default: autoattack)", **unset)
    add("--n", type=_count, metavar="N", help="held-out images to attack (default: 1000 at most)", **unset)
    add("--only", nargs="+", metavar="NAME", help="only these rows of the study")
    help = "leave all times out, as they mean nothing where something else runs"
    add("--untimed", dest="timed_steps", action="store_const", const=0, help=help, **unset)
    add_settings(add)
    add("--output", type=Path, metavar="DIR", help="(default: study/ and the study's name)")

    add = command(
        "diagnose",
        _diagnose,
        "say what differentiating a model twice comes to",
        "Takes the input gradient of a model of timm, and lists what in it raises, is silently wrong or slow"
        " when it is differentiated again, by which modules, and what to do about it.",
    )
    add("model", metavar="MODEL", help="timm's name of it")
    add("--size", type=_count, metavar="N", help="side of the images in pixels (default: the model's own)")
    add("--fused", action="store_true", help="of the model after fuse()")

    add = command("recipes", _recipes, "list the recipes, or print one")
    add("name", nargs="?", metavar="RECIPE")

    add = command(
        "demo",
        _demo,
        "train three small models and compare them",
        "Trains one small GELU network on scikit-learn's digits three ways (cross-entropy alone; gradient"
        " norm with PyTorch's own kernels; gradient norm with the fused ones), attacks the three, and prints"
        " how they compare in speed, accuracy and robustness. Takes minutes on two CPU cores.",
    )
    help = "directory for report.html (default: %(default)s)"
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help=help)
    return parser


def _indented(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="      ")
        for line in text.splitlines()
    )


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    """A number, or a fraction such as 4/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"expected a number or a fraction such as 4/255, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
