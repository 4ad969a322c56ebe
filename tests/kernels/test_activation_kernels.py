"""The Triton kernels of the activations, run against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import torch
from activations import (
    ACTIVATIONS,
    NAMES,
    Activation,
    all_orders_by_autograd,
    assert_no_worse_than_stock,
    each_activation,
    each_kind,
)
from contract import Calls
from harness import in_every_dtype, meta, normal, on_every_device, triton
from torch import Tensor

activation: Any = importlib.import_module("gradnorm_kernels.kernels.activation")
tl = triton.language

GELU = ACTIVATIONS[0]


def triple_backward(act: Activation, *tensors: Tensor) -> Any:
    return getattr(activation, f"{act.name}_triple_backward")(*tensors, **act.params)


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Of aligned tensors of a multiple of 16 elements, whose accesses are all of 128 bits."""
    x = meta(64, 96, dtype=dtype)
    for act in {(act.name, act.params.get("approximate")): act for act in ACTIVATIONS}.values():
        yield str(act), act.all_orders, x, x, x, activation
        if act.curved:
            yield f"{act}-triple", triple_backward, act, x, x, x, x, x


test_compiles_without_spills = harness.compilation_test(calls, wide=["all"])


def run_kernels(act: Activation, *tensors: Tensor) -> list[Tensor]:
    return act.all_orders(*tensors, namespace=None if tensors[0].is_cuda else activation)


def assert_as_accurate_as_stock(act: Activation, *tensors: Tensor, ulps: int = 0) -> None:
    dtype, on_cpu = tensors[0].dtype, tensors[0].device.type == "cpu"
    if on_cpu:
        # The interpreter's exp is NumPy's. Storing bfloat16, it truncates, also what the next op then reads.
        ulps = max(ulps, 2 if act.saves_output and dtype == torch.bfloat16 else 1)
    assert_no_worse_than_stock(act, run_kernels(act, *tensors), *tensors, ulps=ulps)


SHAPES = [
    (0,),
    (3, 0, 5),
    (),  # no dimension at all
    (1,),  # Triton compiles a size of 1 as a constant
    (7,),  # less than one 16-byte access in float16
    (511,),  # one short of a tile in float64,
    (1023,),  # and in the other dtypes
    (513,),  # one more than a tile
    (1025,),
    (3, 1024),  # whole tiles, and so the vectorised kernel without a masked tail
    (5, 7, 11, 13),  # several tiles, none of the sizes a power of two
]


@on_every_device
@in_every_dtype
@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], act: Activation, dtype: torch.dtype, device: str) -> None:
    tensors = [normal(*shape, dtype=dtype, device=device) for _ in range(3)]
    assert_as_accurate_as_stock(act, *tensors, ulps=2)


@on_every_device
@in_every_dtype
@each_activation
def test_range(act: Activation, dtype: torch.dtype, device: str) -> None:
    # Far enough out on both sides that every derivative has reached its limit, and half of the
    # points where the derivatives vary.
    ranges = [torch.linspace(-w, w, 10001, dtype=torch.float64) for w in (30, 4)]
    x = torch.cat(ranges).to(device, dtype)
    grads = [normal(*x.shape, dtype=dtype, device=device) for _ in range(2)]
    assert_as_accurate_as_stock(act, *grads, x)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.curved], ids=str)
def test_triple_backward(act: Activation, dtype: torch.dtype, device: str) -> None:
    """Against the CPU's in float64."""
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    operand = act.reference(x) if act.saves_output else x
    tensors = [
        t.to(device, dtype)
        for t in (*(normal(2001, dtype=torch.float64, device="cpu") for _ in range(4)), operand)
    ]
    expected = act.op("_triple_backward")(*(t.double().cpu() for t in tensors), **act.params)
    for a, e in zip(triple_backward(act, *tensors), expected, strict=True):
        assert a.dtype == dtype
        error = (a.double().cpu() - e).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * e.abs().max()


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.kinks], ids=str)
def test_derivatives_at_kinks_are_stocks(act: Activation, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor(act.kinks, dtype=torch.float64)[:, None].expand(-1, 41).to(device, dtype)
    tensors = [torch.full_like(x, 2), torch.full_like(x, 3), x]
    stock = all_orders_by_autograd(act.stock_forward, *tensors)
    for ours, theirs in zip(run_kernels(act, *tensors), stock, strict=True):
        torch.testing.assert_close(ours, theirs)


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], dim=-1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, but not at an address divisible by 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def pooled(x: Tensor) -> Tensor:
    """As an average of an image that is channels_last: only strides of dimensions of size 1 differ."""
    return x.view(x.shape[0], 1, 1, -1).permute(0, 3, 1, 2)


