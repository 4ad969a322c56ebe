"""The Triton kernels of layer norm and RMS norm, run against float64."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from harness import INTERPRET, in_every_dtype, meta, normal, on_every_device, opmath, triton
from torch import Tensor

layer_norm: Any = importlib.import_module("gradnorm_kernels.kernels.layer_norm")
tl = triton.language
EPS = 1e-5
ALL = [True] * 3


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Of Swin-B and ViT-B over the last dimension, with and without gradients of the parameters' gradients;
    of ConvNeXt-B over channels, and of an image that needs 64-bit offsets; of RMS norm in ViT-B and LLMs."""
    double_backward = layer_norm.layer_norm_double_backward
    for name, shape, dim in (
        ("vit", (64, 197, 768), -1),
        ("swin", (64, 56, 56, 128), -1),
        ("swin28", (64, 28, 28, 256), -1),
        ("swin14", (64, 14, 14, 512), -1),
        ("widest", (64, 49, 8192), -1),
        ("long", (64, 49, 16384), -1),
        ("convnext14", (64, 512, 14, 14), 1),
        ("convnext56", (64, 128, 56, 56), 1),
        ("huge", (1, 64, 8192, 8192), 1),
    ):
        if name == "huge" and dtype != torch.bfloat16:
            continue
        x, w = meta(*shape, dtype=dtype), meta(shape[dim], dtype=dtype)
        s = x.select(dim, 0).unsqueeze(dim).to(opmath(dtype))
        yield name, double_backward, x, None, None, x, x, s, s, w, ALL
        if name in ("vit", "long"):
            yield f"{name}-u", double_backward, x, w, w, x, x, s, s, w, ALL
        if dim == 1:
            yield name, layer_norm.layer_norm_2d, x, w, w
            yield name, layer_norm.layer_norm_2d_backward, x, x, s, s, w, ALL
    for columns in (768, 16384):
        x, w = meta(64, 512, columns, dtype=dtype), meta(columns, dtype=dtype)
        s = x[..., :1].to(opmath(dtype))
        yield f"rms{columns}", layer_norm.rms_norm, x, [columns], w, EPS
        yield f"rms{columns}", layer_norm.rms_norm_backward, x, x, s, w, ALL[:2]
        yield f"rms{columns}", layer_norm.rms_norm_double_backward, x, None, x, x, s, w, ALL
        yield f"rms{columns}-u", layer_norm.rms_norm_double_backward, x, w, x, x, s, w, ALL


test_compiles_without_spills = harness.compilation_test(calls)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("name", "dtype"), [("vit", torch.float32), ("vit", torch.bfloat16), ("swin", torch.float32)], ids=str
)
def test_rows_are_read_once_in_128_bits(name: str, dtype: torch.dtype) -> None:
    """All but the sums, in a tile of rows, and the statistics, which Triton before 3.9 loads anew for some of
    a row's elements."""
    launch, _ = harness.recorded(*next(call[1:] for call in calls(dtype) if call[0] == name))
    loads = re.findall(r"ld\.global\S*", launch.compiled(90).asm["ptx"])
    wide = [load for load in loads if load.endswith("v4.b32")]
    assert len(wide) in (4, 8) and len(loads) - len(wide) <= 16


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
def test_sums_in_memory_wait_for_those_who_wrote_them() -> None:
    """Of rows that are not whole, a tile's part of the sums is added to what other threads wrote."""
    x, w = meta(64, 512, 1, 2, dtype=torch.float32), meta(512, dtype=torch.float32)
    s = meta(64, 1, 1, 2, dtype=torch.float32)
    double_backward = layer_norm.layer_norm_double_backward
    launch, _ = harness.recorded(double_backward, x, None, None, x, x, s, s, w, ALL)
    assert "barrier" in launch.compiled(90).asm["ttir"]


def statistics(input: Tensor, dim: int, centred: bool = True) -> list[Tensor]:
    wide = input.to(opmath(input.dtype))
    variance, mean = torch.var_mean(wide, dim, correction=0, keepdim=True)
    return [mean, (variance + EPS).rsqrt()] if centred else [(wide.square().mean(dim, True) + EPS).rsqrt()]


def run(op: str, *args: Any) -> Any:
    return getattr(harness.implementation(layer_norm, *args), op)(*args)


