"""The Triton kernels of batch normalisation, run against float64."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET, GPUTarget, compile_for, normal, on_every_device, triton
from torch import Tensor

from gradnorm_kernels import reference

batch_norm: Any = importlib.import_module("gradnorm_kernels.kernels.batch_norm")
tl = triton.language
EPS = 1e-3

in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# Shape, channels_last, dtype.
CASES = [
    ((1, 1, 2), False, torch.float32),
    ((6, 5), False, torch.float64),
    ((70, 33), False, torch.float32),  # several tiles of rows, and columns to spare
    ((3, 130), False, torch.float32),  # more than one block of channels
    ((4, 3, 7), False, torch.float16),
    ((3, 5, 7, 11), False, torch.float32),
    ((2, 2, 40, 40), False, torch.bfloat16),  # several tiles along a row, in whole 8-element accesses
    ((9, 2, 5, 60), False, torch.float64),  # several tiles of rows
    ((3, 19, 7, 11), True, torch.float32),
    ((2, 130, 3, 5), True, torch.bfloat16),
]
in_every_case = pytest.mark.parametrize(
    ("shape", "channels_last", "dtype"),
    CASES,
    ids=[
        "x".join(map(str, shape)) + "-channels_last" * last + f"-{str(dtype)[6:]}"
        for shape, last, dtype in CASES
    ],
)


def implementation(device: str) -> Any:
    return torch.ops.gradnorm_kernels if device == "cuda" else batch_norm


def draw(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """v, g, x; then u, t, weight, mean, var."""
    tensors = [normal(*shape, dtype=dtype, device=device) for _ in range(3)]
    if channels_last:
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    per_channel = [normal(shape[1], dtype=dtype, device=device) for _ in range(5)]
    per_channel[4] = per_channel[4].abs() + 0.5
    return tensors, per_channel


def assert_close(actual: Any, exact: Any, dtype: torch.dtype) -> None:
    # Sums of hundreds of terms, which the interpreter's truncating stores of bfloat16 make no worse.
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 2e-2,
    }[dtype]
    for index, (a, e) in enumerate(zip(actual, exact, strict=True)):
        if e is None:
            assert a is None, index
            continue
        assert a.dtype == dtype and a.shape == e.shape, index
        error = (a.double() - e).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"{index}: {error}"


@on_every_device
@in_both_modes
@in_every_case
def test_double_backward(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, training: bool, device: str
) -> None:
    (v, g, x), (u, t, w, mean, var) = draw(shape, channels_last, dtype, device)
    double = [a.double() for a in (v, u, t, g, x, mean, var, w)]
    statistics = [mean, var, None, None]
    if training:
        dims = [0, *range(2, x.ndim)]
        batch_var = x.double().var(dims, correction=0)
        mean, invstd = x.double().mean(dims), (batch_var + EPS).rsqrt()
        # PyTorch keeps them in float32 at least on CUDA.
        opmath = torch.float64 if dtype == torch.float64 else torch.float32
        statistics = [None, None, mean.to(opmath), invstd.to(opmath)]
    exact = reference.batch_norm_double_backward(*double, training, EPS)
    before = [a.clone() for a in (v, u, t, g, x, w)]
    op = implementation(device).batch_norm_double_backward
    actual = op(v, u, t, g, x, w, *statistics, training, EPS)
    assert_close(actual, exact, dtype)
    for result in actual[:2]:
        assert result.stride() == x.stride()
    assert all(map(torch.equal, (v, u, t, g, x, w), before)), "an input was written to"
    again = op(v, u, t, g, x, w, *statistics, training, EPS)
    assert all(map(torch.equal, actual, again)), "another run gave other bits"

    # What a step needs: only grad_grad_input is there. In evaluation mode input is not read.
    zero = torch.zeros_like(u).double()
    exact = reference.batch_norm_double_backward(double[0], zero, zero, *double[3:], training, EPS)
    actual = op(v, None, None, g, x if training else None, w, *statistics, training, EPS)
    assert_close(actual, exact if training else (exact[0], None, exact[2]), dtype)
    # Operands of another layout; no weight; only the parameters' gradients.
    other = v.transpose(0, -1).contiguous().transpose(0, -1)
    actual = op(other, None, None, g, x if training else None, w, *statistics, training, EPS)
    assert_close(actual, exact if training else (exact[0], None, exact[2]), dtype)
    exact = reference.batch_norm_double_backward(*double[:-1], torch.ones_like(zero), training, EPS)
    assert_close(op(v, u, t, g, x, None, *statistics, training, EPS)[:2], exact[:2], dtype)
    exact = reference.batch_norm_double_backward(0 * double[0], *double[1:], training, EPS)
    actual = op(None, u, t, g, x, w, *statistics, training, EPS)
    assert_close(actual, (*exact[:2], None), dtype)
    if not training:
        actual = op(None, None, t, g, None, w, *statistics, training, EPS)
        assert_close(actual, (double[2].view(-1, *[1] * (g.ndim - 2)).expand_as(g), None, None), dtype)


@on_every_device
@in_every_case
def test_backward_of_the_evaluation_mode(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str
) -> None:
    (_, g, x), (_, _, w, mean, var) = draw(shape, channels_last, dtype, device)
    double = [a.double() for a in (g, x, mean, var, w)]
    exact = reference.batch_norm_backward(*double, False, EPS)
    op = implementation(device).batch_norm_backward
    for mask in ([True, False, False], [True, True, True], [True, False, True], [False, True, False]):
        actual = op(g, x if mask[1] else None, w, mean, var, None, None, False, EPS, mask)
        assert_close(actual, [e if wanted else None for e, wanted in zip(exact, mask, strict=True)], dtype)


@on_every_device
@in_both_modes
def test_empty(training: bool, device: str) -> None:
    x, c = torch.empty(2, 3, 0, device=device), torch.ones(3, device=device)
    statistics = (c, c, c, c, training, EPS)
    results = implementation(device).batch_norm_double_backward(x, c, c, x, x, c, *statistics)
    assert [r.shape for r in results] == [x.shape, x.shape, c.shape]
    assert results[2].count_nonzero() == 0


@triton.jit
def tile_ends_kernel(
    ends_ptr,
    tile,
    outer,
    channels,
    units,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    offsets, mask = batch_norm._tile(tile, outer, channels, units, unit, interleaved, rows, columns)
    tl.store(ends_ptr, tl.min(offsets))
    tl.store(ends_ptr + 1, tl.max(tl.where(mask, offsets, -1)))


@pytest.mark.skipif(not INTERPRET, reason="the addresses do not depend on the device")
@pytest.mark.parametrize(
    ("shape", "interleaved"),
    [
        ((2**24, 2**7), True),
        ((2**32, 1), True),
        ((2**31 - 2, 2), True),
        ((2**16, 2**8, 2**12), False),
        ((2, 1, 2**31), False),
        ((1, 1, 2**33), False),
    ],
    ids=str,
)
def test_last_tile_beyond_2_31_elements_in_the_interpreter(shape: tuple[int, ...], interleaved: bool) -> None:
    """Of the first channel, or block of interleaved ones."""
    tensor = torch.empty(shape, device="meta")
    layout = batch_norm._Layout.of(tensor, interleaved)
    outer, channels, units, tiles = layout.sizes
    constants = layout.constants
    inner = units * constants["unit"]
    ends = torch.zeros(2, dtype=torch.int64)
    tile_ends_kernel[(1,)](ends, tiles - 1, outer, channels, units, **constants)
    row = (outer - 1) // constants["rows"] * constants["rows"]
    if interleaved:
        expected = [row * channels, tensor.numel() - 1]
    else:
        column = (inner - 1) // constants["columns"] * constants["columns"]
        expected = [row * channels * inner + column, (outer - 1) * channels * inner + inner - 1]
    assert ends.tolist() == expected and expected[1] > 2**30


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
def test_launch_compiles_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own calls, up to the point where a GPU would be needed."""
    launched = []

    def warm_up(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(run(kernel, *args, **kwargs | {"warmup": True}))

    run = triton.runtime.JITFunction.run
    absent_gpu = SimpleNamespace(
        # Not the number of a GPU that may be there: Triton caches what it compiles under it.
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.JITFunction, "run", warm_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", absent_gpu)
    x = torch.zeros(64, 256, 56, 56).contiguous(memory_format=torch.channels_last)
    c = torch.ones(256)
    for training in (True, False):
        statistics = (c, c, c, c, training, 1e-5)
        batch_norm.batch_norm_double_backward(x, None, None, x, x if training else None, c, *statistics)
    listed = {
        s.kernel.__name__: compile_for(s, 90).asm["ptx"]
        for s in batch_norm.specializations()
        if "channels_last" in s.name
    }
    assert len(listed) == 3
    assert {kernel.metadata.name: kernel.asm["ptx"] for kernel in launched} == listed
