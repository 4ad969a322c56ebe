"""torch.compile: ATen's ops inside, and a whole compiled step with the gradients of the eager one."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import usual
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx

import gradnorm_kernels as gk

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def make_net(activation):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), activation(), nn.Linear(16, 16), activation("tanh"), nn.Linear(16, 3)
    )


def penalised_step(model, x, target):
    """A gradient-norm step that calls ``backward`` inside the compiled region."""
    loss = F.cross_entropy(model(x), target)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.abs().sum()).backward()


def penalised_gradients(model, params, x, target):
    """The same step through torch.func."""

    def loss(params, x):
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), target)

    def penalised(params):
        return loss(params, x) + torch.func.grad(loss, argnums=1)(params, x).abs().sum()

    return torch.func.grad(penalised)(params)


@pytest.fixture
def batch():
    return torch.randn(5, 6, requires_grad=True), torch.randint(3, (5,))


# aot_eager runs the traced derivatives op by op; inductor generates code, and takes half a minute.
@pytest.mark.parametrize(
    ("backend", "fused_by"),
    [
        pytest.param("aot_eager", "module", marks=pytest.mark.slow),
        ("aot_eager", "switch"),
        ("inductor", "module"),
        pytest.param("inductor", "switch", marks=pytest.mark.slow),
    ],
)
def test_whole_step_gives_eagers_gradients(batch, backend, fused_by):
    eager = make_net(nn.GELU)
    penalised_step(eager, *batch)
    expected = [p.grad for p in eager.parameters()]

    model = make_net(gk.FusedGeLU if fused_by == "module" else nn.GELU)
    with gk.set_fused_double_backward(fused_by == "switch"):
        compiled = torch.compile(penalised_gradients, backend=backend, fullgraph=True)
        gradients = compiled(model, dict(model.named_parameters()), *batch).values()
        for ours, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, wanted)

        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            pytest.skip("this torch cannot trace autograd.grad: no torch._dynamo.config.trace_autograd_ops")
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            torch.compile(penalised_step, backend=backend, fullgraph=True)(model, *batch)
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted)


class Channels(nn.Module):
    """Runs a module that wants channels in the second of at least three dimensions."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.view(-1, 2, 4)).view(-1, 8)


NORMS = {
    "layer": lambda: nn.LayerNorm(8),
    "rms": lambda: nn.RMSNorm(8, 1e-5),
    "group": lambda: nn.GroupNorm(2, 8),
    "batch": lambda: nn.BatchNorm1d(8),
    "instance": lambda: Channels(nn.InstanceNorm1d(2, affine=True)),
    "instance with running statistics": lambda: Channels(nn.InstanceNorm1d(2, track_running_stats=True)),
    "hardsigmoid": nn.Hardsigmoid,
    "mish": nn.Mish,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fused_by", ["module", "switch"])
@pytest.mark.parametrize("name", usual(NORMS, "batch", "hardsigmoid"))
def test_third_order(name, fused_by):
    """Of a physics-informed step, compiled and captured: the parameters' gradient of u_xx, as plain autograd
    has it of the fused modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), NORMS[name](), nn.Tanh(), nn.Linear(8, 1)).double()
    x = 10 * torch.randn(16, 2, dtype=torch.float64)
    x[0] = 1e3  # Mish's exponential overflows
    # Of batch normalisation the sum over the samples is constant.
    along = torch.linspace(1, 2, 16, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    buffers = {key: b.clone() for key, b in model.named_buffers()}

    def u(p, x):
        return torch.func.functional_call(model, (p, {k: b.clone() for k, b in buffers.items()}), (x,)).sum()

    def u_x(p, x):
        return torch.func.grad(u, 1)(p, x)[:, 0] @ along

    def step(p, x):
        return torch.func.grad(lambda p, x: torch.func.grad(u_x, 1)(p, x)[:, 0].square().sum())(p, x)

    def by_autograd():
        leaves = {key: p.clone().requires_grad_() for key, p in parameters.items()}
        variable = x.clone().requires_grad_()
        result = u(leaves, variable)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(result, variable, create_graph=True, materialize_grads=True)
            result = gradient[:, 0] @ along
        loss = gradient[:, 0].square().sum() + sum(0 * leaf.sum() for leaf in leaves.values())
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    stock = copy.deepcopy(model)
    gk.fuse(model)
    expected = by_autograd()
    assert all(gradient.isfinite().all() for gradient in expected.values())
    model = model if fused_by == "module" else stock
    with gk.set_fused_double_backward(fused_by == "switch"):
        results = {
            "torch.func": step(parameters, x),
            "compiled": torch.compile(step, backend="aot_eager", fullgraph=True)(parameters, x),
            "captured": make_fx(step)(parameters, x)(parameters, x),
        }
    # Some are 0 but for rounding.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for how, gradients in results.items():
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).abs().max() <= 1e-8 * largest, f"{how}: {key}"


def test_compiled_region_holds_atens_gelu():
    graphs = EagerAndRecordGraphs()
    torch.compile(gk.FusedGeLU(), backend=graphs, fullgraph=True)(torch.randn(3))
    targets = [node.target for graph in graphs.graphs for node in graph.graph.nodes]
    assert F.gelu in targets or torch._C._nn.gelu in targets
    assert "gradnorm_kernels" not in str(targets)
    exported = torch.export.export(gk.FusedGeLU(), (torch.randn(3),))
    assert "gradnorm_kernels" not in str(exported.graph)


class Mixer(nn.Module):
    """Channels for heads: two tokens a pixel, then depthwise convolution in 25 taps."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)

    def forward(self, x):
        tokens = self.depthwise(x).flatten(2)
        q, k, v = (tokens * scale for scale in (0.5, 0.75, 1))
        y = gk.functional.scaled_dot_product_attention(q, k, v)
        return self.grouped(y.view_as(x))


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_what_a_compiler_has_nothing_faster_for_stays_in_a_captured_step(tracing_mode):
    torch.manual_seed(0)
    model = gk.fuse(Mixer().double())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def step(parameters, x):
        x = x.detach().requires_grad_()
        loss = torch.func.functional_call(model, parameters, (x,)).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + gradient.square().sum(), list(parameters.values()))

    captured = make_fx(step, tracing_mode=tracing_mode)(parameters, x)
    names = Counter(getattr(node.target, "_opname", "") for node in captured.graph.nodes)
    attention = "scaled_dot_product_attention"
    assert names[attention] == names[f"{attention}_double_backward"] == 1
    assert names["_softmax"] == 0
    assert names["_depthwise_grad_weight"] == 2
    # Both derivatives of both layers, however many groups these have.
    assert names["convolution"] + names["convolution_backward"] <= 10
    for other in (x, torch.randn_like(x)):
        with torch.no_grad():
            gradients = captured(parameters, other)
        torch.testing.assert_close(gradients, step(parameters, other))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            torch.testing.assert_close(compiled(parameters, x), step(parameters, x))


def test_compiled_module_differentiates_twice_outside(batch):
    """Only the forward is compiled; the region falls back to what PyTorch does there: a clear error."""
    x = batch[0]
    model = torch.compile(make_net(gk.FusedGeLU), backend="aot_eager")
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_switching_inside_a_compiled_function_works_at_every_call():
    def function(x):
        gk.set_fused_double_backward(True)
        return x + 1

    compiled = torch.compile(function, backend="eager")
    try:
        for _ in range(3):
            gk.set_fused_double_backward(False)
            compiled(torch.ones(2))
            assert gk.is_fused_double_backward_enabled()
    finally:
        gk.set_fused_double_backward(False)
