"""Gradient-norm steps of whole models where the device matters: its precisions, streams, threads and graphs.

``make check-gpu`` runs each of these on a GPU in a process of its own. On a CPU they are the same steps as
far as it has the like, so that what is first seen on a GPU is the GPU.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gradnorm_kernels as gk
from gradnorm_kernels import kernels
from gradnorm_kernels._tf32 import allow_tf32
from gradnorm_kernels.training import GradientNormLoss

pytest.importorskip("timm", reason="timm is not installed")

from test_models import distance, make_model

from gradnorm_kernels.training.graph import GraphedBackward, capture
from gradnorm_kernels.training.trainer import _backward

OBJECTIVE = GradientNormLoss(ramp_epochs=0)
# Attention, windows and their masks, depthwise convolutions, BatchNorm with GELU, and with SiLU and gates.
MODELS = {
    "vit_tiny_patch16_224": "eval",
    "swin_tiny_patch4_window7_224": "eval",
    "convnext_atto": "eval",
    "resnet50": "train",
    "efficientnet_b0": "train",
}
PRECISIONS = ("float32", "tf32", "bfloat16")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def each_model(*names: str) -> Any:
    """On every device; a CPU's all but the first are left to `make test-all`."""
    slow = [pytest.mark.slow]
    rows = [(name, "cpu", slow if name != names[0] else []) for name in names]
    rows += [(name, "cuda", [pytest.mark.gpu]) for name in names]
    return pytest.mark.parametrize(
        ("name", "device"),
        [pytest.param(name, device, marks=marks, id=f"{name}-{device}") for name, device, marks in rows],
    )


def operands(name: str, device: str, images: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in float32, images in [0, 1] and targets."""
    model, drawn = make_model(name, MODELS[name])
    drawn = torch.cat([drawn, drawn.cos()])[:images]
    return model.float().to(device), drawn.float().to(device), torch.arange(images, device=device) % 5


def gradients(model: nn.Module, images: Tensor, targets: Tensor, precision: str = "float32") -> list[Tensor]:
    """Of a step, on the CPU."""
    with allow_tf32(precision == "tf32"):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = OBJECTIVE(model, images, targets, epoch=0).total
        return [g.cpu() for g in torch.autograd.grad(total, list(model.parameters()))]


def exact_gradients(model: nn.Module, images: Tensor, targets: Tensor) -> list[Tensor]:
    """Stock's in float64, on the CPU."""
    return gradients(copy.deepcopy(model).cpu().double(), images.cpu().double(), targets.cpu())


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 1e-3) -> None:
    """All gradients together are this close to float64, of which none is zero."""
    size = distance([torch.zeros_like(g) for g in exact], exact)
    assert size > 0 and distance(ours, exact) <= tolerance * size


@on_every_device
def test_the_package_runs_there(device: str, record_property: Any) -> None:
    """By kernels of its own, and not by composites, which would be right as well."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        record_property("device", f"{torch.cuda.get_device_name()}, sm_{major}{minor}")
        assert kernels.has_triton()
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)

    def second(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0].cpu()

    ours = second(gk.functional.gelu, x.float().to(device))
    torch.testing.assert_close(ours, second(nn.functional.gelu, x).float(), rtol=1e-4, atol=1e-6)


@each_model(*MODELS)
def test_gradients(name: str, device: str, record_property: Any) -> None:
    """Their error in each precision is at most twice that of stock in it."""
    model, images, targets = operands(name, device)
    exact = exact_gradients(model, images, targets)
    size = distance([torch.zeros_like(g) for g in exact], exact)
    stock, fused = copy.deepcopy(model), gk.fuse(copy.deepcopy(model))
    wrong = []
    for precision in PRECISIONS:
        if precision == "tf32" and device == "cpu":
            continue
        runs = {"stock": (stock, False), "fused": (fused, False), "switch": (copy.deepcopy(model), True)}
        error = {}
        for variant, (run, switched) in runs.items():
            with gk.set_fused_double_backward(switched):
                error[variant] = distance(gradients(run, images, targets, precision), exact) / size
        text = ", ".join(f"{variant} {value:.1e}" for variant, value in error.items())
        record_property(precision, text)
        # A NaN is above nothing.
        if not max(error["fused"], error["switch"]) <= 2 * error["stock"]:
            wrong.append(f"{precision}: {text}")
    assert not wrong, wrong


@each_model("vit_tiny_patch16_224", "convnext_atto", "resnet50")
def test_empty_batch(name: str, device: str) -> None:
    """Its gradients are zeros, as stock's."""
    model, images, targets = operands(name, device, images=0)
    fused = gk.fuse(model.eval())
    for precision in PRECISIONS[:: 2 if device == "cpu" else 1]:
        for gradient in sum_gradients(fused, images, targets, precision):
            assert gradient.count_nonzero() == 0


