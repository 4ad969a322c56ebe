"""Tells csrc/replay.cpp what kernels a launcher launches, if the environment variable names it (REPLAY)."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .common import Launcher

# What a launch writes for a value of Triton's types.
_FORMATS = {
    **{"i1": "<i", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"},
    **{"u1": "<I", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"},
}
# Beyond it, a launch needs an attribute.
_MOST_SHARED_MEMORY = 228 * 1024
_thread = threading.local()


def note(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the launcher returns. For a call of C++, which notes the ops that it calls as well."""
    _thread.is_noting = True
    try:
        return launcher(*args, **kwargs)
    finally:
        _thread.is_noting = False


def _note_launch(kernel: Any, compiled: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if not getattr(_thread, "is_noting", False):
        return
    note = torch.ops.gradnorm_kernels._note_launch
    is_compiled = isinstance(compiled, triton.compiler.CompiledKernel)
    if not is_compiled or _needs_more_than_parameters(kernel, compiled):
        note(0, [], 0, 0, [], [])
        return
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **constants)
    bound.apply_defaults()
    parameters = list(_parameters(compiled.src.signature.values(), bound.arguments.values()))
    is_known = all(kind in _FORMATS or isinstance(value, Tensor) for kind, value in parameters)
    pointers = [value if isinstance(value, Tensor) else None for _, value in parameters]
    words = [struct.pack(_FORMATS[kind], value) if kind in _FORMATS else b"" for kind, value in parameters]
    bits = [int.from_bytes(word.ljust(8, b"\0"), "little", signed=True) for word in words]
    threads, shared_memory = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    note(compiled.function if is_known else 0, list(grid), threads, shared_memory, pointers, bits)


def _needs_more_than_parameters(kernel: Any, compiled: Any) -> bool:
    """Memory to work in, attributes of the launch, or somebody who is told of it."""
    metadata = compiled.metadata
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(
        (
            *(metadata.target.backend != "cuda", metadata.num_ctas != 1),
            *(metadata.global_scratch_size, metadata.profile_scratch_size),
            *(metadata.launch_cooperative_grid, metadata.launch_pdl, metadata.shared > _MOST_SHARED_MEMORY),
            *(getattr(metadata, "tensordesc_meta", None), kernel.pre_run_hooks),
            *(getattr(hook, "calls", hook) for hook in hooks),
        )
    )


def _parameters(signature: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """The types and values of a kernel's parameters: Triton takes tuples apart, and leaves out constants."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind != "constexpr":
            yield kind, value


Launcher.on_launch = staticmethod(_note_launch)
