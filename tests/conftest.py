import contextlib
import math
import os

# Before torch reads it. The tensors here are small, and threads waiting for one another would take most of
# the time; tests of several threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Those do not spin while they wait: on a busy machine that takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test needs the network, and none may wait for one that does not answer.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Its assertions say as much as a test file's.
pytest.register_assert_rewrite("contract")


def usual(values, *names):
    """Values for `parametrize`, of which those with other names than these are left to `make test-all`."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (str(value) not in names)) for value in values]


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--few-rows", action="store_true", help="of each family's table only the rows that are traced"
    )
    parser.addoption(
        "--one-shape",
        action="store_true",
        help="of each test one shape, in float32 and bfloat16; none that needs most of a GPU's memory",
    )


def pytest_configure(config):
    """Hypothesis draws the same examples in every run, and new ones in `make test-all`."""
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True, max_examples=20)
        settings.register_profile("more", max_examples=60)
        settings.load_profile("more" if config.getoption("--run-slow") else "repeatable")


# Parameters of tests that are shapes, layouts or parts.
SHAPES = {"shape", "dim", "case", "bias_shape", "layout", "layouts", "mask", "n", "given", "parts", "dtype"}


def one_shape(items):
    """The row of the largest shape of those that differ in nothing else."""
    chosen = {}
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        dtype, size = values.get("dtype", torch.float32), math.prod(values.get("shape") or ())
        if dtype not in (torch.float32, torch.bfloat16) or "2_31" in item.name:
            continue
        rest = (f"{name}={value}" for name, value in values.items() if name not in SHAPES)
        key = (item.path, item.originalname, dtype, *rest)
        if key not in chosen or size >= chosen[key][0]:
            chosen[key] = size, item
    return [item for _, item in chosen.values()]


def pytest_collection_modifyitems(config, items):
    if config.getoption("--one-shape"):
        kept = one_shape(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    needs_gpu = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
    for item in items:
        # Not its keywords: the folders that it is in are among them.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(needs_gpu)
    if not config.getoption("--run-slow"):
        # Half of all: to skip each of them takes a minute.
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


def poison():
    """Fills uninitialised memory with NaN from now on, so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
