"""What is remembered of launches, on a GPU that is not there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import torch
from harness import INTERPRET, triton
from torch import Tensor

from gradnorm_kernels import kernels

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter does not compile")
activation: Any = importlib.import_module("gradnorm_kernels.kernels.activation")


class Compiled:
    """In the place of what Triton compiled, with its methods: notes what it is launched with."""

    __getitem__ = triton.compiler.CompiledKernel.__getitem__
    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, noted: list[Any]) -> None:
        self.noted = noted

    def _init_handles(self) -> None: ...

    def launch_metadata(self, *args: Any) -> None: ...

    def run(self, *args: Any) -> None:
        self.noted.append((self, *args))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The launches, of kernels that are not compiled."""
    noted: list[Any] = []
    device = object()  # Triton caches what it compiled under it

    def compile(kernel: Any, key: Any, *args: Any) -> Any:
        return kernel.device_caches[device][0].setdefault(key, Compiled(noted))

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    gpu = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 11,
        get_current_target=lambda: target,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        ),
    )
    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", compile)
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    forget()
    yield noted
    forget()


def forget() -> None:
    harness.common.gpu.cache_clear()
    harness.common._launcher.cache_clear()
    activation._launcher.cache_clear()
    layer_norm = importlib.import_module("gradnorm_kernels.kernels.layer_norm")
    layer_norm._plan.cache_clear()
    layer_norm._launch_sum.compiled.clear()


def calls_of(family: str) -> list[tuple[Any, ...]]:
    module = importlib.import_module(f"test_{family}_kernels")
    return list(module.calls(torch.float32))


def arguments(launch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without results and what lies between launches, which are new tensors each time."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.stride(), value.dtype
        return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value

    return plain(launch)


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_launches_again_as_triton_did(family: str, noted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for _name, launcher, *operands in calls_of(family):
        noted.clear()
        launcher(*operands)
        first = list(map(arguments, noted))
        noted.clear()
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.JITFunction, "run", lambda *args, **kwargs: pytest.fail("forgotten"))
            launcher(*operands)
        assert list(map(arguments, noted)) == first != []


def test_what_a_kernel_is_specialised_on_is_told_apart(noted: list[Any]) -> None:
    x = torch.zeros(64)
    aligned, unaligned = x[:32], x[1:33]
    double = torch.zeros(32, dtype=torch.float64)

    def silu(t: Tensor) -> Callable[..., Any]:
        noted.clear()
        activation.silu(t)
        return noted[0][0]

    compiled = [silu(t) for t in (aligned, unaligned, x[:31], double, x[:1])]
    assert len(set(compiled)) == 5
    assert [silu(t) for t in (aligned, unaligned, x[:31], double, x[:1])] == compiled
