"""The Triton kernels of attention, run against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET, GPUTarget, compile_for, in_every_dtype, normal, on_every_device, triton
from torch import Tensor

import gradnorm_kernels as gk

attention: Any = importlib.import_module("gradnorm_kernels.kernels.attention")
OPS = torch.ops.gradnorm_kernels
in_every_narrow_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:]
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
]
SMALLEST = [WINDOWS[2], ((1, 2, 1), 16, 70, 16, 20, (1, 1, 1))]
in_windows_and_tiles = pytest.mark.parametrize("case", SMALLEST, ids=["window", "tiles"])


class Operands:
    """Of one case: the inputs, the incoming gradients, and results of NaN, as the launchers take them."""

    def __init__(self, case: Any, dtype: torch.dtype, device: str) -> None:
        batch, queries, keys, columns, value_columns, mask = case
        self.is_window = max(queries, keys) <= 64
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


NAMES = (
    *("output", "grad_query", "grad_key", "grad_value", "grad_mask", "grad_grad_output"),
    *("second grad_query", "second grad_key", "second grad_value", "second grad_mask"),
)


def run_kernels(o: Operands, with_dd_mask: bool = True, parts: int = 1) -> list[Tensor | None]:
    scale = 0.3
    output = o.empty(o.grad_output)
    attention._attention_fwd(o.query, o.key, o.value, o.mask, scale, output)
    first = [o.empty(t) for t in (o.query, o.key, o.value)]
    sums = o.sums(parts)
    attention._attention_bwd(o.grad_output, o.query, o.key, o.value, o.mask, scale, *first, sums)
    second = [o.empty(t) for t in (o.grad_output, o.query, o.key, o.value)]
    second_sums = o.sums(parts)
    attention._attention_bwd_bwd(
        o.dd_query,
        o.dd_key,
        o.dd_value,
        o.dd_mask if with_dd_mask else None,
        o.grad_output,
        o.query,
        o.key,
        o.value,
        o.mask,
        scale,
        *second,
        second_sums,
    )
    return [output, *first, o.total(sums), *second, o.total(second_sums)]


def reference(o: Operands, dtype: torch.dtype, with_dd_mask: bool = True) -> list[Tensor | None]:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    query, key, value, mask = map(cast, (o.query, o.key, o.value, o.mask))
    grad_output = cast(o.grad_output)
    output = gk.reference.scaled_dot_product_attention(query, key, value, mask, 0.3)
    *first, d_scores = gk.reference.scaled_dot_product_attention_backward(
        grad_output, query, key, value, mask, 0.3
    )
    dd_scores = o.dd_mask.to(dtype) if with_dd_mask and o.dd_mask is not None else torch.zeros_like(d_scores)
    *second, dd_d_scores = gk.reference.scaled_dot_product_attention_double_backward(
        (cast(o.dd_query), cast(o.dd_key), cast(o.dd_value), dd_scores),
        grad_output,
        query,
        key,
        value,
        mask,
        0.3,
    )

    def to_mask(scores: Tensor) -> Tensor | None:
        if o.mask is None or not o.is_window:
            return None
        return scores.sum_to_size(*o.mask_batch, *scores.shape[-2:])

    return [output, *first, to_mask(d_scores), *second, to_mask(dd_d_scores)]


def assert_as_accurate_as_stock(o: Operands, actual: list, *args: Any) -> None:
    dtype = o.query.dtype
    stock, truth = reference(o, dtype, *args), reference(o, torch.float64, *args)
    for name, a, s, t in zip(NAMES, actual, stock, truth, strict=True):
        if t is None:
            assert a is None
            continue
        tiny = torch.finfo(dtype).eps * t.abs().max().item()
        error = (a.double() - t).abs().max().item()
        stock_error = (s.double() - t).abs().max().item()
        assert error <= 2 * stock_error + tiny, f"{name}: {error} against {stock_error}"


@on_every_device
@in_every_narrow_dtype
@pytest.mark.parametrize("case", WINDOWS + TILED, ids=str)
def test_windows_and_tiles(case: Any, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if their bits were integers")
    o = Operands(case, dtype, device)
    assert_as_accurate_as_stock(o, run_kernels(o))


@on_every_device
def test_vit(device: str) -> None:
    """Of its shape, and in the interpreter, which multiplies in float32 all the same, in tf32's tiles."""
    o = Operands(((1, 1, 1), 197, 197, 64, 64, None), torch.float32, device)
    if device == "cpu":
        with allow_tf32():
            assert_as_accurate_as_stock(o, run_kernels(o))
    else:
        assert_as_accurate_as_stock(o, run_kernels(o))


