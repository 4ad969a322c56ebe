"""The Triton kernels of batch normalisation, run against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import reference
import torch
from conftest import usual
from harness import meta, normal, on_every_device, opmath, triton
from torch import Tensor

batch_norm: Any = importlib.import_module("gradnorm_kernels.kernels.batch_norm")
tl = triton.language
EPS = 1e-3
ALL = [True] * 3


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """The kernels of a gradient-norm step of ResNet-50 at batch 64, in training and in evaluation mode."""
    for name, shape, layout in (
        ("large", (64, 256, 56, 56), torch.contiguous_format),
        ("channels_last", (64, 256, 56, 56), torch.channels_last),
        ("small", (64, 2048, 7, 7), torch.contiguous_format),
    ):
        x = meta(*shape, dtype=dtype).contiguous(memory_format=layout)
        w, c = meta(shape[1], dtype=dtype), meta(shape[1], dtype=opmath(dtype))
        double_backward, backward = batch_norm.batch_norm_double_backward, batch_norm.batch_norm_backward
        for training in (True, False):
            statistics = (c, c, c, c, training, EPS)
            case = f"{name}-{'train' if training else 'eval'}"
            yield case, double_backward, x, None, None, x, x, w, *statistics
            if name != "small":
                yield f"{case}-u", double_backward, x, w, w, x, x, w, *statistics
        yield name, double_backward, x, None, None, x, None, w, *statistics
        for mask in ([True, False, False], ALL):
            yield name, backward, x, x, w, c, c, None, None, False, EPS, mask
        for activation in () if name == "small" else ("silu", "relu"):
            for training in (True, False):
                case = f"{name}-{activation}-{'train' if training else 'eval'}"
                operands = (x, x, w, w, c, c, c, c, training, EPS, activation, [])
                yield case, batch_norm.batch_norm_act_backward, *operands, ALL
                yield case, batch_norm.batch_norm_act_double_backward, x, *operands


test_compiles_without_spills = harness.compilation_test(calls)


@pytest.mark.skipif(harness.INTERPRET, reason="the interpreter does not compile")
def test_compiles_for_rocm() -> None:
    """Whose compiler is not told how many registers a thread may have: it rejects the option."""
    launches = harness.recorded(*next(calls(torch.float32))[1:], target=harness.ROCM)
    assert len(launches) == 2
    for launch in launches:
        assert launch.compiled(harness.ROCM).asm["hsaco"]


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


def in_cases(cases: list[tuple[Any, ...]]) -> Any:
    ids = [f"{'x'.join(map(str, s))}{'-channels_last' * last}-{str(dtype)[6:]}" for s, last, dtype in cases]
    return pytest.mark.parametrize(("shape", "channels_last", "dtype"), cases, ids=ids)


in_every_case = in_cases(CASES)
# The function and parameters of an activation.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "silu": (reference.silu, []),
    "relu": (reference.relu, []),
    "hardswish": (reference.hardswish, []),
    "leaky_relu": (lambda z: reference.leaky_relu(z, 0.2), [0.2]),
    "gelu_tanh": (lambda z: reference.gelu(z, "tanh"), []),
}


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


def statistics_of(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> list[Tensor | None]:
    if not training:
        return [mean, var, None, None]
    batch_var, batch_mean = torch.var_mean(x.double(), [0, *range(2, x.ndim)], correction=0)
    # PyTorch keeps them in float32 at least on CUDA.
    return [None, None, *(t.to(opmath(x.dtype)) for t in (batch_mean, (batch_var + EPS).rsqrt()))]


def assert_close(actual: Any, exact: Any, dtype: torch.dtype) -> None:
    # Sums of hundreds of terms, which the interpreter's truncating stores of bfloat16 make no worse.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert all(a is None or a.dtype == dtype for a in actual)
    harness.assert_accurate(actual, exact, lambda e: tolerance * max(1.0, e.abs().max().item()))


def derived(
    v: Any,
    u: Any,
    t: Any,
    g: Tensor,
    x: Tensor,
    w: Any,
    mean: Tensor,
    var: Tensor,
    training: bool,
    b: Any = None,
    activation: Callable[[Tensor], Tensor] = lambda z: z,
) -> list[list[Tensor]]:
    """The gradients of x, w and b, and the double backward's of g, x, w and b: by autograd in float64."""
    v, u, t, g, x, w, mean, var, b = harness.in_double((v, u, t, g, x, w, mean, var, b))

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return activation(reference.batch_norm(x, mean, var, w, b, training, EPS))

    w = torch.ones_like(mean) if w is None else w
    b = torch.zeros_like(mean) if b is None else b
    return reference.all_orders(function, (x, w, b), g, (v, u, t))[1:]


