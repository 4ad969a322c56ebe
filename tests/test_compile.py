"""torch.compile: ATen's ops inside, and a whole compiled step with the gradients of the eager one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

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
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fused_by", ["module", "switch"])
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


def test_compiled_region_holds_atens_gelu():
    graphs = EagerAndRecordGraphs()
    torch.compile(gk.FusedGeLU(), backend=graphs, fullgraph=True)(torch.randn(3))
    targets = [node.target for graph in graphs.graphs for node in graph.graph.nodes]
    assert F.gelu in targets or torch._C._nn.gelu in targets
    assert "gradnorm_kernels" not in str(targets)
    exported = torch.export.export(gk.FusedGeLU(), (torch.randn(3),))
    assert "gradnorm_kernels" not in str(exported.graph)


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
