"""Compiled regions: eager's first and second derivatives, one compilation for blocks of one structure."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from test_checkpoint import BLOCKS, WIDTH, assert_same, gradients, make_model, step
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


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=() if block in ("dropout", "batch_norm") else pytest.mark.slow)
        for block in BLOCKS
    ],
)
def test_equals_the_step_without(block, compilations):
    model = make_model(block)
    compiled = compile_modules(copy.deepcopy(model))
    for order in (1, 2):
        assert_same(step(compiled, order), step(model, order), 1e-11)
    # Each parametrised module has a class of its own.
    assert len(compilations) == (3 if block == "spectral_norm" else 1)


@pytest.mark.parametrize("block", ["tanh", pytest.param("fused", marks=pytest.mark.slow)])
def test_third_order(block):
    model = make_model(block)
    compiled = compile_modules(copy.deepcopy(model))
    assert_same(step(compiled, 3), step(model, 3), 1e-11)


def test_third_order_through_random_numbers_raises():
    with pytest.raises(RuntimeError, match="third derivative"):
        step(compile_modules(make_model("dropout")), 3)


def test_matrix_products_of_a_step():
    """As many as eager's, in which nothing is computed twice."""
    model = make_model("fused")
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
            counts.append(sum(events.get(f"aten::{name}", 0) for name in ("mm", "addmm")))
        return counts

    assert count(compile_modules(copy.deepcopy(model))) == count(model)


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
def test_gradients_by_parameters_are_differentiated():
    def run(model):
        x = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
        first = torch.autograd.grad(model(x).exp().sum(), list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return gradients(model)

    model = make_model()
    assert_same(run(compile_modules(copy.deepcopy(model))), run(model), 1e-11)


@pytest.mark.slow
def test_several_first_gradients_and_a_retained_graph():
    def run(model):
        torch.manual_seed(1)
        x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
        out = model(x)
        first = [torch.autograd.grad(out[:, i].exp().sum(), x, create_graph=True)[0] for i in range(2)]
        loss = (first[0] * first[1]).sum() + out.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [x.grad, *gradients(model)]

    model = make_model()
    assert_same(run(compile_modules(copy.deepcopy(model))), run(model), 1e-11)


def test_autocast():
    def under_autocast(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def run(model):
        return step(model, 2, functools.partial(under_autocast, model), dtype=torch.float32)

    model = make_model("dropout").float()
    compiled = compile_modules(copy.deepcopy(model))
    # Of the same bfloat16 products.
    assert_same(run(compiled), run(model), 1e-2)
    assert (
        under_autocast(compiled[1], torch.randn(2, WIDTH)).dtype
        == under_autocast(model[1], torch.randn(2, WIDTH)).dtype
    )


def several(x, *, scale, others, flag="a"):
    """Nested arguments and results; one is an argument, one has no gradient, one is an integer."""
    y, z = others["y"]
    assert flag == "b"
    product = torch.tanh(x) * y * scale
    with torch.no_grad():
        constant = x * 2
    return {"product": product, "rest": (product.sum(0), z + 1, x.argmax(), constant, "text", x)}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_several_inputs_and_outputs(order):
    def run(call):
        torch.manual_seed(0)
        x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        z = torch.arange(4)
        out = call(torch.exp(x), scale=2.0, others={"y": [y * x, z]}, flag="b")
        total, plain, index, constant, text, same = out["rest"]
        assert text == "text" and not constant.requires_grad and index.dtype == torch.int64
        assert torch.equal(plain, z + 1)
        loss = (out["product"].square().sum() + total.exp().sum() + same.sin().sum()) * constant.sum()
        for _ in range(order - 1):
            found = torch.autograd.grad(loss, [x, y], create_graph=True)
            loss = sum(g.square().sum() for g in found)
        return torch.autograd.grad(loss, [x, y])

    assert_same(run(gk.compile(several, backend="aot_eager")), run(several), 1e-11)


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), False, True])
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
    model = make_model()
    keys, kinds = model.state_dict().keys(), [type(m) for m in model.modules()]
    assert compile_modules(compile_modules(model)) is model
    assert model.state_dict().keys() == keys and [type(m) for m in model.modules()] == kinds
    expected = step(make_model())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # It runs its own parameters, not those it was copied from.
        assert_same(step(other), expected, 1e-11)
    assert all(p.grad is None for p in model.parameters())


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
