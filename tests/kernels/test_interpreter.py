"""The processes that have Triton's interpreter, and the package without Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import INTERPRET

from gradnorm_kernels import kernels

# Not the source folder, which a child would import instead of the installed package.
TESTS = Path(__file__).parent


@pytest.mark.skipif(INTERPRET, reason="this is the process that it starts")
@pytest.mark.parametrize("family", sorted(p.stem for p in TESTS.glob("test_*_kernels.py")))
def test_values_without_a_gpu(family: str, request: pytest.FixtureRequest) -> None:
    """Runs the tests of a family's file that are marked for the interpreter, in it."""
    slow = ["--run-slow"] if request.config.getoption("--run-slow") else []
    child = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", TESTS / f"{family}.py", "-k", "interpreter"),
            *("-q", "--no-header", *slow),
        ],
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    if child.returncode != 0 or not re.search(r"\b[1-9]\d* passed", child.stdout):
        pytest.fail(f"in the interpreter:\n{child.stdout}\n{child.stderr}", pytrace=False)


def test_triton_is_imported_late() -> None:
    code = "import sys, gradnorm_kernels.kernels as k; k.register(); print('triton' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "False"


def test_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradnorm_kernels.kernels.activation", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    gelu = kernels._lazy("activation", "gelu")
    with pytest.raises(ImportError, match="pip install triton"):
        gelu(torch.ones(4))
