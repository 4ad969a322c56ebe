"""FusedGeLU as a module, fuse(), and the switch for PyTorch's own ops, without timm."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

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


def test_unfuse_is_the_inverse_of_fuse():
    parts = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Mish(inplace=True),
        gk.FusedGeLU(),
    ]
    model = nn.Sequential(
        *parts, weight_norm(nn.Conv2d(4, 4, 1)), nn.TransformerEncoderLayer(4, 2, activation="gelu")
    )
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    gk.fuse(gk.fuse(model))
    assert type(model[3]) is gk.FusedMish and model[6].activation is gk.functional.gelu
    gk.unfuse(model[2]), gk.fuse(model[2])
    model = copy.deepcopy(model)
    assert gk.unfuse(gk.unfuse(model)) is model
    for module, (kind, attributes) in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        # A parametrised module has a class of its own.
        assert type(module) is kind or type(module).__bases__ == kind.__bases__ == (nn.Conv2d,)
    assert model[2].inplace and model[6].activation is F.gelu and type(model[4]) is gk.FusedGeLU
    with pytest.raises(TypeError, match="unfuse: expected model"):
        gk.unfuse("model")


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm, orthogonal], ids=lambda f: f.__name__)
def test_parametrised_modules(parametrise, capsys):
    """Swapped like any other; the parametrisation may come and go before and after."""
    torch.manual_seed(0)
    stock = nn.Sequential(parametrise(nn.Conv1d(4, 4, 3, groups=2)), nn.GELU()).double().eval()
    fused = copy.deepcopy(stock)
    gk.fuse(fused, dry_run=True)
    assert "torch.nn.Conv1d -> FusedConv1d" in capsys.readouterr().out
    assert isinstance(gk.fuse(fused)[0], gk.FusedConv1d)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for ours, theirs in zip(penalised_gradients(fused, x), penalised_gradients(stock, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert gk.fuse(fused)[0].weight.shape == (4, 2, 3)
    parametrize.remove_parametrizations(fused[0], "weight")
    assert type(fused[0]) is gk.FusedConv1d
    parametrise(fused[0])
    before = fused(x)
    assert type(gk.unfuse(fused)[0]).__bases__ == (nn.Conv1d,)
    torch.testing.assert_close(fused(x), before)


class Attending(nn.Module):
    """Self- and cross-attention with every kind of mask."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.is_self = options.get("kdim") is None

    def forward(self, x):
        batch, n = (x.shape[0], x.shape[1]) if self.attention.batch_first else (x.shape[1], x.shape[0])
        torch.manual_seed(1)
        other = x if self.is_self else torch.randn(*x.shape[:2], 5, dtype=x.dtype)
        padding = torch.zeros(batch, n, dtype=torch.bool)
        padding[0, 1] = True
        masks = [
            None,
            torch.ones(n, n, dtype=torch.bool).triu(1),
            torch.randn(3 * batch, n, n, dtype=x.dtype),
        ]
        total = 0
        for mask in masks:
            for pad in (None, padding):
                if mask is not None and mask.is_floating_point() and pad is not None:
                    pad = pad.to(x.dtype)
                causal = mask is masks[1]
                total = (
                    total
                    + self.attention(
                        x, other, other, pad, attn_mask=mask, is_causal=causal, need_weights=False
                    )[0]
                )
        weights = self.attention(x, other, other)
        return total + weights[0] + weights[1].sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attending(),
        lambda: Attending(batch_first=True, bias=False),
        lambda: Attending(kdim=5, vdim=5, batch_first=True),
        lambda: Attending(add_bias_kv=True, add_zero_attn=True),
        lambda: nn.TransformerEncoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 3, 24, 0.0), 2, enable_nested_tensor=False
        ),
    ],
)
def test_attention_modules_of_torch(make):
    torch.manual_seed(0)
    stock = make().double()
    fused = gk.fuse(copy.deepcopy(stock))
    assert any(type(m) is gk.FusedMultiheadAttention for m in fused.modules())
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(fused(x), stock(x))
    with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
        expected = penalised_gradients(stock, x)
        results = penalised_gradients(fused, x)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), stock.eval()(x))


def test_a_decoder_of_torch():
    torch.manual_seed(0)
    stock = nn.Transformer(12, 3, 1, 1, 24, 0.0, "gelu", batch_first=True).double()
    fused = gk.fuse(copy.deepcopy(stock))
    target = torch.randn(2, 4, 12, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def gradients(model):
        bound = nn.Module()
        bound.parameters = model.parameters
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        bound.forward = lambda x: model(x, target, tgt_mask=mask, tgt_is_causal=True)
        return penalised_gradients(bound, x)

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(stock)
    for ours, theirs in zip(gradients(fused), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_in_attention_is_drawn_as_stock_draws_it():
    stock = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True)
    fused = gk.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 5, 12)
    outputs = []
    for model in (stock, fused):
        torch.manual_seed(3)
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(model(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(*outputs)
    assert not torch.equal(fused(x, x, x, need_weights=False)[0], outputs[1])
    with pytest.raises(TypeError, match="expected bool or floating masks"):
        fused(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.int64), need_weights=False)


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