def run_all(dim: int | str, x: Tensor, w: Any, b: Any, g: Tensor, v: Tensor, u: Any, t: Any) -> list[Any]:
    """What there are kernels of, over the columns at dim."""
    if dim == "rms":
        output, rstd = run("rms_norm", x, x.shape[-1:] if w is None else w.shape, w, EPS)
        first = run("rms_norm_backward", g, x, rstd, w, ALL[:2])
        return [output, rstd, *first, *run("rms_norm_double_backward", v, u, g, x, rstd, w, ALL)]
    results: list[Any] = []
    if dim == 1:
        results += run("layer_norm_2d", x, w, b, EPS)
        results += run("layer_norm_2d_backward", g, x, *results[1:], w, ALL)
    # Statistics of what is given, so that only the kernels' own errors are seen.
    return [*results, *run("layer_norm_double_backward", v, u, t, g, x, *statistics(x, dim), w, ALL)]


def exact(dim: int | str, *tensors: Any) -> list[Any]:
    """The same, by autograd in float64."""
    x, w, b, g, v, u, t = harness.in_double(tensors)
    assert x is not None and g is not None

    def function(x: Tensor, w: Any, b: Any = None) -> Tensor:
        if dim == "rms":
            return reference.rms_norm(x, x.shape[-1:] if w is None else w.shape, w, EPS)
        return reference.layer_norm(x.movedim(dim, -1), x.shape[dim:][:1], w, b, EPS).movedim(-1, dim)

    if dim == "rms":
        output, first, second = reference.all_orders(function, (x, w), g, (v, u))
        rstd = statistics(x, tuple(range(-1 if w is None else -w.ndim, 0)), centred=False)
        return [*output, *rstd, *first, *[None] * (w is None), *second, *[None] * (w is None)]
    output, first, second = reference.all_orders(function, (x, w, b), g, (v, u, t))
    return ([*output, *statistics(x, 1), *first] if dim == 1 else []) + second[:3]


def draw(shape: tuple[int, ...], dim: Any, dtype: torch.dtype, device: str, parameters: str) -> list[Any]:
    """The arguments of run_all. parameters names those that there are."""
    x, g, v = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    columns = shape[-1 if dim == "rms" else dim]
    w, b, u, t = (
        normal(columns, dtype=dtype, device=device) if name in parameters else None for name in "wbut"
    )
    return [x, w, b, g, v, u, t]


def allowed(dtype: torch.dtype, device: str, columns: int) -> Callable[[Tensor], float]:
    # Storing bfloat16, the interpreter truncates.
    unit = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 and device == "cpu" else 1)
    rounding = 20 * torch.finfo(opmath(dtype)).eps * (300 if columns < 8 else 1)
    # A row's error is of its own scale, which is large where rstd is.
    return lambda exact: (1 + exact.abs().max().item()) * (unit + rounding)


SHAPES: list[tuple[tuple[int, ...], int | str]] = [
    ((3, 7), -1),
    ((5, 1), -1),
    ((1, 33), -1),
    ((37, 128), -1),  # several rows in a tile, several tiles of a program, a tile that is not full
    ((9, 300), -1),  # of four pieces, the third not full, the last empty
    ((2, 1000), -1),
    ((2, 5000), -1),  # one block of 8192, or two with grad_grad_weight and in float64
    ((3, 8195), -1),
    ((1, 3, 1, 2), 1),
    ((2, 5, 7, 7), 1),
    ((3, 64, 3, 12), 1),  # 36 positions: a tile of 32 and a rest
    ((2, 130, 4, 4), 1),  # more channels than a block of the double backward
    ((3, 7), "rms"),
    ((5, 1), "rms"),
    ((2, 19, 128), "rms"),
    ((2, 3, 300), "rms"),
    ((3, 8195), "rms"),  # three rows a program, which adds to its sums in memory
]


@on_every_device
@in_every_dtype
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("parameters", ["wb", "wbut"], ids=["lean", "u, t"])
def test_values(shape: Any, dim: Any, parameters: str, dtype: torch.dtype, device: str) -> None:
    operands = draw(shape, dim, dtype, device, parameters)
    results = harness.untouched(run_all, dim, *operands)
    assert all(result is None or result.is_contiguous() for result in results)
    columns = shape[-1 if dim == "rms" else dim]
    harness.assert_accurate(results, exact(dim, *operands), allowed(dtype, device, columns))


