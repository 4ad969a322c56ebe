"""FusedGeLU as a module, fuse(), and the switch for PyTorch's own ops, without timm."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradnorm_kernels as gk


class ScaledGELU(nn.GELU):
    """A user's own subclass, whose forward must survive."""

    def forward(self, input):
        return 2 * super().forward(input)


def make_model():
    shared = nn.GELU("tanh")
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.GELU(),
        nn.Sequential(nn.Linear(8, 8), shared, shared),
        ScaledGELU(),
        nn.Linear(8, 2),
    )


def penalised_gradients(model, x):
    x = x.clone().requires_grad_()
    loss = model(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(loss + gradient.abs().sum(), list(model.parameters()))


def test_module_is_a_drop_in():
    assert repr(gk.FusedGeLU("tanh")) == "FusedGeLU(approximate='tanh')"
    assert repr(gk.FusedGeLU(inplace=True)) == "FusedGeLU(approximate='none')"
    assert isinstance(gk.FusedGeLU(), nn.GELU)
    x = torch.randn(5)
    torch.testing.assert_close(gk.FusedGeLU("tanh", inplace=True)(x), F.gelu(x, approximate="tanh"))


def test_fuse_swaps_in_place_and_keeps_everything_else():
    model = make_model()
    before = copy.deepcopy(model)
    state, parameters = model.state_dict(), list(model.parameters())
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("hook"))
    model[1].note = "kept"
    model.eval()

    assert gk.fuse(model) is model
    assert type(model[1]) is gk.FusedGeLU and model[1].approximate == "none"
    assert type(model[2][1]) is gk.FusedGeLU and model[2][1].approximate == "tanh"
    assert model[2][1] is model[2][2]
    assert type(model[3]) is ScaledGELU
    assert not model[1].training and model[1].note == "kept"
    assert model.state_dict().keys() == state.keys()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), before(x))
    assert calls == ["hook"]
    handle.remove()
    model(x)
    assert calls == ["hook"]
    for ours, stock in zip(penalised_gradients(model, x), penalised_gradients(before, x), strict=True):
        torch.testing.assert_close(ours, stock)


def test_fuse_is_idempotent_and_survives_copy_and_pickle():
    model = gk.fuse(gk.fuse(make_model())).to(torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(clone[1]) is gk.FusedGeLU
        assert torch.equal(clone(x), model(x))
    make_model().double().load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_fused_module_scripts_and_traces():
    x = torch.randn(3)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(torch.jit.script(gk.FusedGeLU("tanh"))(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(gk.FusedGeLU("tanh"))(x), expected)


def test_fuse_takes_a_single_module_and_names_bad_input():
    assert type(gk.fuse(nn.GELU())) is gk.FusedGeLU
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got list"):
        gk.fuse([nn.GELU()])


def runs_fused():
    """Whether PyTorch's own gelu now records a fused double backward."""
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    assert type(gradient.grad_fn).__name__ in ("CppFunction", "GeluBackwardBackward0")
    return type(gradient.grad_fn).__name__ == "CppFunction"


def test_switch_is_called_nested_and_used_as_decorator():
    assert not gk.is_fused_double_backward_enabled() and not runs_fused()
    gk.set_fused_double_backward(True)
    assert gk.is_fused_double_backward_enabled() and runs_fused()
    with gk.set_fused_double_backward(False):
        assert not runs_fused()
        with gk.set_fused_double_backward(True):
            with gk.set_fused_double_backward(True):
                assert runs_fused()
            assert runs_fused()
        assert not runs_fused()
    assert runs_fused()
    gk.set_fused_double_backward(False)
    assert not runs_fused()

    @gk.set_fused_double_backward(True)
    def decorated():
        return runs_fused()

    assert not runs_fused()
    assert decorated() and not runs_fused()
    with gk.set_fused_double_backward(True):
        assert decorated() and runs_fused()

    @gk.set_fused_double_backward(True)
    def recursive(depth):
        return runs_fused() and (depth == 0 or recursive(depth - 1)) and runs_fused()

    assert recursive(2) and not runs_fused()
    with pytest.raises(KeyError), gk.set_fused_double_backward(True):
        raise KeyError
    assert not runs_fused()
    with pytest.raises(TypeError, match="expected mode to be a bool"):
        gk.set_fused_double_backward(1)


def test_switch_keeps_channels_last():
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    with gk.set_fused_double_backward(True):
        (gradient,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert second.stride() == x.stride()


def test_switch_leaves_what_it_does_not_cover_to_pytorch():
    """Broadcast operands, which aten::gelu_backward takes and our op does not."""
    g = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(torch.ops.aten.gelu_backward(g, x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), (g, x))

    stock = second()
    with gk.set_fused_double_backward(True):
        for ours, theirs in zip(second(), stock, strict=True):
            assert torch.equal(ours, theirs)
