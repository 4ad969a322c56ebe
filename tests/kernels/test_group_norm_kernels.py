"""The Triton kernel of group normalisation, run against float64."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from harness import in_every_dtype, meta, normal, on_every_device, opmath, triton
from torch import Tensor

tl = triton.language
group_norm: Any = importlib.import_module("gradnorm_kernels.kernels.group_norm")

EPS = 1e-5
ALL = (True, True, True)


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """ResNet-50's with 32 groups, where a group fits in a program and where it does not, and one whose
    channels are all one group, as PoolFormer's; with and without gradients of the parameters' gradients."""
    for name, num_groups, channels, side, layout in (
        ("rows14", 32, 1024, 14, torch.contiguous_format),
        ("rows28", 32, 512, 28, torch.contiguous_format),
        ("rows56", 32, 256, 56, torch.contiguous_format),
        ("columns28", 32, 512, 28, torch.channels_last),
        ("one_group56", 1, 96, 56, torch.contiguous_format),
    ):
        x = meta(64, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
        s, w = meta(64, num_groups, dtype=opmath(dtype)), meta(channels, dtype=dtype)
        for case, u in ((name, None), (f"{name}-u", w)):
            if u is not None and name == "rows28":  # compiled as rows56 is
                continue
            operands = (x, u, u, x, x, s, s, w, num_groups, EPS, ALL)
            yield case, group_norm.group_norm_double_backward, *operands


test_compiles_without_spills = harness.compilation_test(calls)


def draw(
    shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, device: str, parameters: str
) -> list[Any]:
    """The operands up to weight, of which parameters names those that there are: w, p and q."""
    v, g, x = (normal(*shape, dtype=dtype, device=device) for _ in range(3))
    w, p, q = (normal(shape[1], dtype=dtype, device=device) if name in parameters else None for name in "wpq")
    _, mean, rstd = torch.native_group_norm(
        x.to(opmath(dtype)),
        *(None, None, *shape[:2], math.prod(shape[2:]), num_groups, EPS),
    )
    return [v, p, q, g, x, mean, rstd, w]


def run_kernel(operands: list[Any], num_groups: int, output_mask: Any = ALL) -> tuple[Any, ...]:
    op = harness.implementation(group_norm, operands[4]).group_norm_double_backward
    return op(*operands, num_groups, EPS, list(output_mask))


def derived(operands: list[Any], num_groups: int, function: Any = F.group_norm) -> list[Tensor]:
    """The gradients of g, x and w, by autograd."""
    v, p, q, g, x, _, _, w = operands
    w = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if w is None else w

    def of(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return function(x, num_groups, w, b, EPS)

    return reference.all_orders(of, (x, w, torch.zeros_like(w)), g, (v, p, q))[2][:3]


def exact(operands: list[Any], num_groups: int) -> list[Tensor]:
    return derived(harness.in_double(operands), num_groups, reference.group_norm)


def assert_as_accurate_as_stock(operands: list[Any], num_groups: int) -> None:
    actual = harness.untouched(lambda *operands: run_kernel(list(operands), num_groups), *operands)
    dtype = operands[4].dtype
    # One unit in the last place: the two maxima may be over few elements.
    allowed = harness.units(dtype, dtype != torch.float64, floor=1e-12)
    if operands[4].numel():
        harness.assert_accurate(actual, exact(operands, num_groups), allowed, derived(operands, num_groups))
    else:
        harness.assert_accurate(actual, [operands[4], operands[4], torch.zeros_like(actual[2])])


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
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_inf_stay_in_their_group(device: str) -> None:
    shape, num_groups = CASES["rows"]
    for bad, position in itertools.product((math.nan, math.inf), (0, 3, 4)):
        operands = draw(shape, num_groups, torch.float32, device, "w")
        operands[position][0, 0, 0, 0] = bad
        if position == 4:
            operands[5:7] = torch.native_group_norm(operands[4], None, None, 2, 6, 35, 3, EPS)[1:]
        for a, e in zip(run_kernel(operands, num_groups), exact(operands, num_groups), strict=True):
            assert torch.equal(a.isfinite(), e.isfinite()), (bad, position)


@triton.jit
def tile_end_kernel(
    end_ptr, index, rows, column_units, row_stride,
    unit: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    matrix = group_norm._matrix(rows, column_units, unit, block_columns)
    offsets, mask = group_norm._where(index, matrix, row_stride, block_rows, block_columns)
    tl.store(end_ptr, tl.max(tl.max(tl.where(mask, offsets, -1), axis=1), axis=0))


@harness.in_the_interpreter
@pytest.mark.parametrize(
    ("arguments", "unit", "block_rows", "block_columns", "expected"),
    [
        ((0, 1024, 1, 2**22), 1, 1024, 1, 1023 * 2**22),
        ((2**25 - 1, 4, 2**30, 2**33), 8, 4, 256, 2**35 - 1),  # the end of long rows
        ((2**21 - 1, 2**31 - 2, 1, 1), 1, 1024, 1, 2**31 - 3),  # the last of many rows, and a rest
    ],
)
def test_tile_beyond_2_31_elements_in_the_interpreter(
    arguments: Any, unit: int, block_rows: int, block_columns: int, expected: int
) -> None:
    end = torch.zeros(1, dtype=torch.int64)
    sizes = {"unit": unit, "block_rows": block_rows, "block_columns": block_columns}
    tile_end_kernel[(1,)](end, *arguments, **sizes)
    assert end.item() == expected


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    batch, num_groups = 2**20 + 1, 2
    elements = batch * 2048
    harness.skip_without_memory(6 * elements * torch.bfloat16.itemsize)
    x = torch.empty(batch, 8, 256, dtype=torch.bfloat16, device="cuda").normal_()
    mean, rstd = torch.zeros(batch, num_groups, device="cuda"), torch.ones(batch, num_groups, device="cuda")

    def call(x: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        return run_kernel([x, None, None, x, x, mean, rstd, None], num_groups, (True, True, False))

    harness.assert_same_in_parts(call, (0, 2**19 - 1, batch - 2), 2, x, mean, rstd)


@on_every_device
def test_bad_input(device: str) -> None:
    shape, num_groups = CASES["rows"]
    good = draw(shape, num_groups, torch.float32, device, "wpq")
    op, settings = group_norm.group_norm_double_backward, (num_groups, EPS, list(ALL))
    harness.assert_rejected((TypeError, "expected input", op, *(t.long() for t in good), *settings))
    gradients = ("grad_grad_input", "grad_grad_weight", "grad_grad_bias", "grad_output")
    names = (*gradients, "", "mean", "rstd", "weight")
    for k, name in enumerate(names):
        changed = ((ValueError, "", good[k][..., :1]), (RuntimeError, " .* got meta", good[k].to("meta")))
        for error, end, tensor in changed if name else ():
            operands = [*good[:k], tensor, *good[k + 1 :]]
            harness.assert_rejected((error, f"expected {name}{end}", op, *operands, *settings))
