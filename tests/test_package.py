"""The package itself: what importing costs, and what happens with another torch."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import gradnorm_kernels as gk

TESTS = Path(__file__).parent


def run_python(code, cwd=TESTS):
    """Not in the source folder, which Python would import instead of the installed package."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_import_is_quick_and_lazy():
    run = run_python(
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "import gradnorm_kernels\n"
        "print(time.perf_counter() - start)\n"
        "print([name for name in ('triton', 'timm', 'torchvision') if name in sys.modules])\n"
    )
    assert run.returncode == 0, run.stderr
    seconds, heavy = run.stdout.splitlines()
    assert float(seconds) < 2
    assert heavy == "[]"


def test_version_is_the_distributions():
    assert gk.__version__ == version("gradnorm_kernels")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("types.SimpleNamespace(TORCH_VERSION='1.0.0')", "was built for torch 1.0.0, but torch "),
        ("None", "is not built"),
    ],
)
def test_library_built_for_another_torch_says_what_to_run(module, expected):
    run = run_python(
        f"import sys, types\nsys.modules['gradnorm_kernels._built_for'] = {module}\nimport gradnorm_kernels\n"
    )
    assert run.returncode != 0
    assert "ImportError" in run.stderr and expected in run.stderr
    assert "pip install --no-build-isolation" in run.stderr


def test_library_that_does_not_load_says_what_to_run():
    run = run_python("import sys\nsys.modules['gradnorm_kernels._C'] = None\nimport gradnorm_kernels\n")
    assert run.returncode != 0
    assert "did not load in torch " + torch.__version__ in run.stderr
    assert "pip install --no-build-isolation" in run.stderr


def test_build_without_torch_says_what_to_run():
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    run = run_python(code, cwd=TESTS.parent)
    assert run.returncode != 0
    assert "Install torch" in run.stderr and "pip install --no-build-isolation ." in run.stderr
