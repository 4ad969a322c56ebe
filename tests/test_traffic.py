"""benchmarks/traffic.py: that it counts right, and that fused steps move as little as they should."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import usual

pytest.importorskip("timm", reason="timm is not installed")

import gradnorm_kernels as gk

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks import traffic  # noqa: E402

# Fused over stock at batch 64, float32: bytes, launches and peak memory of one step.
CEILINGS = {
    "swin_base_patch4_window7_224": ({}, 0.46, 0.36, 0.61),
    "vit_base_patch16_224": ({}, 0.42, 0.32, 0.54),
    "resnet50-train": ({"act": "gelu", "bn": "train"}, 0.35, 0.25, 0.69),
    "resnet50-eval": ({"act": "gelu", "bn": "eval"}, 0.54, 0.45, 0.72),
    "convnext_base": ({}, 0.60, 0.10, 0.56),
}


@pytest.mark.parametrize("name", usual(CEILINGS, "vit_base_patch16_224", "resnet50-train"))
def test_fused_steps_stay_below_their_ceilings(name):
    options, *ceilings = CEILINGS[name]
    model = name.partition("-")[0]
    stock = traffic.count(model, 64, **options)
    fused = traffic.count(model, 64, variant="fuse", **options)
    for ratio, ceiling in zip(traffic.ratios(stock, fused), ceilings, strict=True):
        assert ratio <= ceiling


def test_checkpointed_steps_keep_little():
    stock, checkpointed = (traffic.count("vit_base_patch16_224", 64, v) for v in ("stock", "checkpoint"))
    *_, peak = traffic.ratios(stock, checkpointed)
    assert peak <= 0.17


# The last backward alone, in GB, under the switch and by fuse.
LAST_BACKWARDS = [
    ("efficientnet_b0", 16, {}, 18.6, 16.3),
    ("resnet50", 16, {}, 21.9, 22.5),
    ("resnet50", 32, {"act": "silu", "bn": "eval"}, 37.6, 37.9),
]


@pytest.mark.parametrize(("model", "batch", "options", "switch", "fuse"), LAST_BACKWARDS)
def test_last_backwards_stay_below_their_ceilings(model, batch, options, switch, fuse):
    for variant, ceiling in (("switch", switch), ("fuse", fuse)):
        counter = traffic.count(model, batch, variant=variant, **options)
        moved = sum(size for (phase, _), size in counter.bytes.items() if phase == "backward")
        assert moved <= ceiling * 1e9, variant


class DiscriminatorBlock(torch.nn.Module):
    """Of StyleGAN2's residual discriminator, with averages for its resampling filters."""

    def __init__(self, channels, wider):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(channels, wider, 3, padding=1)
        self.skip = torch.nn.Conv2d(channels, wider, 1, bias=False)
        self.act1, self.act2 = torch.nn.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2)
        self.down1, self.down2 = torch.nn.AvgPool2d(2), torch.nn.AvgPool2d(2)

    def forward(self, x):
        y = self.act2(self.conv2(self.down1(self.act1(self.conv1(x)))))
        return (y + self.skip(self.down2(x))) / math.sqrt(2)


@pytest.mark.parametrize(("variant", "ceiling"), [("switch", 0.35), ("fuse", 0.44)])
def test_r1_of_a_residual_discriminator(variant, ceiling):
    """The penalty of Mescheder et al. 2018, whose last backward in stock is full of zeros.

    What `fuse` makes again is read once more.
    """
    widths = [32, 64, 128, 256, 512]
    with torch.device("meta"):
        critic = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 1),
            torch.nn.LeakyReLU(0.2),
            *(DiscriminatorBlock(*pair) for pair in itertools.pairwise(widths)),
            torch.nn.Flatten(),
            torch.nn.Linear(512 * 16, 1),
        )
        images = torch.empty(16, 3, 64, 64, requires_grad=True)

    def last_backward():
        critic.zero_grad()
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        penalty = gradient.square().sum([1, 2, 3]).mean()
        return count(penalty.backward)[0]

    stock = last_backward()
    if variant == "fuse":
        gk.fuse(critic)
    with gk.set_fused_double_backward(variant == "switch"):
        assert last_backward() <= ceiling * stock


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


