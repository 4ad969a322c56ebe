"""The Triton kernels of layer normalisation, run against float64."""

from __future__ import annotations

import importlib
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET, GPUTarget, compile_for, in_every_dtype, normal, on_every_device, triton
from torch import Tensor

from gradnorm_kernels import reference

layer_norm: Any = importlib.import_module("gradnorm_kernels.kernels.layer_norm")
tl = triton.language
EPS = 1e-5


def statistics(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    wide = input if input.dtype == torch.float64 else input.float()
    variance, mean = torch.var_mean(wide, dim, correction=0, keepdim=True)
    return mean, (variance + EPS).rsqrt()


def run(op: str, *args: Any) -> tuple[Tensor | None, ...]:
    on_cuda = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
    return getattr(torch.ops.gradnorm_kernels if on_cuda else layer_norm, op)(*args)


def run_all(
    v: Tensor, g: Tensor, x: Tensor, w: Tensor, b: Tensor, u: Tensor | None, t: Tensor | None, dim: int
) -> list[Tensor | None]:
    """What there are kernels of, over the columns at dim."""
    results: list[Tensor | None] = []
    if dim == 1:
        results += run("layer_norm_2d", x, w, b, EPS)
        results += run("layer_norm_2d_backward", g, x, *results[1:], w, [True] * 3)
    mean, rstd = statistics(x, dim)
    return [*results, *run("layer_norm_double_backward", v, u, t, g, x, mean, rstd, w, [True] * 3)]


def exact(
    v: Tensor, g: Tensor, x: Tensor, w: Tensor, b: Tensor, u: Tensor | None, t: Tensor | None, dim: int
) -> list[Tensor]:
    v, g, x, w, b = (tensor.double() for tensor in (v, g, x, w, b))
    u, t = (tensor if tensor is None else tensor.double() for tensor in (u, t))
    last = [tensor.movedim(dim, -1) for tensor in (v, g, x)]
    shape = w.shape
    results = []
    if dim == 1:
        results = [reference.layer_norm(last[2], shape, w, b, EPS), *statistics(last[2], -1)]
        results += reference.layer_norm_backward(*last[1:], shape, w, EPS)
    results += reference.layer_norm_double_backward(last[0], u, t, *last[1:], shape, w, EPS)
    return [result.movedim(-1, dim) if result.ndim > 1 else result for result in results]


SHAPES = [
    ((3, 7), -1),
    ((5, 1), -1),
    ((1, 33), -1),
    ((37, 128), -1),  # several rows in a tile, several tiles of a program, a tile that is not full
    ((2, 1000), -1),
    ((2, 5000), -1),  # one block of 8192, or two with grad_grad_weight and in float64
    ((3, 8195), -1),
    ((1, 3, 1, 2), 1),
    ((2, 5, 7, 7), 1),
    ((3, 64, 3, 12), 1),  # 36 positions: a tile of 32 and a rest
    ((2, 130, 4, 4), 1),  # more channels than a block of the double backward
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("parameters", [False, True], ids=["lean", "u, t"])
def test_values(shape: tuple[int, ...], dim: int, parameters: bool, dtype: torch.dtype, device: str) -> None:
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    w, b, u, t = (normal(shape[dim], dtype=dtype, device=device) for _ in range(4))
    given = (u, t) if parameters else (None, None)
    before = [tensor.clone() for tensor in (v, g, x)]
    # Statistics of what is given, so that only the kernels' own errors are seen.
    results = run_all(v, g, x, w, b, *given, dim)
    unit = torch.finfo(dtype).eps
    # Storing bfloat16, the interpreter truncates.
    unit *= 2 if dtype == torch.bfloat16 and device == "cpu" else 1
    for result, wanted in zip(results, exact(v, g, x, w, b, *given, dim), strict=True):
        assert result is not None and result.shape == wanted.shape and result.is_contiguous()
        # A row's error is of its own scale, which is large where rstd is.
        scale = 1 + wanted.abs().max().item()
        rounding = 20 * torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
        rounding *= 300 if shape[dim] < 8 else 1
        assert (result.double() - wanted).abs().max().item() <= scale * (unit + rounding)
    assert all(map(torch.equal, (v, g, x), before)), "an input was written to"


@on_every_device
@pytest.mark.parametrize(("shape", "dim"), [((37, 128), -1), ((2, 5, 7, 7), 1)], ids=str)
def test_only_what_the_mask_asks_for(shape: tuple[int, ...], dim: int, device: str) -> None:
    v, g, x = (normal(*shape, dtype=torch.float32, device=device) for _ in range(3))
    w, u = (normal(shape[dim], dtype=torch.float32, device=device) for _ in range(2))
    mean, rstd = statistics(x, dim)
    operands: list[Any] = [("layer_norm_double_backward", (v, u, None, g, x, mean, rstd, w))]
    if dim == 1:
        operands.append(("layer_norm_2d_backward", (g, x, mean, rstd, w)))
    for op, args in operands:
        full = run(op, *args, [True] * 3)
        for mask in itertools.product([True, False], repeat=3):
            for result, wanted, asked in zip(run(op, *args, list(mask)), full, mask, strict=True):
                assert result is None if not asked else torch.equal(result, wanted)


@on_every_device
def test_absent_parameters_strides_and_mixed_dtypes(device: str) -> None:
    v, g, x = (normal(2, 6, 4, 4, dtype=torch.float16, device=device) for _ in range(3))
    ones, zeros = torch.ones(6, device=device), torch.zeros(6, device=device)
    with_parameters = run_all(v, g, x, ones, zeros, zeros, None, 1)
    strided = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (v, g, x))
    with_strides = run_all(*strided, ones, zeros, None, zeros, 1)
    for a, b in zip(with_parameters, with_strides, strict=True):
        assert torch.equal(a, b)
    mean, rstd = statistics(x, 1)
    bare = [
        *run("layer_norm_2d", x, None, None, EPS),
        *run("layer_norm_2d_backward", g, x, mean, rstd, None, [True] * 3),
        *run("layer_norm_double_backward", v, None, None, g, x, mean, rstd, None, [True, True, False]),
    ]
    for a, b in zip(bare[:-1], with_parameters, strict=False):
        torch.testing.assert_close(a, b, check_dtype=False, atol=2e-3, rtol=2e-3)
    assert with_parameters[4].dtype == torch.float32  # as the weight is


@on_every_device
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 4)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    w = torch.ones(shape[1], device=device)
    output, mean, rstd = run("layer_norm_2d", x, w, w, EPS)
    assert output.shape == shape and mean.shape == rstd.shape == (shape[0], 1, *shape[2:])
    _, *sums = run("layer_norm_2d_backward", x, x, mean, rstd, w, [True] * 3)
    _, _, second = run("layer_norm_double_backward", x, None, None, x, x, mean, rstd, w, [True] * 3)
    for result in (*sums, second):
        assert torch.equal(result, torch.zeros_like(w))


