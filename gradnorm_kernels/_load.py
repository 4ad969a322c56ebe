"""Loads the compiled library, whose ops then exist as torch.ops.gradnorm_kernels."""

import importlib

import torch

REBUILD = (
    "In its source folder, run:\n"
    '    pip install "setuptools>=77" ninja\n'
    "    pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir ."
)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load() -> None:
    """Imports ``gradnorm_kernels._C``.

    Raises:
        ImportError: if it was never built, or was built for another torch minor version (whose C++
            interface differs); the message says what to run.
    """
    try:
        built_for = importlib.import_module("gradnorm_kernels._built_for").TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(f"gradnorm_kernels is not built. {REBUILD}") from None
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"gradnorm_kernels was built for torch {built_for}, but torch {torch.__version__} is "
            f"installed, and an extension built for one minor version does not load in another. {REBUILD}"
        )
    try:
        importlib.import_module("gradnorm_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"gradnorm_kernels._C, built for torch {built_for}, did not load in torch "
            f"{torch.__version__}: {error}\n{REBUILD}"
        ) from error
