"""CUDA kernels of the ops, written in Triton, which is imported at the first CUDA call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

# The ops that each module here implements, under their own names.
_OPS = {
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
    "activation": tuple(
        name + suffix
        for names, suffixes in (
            (
                ("elu", "gelu", "hardswish", "logsigmoid", "mish", "silu", "softplus", "softsign"),
                ("", "_backward", "_double_backward"),
            ),
            # Of linear pieces, with no second derivative.
            (("hardsigmoid", "leaky_relu", "relu", "relu6"), ("", "_backward")),
            # Made of their output. The forward is ATen's.
            (("sigmoid", "tanh"), ("_backward", "_double_backward")),
        )
        for name in names
        for suffix in suffixes
    ),
    "gated": ("gated_unit", "gated_unit_backward", "gated_unit_double_backward"),
    "group_norm": ("group_norm_double_backward",),
    "attention": (
        "_attention_fwd",
        "_attention_bwd",
        "_attention_bwd_bwd",
        "_attention_softmax",
        "_attention_softmax_backward",
        "_attention_softmax_double_backward",
    ),
}


def _lazy(module: str, op: str) -> Callable[..., Any]:
    implementation: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            try:
                implementation = getattr(importlib.import_module(f"{__name__}.{module}"), op)
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise ImportError(
                    f"gradnorm_kernels.{op} on CUDA needs Triton: pip install triton"
                ) from error
        return implementation(*args, **kwargs)

    return call


@functools.cache
def register() -> torch.library.Library:
    """Make the CUDA kernels known to the dispatcher, for as long as the library object lives.

    The cache keeps it alive, and makes a second call do nothing.
    """
    library = torch.library.Library("gradnorm_kernels", "IMPL", "CUDA")
    for module, ops in _OPS.items():
        for op in ops:
            library.impl(op, _lazy(module, op))
    return library