@on_every_device
@pytest.mark.parametrize("given", [(0,), (1,), (2,)], ids=["v", "u", "none but v, in every layout"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 9, 1, 5)], ids=str)
def test_rms_norm_of_several_dimensions(shape: tuple[int, ...], given: Any, device: str) -> None:
    """The last two, with one of the incoming gradients, or without a weight, and of any strides."""
    x, g, v = (normal(*shape, dtype=torch.float64, device=device) for _ in range(3))
    w, u = (normal(*shape[-2:], dtype=torch.float64, device=device) for _ in range(2))
    if given == (2,):
        results = run_all(
            "rms", *map(harness.strided, (x, w)), None, harness.strided(g), harness.strided(v), None, None
        )
        harness.assert_accurate(results, exact("rms", x, w, None, g, v, None, None), lambda e: 1e-12)
        bare = run_all("rms", x, None, None, g, v, None, None)
        harness.assert_accurate(bare, exact("rms", x, None, None, g, v, None, None), lambda e: 1e-12)
    else:
        incoming = (v, None) if given == (0,) else (None, u)
        results = run_all("rms", x, w, None, g, incoming[0], incoming[1], None)
        expected = exact("rms", x, w, None, g, incoming[0], incoming[1], None)
        harness.assert_accurate(results, expected, lambda e: 1e-12)


@on_every_device
@pytest.mark.parametrize(("shape", "dim"), [((37, 128), -1), ((2, 5, 7, 7), 1), ((37, 128), "rms")], ids=str)
def test_only_what_the_mask_asks_for(shape: tuple[int, ...], dim: Any, device: str) -> None:
    x, w, _, g, v, u, _ = draw(shape, dim, torch.float32, device, "wu")
    if dim == "rms":
        (rstd,) = statistics(x, -1, centred=False)
        operands = [("rms_norm_double_backward", (v, u, g, x, rstd, w), 3)]
        operands.append(("rms_norm_backward", (g, x, rstd, w), 2))
    else:
        operands = [("layer_norm_double_backward", (v, u, None, g, x, *statistics(x, dim), w), 3)]
        if dim == 1:
            operands.append(("layer_norm_2d_backward", (g, x, *statistics(x, dim), w), 3))
    for op, args, size in operands:
        harness.assert_masks(lambda mask, op=op, args=args: run(op, *args, mask), run(op, *args, ALL[:size]))


@on_every_device
def test_absent_parameters_strides_and_mixed_dtypes(device: str) -> None:
    x, g, v = (normal(2, 6, 4, 4, dtype=torch.float16, device=device) for _ in range(3))
    ones, zeros = torch.ones(6, device=device), torch.zeros(6, device=device)
    with_parameters = run_all(1, x, ones, zeros, g, v, zeros, None)
    x_, g_, v_ = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, g, v))
    with_strides = run_all(1, x_, ones, zeros, g_, v_, None, zeros)
    assert all(map(torch.equal, with_parameters, with_strides))
    bare = run_all(1, x, None, None, g, v, None, None)
    assert bare.pop() is None
    for a, b in zip(bare, with_parameters, strict=False):
        torch.testing.assert_close(a, b, check_dtype=False, atol=2e-3, rtol=2e-3)
    assert with_parameters[4].dtype == torch.float32  # as the weight is


@on_every_device
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 4)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    w = torch.ones(shape[1], device=device)
    output, mean, rstd = run("layer_norm_2d", x, w, w, EPS)
    assert output.shape == shape and mean.shape == rstd.shape == (shape[0], 1, *shape[2:])
    _, *sums = run("layer_norm_2d_backward", x, x, mean, rstd, w, ALL)
    _, _, second = run("layer_norm_double_backward", x, None, None, x, x, mean, rstd, w, ALL)
    for result in (*sums, second):
        assert torch.equal(result, torch.zeros_like(w))
    w = torch.ones(shape[3], device=device)
    output, rstd, *first, ddo, grad_input, grad_weight = run_all("rms", x, w, None, x, x, w, None)
    assert output.shape == first[0].shape == ddo.shape == grad_input.shape == shape
    assert rstd.shape == (*shape[:3], 1)
    assert torch.equal(first[1], torch.zeros_like(w)) and torch.equal(grad_weight, torch.zeros_like(w))