LAYOUTS = [
    (contiguous,) * 3,
    (channels_last,) * 3,
    (transposed,) * 3,
    (sliced,) * 3,  # equal strides, but not dense
    (expanded,) * 3,
    (misaligned,) * 3,
    (contiguous, contiguous, channels_last),
    (channels_last, contiguous, contiguous),
    (contiguous, channels_last, transposed),
    (expanded, contiguous, sliced),
]
Layout = Callable[[Tensor], Tensor]


@on_every_device
@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda row: "-".join(f.__name__ for f in row))
@pytest.mark.parametrize(
    "shape",
    [
        (4, 16, 8, 8),  # whole tiles
        (2, 3, 5, 7),  # every size distinct: no permutation is a no-op
        (3, 8, 1, 1),  # strides of size-1 dimensions, which say nothing
    ],
    ids=str,
)
def test_layouts(
    shape: tuple[int, ...],
    layouts: tuple[Layout, Layout, Layout],
    device: str,
) -> None:
    """Neither the dtype nor the activation has any part in this."""
    act = GELU
    tensors = [layout(normal(*shape, dtype=torch.float32, device=device)) for layout in layouts]
    before = [t.clone() for t in tensors]
    assert_as_accurate_as_stock(act, *tensors, ulps=1)
    assert all(map(torch.equal, tensors, before)), "an input was written to"

    # PyTorch's elementwise ops of the same inputs, in the same order, have the wanted layout.
    grad_grad_input, grad_output, x = tensors
    actual = run_kernels(act, *tensors)
    double_backward = torch.addcmul(grad_grad_input, grad_output, x)
    expected = [x.abs(), torch.mul(grad_output, x), double_backward, double_backward]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        a_strides = [stride for size, stride in zip(a.shape, a.stride(), strict=True) if size > 1]
        e_strides = [stride for size, stride in zip(e.shape, e.stride(), strict=True) if size > 1]
        assert a_strides == e_strides, name


@on_every_device
@pytest.mark.parametrize("layout", [pooled, expanded], ids=lambda layout: layout.__name__)
def test_a_layout_is_asked_for_once(layout: Layout, device: str) -> None:
    """To call the op's Meta kernel takes longer than the launch."""
    x, g = (normal(3, 8, 1, 1, dtype=torch.float32, device=device) for _ in range(2))
    first = activation.silu_backward(layout(g), x)
    with Calls() as calls:
        second = activation.silu_backward(layout(g), x)
    assert torch.equal(first, second) and "silu_backward" not in calls.names


