"""``compile`` and ``compile_modules``: what is done with a captured region is in `regions`."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from .checkpoint import blocks_of, wrap_forward

if TYPE_CHECKING:
    from .regions import Backend

__all__ = ["compile", "compile_modules"]

Model = TypeVar("Model", bound=nn.Module)


class Options(tuple[tuple[str, Any], ...]):
    """Of :func:`torch.compile`, so that they can be a key."""

    __slots__ = ()


@functools.cache
def _backend(options: Options) -> Backend:
    """One object for the same options, since Dynamo compiles anew for another."""
    # Only here, because what it imports takes a second.
    from .regions import Backend

    return Backend(_thaw(options))


# Those of torch.compile that say how a graph is compiled; the others say how it is captured.
_OF_PIECES = ("backend", "mode", "options")


def compile(model: Any = None, **options: Any) -> Any:
    """:func:`torch.compile`, for modules and functions whose gradients are differentiated once more.

    What it returns is called from code that is not compiled, and there
    ``torch.autograd.grad(..., create_graph=True)`` and a ``backward()`` of the result work, where
    that of :func:`torch.compile` raises. Forward, first gradients and the gradients of these are
    compiled as they are first asked for. Nothing that takes a matrix product or a convolution is computed
    again; AOTAutograd's partitioner says what is kept. Random numbers are drawn and buffers change once.

    Fused modules and functions give way to PyTorch's ops inside, which the compiler fuses. Only those stay
    that it has nothing faster for: fused attention and the weight gradients of depthwise convolutions.
    PyTorch's own fused attention, which has no second derivative, becomes matrix products and a softmax. A
    third derivative is exact but not compiled. A graph that cannot be traced with its derivatives runs
    without compiling, and a warning says why.

    Args:
        model: a module or function. Without it, a decorator is returned.
        options: of :func:`torch.compile`.

    Raises:
        RuntimeError: in a third derivative through random numbers or buffers that change in the forward; at
            the first call, as an error of the backend, for custom autograd Functions and other higher-order
            operators.
    """
    if model is None:
        return functools.partial(compile, **options)
    pieces = {key: options.pop(key) for key in _OF_PIECES if key in options}
    return torch.compile(model, backend=_backend(_freeze(pieces)), **options)


def compile_modules(
    model: Model,
    select: Callable[[str, nn.Module], bool] | None = None,
    *,
    undo: bool = False,
    **options: Any,
) -> Model:
    """Lets the repeated blocks of ``model`` run as by :func:`compile`, in place, and returns ``model``.

    Blocks of the same structure share one compilation, whatever their weights. Each keeps its class,
    ``state_dict`` and hooks, and gains an attribute ``forward``. Together with :func:`checkpoint_modules`,
    before or after, blocks are also computed again in both backward passes; its hooks break their graphs
    into smaller ones, which costs time.

    Args:
        model, select, undo: as for :func:`checkpoint_modules`.
        options: of :func:`torch.compile`. By default ``dynamic`` is False: another shape compiles anew.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
        ValueError: if it has no such blocks.
    """
    for block in blocks_of(model, select, "compile_modules", undo):
        wrapper: Any = _Compiled(_structure(block), _freeze({"dynamic": False, **options}))
        wrap_forward(block, wrapper, undo)
    return model


class _Compiled(NamedTuple):
    """Calls a forward compiled. It is copied and pickled by what it is made of."""

    structure: tuple[Any, ...]
    options: Options

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _compiled(self.structure, self.options)(forward, *args, **kwargs)


@functools.cache
def _compiled(structure: tuple[Any, ...], options: Options) -> Callable[..., Any]:
    def region(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Dynamo keeps what it compiled, and how often, by the code object: here one for each structure.
    code = region.__code__.replace(co_name=f"region_{next(_numbers)}")
    return compile(types.FunctionType(code, globals()), **_thaw(options))


_numbers = itertools.count()


def _structure(module: nn.Module) -> tuple[Any, ...]:
    state = [*module.named_parameters(), *module.named_buffers()]
    kinds = tuple((name, type(m).__qualname__) for name, m in module.named_modules())
    return kinds, tuple((name, *tensor.shape) for name, tensor in state)


def _freeze(options: dict[str, Any]) -> Options:
    return Options((k, _freeze(v) if isinstance(v, dict) else v) for k, v in sorted(options.items()))


def _thaw(options: Options) -> dict[str, Any]:
    return {k: _thaw(v) if isinstance(v, Options) else v for k, v in options}
