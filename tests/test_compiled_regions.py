"""Compiled regions: eager's first and second derivatives, one compilation for blocks of one structure."""

import copy
import functools
import warnings

import pytest
import torch
from conftest import usual
from test_checkpoint import (
    BLOCKS,
    WIDTH,
    assert_changes_nothing_else,
    assert_same,
    gradients,
    gradients_of_several,
    make_model,
    several,
    step,
    step_of_gradients_by_parameters,
    step_of_several_first_gradients,
    step_under_autocast,
    under_autocast,
)
from torch import nn

import gradnorm_kernels as gk
from gradnorm_kernels import regions

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def compiles_everything():
    """A region that is left as it is would pass every test of values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gradnorm_kernels.compile")
        yield


compile_modules = functools.partial(gk.compile_modules, backend="aot_eager")


@pytest.fixture
def compilations(monkeypatch):
    """The regions that were made."""
    made = []

    class Counted(regions._Region):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(regions, "_Region", Counted)
    return made


@pytest.mark.parametrize("block", usual(BLOCKS, "dropout", "batch_norm"))
def test_equals_the_step_without(block, compilations):
    model = make_model(block)
    compiled = compile_modules(copy.deepcopy(model))
    for order in (1, 2):
        assert_same(step(compiled, order), step(model, order), 1e-11)
    # Each parametrised module has a class of its own.
    assert len(compilations) == (3 if block == "spectral_norm" else 1)


@pytest.mark.parametrize("block", usual(["tanh", "fused"], "tanh"))
def test_third_order(block):
    model = make_model(block)
    compiled = compile_modules(copy.deepcopy(model))
    assert_same(step(compiled, 3), step(model, 3), 1e-11)


def test_third_order_through_random_numbers_raises():
    with pytest.raises(RuntimeError, match="third derivative"):
        step(compile_modules(make_model("dropout")), 3)


@pytest.mark.parametrize("block", ["fused", "attention"])
def test_nothing_is_computed_twice(block):
    """As many matrix products and passes of attention as in an eager step."""
    model = make_model(block)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def twice(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    def once(model):
        model(x).square().sum().backward()

    def count(model):
        counts = []
        for run in (twice, once):
            run(model)
            # Not a dispatch mode, under which Dynamo would compile nothing.
            with torch.profiler.profile() as profiler:
                run(model)
            events = {event.key: event.count for event in profiler.key_averages()}
            products = sum(events.get(f"aten::{name}", 0) for name in ("mm", "addmm"))
            passes = {key: n for key, n in events.items() if key.startswith("gradnorm_kernels::scaled")}
            counts.append((products, passes))
        return counts

    assert count(compile_modules(copy.deepcopy(model))) == count(model)


def test_every_piece_is_compiled():
    """The forward, too, which is made while Dynamo captures the region."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    step(gk.compile_modules(make_model(), backend=backend))
    assert len(compiled) == 4


@pytest.mark.slow
def test_frozen_parameters_and_an_input_without_gradient():
    model = make_model()
    model[1][1].requires_grad_(False)
    model[1][2].fc1.requires_grad_(False)
    compiled = compile_modules(copy.deepcopy(model))
    assert_same(step(compiled), step(model), 1e-11)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for m in (model, compiled):
        m.zero_grad()
        m[1](x).square().sum().backward()
    assert_same(gradients(compiled), gradients(model), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("run", [step_of_several_first_gradients, step_of_gradients_by_parameters])
def test_other_steps(run):
    model = make_model()
    assert_same(run(compile_modules(copy.deepcopy(model))), run(model), 1e-11)


def test_autocast():
    model = make_model("dropout").float()
    compiled = compile_modules(copy.deepcopy(model))
    # Of the same bfloat16 products.
    assert_same(step_under_autocast(compiled, 2), step_under_autocast(model, 2), 1e-2)
    ours, wanted = (under_autocast(m[1], torch.randn(2, WIDTH)) for m in (compiled, model))
    assert ours.dtype == wanted.dtype


@pytest.mark.parametrize("order", [1, 2, 3])
def test_several_inputs_and_outputs(order):
    compiled = gk.compile(several, backend="aot_eager")
    assert_same(gradients_of_several(compiled, order), gradients_of_several(several, order), 1e-11)


@pytest.mark.parametrize("dynamic", usual([None, False, True], "False", "True"))
def test_several_shapes(dynamic, compilations):
    model = make_model()
    compiled = compile_modules(copy.deepcopy(model), dynamic=dynamic)

    def run(model, size):
        x = torch.linspace(-1, 1, size * WIDTH, dtype=torch.float64).view(size, WIDTH).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).exp().sum(), x, create_graph=True)
        model.zero_grad()
        gradient.square().sum().backward()
        return [x.grad, *gradients(model)]

    for size in (5, 3, 7):
        assert_same(run(compiled, size), run(model, size), 1e-11)
    assert len(compilations) == {None: 2, False: 3, True: 1}[dynamic]


