"""The Triton kernel of group normalisation, run against float64."""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import INTERPRET, GPUTarget, compile_for, in_every_dtype, normal, on_every_device, triton
from torch import Tensor

from gradnorm_kernels import reference

tl = triton.language
group_norm: Any = importlib.import_module("gradnorm_kernels.kernels.group_norm")

NAMES = ("grad_grad_output", "grad_input", "grad_weight")
EPS = 1e-5


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize("name", ["rows14", "rows28", "one_group56"])
def test_launch_compiles_what_is_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own call, up to the point where a GPU would be needed."""
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
    batch, num_groups, channels, inner, _ = group_norm._SHAPES[name]
    # Not filled: nothing runs.
    x = torch.empty(batch, channels, inner)
    mean, weight = torch.empty(batch, num_groups), torch.empty(channels)
    group_norm.group_norm_double_backward(
        x, None, None, x, x, mean, mean, weight, num_groups, EPS, [True] * 3
    )
    listed = [
        compile_for(s, 90).asm["ptx"] for s in group_norm.specializations() if f"-{name}-fp32" in s.name
    ]
    assert [kernel.asm["ptx"] for kernel in launched] == listed


def draw(
    shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, device: str, parameters: str
) -> list[Any]:
    """The operands up to weight, of which parameters names those that there are: w, p and q."""
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    w, p, q = (normal(shape[1], dtype=dtype, device=device) if name in parameters else None for name in "wpq")
    _, mean, rstd = torch.native_group_norm(
        x.float() if dtype != torch.float64 else x,
        *(None, None, *shape[:2], math.prod(shape[2:]), num_groups, EPS),
    )
    return [v, p, q, g, x, mean, rstd, w]


def run_kernel(operands: list[Any], num_groups: int, output_mask: Any = (True,) * 3) -> tuple[Any, ...]:
    op = group_norm.group_norm_double_backward
    if operands[4].is_cuda:
        op = torch.ops.gradnorm_kernels.group_norm_double_backward
    return op(*operands, num_groups, EPS, list(output_mask))


def stock(operands: list[Any], num_groups: int) -> dict[str, Tensor]:
    v, p, q, g, x, _, _, w = operands
    g, x = g.detach().requires_grad_(), x.detach().requires_grad_()
    w = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if w is None else w.detach()
    b = torch.zeros_like(w)
    first = torch.autograd.grad(
        F.group_norm(x, num_groups, w.requires_grad_(), b.requires_grad_()), (x, w, b), g, create_graph=True
    )
    given = [(result, grad) for result, grad in zip(first, (v, p, q), strict=True) if grad is not None]
    results = torch.autograd.grad([r for r, _ in given], (g, x, w), [grad for _, grad in given])
    return dict(zip(NAMES, results, strict=True))


def assert_as_accurate_as_stock(operands: list[Any], num_groups: int) -> None:
    before = [None if t is None else t.clone() for t in operands]
    actual = run_kernel(operands, num_groups)
    for tensor, original in zip(operands, before, strict=True):
        assert tensor is None or torch.equal(tensor, original), "an input was written to"
    v, p, q, g, x, _, _, w = (None if t is None else t.double() for t in operands)
    exact = reference.group_norm_double_backward(v, p, q, g, x, num_groups, w, EPS)
    expected = stock(operands, num_groups)
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        s = expected[name]
        assert (a.dtype, a.shape, a.device) == (s.dtype, s.shape, s.device), name
        if a.numel():
            # One unit in the last place: the two maxima may be over few elements.
            tiny = 1e-12 + (a.dtype != torch.float64) * torch.finfo(a.dtype).eps * e.abs().max().item()
            error, stock_error = ((t.double() - e).abs().max().item() for t in (a, s))
            assert error <= 2 * stock_error + tiny, f"{name}: {error} against {stock_error}"


CASES = {
    # Whole groups: as a matrix of several channels, and of one.
    "rows": ((2, 6, 5, 7), 3),
    "instances": ((2, 3, 65), 3),
    "no inner dimension": ((4, 33), 3),
    "aligned": ((2, 8, 4, 8), 2),
    # Larger ones, several programs to each: tiles that end in the middle of rows, and of columns.
    "tiles": ((1, 6, 41, 35), 1),
    "long": ((1, 2, 9001), 2),
    "tall": ((1, 4100, 3), 1),
    "no elements": ((0, 4, 3), 2),
}


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("parameters", ["w", "wpq"])
@pytest.mark.parametrize("case", CASES)
def test_shapes(case: str, parameters: str, dtype: torch.dtype, device: str) -> None:
    shape, num_groups = CASES[case]
    assert_as_accurate_as_stock(draw(shape, num_groups, dtype, device, parameters), num_groups)


@on_every_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_program_a_larger_group(
    layout: torch.memory_format, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are many groups."""
    monkeypatch.setattr(group_norm, "_PROGRAMS", 0)
    group_norm._plan.cache_clear()
    shape, num_groups = CASES["tiles"]
    for parameters in ("w", "wpq"):
        operands = draw(shape, num_groups, torch.float32, device, parameters)
        for position in (0, 3, 4):
            operands[position] = operands[position].to(memory_format=layout)
        assert_as_accurate_as_stock(operands, num_groups)
    group_norm._plan.cache_clear()


