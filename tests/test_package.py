"""The package itself: what importing costs, and what happens with another torch."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import gradnorm_kernels as gk
from gradnorm_kernels import _load

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


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Stand-ins for libraries, in a folder to load from; each name imported is noted instead of imported."""
    for name in ("_C_torch2_12.abi3.so", "_C_torch2_13.abi3.so", "_C_torch2_14.pyd"):
        (tmp_path / name).touch()
    imported = []
    monkeypatch.setattr(_load.importlib, "import_module", imported.append)
    return tmp_path, imported


@pytest.mark.parametrize("found", ["2.13.0+cpu", "2.14.1", "2.14.0a0+git1234567"])
def test_library_of_the_torch_found_is_loaded(libraries, monkeypatch, found):
    folder, imported = libraries
    monkeypatch.setattr(torch, "__version__", found)
    _load.load(folder)
    assert imported == ["gradnorm_kernels._C_torch2_" + found[2:4]]


@pytest.mark.parametrize("found", ["2.1.0", "2.15.0"])
def test_torch_without_a_library_says_which_there_are_and_what_to_run(libraries, monkeypatch, found):
    folder, imported = libraries
    monkeypatch.setattr(torch, "__version__", found)
    with pytest.raises(ImportError, match=f"built for torch 2.12, 2.13, 2.14, but torch {found} is") as error:
        _load.load(folder)
    assert "pip install --no-build-isolation" in str(error.value)
    assert not imported


def test_package_without_a_library_says_what_to_run(tmp_path):
    with pytest.raises(ImportError, match="is not built") as error:
        _load.load(tmp_path)
    assert "pip install --no-build-isolation" in str(error.value)


def test_import_loads_the_library():
    run = run_python("import torch\ntorch.__version__ = '1.0.0'\nimport gradnorm_kernels\n")
    assert run.returncode != 0
    assert "but torch 1.0.0 is installed" in run.stderr


def test_library_that_does_not_load_says_what_to_run():
    name = "gradnorm_kernels._C_torch" + "_".join(torch.__version__.split(".")[:2])
    run = run_python(f"import sys\nsys.modules['{name}'] = None\nimport gradnorm_kernels\n")
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


def test_build_leaves_no_library_of_another_torch(tmp_path):
    package = tmp_path / "gradnorm_kernels"
    package.mkdir()
    (package / "_C_torch1_0.abi3.so").touch()
    (package / "_load.py").touch()
    code = (
        "import runpy, sys\n"
        "from torch.utils.cpp_extension import BuildExtension\n"
        "BuildExtension.run = lambda self: None\n"
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    run = run_python(code, cwd=TESTS.parent)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in package.iterdir()] == ["_load.py"]
