"""The processes that have Triton's interpreter, and the package without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET

from gradnorm_kernels import kernels
from gradnorm_kernels.kernels import composite

# Not the source folder, which a child would import instead of the installed package.
TESTS = Path(__file__).parent


@pytest.mark.skipif(INTERPRET, reason="this is the process that it starts")
# In three processes: each imports torch, and none may come near a test's time limit on a busy machine.
@pytest.mark.parametrize("families", [kernels.FAMILIES[first::3] for first in range(3)], ids=", ".join)
def test_values_without_a_gpu(families: Sequence[str], request: pytest.FixtureRequest) -> None:
    """Runs the tests of these families' files that are marked for the interpreter, in it."""
    slow = ["--run-slow"] if request.config.getoption("--run-slow") else []
    child = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-k", "interpreter", "-rp", "--no-header", *slow),
            *(TESTS / f"test_{family}_kernels.py" for family in families),
        ],
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    have_passed = all(f"PASSED test_{family}_kernels.py" in child.stdout for family in families)
    if child.returncode != 0 or not have_passed:
        pytest.fail(f"in the interpreter:\n{child.stdout}\n{child.stderr}", pytrace=False)


def test_every_family_has_its_tests() -> None:
    files = {file.name for file in TESTS.glob("test_*_kernels.py")}
    assert files == {f"test_{family}_kernels.py" for family in kernels.FAMILIES}


def test_triton_is_imported_late() -> None:
    code = "import sys, gradnorm_kernels.kernels as k; k.register(); print('triton' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "False"


def without_compiler(version: str = "3.8.0") -> SimpleNamespace:
    """As much of a Triton as is asked whether it works."""

    def raise_error() -> None:
        raise RuntimeError("Failed to find C compiler.")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=raise_error))
    return SimpleNamespace(__version__=version, runtime=SimpleNamespace(driver=driver))


@pytest.mark.parametrize(
    ("triton", "platform", "message"),
    [
        (None, "linux", 'cannot be imported .*Remedy: pip install --upgrade "triton>=3.6"'),
        (None, "win32", 'cannot be imported .*Remedy: pip install --upgrade "triton-windows>=3.6"'),
        (without_compiler("3.5.1+git"), "linux", "Triton 3.5.1.git is too old. Remedy: pip install"),
        (
            without_compiler(),
            "linux",
            r"Failed to find C compiler.*Remedy: .* apt-get install gcc python3-dev",
        ),
    ],
    ids=["absent", "absent on Windows", "old", "without compiler"],
)
def test_without_triton_ops_are_composites(
    triton: Any, platform: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(sys, "platform", platform)
    kernels.has_triton.cache_clear()
    x, v = torch.randn(2, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match=message) as warned:
        y = kernels._lazy("activation", "gelu")(x, approximate="tanh")
        grad = kernels._lazy("activation", "gelu_backward")(v, x, approximate="tanh")
    kernels.has_triton.cache_clear()
    assert len(warned) == 1
    torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
    torch.testing.assert_close(grad, torch.ops.aten.gelu_backward(v, x, approximate="tanh"))


def test_every_op_has_a_composite() -> None:
    for op in (op for ops in kernels._OPS.values() for op in ops):
        assert op in composite._IN_PLACE or torch._C._dispatch_has_computed_kernel_for_dispatch_key(
            f"gradnorm_kernels::{op}", "XPU"
        ), op