def sum_gradients(model: nn.Module, images: Tensor, targets: Tensor, precision: str) -> list[Tensor]:
    """Of sums over images, whose means are not defined for none."""
    with allow_tf32(precision == "tf32"):
        images = images.clone().requires_grad_()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = nn.functional.cross_entropy(model(images), targets, reduction="sum")
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        return list(torch.autograd.grad(loss + slope.abs().sum(), list(model.parameters())))


@contextlib.contextmanager
def stream_of_its_own(device: str, wait: bool = False) -> Iterator[None]:
    """Work goes to another stream, after what was queued before.

    Args:
        wait: of a GPU, milliseconds first, in which the host queues work for other streams.
    """
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if wait:
            torch.cuda._sleep(200_000_000)
        yield


@on_every_device
def test_two_streams(device: str) -> None:
    """Steps of other images that run at a time."""
    model, images, targets = operands("swin_tiny_patch4_window7_224", device, images=8)
    fused = gk.fuse(copy.deepcopy(model))
    parts = list(zip(images.chunk(2), targets.chunk(2), strict=True))
    exact = [exact_gradients(model, *part) for part in parts]
    for wait in (False, True):  # Kernels are compiled in the first round.
        found = []
        with allow_tf32(False):
            for part in parts:
                with stream_of_its_own(device, wait):
                    total = OBJECTIVE(fused, *part, epoch=0).total
                    found.append(torch.autograd.grad(total, list(fused.parameters())))
        if device == "cuda":
            torch.cuda.synchronize()
        for ours, wanted in zip(found, exact, strict=True):
            assert_close([g.cpu() for g in ours], wanted)


@on_every_device
def test_two_threads(device: str) -> None:
    """Both compile kernels and launch them; each has a model of its own."""
    names = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
    problems = [operands(name, device) for name in names]
    exact = [exact_gradients(*problem) for problem in problems]
    found: dict[int, list[Tensor]] = {}

    def run(k: int) -> None:
        model, images, targets = problems[k]
        fused = gk.fuse(model)
        with stream_of_its_own(device):
            for _ in range(3):
                # Not `gradients`: the switches of TF32 are the process's.
                total = OBJECTIVE(fused, images, targets, epoch=0).total
                found[k] = [g.cpu() for g in torch.autograd.grad(total, list(fused.parameters()))]

    with allow_tf32(False):
        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k, wanted in enumerate(exact):
        assert_close(found[k], wanted)


def call_again(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As `capture`, without a GPU: a replay is a call that writes into the tensors of the first."""
    results = run()

    def replay() -> None:
        for kept, new in zip(tree_leaves(results), tree_leaves(run()), strict=True):
            if kept is not None:
                kept.copy_(new)

    return replay, results


@each_model("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")
def test_captured_steps(name: str, device: str) -> None:
    """They have the gradients of steps that are not, of other images each, and add to what is there."""
    captures = []

    def counted(run: Callable[[], Any]) -> Any:
        captures.append(run)
        return (capture if device == "cuda" else call_again)(run)

    objective = GradientNormLoss(ramp_epochs=2)
    step = GraphedBackward(_backward, counted)
    model, images, targets = operands(name, device, images=8)
    fused = gk.fuse(copy.deepcopy(model).eval())
    reference = copy.deepcopy(model).eval().cpu().double()
    # Until the weight of the norm stays, and two steps more, none is captured; nor is one of another weight.
    epochs = [0.0, 1.0, *[2.0] * 5]
    for k, epoch in enumerate(epochs):
        if k == 5:
            fused.zero_grad()  # Before, gradients add up.
            reference.zero_grad()
        part, wanted = images.roll(k, 0)[:4], targets.roll(k)[:4]
        weight = 0.5 if k < 6 else 0.25
        with allow_tf32(False):
            loss = step(objective, fused, part, wanted, epoch, weight)
        expected = _backward(objective, reference, part.cpu().double(), wanted.cpu(), epoch, weight)
        assert len(captures) == (k >= 4)
        torch.testing.assert_close(loss.total.cpu().double(), expected.total, rtol=1e-3, atol=1e-4)
        found = [[p.grad.cpu() for p in m.parameters() if p.grad is not None] for m in (fused, reference)]
        assert_close(*found)
    assert loss.parts.keys() == expected.parts.keys() and loss.logits.shape == (4, 5)
