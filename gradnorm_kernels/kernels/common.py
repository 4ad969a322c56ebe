"""What the Triton kernels of every family share."""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Which pass a kernel that serves several of them is launched for.
FORWARD, BACKWARD, DOUBLE_BACKWARD = range(3)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Fused multiply-add is asked for by name because Triton's default differs between versions.
FP_FUSION = {"enable_fp_fusion": True}


def opmath(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on this dtype is done in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def opmath_of(ptr):
    dtype: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32
    return dtype


@triton.jit
def widen(value):
    """To the dtype arithmetic is done in."""
    return value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)


@triton.jit
def load(ptr, offsets, mask):
    """0 outside the mask."""
    return widen(tl.load(ptr + offsets, mask=mask, other=0.0))


@triton.jit
def moved(ptr, offset):
    """Of an absent tensor, None."""
    if ptr is None:
        return None
    else:
        return ptr + offset


@triton.jit
def load_parameter(ptr, offsets, mask, absent: tl.constexpr):
    if ptr is None:
        return absent
    else:  # Triton would compile what follows the if in any case.
        return load(ptr, offsets, mask)


# Normalisations: with < > the mean over what is normalised, h the normalised input and r the factor that made
# it so, output = w h + b.


@triton.jit
def project(a, mean, mean_h, h):
    """P a = a - <a> - h <a h>. Of one that is not centred (RMS norm), <a> is 0 wherever it stands."""
    return a - mean - h * mean_h


@triton.jit
def normalization_terms(v, g, h, w, u, centred: tl.constexpr):
    """Those whose means normalization_double_backward takes; None is one that has no part in it."""
    a = w * g
    return (
        v if centred else None,
        v * h,
        a if centred else None,
        a * h,
        v * a,
        u * g if centred and u is not None else None,
        u * g * h if u is not None else None,
    )


@triton.jit
def _plus(total, term):
    if term is None:
        return total
    else:
        return total + term


@triton.jit
def add_terms(totals, terms):
    return (
        _plus(totals[0], terms[0]),
        _plus(totals[1], terms[1]),
        _plus(totals[2], terms[2]),
        _plus(totals[3], terms[3]),
        _plus(totals[4], terms[4]),
        _plus(totals[5], terms[5]),
        _plus(totals[6], terms[6]),
    )


@triton.jit
def normalization_double_backward(means, v, g, h, r, w, u, t):
    """With v, u and t the gradients of the gradients of input, weight and bias, g the output's, and a = w g:

        grad_grad_output = w r P v + u h + t
        grad_input       = r P(u g) - r^2 (h <v P a> + <a h> P v + <v h> P a)

    and g r P v, whose sum is grad_weight. means are those of normalization_terms. u and t may be None.
    """
    v_mean, v_h, a_mean, a_h, v_a, ug_mean, ug_h = means
    projected = r * project(v, v_mean, v_h, h)
    grad_grad_output = w * projected
    # r is large where the input hardly varies: it multiplies differences, and no two terms that cancel. The
    # multiples of h are added up first, and those of g.
    of_h = r * (3.0 * a_h * v_h + a_mean * v_mean - v_a)
    of_a = -r * v_h
    if u is None:
        grad_input = of_h * h - r * a_h * (v - v_mean) + of_a * (w * g - a_mean)
    else:
        grad_grad_output += u * h
        of_g = u + of_a * w
        grad_input = (of_h - ug_h) * h - r * a_h * (v - v_mean) + (of_g * g - (ug_mean + of_a * a_mean))
    if t is not None:
        grad_grad_output += t
    return grad_grad_output, r * grad_input, g * projected


# Launchers.


class Gpu(NamedTuple):
    """What a launch is chosen by."""

    backend: str
    capability: int  # 90 is sm_90; 0 where there is none
    shared_memory: int  # the most bytes that a program may have
    multiprocessors: int


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """As Triton's driver has it, which also checks launches against it."""
    if device.type == "cpu":  # for Triton's interpreter
        return Gpu("cuda", 90, 227 * 1024, 2)
    driver = triton.runtime.driver.active
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 does nothing, for a stand-in
        target = driver.get_current_target()
        properties = driver.utils.get_device_properties(driver.get_current_device())
    capability = target.arch if target.backend == "cuda" else 0
    return Gpu(target.backend, capability, properties["max_shared_mem"], properties["multiprocessor_count"])


