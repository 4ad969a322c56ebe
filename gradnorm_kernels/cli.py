"""The ``gradnorm`` command: gradient-norm training, and a demonstration of it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .training.config import TrainConfig, TrainingError, option_name

__all__ = ["main"]

# Each is imported only by what needs it, after the arguments are parsed.
OPTIONAL_PACKAGES = {"PIL", "matplotlib", "numpy", "pyautoattack", "sklearn", "timm", "torchvision", "tqdm"}


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
        print(f"gradnorm: error: {error}", file=sys.stderr)
        return 1
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


def _train(output: Path, resume: bool, **changes: Any) -> int:
    from .training.trainer import Interrupted, resumed_config, train

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


def _demo(output: Path) -> int:
    from .training.demo import demo

    print(demo(output).table())
    print(f"\nplots and details: {output / 'report.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradnorm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a classifier, by default on scikit-learn's digits. An interrupt (Ctrl-C) stops it"
        " with a checkpoint.",
    )
    train.set_defaults(command=_train)
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
    types = get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        _add_option(train, item, types[item.name])

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


def _add_option(parser: argparse.ArgumentParser, item: "Field[Any]", hint: Any) -> None:
    """Adds the option for a field of TrainConfig.

    Options not given stay out of the namespace, so that a resumed run can tell them from options given with
    their default.
    """
    kind = next((t for t in get_args(hint) if t is not type(None)), hint)
    help = item.metadata["help"]
    if item.default is not None:
        shown = "4/255" if item.name == "epsilon" else item.default
        help += f" (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif item.metadata["choices"]:
        options["choices"] = item.metadata["choices"]
    else:
        options["type"] = _number if kind is float else kind
        options["metavar"] = {float: "X", int: "N", str: "NAME"}[kind]
    parser.add_argument(option_name(item.name), **options)


def _number(text: str) -> float:
    """A number, or a fraction such as 4/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"expected a number or a fraction such as 4/255, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