@on_every_device
def test_bad_input(device: str) -> None:
    """What the launcher says, without the Autograd key in front of it."""
    x = torch.ones(2, 3, 4, 4, device=device)
    mean, rstd = statistics(x, 1)
    ops = layer_norm
    with pytest.raises(TypeError, match="input"):
        ops.layer_norm_2d(x.int())
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        ops.layer_norm_2d(x[0])
    with pytest.raises(ValueError, match="weight"):
        ops.layer_norm_2d(x, x[0, 0, 0])
    with pytest.raises(ValueError, match="at most 8192 channels"):
        ops.layer_norm_2d(x.expand(2, 3, 4, 4)[:, :1].expand(2, 8193, 4, 4))
    with pytest.raises(ValueError, match="grad_output"):
        ops.layer_norm_2d_backward(x[:1], x, mean, rstd, None, [True] * 3)
    with pytest.raises(TypeError, match="grad_grad_input"):
        ops.layer_norm_double_backward(x.double(), None, None, x, x, mean, rstd, None, [True, True, False])
    with pytest.raises(RuntimeError, match=r"grad_output .* got meta"):
        ops.layer_norm_2d_backward(x.to("meta"), x, mean, rstd, None, [True] * 3)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
def test_launch_compiles_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers' own calls, up to the point where a GPU would be needed."""
    launched = []

    def warm_up(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(run_kernel(kernel, *args, **kwargs | {"warmup": True}))

    run_kernel = triton.runtime.JITFunction.run
    absent_gpu = SimpleNamespace(
        # Not the number of a GPU that may be there: Triton caches what it compiles under it.
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.JITFunction, "run", warm_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", absent_gpu)
    vit = torch.zeros(2, 197, 768)
    mask = [True] * 3
    layer_norm.layer_norm_double_backward(vit, None, None, vit, vit, *statistics(vit, -1), vit[0, 0], mask)
    x = torch.zeros(2, 256, 28, 28)
    layer_norm.layer_norm_2d(x, x[0, :, 0, 0], x[0, :, 0, 0])
    x = torch.zeros(2, 512, 14, 14)
    layer_norm.layer_norm_2d_backward(x, x, *statistics(x, 1), x[0, :, 0, 0], mask)
    layer_norm.layer_norm_double_backward(x, None, None, x, x, *statistics(x, 1), x[0, :, 0, 0], mask)
    ptx = [kernel.asm["ptx"] for kernel in launched if kernel.metadata.name != "sum_kernel"]

    listed = {s.name: compile_for(s, 90).asm["ptx"] for s in layer_norm.specializations()}
    assert ptx == [
        listed[name]
        for name in (
            "layer_norm_bwd_bwd-vit-fp32",
            "layer_norm_fwd-convnext-fp32",
            "layer_norm_bwd-convnext-fp32",
            "layer_norm_bwd_bwd-convnext-fp32",
        )
    ]
    assert len(launched) == 7  # every sum over the rows is one more
    for name in (
        "layer_norm_bwd_bwd-vit-fp32",
        "layer_norm_bwd_bwd-swin-fp32",
        "layer_norm_bwd_bwd-vit-bf16",
    ):
        # Each tensor once, in 128-bit accesses: all but the sums, in a tile of rows, and the statistics,
        # which Triton before 3.9 loads anew for some of a row's elements.
        loads = re.findall(r"ld\.global\S*", listed[name])
        wide = [load for load in loads if load.endswith("v4.b32")]
        assert len(wide) in (4, 8)
        assert len(loads) - len(wide) <= 16


@triton.jit
def column_starts_kernel(
    starts_ptr,
    rows,
    columns,
    row_stride,
    column_stride,
    wide: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    column = tl.arange(0, block_columns)[None, :]
    _, _, start, offsets = layer_norm._rows_of_tile(0, rows, columns, row_stride, block_rows)
    offsets += layer_norm._columns_offsets(column, column_stride, wide)
    first = tl.arange(0, block_rows)[:, None] == 0
    tl.store(starts_ptr + column + tl.zeros_like(offsets), start + offsets, mask=first & (column < columns))


@pytest.mark.skipif(not INTERPRET, reason="the addresses do not depend on the device")
@pytest.mark.parametrize("side", [5, 8192])
def test_image_beyond_2_31_elements_in_the_interpreter(side: int) -> None:
    image = torch.empty(1, 64, side, side, device="meta")
    rows = layer_norm._rows(image, image[:, :1])
    for kernel in (layer_norm.layer_norm_fwd_kernel, layer_norm.layer_norm_bwd_bwd_kernel):
        constants, _ = layer_norm._constants(kernel, rows, torch.bfloat16)
        constants = {name: constants[name] for name in ("wide", "block_rows", "block_columns")}
        # No 64-bit offsets where they are not needed.
        assert constants["wide"] == (side == 8192)
        starts = torch.zeros(64, dtype=torch.int64)
        column_starts_kernel[(1,)](starts, *rows[1:], **constants)
        assert starts.tolist() == [channel * side * side for channel in range(64)]


def test_programs_leave_their_sums_small_beside_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "_multiprocessors", lambda device: 132)
    for shape in ((64 * 197, 768), (64 * 56 * 56, 128), (64 * 49, 1024)):
        meta = torch.empty(shape, device="meta")
        rows = layer_norm._rows(meta, meta[:, :1])
        constants, options = layer_norm._constants(layer_norm.layer_norm_bwd_bwd_kernel, rows, torch.float32)
        programs = layer_norm._programs(rows, constants["block_rows"], options["num_warps"], meta.device)
        assert programs >= 132 and programs * shape[1] <= 0.08 * meta.numel()


@pytest.mark.gpu
def test_same_bits_in_every_run() -> None:
    v, g, x = (normal(4000, 96, dtype=torch.float32, device="cuda") for _ in range(3))
    w = normal(96, dtype=torch.float32, device="cuda")
    args = (v, None, None, g, x, *statistics(x, -1), w, [True] * 3)
    first = run("layer_norm_double_backward", *args)
    for _ in range(5):
        assert all(map(torch.equal, run("layer_norm_double_backward", *args), first))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dim"), [((2**25 + 1, 64), -1), ((2**16 + 1, 64, 16, 32), 1)], ids=str)
def test_more_than_2_31_elements(shape: tuple[int, ...], dim: int) -> None:
    needed = 5 * torch.Size(shape).numel() * torch.bfloat16.itemsize
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, {free >> 30} GiB are free")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    for row in (0, -1):
        x[row].normal_()
    mean = torch.zeros_like(x.select(dim, 0).unsqueeze(dim), dtype=torch.float32)
    args = (None, None, x, x, mean, mean + 1, None, [True, True, False])
    results = run("layer_norm_double_backward", x, *args)
    for part in (slice(0, 1), slice(-1, None)):
        some, some_mean = x[part].clone(), mean[part].clone()
        wanted = run(
            "layer_norm_double_backward",
            some,
            None,
            None,
            some,
            some,
            some_mean,
            some_mean + 1,
            None,
            args[-1],
        )
        for result, expected in zip(results[:2], wanted[:2], strict=True):
            # An address that wrapped around would leave one of these rows wrong.
            assert torch.equal(result[part], expected)