@on_every_device
@in_every_dtype
@each_activation
def test_denormals(act: Activation, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter flushes denormals of bfloat16 to zero")
    finfo = torch.finfo(dtype)
    quantum = finfo.smallest_normal * finfo.eps  # the smallest denormal
    multiples = torch.tensor([-9, -2, 0, 2, 8, 12], dtype=torch.float64)
    x = (multiples * quantum).to(device, dtype)
    ones = torch.ones_like(x)
    output, *_ = run_kernels(act, ones, ones, x)
    expected = act.reference(x.double())
    # Flushed to zero, a multiple of 12 would be off by 6 where f' is 1/2.
    error = (output.double() - expected).abs().max().item()
    assert error <= max(quantum, finfo.eps * expected.abs().max().item())
    if act.limits is None:
        return
    # Denormal gradients where f' is at its limit and f'' is 0.
    _, slope = act.limit(30 * ones.double())
    grad_grad_output = run_kernels(act, x, x, 30 * ones)[2]
    torch.testing.assert_close(grad_grad_output, (x * slope).to(dtype), rtol=0, atol=quantum)


@on_every_device
@in_every_dtype
@each_activation
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_huge(act: Activation, dtype: torch.dtype, device: str) -> None:
    """f, f' and f'' are at their limits: no power of x that overflows makes a NaN of them."""
    huge = torch.finfo(dtype).max
    sizes = [huge, huge / 2, huge**0.75, huge**0.5]
    x = torch.tensor([s * size for size in sizes for s in (1, -1)], dtype=torch.float64)
    x = x.to(device, dtype)
    for gradient, expected in act.far_out(x):
        actual = run_kernels(act, gradient, gradient, x)
        if act.saves_output:  # between the ops is a product of both gradients
            actual, expected = actual[:3], expected[:3]
        for name, a, e in zip(NAMES, actual, expected, strict=False):
            # Storing bfloat16, the interpreter truncates.
            torch.testing.assert_close(a, e.to(dtype), msg=lambda m, n=name: f"{n}: {m}")


@on_every_device
@in_every_dtype
@each_activation
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_inf(act: Activation, dtype: torch.dtype, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf], device=device, dtype=dtype)
    output, *_ = run_kernels(act, x, x, x)
    expected = act.stock_forward(x.double())
    torch.testing.assert_close(output.double(), expected, equal_nan=True)
    x = torch.full((4,), 1.0, device=device, dtype=dtype)
    g = torch.tensor([nan, inf, 1, -inf], device=device, dtype=dtype)
    v = torch.tensor([1.0, 1, nan, 1], device=device, dtype=dtype)
    actual = run_kernels(act, v, g, x)
    ones = torch.ones_like(x).double()
    f, df, _, ddf = all_orders_by_autograd(act.reference, ones, ones, x.double())
    expected = (f, g * df, v * df, v * ddf * g if act.curved else 0 * ones)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        # Only a coarse comparison of the finite values among them.
        torch.testing.assert_close(
            a.double(), e, rtol=0.02, atol=0.01, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@triton.jit
def tile_start_kernel(start_ptr, program, block_size: tl.constexpr):
    if tl.program_id(0) == program:
        offsets, _ = activation.tile(0, block_size)
        tl.store(start_ptr, tl.min(offsets, axis=0))


@harness.in_the_interpreter
def test_tile_beyond_2_31_elements_in_the_interpreter() -> None:
    start = torch.zeros(1, dtype=torch.int64)
    # Few programs, since the interpreter takes them one by one, and so the largest tile there can be.
    program, block_size = 2**12, 2**20
    tile_start_kernel[(program + 1,)](start, program, block_size=block_size)
    assert start.item() == program * block_size


@pytest.mark.gpu
@each_kind
def test_more_than_2_31_elements(act: Activation) -> None:
    n = 2**31 + 4099  # ends in a masked tile
    harness.skip_without_memory(6 * n * torch.bfloat16.itemsize)
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    starts = (0, 2**30, 2**31 - 4099, 2**31 - 1, n - 4099)
    harness.assert_same_in_parts(lambda x: run_kernels(act, x, x, x), starts, 4099, x)


@on_every_device
def test_bad_input(device: str) -> None:
    x = torch.ones(4, device=device)
    far = x.to("meta")
    assert torch.equal(activation.relu(-x.int()), 0 * x.int())
    assert torch.equal(activation.silu(1j * x), torch.nn.functional.silu(1j * x))
    with pytest.raises(ValueError, match="approximate"):
        activation.gelu(x, approximate="exact")
    harness.assert_rejected(
        (TypeError, "input", activation.gelu, x.int()),
        (ValueError, "grad_output", activation.gelu_backward, x[:3], x),
        (TypeError, "grad_grad_input", activation.gelu_double_backward, x.double(), x, x),
        (RuntimeError, "grad_output .* got meta", activation.gelu_backward, far, x),
        (RuntimeError, "device of output .* got meta", activation.tanh_backward, far, x),
    )
