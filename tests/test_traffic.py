"""benchmarks/traffic.py: that it counts right, and that fused steps move as little as they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

import gradnorm_kernels as gk

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks import traffic  # noqa: E402

# Fused over stock at batch 64, float32: bytes and launches of one step.
CEILINGS = {
    "swin_base_patch4_window7_224": ({}, 0.52, 0.42),
    "vit_base_patch16_224": ({}, 0.44, 0.37),
    "resnet50-train": ({"act": "gelu", "bn": "train"}, 0.45, 0.28),
    "resnet50-eval": ({"act": "gelu", "bn": "eval"}, 0.62, 0.48),
    "convnext_base": ({}, 0.58, 0.10),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_fused_steps_stay_below_their_ceilings(name):
    options, most_bytes, most_launches = CEILINGS[name]
    model = name.partition("-")[0]
    stock = traffic.count(model, 64, **options)
    fused = traffic.count(model, 64, variant="fuse", **options)
    moved, launches = traffic.ratios(stock, fused)
    assert moved <= most_bytes
    assert launches <= most_launches


def counted(run):
    with traffic.Traffic() as counter:
        run()
    return counter


def count(run):
    counter = counted(run)
    return counter.bytes.total(), counter.launches.total()


def test_ops_count_what_they_read_and_write():
    x = torch.empty(10, 8, device="meta")
    matrix = torch.empty(8, 4, device="meta")
    assert count(lambda: x + x) == (3 * 320, 1)
    assert count(lambda: x.mul_(2)) == (2 * 320, 1)
    assert count(lambda: x @ matrix) == (320 + 128 + 160, 1)
    assert count(lambda: x.double()) == (320 + 640, 1)
    assert count(lambda: torch.cat([x, x])) == (4 * 320, 1)


def test_floating_point_operations():
    """Of matrix products and convolutions; an attention's are those of the products that it replaces."""

    def flops(run):
        return sum(flops for _, flops in counted(run).ops)

    x = torch.empty(10, 8, device="meta")
    matrix = torch.empty(8, 4, device="meta")
    assert flops(lambda: x + x) == 0
    assert flops(lambda: x @ matrix) == 2 * 10 * 8 * 4
    image, kernel = torch.empty(2, 3, 9, 9, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
    assert flops(lambda: torch.conv2d(image, kernel)) == 2 * 2 * 5 * 7 * 7 * 27

    query = torch.empty(2, 3, 7, 16, device="meta")
    key = torch.empty(2, 3, 11, 16, device="meta")
    attention = gk.functional.scaled_dot_product_attention
    assert flops(lambda: attention(query, key, key)) == 2 * (2 * 2 * 3 * 7 * 11 * 16)
    qkv = torch.empty(2, 7, 3, 3, 16, device="meta")
    assert flops(lambda: torch.ops.gradnorm_kernels.qkv_attention(qkv)) == 2 * (2 * 2 * 3 * 7 * 7 * 16)


@pytest.mark.parametrize(("approximate", "elements", "launches"), [("none", 26, 10), ("tanh", 78, 31)])
def test_gelus_double_backward(approximate, elements, launches):
    """What README says of it; the tanh form's differs between releases of PyTorch."""
    x = torch.empty(1000, device="meta", requires_grad=True)
    g, v = torch.empty_like(x, requires_grad=True), torch.empty_like(x)

    def double_backward(functional):
        output = functional.gelu(x, approximate=approximate)
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        moved, launched = count(lambda: torch.autograd.grad(grad_input, (g, x), v))
        return moved / 4000, launched

    stock = double_backward(torch.nn.functional)
    assert stock == (elements, launches) if approximate == "none" else stock >= (elements, launches)
    assert double_backward(gk.functional) == (5, 1)


def test_views_and_allocations_cost_nothing():
    x = torch.empty(10, 8, device="meta")
    free = count(lambda: (torch.empty_like(x), x.expand(3, 10, 8), x.detach(), x.t(), x.view(80)[None]))
    assert free == (0, 0)


def test_ops_of_several_passes_are_counted_several_times():
    x = torch.empty(4, 3, 5, 5, device="meta", requires_grad=True)
    g = torch.empty_like(x, requires_grad=True)
    weight = torch.empty(3, device="meta", requires_grad=True)
    output = gk.functional.batch_norm(x, None, None, weight, training=True)
    (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    counter = counted(lambda: torch.autograd.grad(grad_input, (g, x), torch.empty_like(x)))
    op = "gradnorm_kernels::batch_norm_double_backward"
    assert counter.launches["forward", op] == 3
    elements = counter.bytes["forward", op] / 4 / x.numel()
    assert 8 <= elements < 8.1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "columns", "launches"), [(64, 64, 1), (65, 8, 2)])
