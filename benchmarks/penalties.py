"""Gradient penalties beyond vision: codes that know nothing of this library, stock and switched.

    python -m benchmarks.penalties [--json FILE]

- a critic's step of WGAN-GP (Gulrajani et al., https://arxiv.org/abs/1704.00028): a convolutional critic of
  32x32 images, with InstanceNorm and SiLU, whose gradient between real and generated images is to have
  norm 1;
- the residual of a physics-informed network (Raissi et al., https://arxiv.org/abs/1711.10561): Burgers'
  equation by a tanh network, and Poisson's by a SiLU network, whose second derivatives are differentiated by
  the parameters;
- a force field: an energy of distances by a SiLU network, whose negative gradient is fitted to forces.

Each step runs with stock PyTorch and under ``set_fused_double_backward(True)``, alternating in one process,
after the parameters' gradients were compared: a difference stops the run.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels._tf32 import allow_tf32

from .measure import alternate, heading, line, option_parser, parse, start, summary, wall_time, write_json
from .steps import gradients, relative_difference

TOLERANCE = 1e-3
Step = Callable[[], None]
Residual = Callable[[Tensor, Tensor, Tensor], Tensor]


def wgan_gp(device: str) -> tuple[nn.Module, Step]:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.InstanceNorm2d(outputs, affine=True), nn.SiLU()]

    critic = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.SiLU(), *block(64, 128), *block(128, 256), nn.Conv2d(256, 1, 4)
    ).to(device)
    real, generated = (torch.rand(64, 3, 32, 32, device=device) for _ in range(2))
    share = torch.rand(64, 1, 1, 1, device=device)

    def step() -> None:
        critic.zero_grad()
        between = (share * real + (1 - share) * generated).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        (critic(generated).mean() - critic(real).mean() + 10 * penalty).backward()

    return critic, step


def burgers(u: Tensor, first: Tensor, at: Tensor) -> Tensor:
    (second,) = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)
    return first[:, 1] + u * first[:, 0] - 0.01 / torch.pi * second[:, 0]


def poisson(u: Tensor, first: Tensor, at: Tensor) -> Tensor:
    second = [torch.autograd.grad(first[:, k].sum(), at, create_graph=True)[0][:, k] for k in range(2)]
    return torch.stack(second).sum(0) + at.sin().prod(1)


def pinn(residual: Residual, activation: type[nn.Module], device: str) -> tuple[nn.Module, Step]:
    width = 256
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), activation())]
    network = nn.Sequential(nn.Linear(2, width), activation(), *layers, nn.Linear(width, 1)).to(device)
    points = torch.rand(4096, 2, device=device)

    def step() -> None:
        network.zero_grad()
        at = points.clone().requires_grad_()
        u = network(at)[:, 0]
        (first,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        residual(u, first, at).square().mean().backward()

    return network, step


def force_field(device: str) -> tuple[nn.Module, Step]:
    atoms, features = 24, 64
    pair = nn.Sequential(
        nn.Linear(features, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1)
    ).to(device)
    positions, forces = (torch.randn(32, atoms, 3, device=device) for _ in range(2))
    centres = torch.linspace(0, 6, features, device=device)
    i, j = torch.triu_indices(atoms, atoms, 1, device=device)

    def step() -> None:
        pair.zero_grad()
        at = positions.clone().requires_grad_()
        distances = (at[:, i] - at[:, j]).norm(dim=-1, keepdim=True)
        energy = pair(torch.exp(-(distances - centres).square())).sum()
        (gradient,) = torch.autograd.grad(energy, at, create_graph=True)
        F.mse_loss(-gradient, forces).backward()

    return pair, step


CODES: dict[str, Callable[[str], tuple[nn.Module, Step]]] = {
    "wgan_gp": wgan_gp,
    "pinn": functools.partial(pinn, burgers, nn.Tanh),
    "poisson": functools.partial(pinn, poisson, nn.SiLU),
    "force_field": force_field,
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
    "code": ("code", "12"),
    "variant": ("variant", "8"),
    "ms": ("milliseconds", "9.1f"),
    "/ stock": ("time_over_stock", "8.3f"),
    "difference": ("gradient_difference", "10.1e"),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse(option_parser(__doc__, rounds=15), arguments)
    machine = start(args)
    print(f"\n{heading(COLUMNS)}")
    rows = []
    for name in CODES:
        # In TF32 the gradients would differ by more than the tolerance.
        with allow_tf32(False):
            measured = measure(name, args)
        print("\n".join(line(COLUMNS, row) for row in measured), flush=True)
        rows += measured
    if args.json:
        write_json(args.json, machine=machine, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