def alive(counter):
    return sum(change for *_, change in counter.memory.changes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_is_alive_from_creation_to_release(device):
    x = torch.empty(256, device=device)
    with traffic.Traffic() as counter:
        assert alive(counter) == 0
        counter.memory.hold([x, x.view(16, 16)])
        assert alive(counter) == 1024
        y = x * 2
        views = [y.view(16, 16).t(), y[3:], y.detach()]
        assert alive(counter) == 2048
        y.mul_(2)
        views[0].add_(1)
        assert alive(counter) == 2048
        del y
        assert alive(counter) == 2048
        views.clear()
        assert alive(counter) == 1024
        # Of memory that was just released, and of none.
        for _ in range(5):
            y = x.double()
            assert alive(counter) == 1024 + 2048
            del y
            assert torch.empty(0, device=device).exp().numel() == 0
        assert alive(counter) == 1024
        (x + 1) * (x + 2)
    assert counter.memory.peak() == {traffic.HELD: 1024, "forward": 3 * 1024}
    del x
    assert alive(counter) == 0


@pytest.mark.parametrize("functional", [torch.nn.functional, gk.functional])
def test_a_graph_keeps_what_it_saved(functional):
    """x W, GELU: after each phase, and where there is most, whose autograd Functions are in C++."""
    x = torch.empty(16, 8, device="meta", requires_grad=True)
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    n, w = 16 * 8 * 4, 8 * 8 * 4
    with traffic.Traffic() as counter:
        counter.memory.hold([x, weight])
        output = functional.gelu(x @ weight)
        assert alive(counter) == n + w + 2 * n  # the product is saved
        ones = torch.ones_like(output)
        counter.phase = "input gradient"
        (gradient,) = torch.autograd.grad(output, x, ones, create_graph=True)
        del ones
        # Saved beside the product: its gradient, for W, and the ones, for GELU.
        assert alive(counter) == n + w + 3 * n + 2 * n
        counter.phase = "backward"
        loss = gradient.sum()
        del gradient, output
        assert alive(counter) == n + w + 3 * n + 4
        loss.backward()
        del loss
        counter.memory.hold([x.grad, weight.grad])
    assert alive(counter) == 2 * (n + w)
    assert counter.memory.after("forward") == n + w + 3 * n
    assert counter.memory.after("input gradient") == n + w + 5 * n


def test_peak_of_one_layer_by_hand():
    """tanh(x W) summed: a step of natural training."""
    x = torch.empty(16, 8, device="meta")
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    n, w = 16 * 8 * 4, 8 * 8 * 4
    with traffic.Traffic() as counter:
        counter.memory.hold([x, weight])
        loss = (x @ weight).tanh().sum()
        counter.phase = "backward"
        loss.backward()
        counter.memory.hold([weight.grad])
    # The output of tanh and its gradient, beside the loss and its own.
    assert counter.memory.after("forward") == n + w + n + 4
    assert counter.memory.peak() == {traffic.HELD: n + w, "forward": n + 4, "backward": n + 4}
    assert alive(counter) == n + 2 * w + 4


def test_peak_is_the_allocators():
    """What PyTorch's allocator reports on the CPU, without a mode that watches."""

    def step(weights, x):
        for weight in weights:
            x = gk.functional.layer_norm(gk.functional.gelu(x @ weight), (64,))
        (gradient,) = torch.autograd.grad(x.square().sum(), leaf, create_graph=True)
        gradient.abs().sum().backward()

    leaf = torch.randn(512, 64, requires_grad=True)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]
    with traffic.Traffic() as counter:
        counter.memory.hold([leaf, *weights])
        step(weights, leaf)
    before = sum(tensor.nbytes for tensor in (leaf, *weights))
    counted = counter.memory.peak().total() - before
    for tensor in (leaf, *weights):
        tensor.grad = None
    with torch.profiler.profile(profile_memory=True) as profiler:
        step(weights, leaf)
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    measured = max(itertools.accumulate(event.nbytes() for event in events))
    assert counted == pytest.approx(measured, rel=0.02)


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


@pytest.mark.slow
def test_command_line(tmp_path):
    out, memory = tmp_path / "traffic.json", tmp_path / "memory.json"
    options = "--model resnet18 --act gelu --batch 2 --bn eval --variants natural stock fuse"
    files = ["--json", out, "--memory-json", memory]
    command = [sys.executable, "-m", "benchmarks.traffic", *options.split(), *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for variant in ("natural", "fuse"):
        assert f"{variant} / stock: bytes 0." in run.stdout
    assert run.stdout.count(", peak memory 0.") == 2
    variants = {"natural", "stock", "fuse"}
    rows = json.loads(out.read_text())["rows"]
    assert {row["variant"] for row in rows} == variants
    assert {row["phase"] for row in rows} == set(traffic.PHASES)
    rows = {row["variant"]: row for row in json.loads(memory.read_text())["rows"]}
    assert rows.keys() == variants
    peaks = {variant: row["bytes_at_peak"] for variant, row in rows.items()}
    assert peaks["natural"]["input gradient"] == 0 < peaks["fuse"]["input gradient"]
    assert sum(peaks["natural"].values()) < sum(peaks["fuse"].values()) < sum(peaks["stock"].values())
    # Their forwards are one, but for the mean of the loss.
    forward = [rows[variant]["bytes_after"]["forward"] for variant in ("natural", "stock")]
    assert forward[0] == pytest.approx(forward[1], rel=1e-3)
