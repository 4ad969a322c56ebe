"""Gradient penalties beyond vision: codes that know nothing of this library, stock and switched.

    python -m benchmarks.penalties [CODE ...] [--json FILE]

The codes are the files of ``examples``, whose docstrings say what they train and after which paper: critics
(wgan_gp, r1, lstm_critic), physics-informed networks (pinn, poisson, poisson_tanh), signed distances with an
eikonal term (siren, sdf), force fields (force_field, schnet, egnn) and a language model.

Each step runs with stock PyTorch and under ``set_fused_double_backward(True)``, alternating in one process,
after the parameters' gradients were compared: a difference stops the run.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from examples import (
    egnn,
    force_field,
    language_model,
    lstm_critic,
    pinn,
    r1,
    schnet,
    sdf,
    siren,
    wgan_gp,
)
from gradnorm_kernels._tf32 import allow_tf32

from .measure import (
    alternate,
    gradients,
    heading,
    line,
    option_parser,
    parse,
    relative_difference,
    start,
    summary,
    wall_time,
    write_json,
)

TOLERANCE = 1e-3
Step = Callable[[], None]
# Of a device: a model, and a step that leaves its gradients in it.
CODES: dict[str, Callable[[str], tuple[nn.Module, Step]]] = {
    "wgan_gp": wgan_gp.make,
    "r1": r1.make,
    "lstm_critic": lstm_critic.make,
    "pinn": pinn.make,
    "poisson": functools.partial(pinn.make, residual=pinn.poisson, activation=nn.SiLU),
    "poisson_tanh": functools.partial(pinn.make, residual=pinn.poisson),
    "siren": siren.make,
    "sdf": sdf.make,
    "force_field": force_field.make,
    "schnet": schnet.make,
    "egnn": egnn.make,
    "language_model": language_model.make,
}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, step = CODES[name](args.device)
    runs = {"stock": step, "switch": functools.partial(_switched, step)}
    found: dict[str, list[Tensor]] = {}
    for variant, run in runs.items():
        run()
        found[variant] = gradients(model)
    difference = relative_difference(found["switch"], found["stock"])
    if difference > TOLERANCE:
        raise SystemExit(f"{name}: under the switch, gradients are {difference:.1e} off stock's")
    seconds = alternate(runs, wall_time, args.rounds)
    rows = [
        {"code": name, "variant": variant, **summary(taken, seconds["stock"])}
        for variant, taken in seconds.items()
    ]
    rows[1]["gradient_difference"] = difference
    return rows


def _switched(step: Step) -> None:
    with gk.set_fused_double_backward(True):
        step()


COLUMNS = {
    "code": ("code", "14"),
    "variant": ("variant", "8"),
    "ms": ("milliseconds", "9.1f"),
    "/ stock": ("time_over_stock", "8.3f"),
    "difference": ("gradient_difference", "10.1e"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = option_parser(__doc__, rounds=15)
    parser.add_argument("codes", nargs="*", metavar="CODE", help=f"default: all of {', '.join(CODES)}")
    args = parse(parser, arguments)
    if unknown := set(args.codes) - set(CODES):
        parser.error(f"CODE: expected some of {', '.join(CODES)}, got {', '.join(sorted(unknown))}")
    machine = start(args)
    print(f"\n{heading(COLUMNS)}")
    rows = []
    for name in args.codes or CODES:
        # In TF32 the gradients would differ by more than the tolerance.
        with allow_tf32(False):
            measured = measure(name, args)
        print("\n".join(line(COLUMNS, row) for row in measured), flush=True)
        rows += measured
    if args.json:
        write_json(args.json, machine=machine, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
