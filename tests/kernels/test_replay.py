"""Launches that C++ repeats, against Triton's own of the same calls.

The driver is a stand-in, which must be there before any other is loaded: these tests run in a process of
their own.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest
import stand_in
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_kernels import _tf32, kernels
from gradnorm_kernels.kernels import common

TESTS = Path(__file__).parent
HAS_STAND_IN = stand_in.LIBRARY in os.environ
in_the_child = pytest.mark.skipif(
    not HAS_STAND_IN, reason="test_replays_launches runs these in a process of its own"
)
ops = torch.ops.gradnorm_kernels
CUDA, PLAIN = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("CUDA", "PrivateUse2"))


@pytest.mark.skipif(HAS_STAND_IN or harness.INTERPRET, reason="this is the process that it starts")
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is loaded as on Linux")
def test_replays_launches(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-rp", "--no-header", Path(__file__).name],
        check=False,
        env=os.environ | stand_in.environment(tmp_path),
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    have_passed = all(
        f"PASSED test_replay.py::test_family[{family}]" in child.stdout for family in kernels.FAMILIES
    )
    if child.returncode != 0 or not have_passed:
        pytest.fail(f"with a stand-in for the driver:\n{child.stdout}\n{child.stderr}", pytrace=False)


@pytest.fixture(scope="module", autouse=HAS_STAND_IN)
def installed(tmp_path_factory: pytest.TempPathFactory) -> None:
    stand_in.install(tmp_path_factory.mktemp("kernels"))


class Allocations(TorchDispatchMode):
    """The tensors that are made, which it keeps, after the operands."""

    def __init__(self, operands: Iterator[Tensor]) -> None:
        super().__init__()
        self.tensors = list(operands)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in([result]):
            if tensor.device.type != "meta" and memory(tensor) not in map(memory, self.tensors):
                self.tensors.append(tensor)
        return result


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def launches(op: Any, keys: Any, *args: Any, **kwargs: Any) -> tuple[list[stand_in.Noted], list[Any], Any]:
    """The launches of a call, addresses in them as numbers of tensors and bytes from where they begin, and
    what there is to say of the results; the results."""
    stand_in.take_launches()
    with Allocations(tensors_in([*args, *kwargs.values()])) as allocations:
        results = op.redispatch(keys, *args, **kwargs)
    results = results if isinstance(results, (tuple, list)) else (results,)

    def relative(word: int) -> Any:
        for number, tensor in enumerate(allocations.tensors):
            storage = tensor.untyped_storage()
            if 0 <= word - storage.data_ptr() < storage.nbytes():
                return number, word - tensor.data_ptr()
        return word

    noted = [
        launch._replace(parameters=tuple(map(relative, launch.parameters)))
        for launch in stand_in.take_launches()
    ]
    described = [
        result
        if result is None
        else (result.shape, result.stride(), result.dtype, relative(result.data_ptr()))
        for result in results
    ]
    return noted, described, results


def materialised(value: Any) -> Any:
    """A tensor in memory of its own, which nothing writes to."""
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8).view(value.dtype)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def assert_as_triton_launches(name: str, *args: Any, **kwargs: Any) -> tuple[int, Any]:
    """The number of launches, and the results."""
    op = getattr(ops, name).default
    noted, described, results = launches(op, CUDA, *args, **kwargs)
    assert (noted, described) == launches(op, PLAIN, *args, **kwargs)[:2]
    assert noted and all(launch.context for launch in noted)
    return len(noted), results


class Replayed:
    """Puts in the place of a family's launchers its ops, compared with them."""

    def __init__(self, family: str, patch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module(f"gradnorm_kernels.kernels.{family}")
        self.launchers = {name: getattr(self.module, name) for name in kernels._OPS[family]}
        self.count = 0
        for name in self.launchers:
            patch.setattr(self.module, name, functools.partial(self.call, name))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        first, again = ([materialised(arg) for arg in args] for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            for each, launcher in self.launchers.items():
                patch.setattr(self.module, each, launcher)
            getattr(ops, name).default.redispatch(CUDA, *first, **kwargs)
            with launches_by_python() as by_python:
                getattr(ops, name).default.redispatch(CUDA, *again, **kwargs)
            assert not by_python
            count, results = assert_as_triton_launches(name, *again, **kwargs)
        self.count += count
        return results if len(results) > 1 else results[0]


@contextlib.contextmanager
def launches_by_python() -> Iterator[list[Any]]:
    kernels_run: list[Any] = []
    launch = common.Launcher.__call__

    def noting(launcher: Any, *args: Any) -> None:
        kernels_run.append(launcher)
        launch(launcher, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Launcher, "__call__", noting)
        yield kernels_run


@in_the_child
@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call whose launches the family's test compiles."""
    torch.use_deterministic_algorithms(False)  # poisoned memory would take the gigabytes that are there
    calls = importlib.import_module(f"test_{family}_kernels").calls
    replayed = Replayed(family, monkeypatch)
    for dtype in harness.DTYPES:
        for _, launcher, *operands in calls(dtype):
            if all(tensor.numel() < 2**31 for tensor in tensors_in(operands)):
                launcher(*operands)
    assert replayed.count


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


@in_the_child
def test_other_calls_are_not_repeated() -> None:
    """Each differs from the one before in what a launch depends on, and in nothing else."""
    x, g, v = (normal(6, 64) for _ in range(3))
    w = normal(64)
    statistics = normal(6, 1), normal(6, 1)
    gelu = "gelu_double_backward"
    for operands in ((v, v, v), (v, g, x), (g, g, x), (g, x, g)):
        assert_as_triton_launches(gelu, *operands)
    packed = normal(3, 6, 64)
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]):
        assert_as_triton_launches(gelu, *(packed[number] for number in order))
    for begin in (0, 1, 4):
        assert_as_triton_launches(gelu, *(t.flatten()[begin : begin + 64] for t in (v, g, x)))
    for beta in (1.0, 2.0):
        assert_as_triton_launches("softplus", x, beta=beta)
    for approximate in ("none", "tanh"):
        assert_as_triton_launches("gelu", x, approximate=approximate)
    for tensor in (x, x.double(), x.bfloat16(), x.half(), x[:5].clone(), normal(64, 6), normal(64, 6).t()):
        assert_as_triton_launches("silu", tensor)
    assert_as_triton_launches("silu_backward", g, x)
    assert_as_triton_launches("silu_backward", g, normal(64, 6).t())
    every = [True] * 3
    for u, t, mask in (
        (None, None, every),
        (w, None, every),
        (None, w, every),
        (None, w, [True, True, False]),
    ):
        operands = (v, u, t, g, x, *statistics, w, mask)
        assert_as_triton_launches("layer_norm_double_backward", *operands)
    image, c = normal(2, 4, 3, 3), normal(4)
    for parameters in ([0.25], [0.5], [0.75]):
        operands = (image, image, None, None, c, c, c, c, True, 1e-5, "leaky_relu", parameters)
        assert_as_triton_launches("batch_norm_act_backward", *operands, [True] * 3)


