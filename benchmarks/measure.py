"""What every benchmark shares: options, a heap that is kept, gradients compared, alternating timings, the
machine, the file."""

import argparse
import ctypes
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradnorm_kernels._json import by_line
from gradnorm_kernels._machine import processor_name


def option_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed runs of each variant")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine there")
    return parser


def time_limit_option(parser: argparse.ArgumentParser) -> None:
    help = "begin nothing that would not end by then, if it took as long as the last; default: none"
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help=help)


class Budget:
    """How long a run may take, and whether what comes next still fits."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.monotonic()
        self.latest: float | None = None

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def allows_another(self) -> bool:
        """Whether it would end in time if it took as long as what has run since this was last asked."""
        now = time.monotonic()
        expected = 0.0 if self.latest is None else now - self.latest
        if expected > self.left():
            return False
        self.latest = now
        return True


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, with the device filled in."""
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    return args


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the process one to measure in, and says in what machine it does."""
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = keep_heap() if args.device == "cpu" else None
    machine = describe_machine(args.device) | ({} if kept is None else {"heap_kept": kept})
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return machine


def keep_heap() -> bool:
    """Lets glibc keep memory that is freed; whether it does, or what else allocates.

    Otherwise a tensor of more than 32 MiB is fresh memory each time, whose pages cost more to make than to
    write, and whether a smaller one is depends on what the process has freed before.
    """
    # M_MMAP_MAX: no block is mapped on its own. M_TRIM_THRESHOLD: the heap never shrinks.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)
        mallopt(-1, -1)
    tensor = torch.ones(2**24)
    # Of 16,384 pages, or 32 huge ones; small blocks that stay may split the first holes.
    return min(page_faults(tensor.clone) for _ in range(10)) < 16


def page_faults(run: Callable[[], Any]) -> int:
    """How many pages a run makes by touching them first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# Of a printed table, by heading: the row's key, the format, and what a number is multiplied by.
Columns = dict[str, tuple[str, str] | tuple[str, str, float]]


def heading(columns: Columns) -> str:
    return " ".join(
        f"{name:{form}}" if form.isdigit() else f"{name:>{_width(form)}}"
        for name, (_, form, *_) in columns.items()
    )


def line(columns: Columns, row: dict[str, Any]) -> str:
    """The row's cells, and what went wrong, if anything did."""
    cells = []
    for key, form, *scale in columns.values():
        value = row.get(key)
        if value is None:
            cells.append(f"{'-':>{_width(form)}}")
        else:
            cells.append(format(value * scale[0] if scale else value, form))
    return " ".join([*cells, row.get("error", "")]).rstrip()


def _width(form: str) -> str:
    return form.partition(".")[0].rstrip(",")


def write_json(path: Path, *, quiet: bool = False, **contents: Any) -> None:
    """Writes the file whole or not at all, so that a run that is cut off leaves what it wrote last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}")
    written.write_text(by_line(contents))
    written.replace(path)
    if not quiet:
        print(f"\nwrote {path}", flush=True)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def relative_difference(ours: list[Tensor], stocks: list[Tensor]) -> float:
    """The largest difference in any parameter's gradient, in units of that gradient's largest element.

    The unit is at least a thousandth of the largest gradient of all: some are zero but for rounding, such as
    that of a bias before a BatchNorm.
    """
    if len(ours) != len(stocks):
        return math.inf
    smallest_unit = max(g.abs().max().item() for g in stocks) / 1000
    found = [
        (a - b).abs().max().item() / max(b.abs().max().item(), smallest_unit)
        for a, b in zip(ours, stocks, strict=True)
    ]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def alternate(
    variants: dict[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float],
    rounds: int,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Seconds that each variant took in each round; the variants take turns, so that a machine whose speed
    drifts slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warm_up + rounds):
        for name, run in variants.items():
            seconds[name].append(clock(run))
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def summary(taken: list[float], baseline: list[float] | None) -> dict[str, float | None]:
    """What a row says of the seconds that its variant took; ``baseline`` is stock's, round by round."""
    return {
        "milliseconds": statistics.median(taken) * 1e3,
        "milliseconds_min": min(taken) * 1e3,
        "milliseconds_max": max(taken) * 1e3,
        "time_over_stock": median_ratio(taken, baseline) if baseline else None,
    }


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios round by round, which a drift of the machine's speed leaves alone."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def wall_time(run: Callable[[], Any]) -> float:
    """Seconds until the run and the work that it queued on the GPU are done."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def gpu_time(run: Callable[[], Any]) -> float:
    """Seconds that the GPU worked on it, without the host's time to launch it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Long enough for the host to queue the run behind it.
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and versions, to stand beside every number."""
    facts: dict[str, Any] = {
        "device": device,
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{os.cpu_count()} cores of {processor_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "gradnorm_kernels": _version("gradnorm_kernels"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
    if device == "cpu":
        facts |= {
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        }
    else:
        facts["cuda"] = torch.version.cuda
    return facts


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, with ``+`` where the code in the working tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        code = ["csrc", "gradnorm_kernels", "benchmarks/*.py", "examples", "setup.py"]
        differs = [*git, "diff", "--quiet", "HEAD", "--", *(f":(top){path}" for path in code)]
        changed = subprocess.run(differs, capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed)