@on_every_device
@pytest.mark.parametrize("case", ["rows", "tiles"])
def test_layouts(case: str, device: str) -> None:
    shape, num_groups = CASES[case]
    operands = draw(shape, num_groups, torch.float32, device, "wpq")
    contiguous = run_kernel(operands, num_groups)
    layouts = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    ]
    for which, change in [*itertools.product([[0, 3, 4]], layouts), ([4], layouts[0]), ([0, 3], layouts[0])]:
        changed = [change(t) if i in which else t for i, t in enumerate(operands)]
        results = run_kernel(changed, num_groups)
        for a, e in zip(results, contiguous, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        last = changed[4].is_contiguous(memory_format=torch.channels_last)
        wanted = torch.channels_last if last else torch.contiguous_format
        assert all(t.is_contiguous(memory_format=wanted) for t in results[:2])


@on_every_device
@pytest.mark.parametrize("case", ["aligned", "tiles"])
def test_every_choice_of_operands_and_results(case: str, device: str) -> None:
    shape, num_groups = CASES[case]
    operands = draw(shape, num_groups, torch.float64, device, "wpq")
    everything = run_kernel(operands, num_groups)
    for mask in ((True, True, False), (True, False, False), (False, True, False), (False, False, True)):
        for a, e, asked in zip(run_kernel(operands, num_groups, mask), everything, mask, strict=True):
            assert torch.equal(a, e) if asked else a is None
    for absent in ("p", "q", "w", "pqw"):
        some = [None if name in absent else t for name, t in zip("vpqgxmrw", operands, strict=True)]
        assert_as_accurate_as_stock(some, num_groups)
    without_v = run_kernel([None, *operands[1:]], num_groups)
    with_zeros = run_kernel([torch.zeros_like(operands[0]), *operands[1:]], num_groups)
    assert all(map(torch.equal, without_v, with_zeros))


@on_every_device
def test_runs_repeat_exactly(device: str) -> None:
    for case in ("rows", "tiles"):
        shape, num_groups = CASES[case]
        operands = draw(shape, num_groups, torch.float32, device, "wpq")
        first, second = (run_kernel(operands, num_groups) for _ in range(2))
        assert all(map(torch.equal, first, second))


@on_every_device
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_inf_stay_in_their_group(device: str) -> None:
    shape, num_groups = CASES["rows"]
    for bad, position in itertools.product((math.nan, math.inf), (0, 3, 4)):
        operands = draw(shape, num_groups, torch.float32, device, "w")
        operands[position][0, 0, 0, 0] = bad
        if position == 4:
            operands[5:7] = torch.native_group_norm(operands[4], None, None, 2, 6, 35, 3, EPS)[1:]
        v, _, _, g, x, _, _, w = (None if t is None else t.double() for t in operands)
        exact = reference.group_norm_double_backward(v, None, None, g, x, num_groups, w, EPS)
        for name, a, e in zip(NAMES, run_kernel(operands, num_groups), exact, strict=True):
            assert torch.equal(a.isfinite(), e.isfinite()), (bad, position, name)


@triton.jit
def tile_end_kernel(
    end_ptr,
    index,
    rows,
    column_units,
    row_stride,
    unit: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    matrix = group_norm._matrix(rows, column_units, unit, block_columns)
    offsets, mask = group_norm._where(index, matrix, row_stride, block_rows, block_columns)
    tl.store(end_ptr, tl.max(tl.max(tl.where(mask, offsets, -1), axis=1), axis=0))


@pytest.mark.skipif(not INTERPRET, reason="on a GPU, test_more_than_2_31_elements shows it")
@pytest.mark.parametrize(
    ("index", "rows", "column_units", "row_stride", "unit", "block_rows", "block_columns", "expected"),
    [
        (0, 1024, 1, 2**22, 1, 1024, 1, 1023 * 2**22),
        (2**25 - 1, 4, 2**30, 2**33, 8, 4, 256, 2**35 - 1),  # the end of long rows
        (2**21 - 1, 2**31 - 2, 1, 1, 1, 1024, 1, 2**31 - 3),  # the last of many rows, and a rest
    ],
)
def test_tile_beyond_2_31_elements_in_the_interpreter(
    index: int,
    rows: int,
    column_units: int,
    row_stride: int,
    unit: int,
    block_rows: int,
    block_columns: int,
    expected: int,
) -> None:
    end = torch.zeros(1, dtype=torch.int64)
    sizes = {"unit": unit, "block_rows": block_rows, "block_columns": block_columns}
    tile_end_kernel[(1,)](end, index, rows, column_units, row_stride, **sizes)
    assert end.item() == expected


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    batch, num_groups = 2**20 + 1, 2
    elements = batch * 2048
    needed = 6 * elements * torch.bfloat16.itemsize
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    x = torch.empty(batch, 8, 256, dtype=torch.bfloat16, device="cuda").normal_()
    mean, rstd = torch.zeros(batch, num_groups, device="cuda"), torch.ones(batch, num_groups, device="cuda")
    whole = run_kernel([x, None, None, x, x, mean, rstd, None], num_groups, (True, True, False))
    for start in (0, 2**19 - 1, batch - 2):
        part = slice(start, start + 2)
        some = [x[part], None, None, x[part], x[part], mean[part], rstd[part], None]
        for a, e in zip(whole, run_kernel(some, num_groups, (True, True, False)), strict=True):
            assert a is None or torch.equal(a[part], e), f"from {start}"


@on_every_device
def test_bad_input(device: str) -> None:
    """What the launcher says, without the Autograd key in front of it."""
    shape, num_groups = CASES["rows"]
    good = draw(shape, num_groups, torch.float32, device, "wpq")
    names = ("grad_grad_input", "grad_grad_weight", "grad_grad_bias", "grad_output", "input")
    for position, name in enumerate((*names, "mean", "rstd", "weight")):
        if name != "input":
            bad = [t[..., :1] if i == position else t for i, t in enumerate(good)]
            with pytest.raises(ValueError, match=f"expected {name}"):
                group_norm.group_norm_double_backward(*bad, num_groups, EPS, [True] * 3)
            bad = [t.to("meta") if i == position else t for i, t in enumerate(good)]
            with pytest.raises(RuntimeError, match=f"expected {name} .* got meta"):
                group_norm.group_norm_double_backward(*bad, num_groups, EPS, [True] * 3)
    with pytest.raises(TypeError, match="expected input"):
        bad = [t.long() for t in good]
        group_norm.group_norm_double_backward(*bad, num_groups, EPS, [True] * 3)