@on_every_device
def test_bad_input(device: str) -> None:
    x = torch.ones(2, 3, 4, 4, device=device)
    s, c, two = x[:, :1], x[0, :, 0, 0], [True, True, False]
    wide, many, far = x.double(), x[:, :1].expand(2, 8193, 4, 4), x.to("meta")
    ops = layer_norm
    harness.assert_rejected(
        (TypeError, "input", ops.layer_norm_2d, x.int()),
        (ValueError, r"\(N, C, H, W\)", ops.layer_norm_2d, x[0]),
        (ValueError, "weight", ops.layer_norm_2d, x, x[0, 0, 0]),
        (ValueError, "at most 8192 channels", ops.layer_norm_2d, many),
        (ValueError, "grad_output", ops.layer_norm_2d_backward, x[:1], x, s, s, None, ALL),
        (RuntimeError, "grad_output .* got meta", ops.layer_norm_2d_backward, far, x, s, s, None, ALL),
        (
            TypeError,
            "grad_grad_input",
            ops.layer_norm_double_backward,
            wide,
            None,
            None,
            x,
            x,
            s,
            s,
            None,
            two,
        ),
        (ValueError, "normalized_shape", ops.rms_norm, x, [3], None, EPS),
        (ValueError, "weight", ops.rms_norm, x, [4], c, EPS),
        (TypeError, "grad_output", ops.rms_norm_backward, wide, x, x[..., :1], None, ALL[:2]),
        (ValueError, "grad_grad_weight", ops.rms_norm_double_backward, x, c, x, x, x[..., :1], None, two),
    )


H100 = harness.common.Gpu("cuda", 90, 227 * 1024, 132)


@triton.jit
def column_starts_kernel(
    starts_ptr, rows, columns, row_stride, column_stride, unit: tl.constexpr, across: tl.constexpr,
    wide: tl.constexpr, shape: tl.constexpr, in_warps: tl.constexpr,
):  # fmt: skip
    sizes = layer_norm._sizes(rows, columns, row_stride, column_stride, unit, across)
    rows, columns, row_stride, column_stride = sizes
    tile = layer_norm._rows_of_tile(0, rows, columns, row_stride, shape[1])
    place, column = layer_norm._place(tile, 0, columns, column_stride, wide, shape, in_warps)
    start, offsets, mask = place
    first = tl.arange(0, shape[1])[None, :, None] == 0
    tl.store(starts_ptr + column[0] + tl.zeros_like(offsets), start + offsets, mask=first & mask)


@harness.in_the_interpreter
@pytest.mark.parametrize("side", [5, 8192])
def test_image_beyond_2_31_elements_in_the_interpreter(side: int) -> None:
    image = torch.empty(1, 64, side, side, device="meta")
    rows = layer_norm._rows(image.shape, image[:, :1].shape)
    for kernel in (layer_norm.layer_norm_fwd_kernel, layer_norm.layer_norm_bwd_bwd_kernel):
        launcher, _, units = layer_norm._plan(kernel, rows, torch.bfloat16, H100)
        names = ("unit", "across", "wide", "shape", "in_warps")
        constants = {name: launcher.constants[name] for name in names}
        # No 64-bit offsets where they are not needed.
        assert constants["wide"] == (side == 8192)
        starts = torch.zeros(64, dtype=torch.int64)
        column_starts_kernel[(1,)](starts, *units[1:], **constants)
        assert starts.tolist() == [channel * side * side for channel in range(64)]


def test_programs_leave_their_sums_small_beside_the_tensors() -> None:
    for shape in ((64 * 197, 768), (64 * 56 * 56, 128), (64 * 14 * 14, 512), (64 * 49, 1024)):
        meta = torch.empty(shape, device="meta")
        rows = layer_norm._rows(meta.shape, meta[:, :1].shape)
        _, programs, _ = layer_norm._plan(layer_norm.layer_norm_bwd_bwd_kernel, rows, torch.float32, H100)
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
    harness.skip_without_memory(5 * torch.Size(shape).numel() * torch.bfloat16.itemsize)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    for row in (0, -1):
        x[row].normal_()
    mean = torch.zeros_like(x.select(dim, 0).unsqueeze(dim), dtype=torch.float32)
    op, mask = "layer_norm_double_backward", [True, True, False]
    harness.assert_same_in_parts(
        lambda x, mean: run(op, x, None, None, x, x, mean, mean + 1, None, mask),
        (0, shape[0] - 1),
        1,
        x,
        mean,
    )
