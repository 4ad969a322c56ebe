"""What reports and benchmarks say of the machine beside their numbers."""

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's model name where Linux tells it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
