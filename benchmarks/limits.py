"""The machine's own ceilings, measured: the rate of a copy, and of a matrix product in each precision.

    python -m benchmarks.limits [--json FILE]

From them follows the floor of a step: the time that its ops would take, one after another, if each were as
fast as the ceilings allow. An op that moves b bytes and does f floating-point operations takes at least
max(b / copy rate, f / matrix rate) (the roofline of Williams et al., https://doi.org/10.1145/1498765.1498785).
Convolutions may beat the matrix rate where they save multiplications, and ops whose tensors stay in a CPU's
cache the copy rate; a compiler may also fuse what is several ops here.
"""

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradnorm_kernels._tf32 import allow_tf32

from .measure import option_parser, parse, start, wall_time, write_json

# Bytes of the copied tensor and size of the square matrices, too large for caches and launches to matter.
SIZES = {"cpu": (2**27, 2048), "cuda": (2**30, 8192)}
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}
# What the TF32 switch rounds are float32 tensors.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """Ceilings.

    Attributes:
        copy_bytes_per_second: read and written.
        flops_per_second: of a matrix product, by precision; a multiply-add counts 2.
    """

    copy_bytes_per_second: float
    flops_per_second: dict[str, float]

    def floor(self, ops: Iterable[tuple[int, int]], precision: str) -> float:
        """Seconds that ops, each given by its bytes and floating-point operations, take at least."""
        rate = self.flops_per_second[precision]
        return sum(max(moved / self.copy_bytes_per_second, flops / rate) for moved, flops in ops)


def measure(device: str, precisions: Iterable[str], rounds: int = 10) -> Limits:
    """The ceilings of a ``"cpu"`` or ``"cuda"`` device: medians of ``rounds`` runs."""
    size, n = SIZES[device]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), rounds)
    rates = {}
    for precision in precisions:
        matrix = torch.rand(n, n, device=device, dtype=DTYPES[precision])
        product = functools.partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix))
        with allow_tf32(precision == "tf32"):
            rates[precision] = 2 * n**3 / _seconds(product, rounds)
    return Limits(2 * size / copied, rates)


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    return statistics.median([wall_time(run) for _ in range(rounds + 3)][3:])


def main(arguments: list[str] | None = None) -> None:
    args = parse(option_parser(__doc__, rounds=10), arguments)
    machine = start(args)
    limits = measure(args.device, PRECISIONS[args.device], args.rounds)
    print(f"\ncopy {limits.copy_bytes_per_second / 1e9:.1f} GB/s")
    for precision, rate in limits.flops_per_second.items():
        print(f"matrix product, {precision} {rate / 1e12:.3f} TFLOP/s")
    if args.json:
        write_json(args.json, machine=machine, rounds=args.rounds, rows=[asdict(limits)])


if __name__ == "__main__":
    main()
