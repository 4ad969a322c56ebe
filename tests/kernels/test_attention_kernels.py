"""The Triton kernels of attention, run against float64."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from harness import INTERPRET, in_every_dtype, meta, normal, on_every_device, triton
from torch import Tensor

import gradnorm_kernels as gk
from gradnorm_kernels import kernels
from gradnorm_kernels._tf32 import allow_tf32
from gradnorm_kernels.kernels import NotCoveredError, composite

attention: Any = importlib.import_module("gradnorm_kernels.kernels.attention")
OPS = torch.ops.gradnorm_kernels
SCALE = 0.3


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Windows of Swin, 7 by 7 with 32 columns a head, and ViT's 197 tokens of 64 columns a head, both also
    with tf32, and rows of scores."""
    if dtype != torch.float64:
        for name, case in (
            ("swin", ((64, 4, 4), 49, 49, 32, 32, (1, 4, 4))),
            ("vit", ((64, 1, 12), 197, 197, 64, 64, None)),
            ("vit-mask", ((64, 1, 12), 197, 197, 64, 64, (1, 1, 12))),
            ("wide", ((64, 1, 8), 256, 256, 128, 128, None)),
            ("wide-mask", ((64, 1, 8), 256, 256, 128, 128, (1, 1, 8))),
        ):
            if dtype == torch.float32 and name.startswith("wide"):
                continue  # takes matrix products
            o = Operands(case, dtype, "meta")
            yield name, run_kernels, o, False, 2
            if dtype == torch.float32:
                yield f"{name}-tf32", allow_tf32(True)(run_kernels), o, False, 2
    scores, mask = meta(8, 12, 577, 577, dtype=dtype), meta(577, 577, dtype=dtype)
    for name, m in (("rows", None), ("rows-mask", mask)):
        yield name, attention._attention_softmax, scores, m, SCALE
        yield name, attention._attention_softmax_backward, scores, scores, m, SCALE
        operands = (scores, m, scores, scores, scores, m, SCALE)
        yield name, attention._attention_softmax_double_backward, *operands


in_every_narrow_dtype = pytest.mark.parametrize(
    "dtype", harness.DTYPES_OF_MAKE_TEST[:-1], ids=lambda dtype: str(dtype)[6:]
)

# (batch, queries, keys, columns, value columns, the mask's batch)
WINDOWS = [
    ((2, 1, 2), 49, 49, 32, 32, (1, 1, 2)),  # Swin's, which fill three quarters of a tile
    ((1, 1, 1), 64, 64, 16, 16, None),  # whole tiles
    ((1, 3, 2), 5, 7, 3, 20, (1, 1, 2)),  # less than the least tile, in every direction
    ((2, 1, 1), 17, 33, 64, 40, (2, 1, 1)),  # queries and keys of different tiles
]
TILED = [
    ((1, 1, 2), 65, 66, 16, 20, (1, 1, 2)),
    ((2, 1, 1), 5, 131, 3, 64, (1, 1, 1)),  # one block of queries, several of keys
    ((1, 2, 1), 100, 33, 40, 16, None),  # and the other way round
    ((1, 1, 2), 70, 40, 128, 65, (1, 1, 1)),  # wide heads
    ((2, 1, 1), 20, 30, 65, 16, None),  # as few tokens as a window's
]
SMALLEST = [WINDOWS[2], ((1, 2, 1), 16, 70, 16, 20, (1, 1, 1))]
in_windows_and_tiles = pytest.mark.parametrize("case", SMALLEST, ids=["window", "tiles"])


