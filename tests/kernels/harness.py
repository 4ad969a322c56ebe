"""What the tests of the Triton kernels share.

No GPU is needed for most of them: Triton compiles for a GPU that is not there, and its interpreter runs
kernels on CPU tensors. The interpreter is chosen by an environment variable when Triton is imported, so
test_interpreter.py runs the other files again in processes that have it set. Where a GPU is present the same
tests run on it, through the dispatcher.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import usual
from torch import Tensor

from gradnorm_kernels.kernels import NotCoveredError

triton = pytest.importorskip("triton", reason="Triton is not installed")
common: Any = importlib.import_module("gradnorm_kernels.kernels.common")
GPUTarget = triton.backends.compiler.GPUTarget

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", id="interpreter")
    if INTERPRET
    else pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
if INTERPRET:
    # Its products are numpy's, of which each processor rounds in its own way.
    import numpy

    def product(a: Any, b: Any, dtype: Any = None, matmul: Any = numpy.matmul) -> Any:
        return matmul(a.astype(numpy.float64), b.astype(numpy.float64)).astype(dtype or a.dtype)

    numpy.matmul = product


def usual_interpreted(values: Sequence[Any], *usual_values: Any) -> list[Any]:
    """For `parametrize`. In the interpreter, which takes minutes, the others are left to `make test-all`."""
    return usual(values, *map(str, usual_values if INTERPRET else values))


slow_when_interpreted = pytest.mark.slow if INTERPRET else lambda test: test
DTYPES_OF_MAKE_TEST = usual_interpreted(DTYPES, torch.float32)
on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES_OF_MAKE_TEST, ids=lambda dtype: str(dtype)[6:])
in_the_interpreter = pytest.mark.skipif(not INTERPRET, reason="the addresses do not depend on the device")


# Launches, compiled without a GPU.

# The most shared memory of a block, in KiB: table "Technical Specifications per Compute Capability" of the
# CUDA C++ Programming Guide.
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Of which each kind stands for the others in most tests.
ARCHITECTURES = (80, 90, 100, 120)
ROCM = GPUTarget("hip", "gfx942", 64)
# What `make test` compiles; the rest is left to `make test-all`.
USUAL = ((torch.float32, 90), (torch.bfloat16, 90))


class Launch(NamedTuple):
    """A kernel as a launcher's call has Triton specialise it."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def compiled(self, target: Any) -> Any:
        source = triton.compiler.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", target, 32) if isinstance(target, int) else target
        return triton.compile(source, target=target, options=self.options)


def recorded(launcher: Callable[..., Any], *operands: Any, target: Any = 90) -> list[Launch]:
    """The launches of a call on meta tensors, whose addresses are aligned as a GPU's are.

    Args:
        target: a CUDA architecture, or a GPUTarget of another backend's.
    """
    launches: list[Launch] = []

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options.clear()
        options.update((name, value) for name, value in kwargs.items() if name not in kernel.arg_names)
        run(kernel, *args, grid=grid, warmup=True, **kwargs)

    def record(kernel: Any, *args: Any) -> None:
        _key, signature, _device, constants, _options, attributes, _warmup = args
        launches.append(Launch(kernel, signature, constants, attributes, dict(options)))

    options: dict[str, Any] = {}
    run = triton.runtime.JITFunction.run
    absent_gpu = SimpleNamespace(
        # Not the number of a GPU that may be there: Triton caches what it specialises under it.
        get_current_device=lambda: f"absent {target}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_MEMORY.get(target.arch, 64) * 1024,  # 64 of ROCm's
                "multiprocessor_count": 132,
            }
        ),
    )
    target = GPUTarget("cuda", target, 32) if isinstance(target, int) else target
    common.gpu.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", warm_up)
        patch.setattr(triton.runtime.JITFunction, "_do_compile", record)
        patch.setattr(triton.runtime.driver, "_active", absent_gpu)
        launcher(*operands)
    common.gpu.cache_clear()
    return launches


