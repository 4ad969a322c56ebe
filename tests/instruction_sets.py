"""Checks run under every instruction set that the CPU kernels are compiled for, not only this machine's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

each_instruction_set = pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])


def run_under(capability: str, module: str, checks: str) -> None:
    """Runs `checks`, in which `t` is the test module, in a process with that instruction set."""
    code = f"import torch\ntorch.manual_seed(0)\nimport {module} as t\n{checks}"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(torch.backends.cpu.get_cpu_capability())"],
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    chosen = run.stdout.strip().lower().replace("no avx", "default")
    if chosen != capability:
        pytest.skip(f"this processor has no {capability}: torch chose {chosen}")
