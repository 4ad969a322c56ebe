"""CPU kernels, with the instruction sets that this processor has but does not choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# In a process of its own, where torch chooses once: the tests of every family.
CHECKS = """
import importlib, pathlib
import conftest, torch
from contract import OpContract

conftest.poison()
assert torch.empty(9).isnan().all()
for path in sorted(pathlib.Path().glob("test_*.py")):
    if "\\nfrom contract import" in path.read_text():
        importlib.import_module(path.stem)
families = OpContract.__subclasses__()
for family in families:
    families += family.__subclasses__()
assert len(families) > 10
for family in families:
    torch.manual_seed(0)  # whatever families come before
    family().check_kernels()
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_kernels_of_every_family(capability):
    best = torch.backends.cpu.get_cpu_capability().lower()
    if capability == best:
        pytest.skip("all other tests run with it")
    # Which torch would believe, and the processor stop at.
    if capability == "avx512" and best == "avx2":
        pytest.skip("this processor has no avx512")
    run = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    chosen = run.stdout.strip().lower().replace("no avx", "default")
    if chosen != capability:
        pytest.skip(f"this processor has no {capability}: torch chose {chosen}")