def test_attention_over_more_than_a_window_is_read_twice(tokens, columns, launches, packed):
    if packed:
        tensors = [torch.empty(2, tokens, 3, 2, columns, device="meta", requires_grad=True)]
        attention = gk.functional.qkv_attention
    else:
        tensors = [torch.empty(2, 2, tokens, columns, device="meta", requires_grad=True) for _ in range(3)]
        attention = gk.functional.scaled_dot_product_attention
    output = attention(*tensors)
    n, grad_output = output.numel() * 4, torch.empty_like(output, requires_grad=True)
    with traffic.Traffic() as counter:
        grads = torch.autograd.grad(output, tensors, grad_output, create_graph=True)
        counter.phase = "backward"
        torch.autograd.grad(grads, [grad_output, *tensors], [torch.empty_like(t) for t in tensors])
    assert list(counter.launches.values()) == [launches, launches]
    assert list(counter.bytes.values()) == [launches * 4 * n + 3 * n, launches * 7 * n + 4 * n]


def test_one_layer_by_hand():
    """x W, GELU: the whole of a step, op by op."""
    x = torch.empty(16, 8, device="meta", requires_grad=True)
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    n, w = 16 * 8 * 4, 8 * 8 * 4
    with traffic.Traffic() as counter:
        hidden = x @ weight
        output = gk.functional.gelu(hidden)
        counter.phase = "input gradient"
        (gradient,) = torch.autograd.grad(output, x, torch.empty_like(output), create_graph=True)
        counter.phase = "backward"
        torch.autograd.grad(gradient, weight, torch.empty_like(gradient))
    assert counter.bytes == {
        ("forward", "aten::mm"): 2 * n + w,
        ("forward", "gradnorm_kernels::gelu"): 2 * n,
        ("input gradient", "gradnorm_kernels::gelu_backward"): 3 * n,
        ("input gradient", "aten::mm"): 2 * n + w,
        # Of v W for the gradient's own gradient, x' g for W's, and once more for W through the GELU.
        ("backward", "aten::mm"): (2 * n + w) + 2 * (2 * n + w),
        ("backward", "gradnorm_kernels::gelu_double_backward"): 5 * n,
        ("backward", "aten::add"): 3 * w,
    }


def test_what_a_compiler_would_move():
    """x W stays a matrix product; the derivatives of what follows are one kernel, which keeps no graph."""

    def step(x, weight):
        hidden = (x @ weight).detach().requires_grad_()
        (slope,) = torch.autograd.grad(hidden.sigmoid().sum(), hidden, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), hidden)

    x, weight = torch.ones(16, 8), torch.ones(8, 8)
    n, w = 16 * 8 * 4, 8 * 8 * 4
    for _ in range(2):  # a cache does not hide the second
        counter = traffic.compiled_traffic(step, x, weight)
        assert counter.bytes == {
            (traffic.WHOLE, "aten::mm"): 2 * n + w,
            (traffic.WHOLE, "inductor::generated"): 2 * n,
        }
        assert set(counter.launches.values()) == {1}


def test_what_cannot_be_compiled():
    def step(x):
        torch._dynamo.graph_break()

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        traffic.compiled_traffic(step, torch.ones(3))


def test_command_line(tmp_path):
    out = tmp_path / "traffic.json"
    options = "--model resnet18 --act gelu --batch 2 --bn eval --variants stock fuse switch --json"
    command = [sys.executable, "-m", "benchmarks.traffic", *options.split(), out]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fuse / stock: bytes 0." in run.stdout and "switch / stock: bytes 0." in run.stdout
    result = json.loads(out.read_text())
    assert {row["variant"] for row in result["rows"]} == {"stock", "fuse", "switch"}
    assert {row["phase"] for row in result["rows"]} == set(traffic.PHASES)