@contextmanager
def allow_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
@in_windows_and_tiles
def test_unwanted_gradients_are_not_written(case: Any, device: str) -> None:
    o = Operands(case, torch.float32, device)
    expected = run_kernels(o)
    tensors = (o.grad_output, o.query, o.key, o.value, o.mask, 0.3)
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
@pytest.mark.parametrize("given", range(3))
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
        *absent, None, o.grad_output, o.query, o.key, o.value, o.mask, 0.3, *results, None
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
            ops._attention_softmax(scores, masks[0], 0.3),
            *ops._attention_softmax_backward(dp, scores, masks[0], 0.3),
            *ops._attention_softmax_double_backward(a, masks[1], c, dp, scores, masks[0], 0.3),
            *ops._attention_softmax_double_backward(None, masks[1], c, dp, scores, masks[0], 0.3),
            *ops._attention_softmax_double_backward(a, None, None, dp, scores, masks[0], 0.3),
        ]

    # Storing bfloat16, the interpreter truncates.
    tolerance = 3 * torch.finfo(dtype).eps
    actual = run(attention if device == "cpu" else OPS)
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


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "case"),
    [("swin", ((4, 3, 2), 49, 49, 32, 32, (1, 3, 2))), ("vit", ((1, 3, 2), 197, 197, 64, 64, None))],
    ids=["swin", "vit"],
)
def test_launch_compiles_what_is_listed(
    model: str, case: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launchers' own calls, up to the point where a GPU would be needed."""
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
    run_kernels(Operands(case, dtype, "cpu"), with_dd_mask=False, parts=2)

    pointer = "bf16" if dtype == torch.bfloat16 else "fp32"
    listed = [
        compile_for(s, 90).asm["ptx"]
        for s in attention.specializations()
        if f"-{model}" in s.name and s.name.endswith(pointer)
    ]
    assert [kernel.asm["ptx"] for kernel in launched] == listed
    assert len(listed) == {"swin": 3, "vit": 5}[model]


@pytest.mark.gpu
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("tokens", [49, 197])
def test_ops_on_cuda(tokens: int, with_mask: bool) -> None:
    """Through the dispatcher and autograd: by windows, by tiles, and, with a mask's gradient, by parts."""
    torch.manual_seed(0)
    operands = [torch.randn(2, 3, tokens, 32) for _ in range(3)]
    operands += [torch.randn(3, tokens, tokens)] * with_mask
    grad_output, grad_grads = torch.randn(2, 3, tokens, 32), [torch.randn_like(t) for t in operands]

    def all_orders(function: Any, device: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t.to(device, dtype).requires_grad_() for t in operands]
        grad = grad_output.to(device, dtype).requires_grad_()
        output = function(*tensors)
        first = torch.autograd.grad(output, tensors, grad, create_graph=True)
        second = torch.autograd.grad(first, [grad, *tensors], [t.to(device, dtype) for t in grad_grads])
        return [output, *first, *second]

    fused = gk.functional.scaled_dot_product_attention
    exact = all_orders(gk.reference.scaled_dot_product_attention, "cpu", torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        stock = all_orders(gk.reference.scaled_dot_product_attention, "cuda", dtype)
        runs = [all_orders(fused, "cuda", dtype) for _ in range(2)]
        for ours, again, theirs, wanted in zip(*runs, stock, exact, strict=True):
            assert torch.equal(ours, again)
            error = (ours.cpu().double() - wanted).abs().max()
            stock_error = (theirs.cpu().double() - wanted).abs().max()
            assert error <= 2 * stock_error + torch.finfo(dtype).eps * wanted.abs().max()
