"""Loads the compiled library, whose ops then exist as torch.ops.gradnorm_kernels."""

import importlib
from pathlib import Path

import torch

REBUILD = (
    "In its source folder, run:\n"
    '    pip install "setuptools>=77" ninja\n'
    "    pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir ."
)
PREFIX = "_C_torch"


def load(folder: Path = Path(__file__).parent) -> None:
    """Imports the library in ``folder`` for the installed torch, ``_C_torch2_14`` for torch 2.14.1.

    Raises:
        ImportError: if there is none for this minor version (the C++ interface differs from one to the
            next), or it does not load; the message says what there is and what to run.
    """
    wanted = ".".join(torch.__version__.split(".")[:2])
    names = (path.name.partition(".")[0].removeprefix(PREFIX) for path in folder.glob(PREFIX + "*"))
    built = sorted({name.replace("_", ".") for name in names})
    if not built:
        raise ImportError(f"gradnorm_kernels is not built. {REBUILD}")
    if wanted not in built:
        raise ImportError(
            f"gradnorm_kernels was built for torch {', '.join(built)}, but torch {torch.__version__} is "
            f"installed, and a library built for one minor version does not load in another. {REBUILD}"
        )
    name = PREFIX + wanted.replace(".", "_")
    try:
        importlib.import_module(f"gradnorm_kernels.{name}")
    except ImportError as error:
        raise ImportError(
            f"gradnorm_kernels.{name} did not load in torch {torch.__version__}: {error}\n{REBUILD}"
        ) from error