@in_the_child
def test_settings_of_pytorch() -> None:
    query, key, value, output = (normal(2, 1, 2, 49, 32) for _ in range(4))
    with _tf32.allow_tf32(False):
        assert_as_triton_launches("_attention_fwd", query, key, value, None, 0.5, output)
    with _tf32.allow_tf32(True):
        assert_as_triton_launches("_attention_fwd", query, key, value, None, 0.5, output)


@in_the_child
def test_forgets_operands() -> None:
    """A plan keeps layouts, and no tensor."""
    x, g = normal(3, 17), normal(3, 17)
    result = ops.silu_backward.default.redispatch(CUDA, g, x)
    stored = [StorageWeakRef(tensor.untyped_storage()) for tensor in (x, g, result)]
    del x, g, result
    assert all(storage.expired() for storage in stored)


class Alive(TorchDispatchMode):
    """The most tensors at a time of those that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append(StorageWeakRef(result.untyped_storage()))
        self.most = max(self.most, sum(not storage.expired() for storage in self.made))
        return result


@in_the_child
def test_composites() -> None:
    """Of rows that no kernel covers: their ops are repeated, and what these made is freed as early."""
    op = ops._attention_softmax_backward.default
    grad, scores = normal(1, 1, 1, 2, 8200), normal(1, 1, 1, 2, 8200)
    op.redispatch(CUDA, 3 * grad, 3 * scores, None, 0.5)
    results, alive = [], []
    for keys in (CUDA, PLAIN):
        with Alive() as made:
            results.append(op.redispatch(keys, grad, scores, None, 0.5))
        alive.append(made)
    assert all(map(torch.equal, *results))
    assert alive[0].most < len(alive[0].made)
    assert alive[0].most <= alive[1].most


@in_the_child
def test_somebody_is_told_of_launches() -> None:
    x, told = normal(3, 19), []
    hook = harness.triton.knobs.runtime.launch_enter_hook
    hook.add(told.append)
    try:
        for _ in range(3):
            assert_as_triton_launches("silu", x)
    finally:
        hook.remove(told.append)
    assert len(told) == 6


@in_the_child
def test_errors() -> None:
    x = normal(3, 23)
    assert_as_triton_launches("silu", x)
    with stand_in.failing(719), pytest.raises(RuntimeError, match="719"):
        ops.silu.default.redispatch(CUDA, x)
    assert_as_triton_launches("silu", x)
    for _ in range(2):
        with pytest.raises(ValueError, match="grad_output"):
            ops.silu_backward.default.redispatch(CUDA, x[:2], x)


@in_the_child
def test_threads() -> None:
    """Which all come with the same new shapes at once, and then others, without a context of the driver's."""
    barrier, threads, calls = threading.Barrier(6), 6, 20

    def run(_: int) -> None:
        x, g = normal(5, 29), normal(5, 29)
        barrier.wait()
        for columns in range(1, calls + 1):
            ops.silu_backward.default.redispatch(CUDA, g[:, :columns].clone(), x[:, :columns].clone())

    for _ in range(2):
        stand_in.take_launches()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
        noted = stand_in.take_launches()
        assert len(noted) == threads * calls
        assert all(launch.context for launch in noted)
        sizes = collections.Counter(launch.parameters[3] for launch in noted)
        assert sizes == {5 * columns: threads for columns in range(1, calls + 1)}