def at_most_128_registers(device: Gpu) -> dict[str, int]:
    """An option of a launch: left to itself, ptxas spills some for the sake of one more program at a time."""
    return {"maxnreg": 128} if device.backend == "cuda" else {}


class Launcher:
    """A kernel with its constants and options, which remembers what Triton compiled for what operands. These
    are tensors, numbers, None, and tuples of a tensor and numbers.

    Triton finds that by all that it may depend on, in twice the host time. Here it is found by what these
    kernels are specialised on: dtypes, alignments to 16 bytes, and the very numbers.
    """

    # Told of every launch; replay.py's.
    on_launch: ClassVar[Callable[..., None] | None] = None

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self._kernel = kernel
        self.constants = constants
        self.compiled: dict[tuple[Any, ...], Any] = {}
        # The constants, in the order of the kernel's parameters.
        self._rest: list[Any] = []

    def __call__(self, grid: tuple[int, ...], operands: tuple[Any, ...]) -> None:
        key: list[Any] = []
        for operand in operands:
            if type(operand) is tuple:
                operand, *numbers = operand
                key += numbers
            if isinstance(operand, Tensor):
                key += operand.dtype, operand.data_ptr() % 16, operand.get_device()
            else:
                key.append(operand)
        compiled = self.compiled.get(of := tuple(key))
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*operands, *self._rest)
        else:
            compiled = self._kernel[grid](*operands, **self.constants)
            if compiled is not None:  # There is none of the interpreter's.
                names = self._kernel.arg_names[len(operands) :]
                self._rest = [self.constants[name] for name in names]
                if len(self.compiled) >= 1024:
                    self.compiled.clear()
                self.compiled[of] = compiled
        if self.on_launch is not None:
            self.on_launch(self._kernel, compiled, grid, operands, self.constants)


@functools.lru_cache(maxsize=4096, typed=True)
def _launcher(kernel: Any, **constants: Any) -> Launcher:
    return Launcher(kernel, constants)


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """kernel[grid](*operands, **constants), remembered: constants are what the kernel is compiled for, and
    options."""
    _launcher(kernel, **constants)(grid, operands)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def empty_like(tensor: Tensor, wanted: bool = True) -> Tensor | None:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else None


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient, of which an undefined one is zero."""
    return torch.zeros_like(like) if grad is None else grad


def on_meta(op: str, tensors: tuple[Tensor, ...], *settings: Any, **options: Any) -> Any:
    """What the op's Meta kernel gives for such tensors, or what is raised for them or for their devices."""
    overload = getattr(torch.ops.gradnorm_kernels, op).default
    names = [argument.name for argument in overload._schema.arguments[: len(tensors)]]
    device = tensors[-1].device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device != device:
            devices = f"{names[-1]} ({device}), got {tensor.device}"
            raise RuntimeError(f"{op}: expected {name} to be on the device of {devices}")
    layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    return _results_on_meta(overload, layouts, settings, tuple(options.items()))


@functools.lru_cache(maxsize=4096)
def _results_on_meta(
    overload: Any,
    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...],
    settings: tuple[Any, ...],
    options: tuple[tuple[str, Any], ...],
) -> Any:
    meta = (
        torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in layouts
    )
    return overload(*meta, *settings, **dict(options))


def check_operands(
    op: str,
    input: Tensor,
    others: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor | None],
    columns: int,
) -> None:
    """The others are like the input, and the parameters have an element for each of the columns."""
    shape, dtype, device = input.shape, input.dtype, input.device
    if dtype not in DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"{op}: expected input to be one of {names}, got {dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: expected {name} to have the dtype of input ({dtype}), got {tensor.dtype}")
        if tensor.shape != shape:
            shapes = f"({list(shape)}), got {list(tensor.shape)}"
            raise ValueError(f"{op}: expected {name} to have the shape of input {shapes}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.numel() != columns:
            raise ValueError(f"{op}: expected {name} to have {columns} elements, got {list(parameter.shape)}")
    for tensors in (others, parameters):
        for name, any_tensor in tensors.items():
            if any_tensor is not None and any_tensor.device != device:
                devices = f"({device}), got {any_tensor.device}"
                raise RuntimeError(f"{op}: expected {name} to be on the device of input {devices}")
