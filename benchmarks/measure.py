"""What every benchmark shares: options, alternating timings, and a description of the machine."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gradnorm_kernels._machine import processor_name


def option_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed runs of each variant")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine there")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, with the device filled in and the number of threads set."""
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def write_json(
    path: Path, machine: dict[str, Any], rounds: int, rows: list[dict[str, Any]], **more: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine, "rounds": rounds, **more, "rows": rows}
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nwrote {path}")


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
        code = ["csrc", "gradnorm_kernels", "benchmarks/*.py", "setup.py"]
        differs = [*git, "diff", "--quiet", "HEAD", "--", *(f":(top){path}" for path in code)]
        changed = subprocess.run(differs, capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed)
