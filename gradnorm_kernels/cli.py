"""The ``gradnorm`` command: gradient-norm training, its evaluation, and studies of both."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .training.config import (
    Interrupted,
    TrainConfig,
    TrainingError,
    as_options,
    describe_options,
    load_recipe,
    parse_settings,
    recipe_names,
)

__all__ = ["main"]

# Each is imported only by what needs it, after the arguments are parsed.
OPTIONAL_PACKAGES = {
    "PIL",
    "matplotlib",
    "numpy",
    "pyautoattack",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
    "yaml",
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
        print(
            f"gradnorm: error: the package {error.name} is missing;"
            " run: pip install 'gradnorm_kernels[train]'",
            file=sys.stderr,
        )
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


def _train(recipe: str | None, output: Path, resume: bool, settings: list[str], **options: Any) -> int:
    from .training.trainer import resumed_config, train

    changes = {**(load_recipe(recipe) if recipe else {}), **parse_settings(settings), **as_options(options)}
    config = resumed_config(output, changes) if resume else TrainConfig(**changes)
    try:
        train(config, output, resume=resume)
    except Interrupted as interrupted:
        print(
            f"gradnorm: {interrupted}\n"
            f"resume with: gradnorm train --resume --output {shlex.quote(str(output))}",
            file=sys.stderr,
        )
        return 130
    return 0


def _evaluate(checkpoint: Path, output: Path | None, **options: Any) -> int:
    from .training.runs import evaluate_run

    report = evaluate_run(checkpoint, output, **options)
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

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a classifier by a recipe, by default on scikit-learn's digits. An interrupt"
        " (Ctrl-C) stops it with a checkpoint.",
        epilog="options to --set, with their defaults:\n" + _indented(describe_options()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(command=_train)
    train.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe of `gradnorm recipes`, or a YAML file of options; without it, the defaults below",
    )
    train.add_argument(
        "--output",
        type=Path,
        default=Path("run"),
        metavar="DIR",
        help="directory for the checkpoint, metrics.jsonl and config.json (default: %(default)s)",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output, whose options it keeps",
    )
    _add_settings(train)
    _add_data(train)
    # Shorthands of --set for what differs from run to run.
    shorthand: dict[str, Any] = {"default": argparse.SUPPRESS}
    train.add_argument("--act", metavar="NAME", help="activation, as act below", **shorthand)
    train.add_argument("--fused", choices=("auto", "on", "off"), help="fused kernels", **shorthand)
    train.add_argument("--init", metavar="CHECKPOINT", help="weights to start from", **shorthand)
    train.add_argument("--compile", action="store_true", help="compile the whole step", **shorthand)
    train.add_argument("--device", metavar="NAME", help="torch device", **shorthand)

    evaluate = commands.add_parser(
        "evaluate",
        help="attack a trained model",
        description="Measures a checkpoint's accuracy on held-out images, clean and under attack, as a table"
        " and as JSON beside the checkpoint. An interrupted AutoAttack goes on where it was.",
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's directory or checkpoint"
    )
    _add_data(evaluate)
    evaluate.add_argument(
        "--attack",
        choices=("autoattack", "apgd-ce", "pgd", "fgsm"),
        default="autoattack",
        help="(default: %(default)s, the standard version)",
    )
    evaluate.add_argument(
        "--eps",
        type=_number,
        nargs="+",
        metavar="X",
        help="radius in pixel units, such as 4/255; several make a curve (default: the run's epsilon)",
    )
    evaluate.add_argument("--norm", choices=("Linf", "L2"), default="Linf", help="(default: %(default)s)")
    evaluate.add_argument(
        "--n", type=_count, metavar="N", help="held-out images to attack, a fixed sample (default: all)"
    )
    evaluate.add_argument(
        "--batch-size", type=_count, default=250, metavar="N", help="(default: %(default)s)"
    )
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    evaluate.add_argument("--device", metavar="NAME", help="torch device (default: cuda where there is one)")
    evaluate.add_argument(
        "--output", type=Path, metavar="DIR", help="where the JSON goes (default: beside the checkpoint)"
    )

    study = commands.add_parser(
        "study",
        help="train and attack several models, and report",
        description="Runs every training run of a study, attacks the models, and writes study.json and"
        " report.html. What is finished in --output is not done again.",
    )
    study.set_defaults(command=_study)
    study.add_argument("name", choices=("activations", "objectives", "stability"))
    _add_data(study)
    # Options not given are left to study()'s own defaults.
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    study.add_argument("--recipe", metavar="RECIPE", help="what the runs share (default: digits)", **unset)
    study.add_argument("--seeds", type=_count, metavar="N", help="runs of each row (default: 1)", **unset)
    study.add_argument(
        "--attack",
        choices=("autoattack", "apgd-ce", "pgd", "fgsm"),
        help="at the recipe's epsilon (default: autoattack)",
        **unset,
    )
    study.add_argument(
        "--n", type=_count, metavar="N", help="held-out images to attack (default: 1000 at most)", **unset
    )
    study.add_argument("--only", nargs="+", metavar="NAME", help="only these rows of the study")
    _add_settings(study)
    study.add_argument("--output", type=Path, metavar="DIR", help="(default: study/ and the study's name)")

    recipes = commands.add_parser("recipes", help="list the recipes, or print one")
    recipes.set_defaults(command=_recipes)
    recipes.add_argument("name", nargs="?", metavar="RECIPE")

    demo = commands.add_parser(
        "demo",
        help="train three small models and compare them",
        description="Trains one small GELU network on scikit-learn's digits three ways (cross-entropy alone;"
        " gradient norm with PyTorch's own kernels; gradient norm with the fused ones), attacks the three,"
        " and prints how they compare in speed, accuracy and robustness. Takes minutes on two CPU cores.",
    )
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="directory for report.html (default: %(default)s)",
    )
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="image folder holding train/<class>/* and val/, validation/ or test/<class>/*",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options of `gradnorm train --help`, over the recipe's",
    )


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
