"""The Triton kernels of the activations, run against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import INTERPRET, GPUTarget, compile_for, in_every_dtype, normal, on_every_device, triton
from torch import Tensor

activation: Any = importlib.import_module("gradnorm_kernels.kernels.activation")
tl = triton.language

APPROXIMATES = ["none", "tanh"]
in_both_modes = pytest.mark.parametrize("approximate", APPROXIMATES)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
@in_every_dtype
@in_both_modes
def test_launch_compiles_what_is_listed(
    approximate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    tensors = [torch.zeros(64, 96, dtype=dtype) for _ in range(3)]
    run_ops(activation, *tensors, approximate=approximate)

    listed = {
        s.kernel.__name__: compile_for(s, 90).asm["ptx"]
        for s in activation.specializations()
        if f"gelu_{approximate}-{'bf' if dtype == torch.bfloat16 else 'fp'}" in s.name
        and s.name.endswith(str(8 * dtype.itemsize))
    }
    assert {kernel.metadata.name: kernel.asm["ptx"] for kernel in launched} == listed
    assert len(listed) == 3


# Values. `reference` differentiates PyTorch's own gelu twice, in float64 for the truth and in the
# tested dtype for the error that PyTorch itself makes.

NAMES = ("output", "grad_input", "grad_grad_output", "grad_input of the double backward")


def run_ops(
    ops: Any, grad_grad_input: Tensor, grad_output: Tensor, input: Tensor, *, approximate: str
) -> tuple[Tensor, ...]:
    return (
        ops.gelu(input, approximate=approximate),
        ops.gelu_backward(grad_output, input, approximate=approximate),
        *ops.gelu_double_backward(grad_grad_input, grad_output, input, approximate=approximate),
    )


def run_kernels(*tensors: Tensor, approximate: str) -> tuple[Tensor, ...]:
    ops = torch.ops.gradnorm_kernels if tensors[0].is_cuda else activation
    return run_ops(ops, *tensors, approximate=approximate)


def reference(
    grad_grad_input: Tensor, grad_output: Tensor, input: Tensor, *, approximate: str
) -> tuple[Tensor, ...]:
    input = input.detach().requires_grad_()
    grad_output = grad_output.detach().requires_grad_()
    output = torch.nn.functional.gelu(input, approximate=approximate)
    (grad_input,) = torch.autograd.grad(output, input, grad_output, create_graph=True)
    second = torch.autograd.grad(grad_input, (grad_output, input), grad_grad_input)
    return output.detach(), grad_input.detach(), *second


def assert_as_accurate_as_stock(*tensors: Tensor, approximate: str, allow_one_ulp: bool = False) -> None:
    """The error is at most twice stock's, plus, if allowed, one unit in the last place.

    A comparison of two maxima says something of accuracy only over many elements.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    # Storing bfloat16, the interpreter truncates.
    allow_one_ulp |= dtype == torch.bfloat16 and device.type == "cpu"
    actual = run_kernels(*tensors, approximate=approximate)
    stock = reference(*tensors, approximate=approximate)
    truth = reference(*(t.double() for t in tensors), approximate=approximate)
    for name, a, s, t in zip(NAMES, actual, stock, truth, strict=True):
        assert (a.dtype, a.shape, a.device) == (dtype, t.shape, device), name
        if a.numel():
            # In float64 the truth is stock itself: a few hundred roundings of 1e-16 are between.
            tiny = 5e-14 + allow_one_ulp * torch.finfo(dtype).eps * t.abs().max().item()
            error = (a.double() - t).abs().max().item()
            stock_error = (s.double() - t).abs().max().item()
            assert error <= 2 * stock_error + tiny, f"{name}: {error} against {stock_error}"


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
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], approximate: str, dtype: torch.dtype, device: str) -> None:
    tensors = [normal(*shape, dtype=dtype, device=device) for _ in range(3)]
    assert_as_accurate_as_stock(*tensors, approximate=approximate, allow_one_ulp=True)


@on_every_device
@in_every_dtype
@in_both_modes
def test_range(approximate: str, dtype: torch.dtype, device: str) -> None:
    # Far enough out on both sides that every derivative has reached its limit, and half of the
    # points where the derivatives vary.
    ranges = [torch.linspace(-w, w, 20001, dtype=torch.float64) for w in (30, 4)]
    x = torch.cat(ranges).to(device, dtype)
    grads = [normal(*x.shape, dtype=dtype, device=device) for _ in range(2)]
    assert_as_accurate_as_stock(*grads, x, approximate=approximate)


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
    tensors = [layout(normal(*shape, dtype=torch.float32, device=device)) for layout in layouts]
    before = [t.clone() for t in tensors]
    assert_as_accurate_as_stock(*tensors, approximate="none", allow_one_ulp=True)
    assert all(map(torch.equal, tensors, before)), "an input was written to"

    # PyTorch's elementwise ops of the same inputs, in the same order, have the wanted layout.
    grad_grad_input, grad_output, x = tensors
    actual = run_kernels(*tensors, approximate="none")
    double_backward = torch.addcmul(grad_grad_input, grad_output, x)
    expected = [x.abs(), torch.mul(grad_output, x), double_backward, double_backward]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        a_strides = [stride for size, stride in zip(a.shape, a.stride(), strict=True) if size > 1]
        e_strides = [stride for size, stride in zip(e.shape, e.stride(), strict=True) if size > 1]
        assert a_strides == e_strides, name


