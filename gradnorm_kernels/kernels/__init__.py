"""CUDA kernels of the ops, written in Triton, which is imported at the first CUDA call.

Where there is none that works, and where a kernel does not cover a shape, the op is its composite.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import composite

# The ops that each module here implements, under their own names; the longest to test first.
_OPS = {
    "attention": (
        "_attention_fwd",
        "_attention_bwd",
        "_attention_bwd_bwd",
        "_attention_softmax",
        "_attention_softmax_backward",
        "_attention_softmax_double_backward",
    ),
    "batch_norm": (
        "batch_norm_backward",
        "batch_norm_double_backward",
        "batch_norm_act_backward",
        "batch_norm_act_double_backward",
    ),
    "layer_norm": (
        "layer_norm_2d",
        "layer_norm_2d_backward",
        "layer_norm_double_backward",
        "rms_norm",
        "rms_norm_backward",
        "rms_norm_double_backward",
    ),
    "softmax": ("softmax_double_backward", "softmax_with_bias"),
    "cross_entropy": ("cross_entropy", "cross_entropy_backward", "cross_entropy_double_backward"),
    "normalize": (
        *("normalize", "normalize_backward", "normalize_double_backward"),
        *("vector_norm_double_backward", "weight_norm_double_backward"),
    ),
    "activation": tuple(
        name + suffix
        for names, suffixes in (
            (
                (
                    *("cos", "elu", "gelu", "hardswish", "logsigmoid", "mish", "quick_gelu", "silu", "sin"),
                    *("softplus", "softsign", "squared_relu"),
                ),
                ("", "_backward", "_double_backward", "_triple_backward"),
            ),
            # Of linear pieces, with no second derivative.
            (("hardsigmoid", "leaky_relu", "relu", "relu6"), ("", "_backward")),
            # Made of their output. The forward is ATen's.
            (("sigmoid", "tanh"), ("_backward", "_double_backward", "_triple_backward")),
        )
        for name in names
        for suffix in suffixes
    ),
    "gated": ("gated_unit", "gated_unit_backward", "gated_unit_double_backward"),
    "cdist": ("cdist_backward", "cdist_double_backward"),
    "group_norm": ("group_norm_double_backward",),
    "grid_sample": ("grid_sample_double_backward",),
    "permute_rows": ("permute_rows",),
    "recurrent": (
        *("lstm_step", "lstm_step_backward", "lstm_step_double_backward"),
        *("gru_step", "gru_step_backward", "gru_step_double_backward"),
    ),
}
FAMILIES = tuple(_OPS)

# The environment variable that has C++ repeat launches: 1 or not.
REPLAY = "GRADNORM_KERNELS_REPLAY"

# That of torch 2.11.
_OLDEST_TRITON = (3, 6)


class NotCoveredError(Exception):
    """A launcher has no kernel for such operands, on such a device."""


def _install() -> str:
    """How Triton is installed on this platform."""
    if torch.version.hip:
        return "reinstall torch from PyTorch's index for ROCm, with the Triton that it names"
    package = "triton-windows" if sys.platform == "win32" else "triton"
    return f'pip install --upgrade "{package}>={".".join(map(str, _OLDEST_TRITON))}"'


def _obstacle() -> tuple[str, str] | None:
    """Why Triton cannot run here, and the remedy."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})", _install()
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old", _install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    try:
        # Makes the module that talks to the driver, for which Triton calls a C compiler.
        triton.runtime.driver.active.get_current_target()
    # Of many kinds: of the compiler, of the linker, of the driver.
    except Exception as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"Triton found no C compiler, no header of Python or no driver ({what})",
            "install them (Debian: apt-get install gcc python3-dev; Fedora: dnf install gcc python3-devel; "
            "Windows: triton-windows brings its own), or name a compiler by the environment variable CC",
        )
    return None


@functools.cache
def has_triton() -> bool:
    """Whether kernels can run; warns, the first time, if not."""
    obstacle = _obstacle()
    if obstacle is not None:
        reason, remedy = obstacle
        warnings.warn(
            f"gradnorm_kernels: on the GPU, PyTorch's own ops take the place of fused kernels, which is "
            f"right but slower: {reason}. Remedy: {remedy}",
            stacklevel=2,
        )
    return obstacle is None


def _lazy(module: str, op: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None
    # The composite writes all results anew.
    not_covered: tuple[type[Exception], ...] = ()

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal launcher, not_covered
        if launcher is None:
            if not has_triton():
                return composite.call(op, *args, **kwargs)
            from triton.runtime.errors import OutOfResources

            not_covered = (NotCoveredError, OutOfResources)
            launcher = getattr(importlib.import_module(f"{__name__}.{module}"), op)
        try:
            return launcher(*args, **kwargs)
        except not_covered:
            return composite.call(op, *args, **kwargs)

    return call


def _noting(launcher: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not has_triton():
            return launcher(*args, **kwargs)
        from . import replay

        return replay.note(launcher, *args, **kwargs)

    return call


@functools.cache
def register() -> torch.library.Library:
    """Make the CUDA kernels known to the dispatcher, for as long as the library object lives.

    The cache keeps it alive, and makes a second call do nothing.
    """
    library = torch.library.Library("gradnorm_kernels", "IMPL")
    launchers = {op: _lazy(module, op) for module, ops in _OPS.items() for op in ops}
    is_replayed = os.environ.get(REPLAY) == "1" and os.environ.get("TRITON_INTERPRET") != "1"
    for op, launcher in launchers.items():
        # Where C++ calls them (csrc/replay.cpp).
        library.impl(op, launcher, "PrivateUse2" if is_replayed else "CUDA")
        if is_replayed:
            library.impl(op, _noting(launcher), "PrivateUse3")
    if is_replayed:
        torch.ops.gradnorm_kernels._replay(list(launchers))
    return library