@pytest.mark.skipif(HAS_STAND_IN or kernels.REPLAY in os.environ, reason="the variable is set")
def test_without_the_variable() -> None:
    for op in (f"gradnorm_kernels::{op}" for of_family in kernels._OPS.values() for op in of_family):
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, op)
        assert (has("CUDA"), has("PrivateUse2"), has("PrivateUse3")) == (True, False, False)
    assert "gradnorm_kernels.kernels.replay" not in sys.modules
    assert common.Launcher.on_launch is None


@pytest.mark.gpu
def test_values_on_a_gpu() -> None:
    """Those of Python's launches, on other streams, from other threads and in a CUDA graph."""
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    subprocess.run(
        [sys.executable, "-c", "import test_replay; test_replay.assert_same_on_a_gpu()"],
        check=True,
        env=os.environ | {kernels.REPLAY: "1", "PYTHONPATH": paths},
        cwd=TESTS,
    )


def assert_same_on_a_gpu() -> None:
    x, g, v = (torch.randn(64, 256, device="cuda") for _ in range(3))
    image, w, c = (
        torch.randn(8, 64, 7, 7, device="cuda"),
        torch.ones(256, device="cuda"),
        torch.ones(64).cuda(),
    )
    statistics = [torch.randn(64, 1, device="cuda") for _ in range(2)]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.silu_double_backward.default, (v, g, x)),
        (ops.layer_norm_double_backward.default, (v, None, None, g, x, *statistics, w, [True] * 3)),
        (
            ops.batch_norm_double_backward.default,
            (image, None, None, image.flip(0), image.flip(1), *[c] * 5, True, 1e-5),
        ),
    ]
    for op, args in calls:

        def run(op: Any = op, args: Any = args) -> list[Tensor]:
            return list(tensors_in(op.redispatch(CUDA, *args)))

        expected = list(tensors_in(op.redispatch(PLAIN, *args)))
        actual = [run(), run()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual.append(run())
        torch.cuda.current_stream().wait_stream(stream)
        with ThreadPoolExecutor(1) as pool:
            actual.append(pool.submit(run).result())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual.append(run())
        graph.replay()
        for results in actual:
            assert all(map(torch.equal, results, expected)), op