class Operands:
    """Of one case: the inputs, the incoming gradients, and results of NaN, as the launchers take them."""

    def __init__(self, case: Any, dtype: torch.dtype, device: str) -> None:
        batch, queries, keys, columns, value_columns, mask = case
        self.is_window = max(queries, keys, columns, value_columns) <= 64
        torch.manual_seed(0)

        def split(rows: int, width: int) -> Tensor:
            # As one of three that one layer makes: (batch, rows, 3, heads, columns).
            whole = normal(*batch[:2], rows, 3, batch[2], width, dtype=dtype, device=device)
            return whole.select(-3, 1).transpose(-3, -2)

        self.query, self.dd_query = split(queries, columns), split(queries, columns)
        self.key, self.dd_key = split(keys, columns), split(keys, columns)
        self.value, self.dd_value = split(keys, value_columns), split(keys, value_columns)
        self.grad_output = split(queries, value_columns)
        self.mask = self.dd_mask = None
        if mask is not None:
            masks = [normal(*mask, queries, keys, dtype=torch.float32, device=device) for _ in range(2)]
            self.mask, self.dd_mask = (m.expand(*batch, queries, keys) for m in masks)
            if not self.is_window:
                # The mask's gradients are for windows.
                self.dd_mask = None
        self.mask_batch = mask

    def empty(self, like: Tensor) -> Tensor:
        return torch.full_like(like, float("nan"))

    def sums(self, parts: int) -> Tensor | None:
        if self.mask is None or not self.is_window:
            return None
        tiles = torch.Size(self.mask_batch).numel()
        key_block = max(16, triton.next_power_of_2(self.mask.shape[-1]))
        return torch.full(
            (parts, tiles, self.mask.shape[-2], key_block), float("nan"), device=self.query.device
        )

    def total(self, sums: Tensor | None) -> Tensor | None:
        if sums is None:
            return None
        total = sums.sum(0)[..., : self.mask.shape[-1]]
        return total.unflatten(0, self.mask_batch)


def run_kernels(o: Operands, with_dd_mask: bool = True, parts: int = 1) -> list[Tensor | None]:
    output = o.empty(o.grad_output)
    attention._attention_fwd(o.query, o.key, o.value, o.mask, SCALE, output)
    first = [o.empty(t) for t in (o.query, o.key, o.value)]
    sums = o.sums(parts)
    attention._attention_bwd(o.grad_output, o.query, o.key, o.value, o.mask, SCALE, *first, sums)
    second = [o.empty(t) for t in (o.grad_output, o.query, o.key, o.value)]
    second_sums = o.sums(parts)
    incoming = (o.dd_query, o.dd_key, o.dd_value, o.dd_mask if with_dd_mask else None, o.grad_output)
    operands = (o.query, o.key, o.value, o.mask, SCALE)
    attention._attention_bwd_bwd(*incoming, *operands, *second, second_sums)
    return [output, *first, o.total(sums), *second, o.total(second_sums)]


def derived(o: Operands, dtype: torch.dtype, with_dd_mask: bool = True) -> list[Tensor | None]:
    """The same by autograd."""
    incoming = (o.dd_query, o.dd_key, o.dd_value, o.dd_mask if with_dd_mask else None)
    inputs, grad_grads = (
        [None if t is None else t.to(dtype) for t in tensors]
        for tensors in ((o.query, o.key, o.value, o.mask), incoming)
    )

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return reference.scaled_dot_product_attention(q, k, v, mask, SCALE)

    output, first, second = reference.all_orders(function, inputs, o.grad_output.to(dtype), grad_grads)

    def to_mask(gradients: list[Tensor]) -> Tensor | None:
        if o.mask is None or not o.is_window:
            return None
        return gradients[-1].sum_to_size(*o.mask_batch, *o.mask.shape[-2:])

    return [*output, *first[:3], to_mask(first), *second[:4], to_mask(second)]


def assert_as_accurate_as_stock(o: Operands, actual: list, *args: Any) -> None:
    dtype = o.query.dtype
    stock, truth = derived(o, dtype, *args), derived(o, torch.float64, *args)
    # The mask's gradient is of the dtype of arithmetic.
    stock = [s if a is None else s.to(a.dtype) for s, a in zip(stock, actual, strict=True)]
    harness.assert_accurate(actual, truth, harness.units(dtype, 1), stock)


