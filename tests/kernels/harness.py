"""What the tests of the Triton kernels share.

No GPU is needed for most of them: Triton compiles for a GPU that is not there, and its interpreter runs
kernels on CPU tensors. The interpreter is chosen by an environment variable when Triton is imported, so
test_interpreter.py runs the others again in a process that has it set. Where a GPU is present the same tests
run on it, through the dispatcher.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
GPUTarget = triton.backends.compiler.GPUTarget

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", id="interpreter")
    if INTERPRET
    else pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def compile_for(specialization: Any, capability: int) -> Any:
    kernel, constants = specialization.kernel, specialization.constants
    position = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = triton.compiler.ASTSource(
        kernel,
        specialization.signature,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in specialization.divisible_by_16},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=specialization.options)


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)