def recorded_on(capability: int, *call: Any) -> list[Launch]:
    """The launches on a GPU of this capability; none where it is not covered."""
    try:
        return recorded(*call, target=capability)
    except NotCoveredError:
        return []


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter_sizes(signature: Iterable[Any]) -> list[int]:
    """Of a kernel's parameters, in bytes: Triton takes tuples apart, and leaves out constants."""
    sizes: list[int] = []
    for kind in signature:
        if isinstance(kind, tuple):
            sizes += parameter_sizes(kind)
        elif kind != "constexpr":
            sizes.append(8 if kind[0] == "*" else max(int(re.sub(r"\D", "", kind)) // 8, 1))
    return sizes


def compilation_test(
    calls: Callable[[torch.dtype], Iterator[tuple[Any, ...]]],
    wide: Sequence[str] = (),
    known: dict[str, str] | None = None,
    by_device: bool = False,
) -> Callable[..., None]:
    """A test of every distinct launch of a family's calls, in each dtype and for each architecture.

    Args:
        calls: tuples of a name, a launcher and its arguments.
        wide: the names of those whose kernels have 128-bit accesses only; all is every one.
        known: what does not hold yet: patterns of tests' ids, and why.
        by_device: the launches differ from device to device; every architecture is tested.
    """
    cases: dict[str, Any] = {}
    for dtype in [] if INTERPRET else DTYPES:
        seen: list[tuple[int, Launch]] = []
        for name, *call in calls(dtype):
            usual = recorded(*call)
            for capability in SHARED_MEMORY if by_device else ARCHITECTURES:
                for launch in recorded_on(capability, *call) if by_device else usual:
                    if (capability, launch) in seen:
                        continue
                    seen.append((capability, launch))
                    case = f"{launch.kernel.__name__.removesuffix('_kernel')}-{name}-{str(dtype)[6:]}"
                    case += "-again" * (f"{case}-sm_{capability}" in cases)
                    key = f"{case}-sm_{capability}"
                    marks = [] if (dtype, capability) in USUAL else [pytest.mark.slow]
                    for pattern, reason in (known or {}).items():
                        if re.fullmatch(pattern, key):
                            marks.append(pytest.mark.xfail(strict=True, reason=reason))
                    is_wide = "all" in wide or name in wide
                    cases[key] = pytest.param(launch, capability, is_wide, id=key, marks=marks)

    @pytest.mark.parametrize(("launch", "capability", "is_wide"), list(cases.values()))
    def test_compiles_without_spills(launch: Launch, capability: int, is_wide: bool, tmp_path: Path) -> None:
        compiled = launch.compiled(capability)
        assert compiled.metadata.enable_fp_fusion
        # What csrc/replay.cpp writes: two pointers of Triton's own come last.
        parameters = [int(bits) // 8 for bits in re.findall(r"\.param \.\w(\d+)", compiled.asm["ptx"])]
        assert parameters == [*parameter_sizes(launch.signature.values()), 8, 8]
        assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024, (
            "more shared memory than there is"
        )
        if is_wide:
            assert_128_bit_accesses(compiled.asm["ptx"], str(launch.signature.values()).count("*"))
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # ptxas spills registers to the stack, which else only libdevice's sine far from 0 uses, for 8 words.
        (stack,) = re.findall(r"REG:\d+ STACK:(\d+) .*LOCAL:0\b", usage)
        assert int(stack) <= (40 if TABLE_OF_SINES in compiled.asm["ptx"] else 0), usage

    return test_compiles_without_spills


# How libdevice reads the digits of 2 / pi, for a sine far from 0.
TABLE_OF_SINES = "ld.global.nc.b32"


def accesses(ptx: str) -> tuple[int, list[str]]:
    """The number of 128-bit accesses to global memory, and the narrower ones."""
    # A 128-bit vector is v4.b32 or v2.b64; Blackwell also has 256 bits.
    wide = {"v4.b32", "v2.b64", "v8.b32", "v4.b64"}
    every = re.findall(r"\b(?:ld|st)\.global\S*", ptx.replace(TABLE_OF_SINES, ""))
    narrow = [access for access in every if ".".join(access.split(".")[-2:]) not in wide]
    return len(every) - len(narrow), narrow


def assert_128_bit_accesses(ptx: str, arrays: int) -> None:
    wide, narrow = accesses(ptx)
    assert wide >= arrays
    assert not narrow, f"narrower than 128 bits: {narrow}"


# Values.


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    drawn_on = "meta" if device == "meta" else "cpu"
    return torch.randn(shape, dtype=torch.float64, device=drawn_on).to(device, dtype)


def implementation(module: Any, *tensors: Any) -> Any:
    """Of a family's ops: through the dispatcher on a GPU, without it in the interpreter."""
    on_cuda = any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tensors)
    return torch.ops.gradnorm_kernels if on_cuda else module


def untouched(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns, which must not write to its arguments, and on a GPU give the same bits again."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    results = call(*args)
    for arg, original in zip(args, before, strict=True):
        assert not isinstance(arg, Tensor) or torch.equal(arg, original), "an input was written to"
    if not INTERPRET:
        for result, again in zip(results, call(*args), strict=True):
            assert result is None or torch.equal(result, again), "another run gave other bits"
    return results


def in_double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_accurate(
    actual: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    allowed: Callable[[Tensor], float] = lambda exact: 0.0,
    stock: Sequence[Tensor | None] | None = None,
) -> None:
    """The errors are at most twice stock's, where it is given, and what is allowed besides."""
    for index, (a, e) in enumerate(zip(actual, exact, strict=True)):
        if e is None or a is None:
            assert a is e, index
            continue
        assert a.shape == e.shape, index
        theirs = None if stock is None else stock[index]
        assert theirs is None or (a.dtype, a.device) == (theirs.dtype, theirs.device), index
        if a.numel():
            error = (a.double() - e).abs().max().item()
            stock_error = 0.0 if theirs is None else (theirs.double() - e).abs().max().item()
            assert error <= 2 * stock_error + allowed(e), f"{index}: {error} against {stock_error}"


def units(dtype: torch.dtype, count: float, floor: float = 0.0) -> Callable[[Tensor], float]:
    """Units in the last place of the largest element: a few say little of a maximum, and the interpreter
    truncates what it stores as bfloat16."""
    return lambda exact: floor + count * torch.finfo(dtype).eps * exact.abs().max().item()


def each_mask(size: int) -> Iterator[list[bool]]:
    for bits in range(2**size):
        yield [bool(bits >> k & 1) for k in range(size)]


def assert_masks(call: Callable[[list[bool]], Any], full: Sequence[Tensor | None]) -> None:
    """Results that are not asked for are None, and the others do not depend on them."""
    for mask in each_mask(len(full)):
        for result, wanted, asked in zip(call(mask), full, mask, strict=True):
            assert result is None if not asked else torch.equal(result, wanted), mask


def assert_rejected(*calls: tuple[Any, ...]) -> None:
    """Of an error, a pattern of its message, a launcher and its arguments: what the launcher says, without
    the Autograd key in front of it."""
    for error, match, launcher, *args in calls:
        with pytest.raises(error, match=match):
            launcher(*args)


def strided(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def skip_without_memory(needed: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, {free >> 30} GiB are free")


def assert_same_in_parts(call: Any, starts: Sequence[int], length: int, *tensors: Tensor) -> None:
    """Of tensors of more than 2^31 elements, and rows of them that are computed alone: an address that
    wrapped around would leave one of these places unwritten or wrong."""
    whole = call(*tensors)
    for start in starts:
        part = slice(start, start + length)
        for result, expected in zip(whole, call(*(t[part].clone() for t in tensors)), strict=True):
            assert result is None or torch.equal(result[part], expected), f"from {start}"