@on_every_device
@in_every_narrow_dtype
@pytest.mark.parametrize("case", harness.usual_interpreted(WINDOWS + TILED, *WINDOWS[1:], TILED[1]), ids=str)
def test_windows_and_tiles(case: Any, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if their bits were integers")
    o = Operands(case, dtype, device)
    assert_as_accurate_as_stock(o, run_kernels(o))


@on_every_device
@harness.slow_when_interpreted
def test_vit(device: str) -> None:
    """Of its shape, and in the interpreter, which multiplies in float32 all the same, in tf32's tiles."""
    o = Operands(((1, 1, 1), 197, 197, 64, 64, None), torch.float32, device)
    assert_as_accurate_as_stock(o, (allow_tf32(True)(run_kernels) if device == "cpu" else run_kernels)(o))


@on_every_device
def test_keys_far_below_the_others(device: str) -> None:
    """exp(-95), which the weights of the second block of keys sum to, has no inverse in float32."""
    o = Operands(SMALLEST[1], torch.float32, device)
    o.mask = torch.zeros_like(o.mask)
    o.mask[..., 32:64] = -95.0
    o.mask[..., 0] = 5.0
    assert_as_accurate_as_stock(o, run_kernels(o))


@on_every_device
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_the_masks_gradient(parts: int, device: str) -> None:
    o = Operands(((4, 1, 1), 18, 17, 16, 16, (1, 1, 1)), torch.float32, device)
    assert_as_accurate_as_stock(o, run_kernels(o, False, parts), False)


@on_every_device
@in_windows_and_tiles
def test_queries_without_keys_get_zeros(case: Any, device: str) -> None:
    o = Operands(case, torch.float32, device)
    o.mask = o.mask.clone()
    o.mask[..., 3, :] = -float("inf")
    o.mask[..., 2, 1:] = -float("inf")
    # Nothing in the first tile.
    o.mask[..., 1, :-1] = -float("inf")
    o.mask_batch = o.mask.shape[:3]
    results = run_kernels(o)
    assert all(result is None or result.isfinite().all() for result in results)
    assert not results[0][..., 3, :].any() and results[0][..., 2, :].any()
    assert_as_accurate_as_stock(o, results)


@on_every_device
@pytest.mark.parametrize("case", harness.usual_interpreted(SMALLEST, SMALLEST[0]), ids=["window", "tiles"])
def test_unwanted_gradients_are_not_written(case: Any, device: str) -> None:
    o = Operands(case, torch.float32, device)
    expected = run_kernels(o)
    tensors = (o.grad_output, o.query, o.key, o.value, o.mask, SCALE)
    for wanted in range(3):
        results = [o.empty(t) if i == wanted else None for i, t in enumerate((o.query, o.key, o.value))]
        attention._attention_bwd(*tensors, *results, None)
        assert torch.equal(results[wanted], expected[1 + wanted])
    for wanted in range(4):
        likes = (o.grad_output, o.query, o.key, o.value)
        results = [o.empty(t) if i == wanted else None for i, t in enumerate(likes)]
        attention._attention_bwd_bwd(o.dd_query, o.dd_key, o.dd_value, o.dd_mask, *tensors, *results, None)
        torch.testing.assert_close(results[wanted], expected[5 + wanted])


@on_every_device
@in_windows_and_tiles
@pytest.mark.parametrize("given", harness.usual_interpreted(range(3), 2))
def test_absent_gradients_are_zeros(given: int, case: Any, device: str) -> None:
    o = Operands(case, torch.float32, device)
    incoming = [
        t if i == given else torch.zeros_like(t) for i, t in enumerate((o.dd_query, o.dd_key, o.dd_value))
    ]
    o.dd_query, o.dd_key, o.dd_value = incoming
    expected = run_kernels(o, False)[5:9]
    results = [o.empty(t) for t in (o.grad_output, o.query, o.key, o.value)]
    absent = [t if i == given else None for i, t in enumerate(incoming)]
    attention._attention_bwd_bwd(
        *absent, None, o.grad_output, o.query, o.key, o.value, o.mask, SCALE, *results, None
    )
    torch.testing.assert_close(results, expected)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("mask", [None, (2, 1, 7), (1, 2, 2, 1)], ids=str)
def test_rows_of_scores(mask: Any, dtype: torch.dtype, device: str) -> None:
    a, c, dp, scores = (normal(1, 2, 2, 7, dtype=dtype, device=device) for _ in range(4))
    masks = [None, None] if mask is None else [normal(*mask, dtype=dtype, device=device) for _ in range(2)]

    def run(ops: Any) -> list[Tensor]:
        return [
            ops._attention_softmax(scores, masks[0], SCALE),
            *ops._attention_softmax_backward(dp, scores, masks[0], SCALE),
            *ops._attention_softmax_double_backward(a, masks[1], c, dp, scores, masks[0], SCALE),
            *ops._attention_softmax_double_backward(None, masks[1], c, dp, scores, masks[0], SCALE),
            *ops._attention_softmax_double_backward(a, None, None, dp, scores, masks[0], SCALE),
        ]

    # Storing bfloat16, the interpreter truncates.
    tolerance = 3 * torch.finfo(dtype).eps
    actual = run(harness.implementation(attention, scores))
    before = scores, a, c, dp
    scores, a, c, dp = (t.cpu() for t in before)
    masks = [None if m is None else m.cpu() for m in masks]
    for result, wanted in zip(actual, run(OPS), strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=tolerance, atol=tolerance)


@on_every_device
def test_rows_without_scores(device: str) -> None:
    scores = torch.full((1, 1, 3, 5), -float("inf"), device=device)
    scores[..., 1, 2] = 1.0
    ones = torch.ones_like(scores)
    p, ds, b, e = attention._attention_softmax_double_backward(ones, None, ones, ones, scores, None, 1.0)
    assert not p[..., [0, 2], :].any() and p[0, 0, 1, 2] == 1
    assert not ds.any() and not b.any() and not e.any()


# With TF32 products these hold more than the registers of a thread, which the former lists did not see.
KNOWN = {
    # 56 and 16 bytes, at a third of the instructions that float32's own products take.
    r"tiled_attention_bwd_bwd-vit-float32(-again)?-sm_90": "spills with three products of TF32",
    # Eight bytes, for a third program on a multiprocessor.
    r"tiled_attention_bwd-vit-mask-bfloat16-again-sm_80": "spills 8 bytes",
    r"window_attention_bwd(_bwd)?-(swin|window)-tf32-float32-sm_\d+": "spills with TF32 products",
    r"\w*attention_(fwd|bwd|bwd_bwd)-(swin|vit)\S*-b?float16\S*-sm_75": "spills, without tensor cores",
}
test_compiles_without_spills = harness.compilation_test(calls, known=KNOWN, by_device=True)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
def test_swins_stages_share_their_kernels() -> None:
    """Swin-B's at batch 64: in all of them windows are of 49 tokens, and heads of 32 columns."""
    found: list[harness.Launch] = []
    for windows, heads in ((64, 4), (16, 8), (4, 16), (1, 32)):
        plain = ((1, 64 * windows, heads), (1, 1, heads))
        shifted = ((64, windows, heads), (1, windows, heads))
        for batch, mask in (plain, shifted) if windows > 1 else (plain,):
            o = Operands((batch, 49, 49, 32, 32, mask), torch.bfloat16, "meta")
            o.mask = o.mask[0].unsqueeze(0)
            tiles = torch.Size(mask).numel()
            parts = min(2048 // tiles, torch.Size(batch).numel() // tiles)
            results = [o.empty(t) for t in (o.query, o.key, o.value)]
            tensors = (o.grad_output, o.query, o.key, o.value, o.mask, SCALE, *results, None)
            for step in ((run_kernels, o, False, parts), (attention._attention_bwd, *tensors)):
                found += [launch for launch in harness.recorded(*step) if launch not in found]
    assert {launch.kernel.__name__ for launch in found} == {
        *("attention_fwd_kernel", "window_attention_bwd_kernel", "window_attention_bwd_bwd_kernel")
    }
    assert len(found) <= 8


def launches(case: Any, precision: str, target: Any) -> list[harness.Launch]:
    """Of all passes in float32, on such a device."""
    with allow_tf32(precision == "tf32"):
        return harness.recorded(run_kernels, Operands(case, torch.float32, "meta"), True, 2, target=target)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("capability", "columns", "precision"),
    [
        pytest.param(*case, marks=[] if case[:2] in ((80, 64), (86, 64)) else pytest.mark.slow)
        for case in (
            *((capability, columns, "tf32") for capability in harness.SHARED_MEMORY for columns in (32, 64)),
            (75, 32, "ieee"),
            (86, 64, "ieee"),
        )
        if case[:2] != (75, 64)
    ],
)
def test_windows_fit_the_shared_memory(
    capability: int, columns: int, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Of 64 tokens, with the mask's gradient. Without assembling, which takes longest, nor caching that."""
    from triton.backends.nvidia.compiler import CUDABackend

    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *args: b"")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    case = ((64, 1, 12), 64, 64, columns, columns, (1, 1, 12))
    *_, double_backward = launches(case, precision, capability)
    shared = double_backward.compiled(capability).metadata.shared
    assert shared <= harness.SHARED_MEMORY[capability] * 1024


@pytest.mark.skipif(INTERPRET, reason="it takes the interpreter's own device")
@pytest.mark.parametrize("case", [WINDOWS[0], TILED[0]], ids=["window", "tiles"])
def test_precision_is_one_that_the_device_has(case: Any) -> None:
    for target, expected in ((75, "ieee"), (80, "tf32"), (90, "tf32"), (120, "tf32"), (harness.ROCM, "ieee")):
        found = launches(case, "tf32", target)
        assert len(found) >= 3 and all(expected in launch.constants.values() for launch in found), target


@pytest.mark.skipif(INTERPRET, reason="it takes the interpreter's own device")
@pytest.mark.parametrize(("case", "on_sm_90"), [(WINDOWS[0], 1), (TILED[0], 3), (TILED[2], 5)], ids=str)
def test_float32_in_three_products_of_tf32(case: Any, on_sm_90: int) -> None:
    """Where these spill little: the forward, and on sm_90 tiles but for the second order with a mask."""
    for target, expected in ((75, 0), (80, 1), (86, 1), (90, on_sm_90), (100, 1), (harness.ROCM, 0)):
        in_three = ["tf32x3" in launch.constants.values() for launch in launches(case, "ieee", target)]
        assert in_three == [True] * expected + [False] * (len(in_three) - expected), target


@pytest.mark.skipif(INTERPRET, reason="it takes the interpreter's own device")
def test_windows_beyond_the_shared_memory_are_not_covered() -> None:
    with pytest.raises(NotCoveredError):
        launches(((64, 1, 12), 64, 64, 64, 64, (1, 1, 12)), "ieee", 75)


@pytest.mark.skipif(INTERPRET, reason="it takes the interpreter's own device")
def test_wide_heads_take_the_memory_of_newer_devices() -> None:
    o = Operands(((1, 1, 8), 256, 256, 128, 128, None), torch.float16, "meta")
    assert len(harness.recorded(run_kernels, o, target=86)) == 5
    for target in (75, harness.ROCM):
        with pytest.raises(NotCoveredError):
            harness.recorded(run_kernels, o, target=target)


@on_every_device
def test_the_masks_gradient_of_an_empty_batch_is_zero(device: str) -> None:
    o = Operands(((0, 2, 2), 5, 4, 4, 4, (1, 2, 2)), torch.float32, device)
    *_, second_sums = results = run_kernels(o, True, 2)
    assert results[4].shape == second_sums.shape == (1, 2, 2, 5, 4)
    assert not results[4].any() and not second_sums.any()


@pytest.mark.parametrize("case", [*WINDOWS[:3], TILED[0]], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_composites_of_the_passes(case: Any, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the results, partial sums among them, that kernels write."""
    for op in ("_attention_fwd", "_attention_bwd", "_attention_bwd_bwd"):
        monkeypatch.setattr(attention, op, functools.partial(composite.call, op))
    o = Operands(case, torch.float32, "cpu")
    assert_as_accurate_as_stock(o, run_kernels(o, True, parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows_are_composites(dtype: torch.dtype) -> None:
    most = 4096 if dtype == torch.float64 else 8192
    for keys, is_covered in ((most, True), (most + 1, False)):
        meta_scores = meta(1, 2, keys, dtype=dtype)
        if is_covered and not INTERPRET:
            assert harness.recorded(attention._attention_softmax, meta_scores, None, SCALE)
        elif not is_covered:
            with pytest.raises(NotCoveredError):
                attention._attention_softmax(meta_scores, None, SCALE)
    scores = normal(1, 2, most + 1, dtype=dtype, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "has_triton", lambda: True)
        p = kernels._lazy("attention", "_attention_softmax")(scores, None, SCALE)
    torch.testing.assert_close(p, (scores * SCALE).softmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("tokens", [49, 197])
def test_ops_on_cuda(tokens: int, with_mask: bool) -> None:
    """Through the dispatcher and autograd: by windows, by tiles, and, with a mask's gradient, by parts."""
    torch.manual_seed(0)
    operands: list[Any] = [torch.randn(2, 3, tokens, 32) for _ in range(3)]
    operands += [torch.randn(3, tokens, tokens)] * with_mask
    grad_output, grad_grads = torch.randn(2, 3, tokens, 32), [torch.randn_like(t) for t in operands]

    def all_orders(function: Any, device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs, incoming = ([t.to(device, dtype) for t in tensors] for tensors in (operands, grad_grads))
        output, first, second = reference.all_orders(
            function, inputs, grad_output.to(device, dtype), incoming
        )
        return [*output, *first, *second]

    fused = gk.functional.scaled_dot_product_attention
    exact = all_orders(reference.scaled_dot_product_attention, "cpu", torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        stock = all_orders(reference.scaled_dot_product_attention, "cuda", dtype)
        runs = [all_orders(fused, "cuda", dtype) for _ in range(2)]
        assert all(map(torch.equal, *runs))
        ours, stock = ([t.cpu() for t in tensors] for tensors in (runs[0], stock))
        harness.assert_accurate(ours, exact, harness.units(dtype, 1), stock)
