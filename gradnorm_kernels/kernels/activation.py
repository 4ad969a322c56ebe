"""Triton kernels of the elementwise activations.

One kernel per pass serves every activation: an activation is its f, f' and f'', three small
functions that the kernel receives as compile-time constants. To add one, write the three
functions, give them a row in `ACTIVATIONS`, and make its ops with `_make_ops`.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FP_FUSION, Specialization, pointer_type, widen

# Kernels. A tensor is a flat array here: the launcher sees to it that all arrays of a launch share
# one memory layout. `parameters` is spelled out because Triton's generated launcher has a local
# variable `params`.


@triton.jit
def _tile(n, block_size: tl.constexpr):
    # 64-bit before the product: a tensor may have more than 2^31 elements.
    offsets = tl.program_id(0).to(tl.int64) * block_size + tl.arange(0, block_size)
    return offsets, offsets < n


@triton.jit
def activation_fwd_kernel(
    input_ptr, output_ptr, n, parameters: tl.constexpr, f: tl.constexpr, block_size: tl.constexpr
):
    """output = f(input). Moves 2n elements: reads 1, writes 1."""
    offsets, mask = _tile(n, block_size)
    x = widen(tl.load(input_ptr + offsets, mask=mask))
    tl.store(output_ptr + offsets, f(x, parameters), mask=mask)


@triton.jit
def activation_bwd_kernel(
    grad_output_ptr,
    input_ptr,
    grad_input_ptr,
    n,
    parameters: tl.constexpr,
    df: tl.constexpr,
    block_size: tl.constexpr,
):
    """grad_input = grad_output * f'(input). Moves 3n elements: reads 2, writes 1."""
    offsets, mask = _tile(n, block_size)
    x = tl.load(input_ptr + offsets, mask=mask)
    grad_output = tl.load(grad_output_ptr + offsets, mask=mask)
    grad_input = widen(grad_output) * df(widen(x), parameters)
    tl.store(grad_input_ptr + offsets, grad_input, mask=mask)


@triton.jit
def activation_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    n,
    parameters: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    block_size: tl.constexpr,
):
    """grad_grad_output = grad_grad_input * f'(input) and
    grad_input = grad_grad_input * grad_output * f''(input).

    Moves 5n elements: reads 3, writes 2. What f' and f'' have in common is computed once: the
    compiler merges equal subexpressions.
    """
    offsets, mask = _tile(n, block_size)
    x = tl.load(input_ptr + offsets, mask=mask)
    grad_grad_input = tl.load(grad_grad_input_ptr + offsets, mask=mask)
    grad_output = tl.load(grad_output_ptr + offsets, mask=mask)
    x = widen(x)
    grad_grad_input = widen(grad_grad_input)
    grad_grad_output = grad_grad_input * df(x, parameters)
    # f'' before the other gradient: where it is 0, two large gradients cannot overflow to inf * 0.
    grad_input = grad_grad_input * ddf(x, parameters) * widen(grad_output)
    tl.store(grad_grad_output_ptr + offsets, grad_grad_output, mask=mask)
    tl.store(grad_input_ptr + offsets, grad_input, mask=mask)


# GELU, erf: f = x Phi(x), f' = Phi + x phi, f'' = 2 phi - x (x phi).

_SQRT_1_2 = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * _SQRT_1_2)


@triton.jit
def _normal_pdf(x):
    return _INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_erf(x, parameters: tl.constexpr):
    return x * _normal_cdf(x)


@triton.jit
def gelu_erf_df(x, parameters: tl.constexpr):
    return _normal_cdf(x) + x * _normal_pdf(x)


@triton.jit
def gelu_erf_ddf(x, parameters: tl.constexpr):
    phi = _normal_pdf(x)
    # Not (2 - x^2) phi: x^2 may be inf where phi is 0.
    return 2.0 * phi - x * (x * phi)


# GELU, tanh: f = x s with s = sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3) = A x + B x^3.
# With q = s (1 - s) = ds/dz, z' = A + 3 B x^2 and z'' = 6 B x,
#     f' = s + x q z',   f'' = 2 q z' + x (q z'' + z' (q z') (1 - 2 s)).
# q is the first factor of every product below: it is 0 long before a power of x overflows.

_A = tl.constexpr(2 * math.sqrt(2 / math.pi))
_B = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_B3 = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def _gelu_tanh_gate(x):
    """s = sigmoid(z) and q = s (1 - s), the smaller of s and 1 - s free of cancellation."""
    z = x * (_A + _B * x * x)
    e = tl.exp(-tl.abs(z))
    smaller = e / (1.0 + e)
    larger = 1.0 - smaller
    return tl.where(z >= 0, larger, smaller), smaller * larger


@triton.jit
def gelu_tanh(x, parameters: tl.constexpr):
    s, _ = _gelu_tanh_gate(x)
    return x * s


@triton.jit
def gelu_tanh_df(x, parameters: tl.constexpr):
    s, q = _gelu_tanh_gate(x)
    qx = q * x
    return s + (_A * qx + _B3 * (qx * x * x))


@triton.jit
def gelu_tanh_ddf(x, parameters: tl.constexpr):
    s, q = _gelu_tanh_gate(x)
    qxx = q * x * x
    qdz = _A * q + _B3 * qxx
    qdzdz = _A * qdz + _B3 * (qdz * x * x)
    return 2.0 * (qdz + _B3 * qxx) + qdzdz * x * (1.0 - 2.0 * s)


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, in the hot path
class Activation:
    """f, f' and f'' as functions of (x, parameters): compile-time floats, such as ELU's alpha."""

    f: Any
    df: Any
    ddf: Any
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Pass:
    """A kernel, the numbers of arrays it reads and writes, and the functions it is built from."""

    kernel: Any
    reads: int
    writes: int
    functions: tuple[str, ...]


