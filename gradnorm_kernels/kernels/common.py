"""What the Triton kernels of every family share."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Fused multiply-add is asked for by name because Triton's default differs between versions.
FP_FUSION = {"enable_fp_fusion": True}


@triton.jit
def widen(value):
    """To the dtype arithmetic is done in: float32 at least."""
    return value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)


class Specialization(NamedTuple):
    """A kernel as a launch has it compiled, in the terms of Triton's ASTSource.

    Each module of kernels lists its own in ``specializations()``, at the shapes of the models that it is
    for, and the tests compile them all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    options: dict[str, Any]
    # Arrays that it reads and writes in 128-bit accesses only; None where it may use narrower ones.
    wide_accesses: tuple[int, int] | None = None


def pointer_type(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to elements of dtype."""
    return {
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
    }[dtype]