def test_nothing_is_recorded_without_gradients():
    model, x = make_model("dropout"), torch.randn(5, WIDTH, dtype=torch.float64)
    compiled = compile_modules(copy.deepcopy(model))
    for forward in (torch.no_grad, torch.inference_mode):
        with forward():
            outputs = []
            for m in (model, compiled):
                torch.manual_seed(0)
                outputs.append(m(x))
            assert_same(*([o] for o in outputs))
            assert not outputs[1].requires_grad
    assert compiled(x).requires_grad


def test_train_and_eval():
    model = make_model("batch_norm")
    compiled = compile_modules(copy.deepcopy(model))
    for mode in (True, False, True):
        assert_same(step(compiled.train(mode)), step(model.train(mode)), 1e-11)
        model.zero_grad(), compiled.zero_grad()
    assert model[1][0].between[0].num_batches_tracked == 2


def test_an_output_changed_in_place_is_noticed():
    """As in eager mode, where the last op's output is needed in the backward pass."""
    compiled = gk.compile(lambda x: x.sin().tanh(), backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    compiled(x).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(x).mul_(2).sum().backward()


@pytest.mark.slow
def test_with_checkpoint():
    model = make_model("batch_norm")
    for first, second in ((compile_modules, gk.checkpoint_modules), (gk.checkpoint_modules, compile_modules)):
        both = second(first(copy.deepcopy(model)))
        assert_same(step(both), step(copy.deepcopy(model)), 1e-11)
        gk.checkpoint_modules(both, undo=True)
        assert "forward" in vars(both[1][0])
        assert "forward" not in vars(gk.compile_modules(both, undo=True)[1][0])


@pytest.mark.slow
def test_compile_modules_changes_nothing_else():
    assert_changes_nothing_else(compile_modules, 1e-11)


def test_bad_input():
    with pytest.raises(TypeError, match="model"):
        gk.compile_modules(torch.sin)
    with pytest.raises(ValueError, match="select"):
        gk.compile_modules(nn.Linear(2, 2))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_custom_autograd_functions_raise():
    """What Dynamo makes of them has a wrong second derivative, also without this package."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        gk.compile(lambda x: Doubled.apply(x.sin()) * x, backend="aot_eager")(x)


def test_a_critic_as_in_tutorials():
    """WGAN-GP: three forwards of one critic, of which one is differentiated twice."""

    def train(compile):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.LayerNorm(8), nn.Linear(8, 1)).double()
        generator = nn.Linear(3, 4).double()
        critic = compile(critic)
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(3):
            real, fake = torch.randn(6, 4).double(), generator(torch.randn(6, 3).double()).detach()
            alpha = torch.rand(6, 1).double()
            interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
            scores = critic(interpolates)
            (gradient,) = torch.autograd.grad(
                scores, interpolates, torch.ones_like(scores), create_graph=True, retain_graph=True
            )
            penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in critic.parameters()]

    compiled = train(functools.partial(gk.compile, backend="aot_eager"))
    assert_same(compiled, train(lambda critic: critic), 1e-9)


@pytest.mark.parametrize("pde", ["eikonal", "burgers"])
def test_a_physics_informed_network(pde):
    def run(compile):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        ).double()
        u, points = compile(model), torch.rand(7, 2).double().requires_grad_()
        value = u(points)
        (first,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        if pde == "eikonal":
            residual = first.norm(dim=1) - 1
        else:
            (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
            residual = first[:, 1] + value[:, 0] * first[:, 0] - 0.1 * second[:, 0]
        residual.square().mean().backward()
        return gradients(model)

    compiled = run(functools.partial(gk.compile, backend="aot_eager"))
    assert_same(compiled, run(lambda model: model), 1e-11)