FORWARD = Pass(activation_fwd_kernel, 1, 1, ("f",))
BACKWARD = Pass(activation_bwd_kernel, 2, 1, ("df",))
DOUBLE_BACKWARD = Pass(activation_bwd_bwd_kernel, 3, 2, ("df", "ddf"))
PASSES = (FORWARD, BACKWARD, DOUBLE_BACKWARD)

ACTIVATIONS = {
    "gelu_none": Activation(gelu_erf, gelu_erf_df, gelu_erf_ddf),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_df, gelu_tanh_ddf),
}

# Elements a program owns. With 4 warps a thread owns 8 elements (4 of float64), which is one or two
# 16-byte accesses per array: bytes in flight enough, and registers few enough that most warps of an
# SM are resident.
_BLOCK = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 1024, torch.float64: 512}
_OPTIONS = {"num_warps": 4, **FP_FUSION}


@functools.cache
def _constants(pass_: Pass, activation: Activation, dtype: torch.dtype) -> dict[str, Any]:
    functions = {name: getattr(activation, name) for name in pass_.functions}
    return {"parameters": activation.parameters, **functions, "block_size": _BLOCK[dtype]}


def _launch(pass_: Pass, activation: Activation, tensors: tuple[Tensor, ...]) -> None:
    """Run over the tensors, inputs before outputs, which all share one dense memory layout."""
    n = tensors[0].numel()
    if n == 0:
        return
    constants = _constants(pass_, activation, tensors[0].dtype)
    grid = (-(-n // constants["block_size"]),)  # triton.cdiv takes 2 us of host time
    with torch.cuda.device_of(tensors[0]):  # does nothing for a CPU tensor (Triton's interpreter)
        pass_.kernel[grid](*tensors, n, **constants, **_OPTIONS)


def _in_one_layout(
    op: str, inputs: tuple[Tensor, ...], settings: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs in the layout of the op's output, copied where they differ, and an empty output.

    The op's Meta kernel says what the output looks like, and rejects inputs that do not match.
    """
    overload = getattr(torch.ops.gradnorm_kernels, op).default
    device = inputs[-1].device
    for argument, tensor in zip(overload._schema.arguments, inputs, strict=False):
        if tensor.device != device:
            raise RuntimeError(
                f"{op}: expected {argument.name} to be on the device of input ({device}), got {tensor.device}"
            )
    on_meta = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in inputs)
    meta = overload(*on_meta, *settings, **options)
    meta = meta[0] if isinstance(meta, tuple) else meta

    def empty() -> Tensor:
        return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)

    def in_layout(tensor: Tensor) -> Tensor:
        dims = zip(tensor.shape, meta.shape, tensor.stride(), meta.stride(), strict=False)
        # The stride of a dimension of size 1 says nothing.
        same = all(size == wanted and (a == b or size == 1) for size, wanted, a, b in dims)
        same = same and tensor.ndim == meta.ndim and tensor.dtype == meta.dtype
        return tensor if same else empty().copy_(tensor)

    return tuple(in_layout(tensor) for tensor in inputs), empty()


def _make_op(pass_: Pass, op: str, select: Callable[..., Activation]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
        inputs, settings = args[: pass_.reads], args[pass_.reads :]
        activation = select(*settings, **options)
        like = inputs[-1]
        if like.dtype not in _BLOCK:
            names = ", ".join(str(dtype)[6:] for dtype in _BLOCK)
            raise TypeError(f"{op}: expected input to be one of {names}, got {like.dtype}")
        # empty_like keeps the strides of a dense tensor, and of no other.
        output = torch.empty_like(like)
        strides = output.stride()
        for tensor in inputs:
            if (
                tensor.stride() != strides
                or tensor.shape != like.shape
                or tensor.dtype != like.dtype
                or tensor.device != like.device
            ):
                inputs, output = _in_one_layout(op, inputs, settings, options)
                break
        outputs = (output, *(torch.empty_like(output) for _ in range(pass_.writes - 1)))
        _launch(pass_, activation, inputs + outputs)
        return output if pass_.writes == 1 else outputs

    run.__name__ = run.__qualname__ = op
    return run


def _make_ops(name: str, select: Callable[..., Activation]) -> tuple[Callable[..., Any], ...]:
    """An activation's three ops; select makes an Activation of what follows their tensors."""
    return (
        _make_op(FORWARD, name, select),
        _make_op(BACKWARD, f"{name}_backward", select),
        _make_op(DOUBLE_BACKWARD, f"{name}_double_backward", select),
    )


def _select_gelu(*, approximate: str = "none") -> Activation:
    activation = ACTIVATIONS.get(f"gelu_{approximate}")
    if activation is None:
        raise ValueError(f"gelu: expected approximate to be 'none' or 'tanh', got {approximate!r}")
    return activation


gelu, gelu_backward, gelu_double_backward = _make_ops("gelu", _select_gelu)


def specializations() -> Iterator[Specialization]:
    """Every kernel x activation x dtype, for aligned tensors of a multiple of 16 elements."""
    for pass_, (activation, functions), dtype in itertools.product(PASSES, ACTIVATIONS.items(), _BLOCK):
        constants = _constants(pass_, functions, dtype)
        pointer = pointer_type(dtype)
        arguments = tuple(name for name in pass_.kernel.arg_names if name not in constants)
        yield Specialization(
            f"{pass_.kernel.__name__}-{activation}-{pointer[1:]}",
            pass_.kernel,
            {name: "i32" if name == "n" else pointer for name in arguments}
            | dict.fromkeys(constants, "constexpr"),
            constants,
            arguments,
            _OPTIONS,
            wide_accesses=(pass_.reads, pass_.writes),
        )