@on_every_device
@in_every_dtype
@in_both_modes
def test_denormals(approximate: str, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter flushes denormals of bfloat16 to zero")
    finfo = torch.finfo(dtype)
    quantum = finfo.smallest_normal * finfo.eps  # the smallest denormal
    multiples = torch.tensor([-9, -2, 0, 2, 8, 12], dtype=torch.float64)
    x = (multiples * quantum).to(device, dtype)
    ones = torch.ones_like(x)
    output, *_ = run_kernels(ones, ones, x, approximate=approximate)
    # gelu(x) = x / 2 here. Flushed to zero, a multiple of 12 would be off by 6.
    error = (output.double() - x.double() / 2).abs().max().item()
    assert error <= quantum
    assert_as_accurate_as_stock(ones, ones, x, approximate=approximate, allow_one_ulp=True)
    # Denormal gradients where f' is 1 and f'' is 0.
    grad_grad_output = run_kernels(x, x, 30 * ones, approximate=approximate)[2]
    assert torch.equal(grad_grad_output, x)


@on_every_device
@in_every_dtype
@in_both_modes
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_huge(approximate: str, dtype: torch.dtype, device: str) -> None:
    """f, f' and f'' are at their limits: no power of x that overflows makes a NaN of them."""
    huge = torch.finfo(dtype).max
    sizes = [huge, huge / 2, huge**0.75, huge**0.5, huge**0.34]
    x = torch.tensor([s * size for size in sizes for s in (1, -1)], dtype=torch.float64)
    x = x.to(device, dtype)
    step = (x > 0).to(dtype)
    for gradient in (torch.ones_like(x), torch.full_like(x, huge)):
        actual = run_kernels(gradient, gradient, x, approximate=approximate)
        expected = (x * step, gradient * step, gradient * step, 0 * x)
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert torch.equal(a, e), name


@on_every_device
@in_every_dtype
@in_both_modes
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_inf(approximate: str, dtype: torch.dtype, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 1.0, 1.0, 1.0, 1.0, -2.0], device=device, dtype=dtype)
    grad_output = torch.tensor([1.0, 1, 1, nan, inf, 1, 1, -inf], device=device, dtype=dtype)
    grad_grad_input = torch.tensor([1.0, 1, 1, 1, 1, nan, inf, 1], device=device, dtype=dtype)
    tensors = (grad_grad_input, grad_output, x)
    actual = run_kernels(*tensors, approximate=approximate)
    expected = reference(*(t.double() for t in tensors), approximate=approximate)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        # Only a coarse comparison of the finite values among them.
        torch.testing.assert_close(
            a.double(), e, rtol=0.02, atol=0.01, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@triton.jit
def tile_start_kernel(start_ptr, program, block_size: tl.constexpr):
    if tl.program_id(0) == program:
        offsets, _ = activation._tile(0, block_size)
        tl.store(start_ptr, tl.min(offsets, axis=0))


@pytest.mark.skipif(not INTERPRET, reason="on a GPU, test_more_than_2_31_elements shows it")
def test_tile_beyond_2_31_elements_in_the_interpreter() -> None:
    start = torch.zeros(1, dtype=torch.int64)
    # Few programs, since the interpreter takes them one by one, and so the largest tile there can be.
    program, block_size = 2**12, 2**20
    tile_start_kernel[(program + 1,)](start, program, block_size=block_size)
    assert start.item() == program * block_size


@pytest.mark.gpu
@in_both_modes
def test_more_than_2_31_elements(approximate: str) -> None:
    n = 2**31 + 4099  # ends in a masked tile
    needed = 6 * n * torch.bfloat16.itemsize
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, {free >> 30} GiB are free")
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    outputs = run_kernels(x, x, x, approximate=approximate)
    # An address that wrapped around would leave one of these places unwritten or wrong.
    for start in (0, 2**30, 2**31 - 4099, 2**31 - 1, n - 4099):
        part = x[start : start + 4099].clone()
        expected = run_kernels(part, part, part, approximate=approximate)
        for name, a, e in zip(NAMES, outputs, expected, strict=True):
            assert torch.equal(a[start : start + 4099], e), f"{name} from {start}"


@on_every_device
def test_bad_input(device: str) -> None:
    """What the launcher or the Meta kernel says, without the Autograd key in front of them."""
    x = torch.ones(4, device=device)
    with pytest.raises(ValueError, match="approximate"):
        activation.gelu(x, approximate="exact")
    with pytest.raises(TypeError, match="input"):
        activation.gelu(x.int())
    with pytest.raises(ValueError, match="grad_output"):
        activation.gelu_backward(x[:3], x)
    with pytest.raises(TypeError, match="grad_grad_input"):
        activation.gelu_double_backward(x.double(), x, x)
    with pytest.raises(RuntimeError, match=r"grad_output .* got meta"):
        activation.gelu_backward(x.to("meta"), x)