@on_every_device
@in_both_modes
@in_every_case
def test_double_backward(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, training: bool, device: str
) -> None:
    (v, g, x), (u, t, w, mean, var) = draw(shape, channels_last, dtype, device)
    statistics = statistics_of(x, mean, var, training)
    op = harness.implementation(batch_norm, x).batch_norm_double_backward

    def exact(v: Any, u: Any, t: Any, w: Any) -> list[Tensor]:
        return derived(v, u, t, g, x, w, mean, var, training)[1][:3]

    actual = harness.untouched(op, v, u, t, g, x, w, *statistics, training, EPS)
    assert_close(actual, exact(v, u, t, w), dtype)
    assert all(result.stride() == x.stride() for result in actual[:2])

    # What a step needs: only grad_grad_input is there. In evaluation mode input is not read.
    lean = exact(v, None, None, w)
    read = x if training else None
    for other in (v, harness.strided(v)):
        actual = op(other, None, None, g, read, w, *statistics, training, EPS)
        assert_close(actual, lean if training else (lean[0], None, lean[2]), dtype)
    # No weight; only the parameters' gradients.
    assert_close(op(v, u, t, g, x, None, *statistics, training, EPS)[:2], exact(v, u, t, None)[:2], dtype)
    actual = op(None, u, t, g, x, w, *statistics, training, EPS)
    assert_close(actual, (*exact(None, u, t, w)[:2], None), dtype)
    if not training:
        actual = op(None, None, t, g, None, w, *statistics, training, EPS)
        assert_close(actual, (exact(None, None, t, w)[0], None, None), dtype)


@on_every_device
@in_every_case
def test_backward_of_the_evaluation_mode(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str
) -> None:
    (v, g, x), (_, _, w, mean, var) = draw(shape, channels_last, dtype, device)
    exact, _ = derived(v, None, None, g, x, w, mean, var, False)
    op = harness.implementation(batch_norm, x).batch_norm_backward
    for mask in ([True, False, False], ALL, [True, False, True], [False, True, False]):
        actual = op(g, x if mask[1] else None, w, mean, var, None, None, False, EPS, mask)
        assert_close(actual, [e if wanted else None for e, wanted in zip(exact, mask, strict=True)], dtype)


@on_every_device
@in_both_modes
@pytest.mark.parametrize("activation", usual(ACTIVATIONS, "silu", "leaky_relu"))
@in_cases([CASES[k] for k in (2, 4, 6, 7, 9)])
def test_with_an_activation(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    activation: str,
    training: bool,
    device: str,
) -> None:
    (v, g, x), (_, b, w, mean, var) = draw(shape, channels_last, dtype, device)
    function, parameters = ACTIVATIONS[activation]
    operands = (g, x, w, b, *statistics_of(x, mean, var, training), training, EPS, activation, parameters)
    ops = harness.implementation(batch_norm, x)
    first, second = derived(v, None, None, g, x, w, mean, var, training, b, function)
    backward = harness.untouched(ops.batch_norm_act_backward, *operands, ALL)
    assert_close(backward, first, dtype)
    double_backward = harness.untouched(ops.batch_norm_act_double_backward, v, *operands)
    assert_close(double_backward, second, dtype)
    assert all(result.stride() == x.stride() for result in (backward[0], *double_backward[:2]))


@on_every_device
@in_both_modes
@in_cases([CASES[1], CASES[8]])
def test_with_an_activation_without_parameters(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, training: bool, device: str
) -> None:
    (v, g, x), (_, _, _, mean, var) = draw(shape, channels_last, dtype, device)
    settings = (None, None, *statistics_of(x, mean, var, training), training, EPS, "silu", [])
    ops = harness.implementation(batch_norm, x)
    first, second = derived(v, None, None, g, x, None, mean, var, training, None, reference.silu)
    backward = ops.batch_norm_act_backward(g, x, *settings, ALL)
    assert_close(backward, first, dtype)
    double_backward = ops.batch_norm_act_double_backward(v, g, x, *settings)
    assert_close(double_backward, second, dtype)

    def strided(mask: list[bool]) -> Any:
        return ops.batch_norm_act_backward(harness.strided(g), x, *settings, mask)

    harness.assert_masks(strided, backward)
    strided_v_g = harness.strided(v), harness.strided(g)
    again = ops.batch_norm_act_double_backward(*strided_v_g, x, *settings)
    assert all(map(torch.equal, again, double_backward))


def test_activations_of_their_output_are_rejected() -> None:
    harness.assert_rejected(
        (ValueError, "activation", batch_norm._select, "tanh", ()),
        (ValueError, "activation", batch_norm._select, "swish", ()),
    )


@on_every_device
@in_both_modes
def test_empty(training: bool, device: str) -> None:
    x, c = torch.empty(2, 3, 0, device=device), torch.ones(3, device=device)
    statistics = (c, c, c, c, training, EPS)
    act = (x, x, c, c, *statistics, "silu", [])
    ops = harness.implementation(batch_norm, x)
    for results, shapes in (
        (ops.batch_norm_double_backward(x, c, c, x, x, c, *statistics), [x.shape, x.shape, c.shape]),
        (ops.batch_norm_act_backward(*act, ALL), [x.shape, c.shape, c.shape]),
        (ops.batch_norm_act_double_backward(x, *act), [x.shape, x.shape, c.shape, c.shape]),
    ):
        assert [r.shape for r in results] == shapes
        assert all(r.count_nonzero() == 0 for r in results)


@triton.jit
def tile_ends_kernel(
    ends_ptr, tile, outer, channels, units,
    unit: tl.constexpr, interleaved: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    offsets, mask = batch_norm._tile(tile, outer, channels, units, unit, interleaved, rows, columns)
    tl.store(ends_ptr, tl.min(offsets))
    tl.store(ends_ptr + 1, tl.max(tl.where(mask, offsets, -1)))


@harness.in_the_interpreter
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
    layout = batch_norm._Layout.of(tensor.shape, interleaved)
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
