"""What every benchmark shares: alternating timings, and a description of the machine they were taken on."""

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


def alternate(variants: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds that each variant took in each round; the variants take turns, so that a machine whose speed
    drifts slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    warm_up = 3
    for _ in range(warm_up + rounds):
        for name, run in variants.items():
            seconds[name].append(_time_on_gpu(run) if device == "cuda" else _time_on_cpu(run))
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios round by round, which a drift of the machine's speed leaves alone."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _time_on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Long enough for the host to queue the run behind it: what is timed is the GPU's work, not the launch.
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


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
        facts["driver_cuda"] = torch.version.cuda
    return facts


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, with ``+`` where the working tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed)
