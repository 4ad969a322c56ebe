"""What diagnose says of PyTorch's own models and functions, and its silence about those that are right."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradnorm_kernels as gk


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def dirichlet(concentration):
    return torch.distributions.Dirichlet(concentration).rsample()


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Detached(Marked):
    @staticmethod
    def backward(ctx, grad):
        return (2 * ctx.saved_tensors[0] * grad).detach()


def found(diagnosis):
    return {(finding.kind, finding.op.split("Backward")[0]) for finding in diagnosis}


X = torch.rand(3, 4)
HARMFUL = {
    "hardsigmoid": (F.hardsigmoid, X, "raises", "Hardsigmoid"),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q),
        torch.rand(1, 2, 4, 8),
        "raises",
        "ScaledDotProductFlashAttentionForCpu",
    ),
    "MultiheadAttention": (
        lambda x: nn.MultiheadAttention(8, 2)(x, x, x, need_weights=False),
        torch.rand(4, 2, 8),
        "raises",
        "ScaledDotProductFlashAttentionForCpu",
    ),
    "embedding_bag": (lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w), X, "raises", "EmbeddingBag"),
    "ctc_loss": (
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])),
        torch.rand(5, 1, 4),
        "raises",
        "CtcLoss",
    ),
    "multi_margin_loss": (
        lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2])),
        X,
        "raises",
        "MultiMarginLoss",
    ),
    "multilabel_margin_loss": (
        lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, -1, 2]] * 3)),
        X,
        "raises",
        "MultilabelMarginLoss",
    ),
    "segment_reduce": (
        lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([1, 2])),
        X,
        "raises",
        "SegmentReduce",
    ),
    "layer norm without weight": (
        lambda t: F.layer_norm(t[:2], (4,), None, t[2]),
        X,
        "raises",
        "NativeLayerNorm",
    ),
    "batch norm without weight": (
        lambda t: F.batch_norm(t[:2], None, None, None, t[2], True),
        X,
        "raises",
        "NativeBatchNorm",
    ),
    "Dirichlet": (dirichlet, X, "cut", "_Dirichlet"),
    "once_differentiable": (Marked.apply, X, "cut", "Marked"),
    "detached": (Detached.apply, X, "cut", "Detached"),
    "sparse values": (
        lambda v: torch.sparse_coo_tensor([[0, 1, 2]], v, (3,), check_invariants=True).to_dense() ** 2,
        torch.rand(3),
        "cut",
        "SparseCooTensorWithDimsAndTensors",
    ),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_hurts_is_found_and_nothing_else(name):
    function, x, kind, op = HARMFUL[name]
    diagnosis = gk.diagnose(function, x)
    assert found(diagnosis.harmful) == {(kind, op)}
    # As it is: the second derivative raises, or is not there.
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    output = output[0] if isinstance(output, tuple) else output
    incoming = torch.ones_like(output).requires_grad_()
    (gradient,) = torch.autograd.grad(output, leaf, incoming, create_graph=True)
    if kind == "raises":
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.square().sum(), leaf)
    else:
        loss = leaf.square().sum() + gradient.square().sum()
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], 2 * leaf)


@pytest.mark.parametrize(
    "name",
    [
        "hardsigmoid",
        "embedding_bag",
        "ctc_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "segment_reduce",
    ],
)
def test_what_the_switch_remedies(name):
    function, x, _, _ = HARMFUL[name]
    assert all("gk.set_fused_double_backward" in f.remedy for f in gk.diagnose(function, x).harmful)
    with gk.set_fused_double_backward(True):
        assert not gk.diagnose(function, x).harmful


def test_sparse_gradients_have_no_remedy():
    def bags(weight):
        return F.embedding_bag(torch.tensor([[0, 1]]), weight, mode="sum", sparse=True)

    with gk.set_fused_double_backward(True):
        assert found(gk.diagnose(bags, X)) == {("raises", "EmbeddingBag")}


def test_attention_under_the_switch_and_fused():
    function, x, _, _ = HARMFUL["MultiheadAttention"]
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu")
    assert ("raises", "ScaledDotProductFlashAttentionForCpu") in found(gk.diagnose(model, x))
    with gk.set_fused_double_backward(True):
        assert not gk.diagnose(function, x) and not gk.diagnose(model, x)
    assert not gk.diagnose(gk.fuse(model), x)


def test_weight_norm_is_wrong_where_the_weight_is_differentiated():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh())
    assert not gk.diagnose(model, X).harmful
    parameters = [p for name, p in model.named_parameters() if "original" in name]
    diagnosis = gk.diagnose(model(X), parameters)
    assert found(diagnosis.harmful) == {("wrong", "WeightNormInterface")}
    with gk.set_fused_double_backward(True):
        assert not gk.diagnose(model(X), parameters).harmful
    assert not gk.diagnose(gk.fuse(model)(X), parameters).harmful


def test_compiled_modules():
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))
    compiled = torch.compile(inner, backend="aot_eager")
    for model, place in ((compiled, "the model"), (nn.Sequential(nn.Linear(4, 4), compiled), "1")):
        (finding,) = gk.diagnose(model, X)
        assert (finding.kind, finding.op, finding.modules) == ("raises", "CompiledFunctionBackward", (place,))
        assert "whole step" in finding.remedy


def test_what_is_slow_and_what_covers_it():
    diagnosis = gk.diagnose(Recurrent(), torch.rand(2, 3, 4))
    assert found(diagnosis) == {("slow", "MkldnnRnnLayer")} and not diagnosis.harmful
    with gk.set_fused_double_backward(True):
        assert not gk.diagnose(Recurrent(), torch.rand(2, 3, 4))
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1))
    images = torch.rand(2, 4, 8, 8)
    diagnosis = gk.diagnose(model, images)
    assert found(diagnosis) == {("slow", op) for op in ("Convolution", "NativeBatchNorm", "Silu")}
    norm = next(finding for finding in diagnosis if finding.op.startswith("NativeBatchNorm"))
    assert norm.modules == ("1",) and norm.excess_bytes == (84 - 5) * 2 * 4 * 36 * 4
    assert all("gk.fuse" in finding.remedy for finding in diagnosis)
    assert json.loads(json.dumps([finding.to_dict() for finding in diagnosis]))[0]["kind"] == "slow"
    assert not gk.diagnose(gk.fuse(model), images)
    assert str(gk.diagnose(model, images)).startswith("nothing found")


@pytest.mark.parametrize(
    ("name", "size", "harmful"),
    [
        ("vit_tiny_patch16_224", 32, {("raises", "ScaledDotProductFlashAttentionForCpu")}),
        ("mobilenetv3_small_100", 32, {("raises", "Hardsigmoid")}),
        ("resnet50", 32, set()),
    ],
)
def test_models_of_timm(name, size, harmful):
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model(name, **({"img_size": size} if "vit" in name else {})).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(2, 3, size, size)
    diagnosis = gk.diagnose(model, images)
    assert found(diagnosis.harmful) == harmful
    for finding in diagnosis:
        named = dict(model.named_modules())
        assert len(finding.modules) == finding.count or finding.op.startswith("Relu")
        assert all(module in named for module in finding.modules)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not gk.diagnose(gk.fuse(model), images).harmful


def test_outputs_that_are_computed_already():
    x = X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=False):
            y = F.hardsigmoid(x)
    (finding,) = gk.diagnose({"logits": y}, [x])
    assert finding.modules[0].startswith(__file__)
    (finding,) = gk.diagnose(F.hardsigmoid(x), x)
    assert finding.modules == () and str(gk.diagnose(y, x)).startswith("raises    1 x HardsigmoidBackward0")
    with torch.no_grad():
        assert gk.diagnose(F.hardsigmoid, X).harmful


def test_bad_input_is_named():
    x = X.clone().requires_grad_()
    for bad in (torch.arange(3), [1.0]):
        with pytest.raises(TypeError, match="expected inputs to be floating-point tensors"):
            gk.diagnose(F.hardsigmoid, bad)
    with pytest.raises(TypeError, match="expected outputs to hold a floating-point tensor"):
        gk.diagnose(lambda x: 3, x)
    for outputs in (torch.ones(3), x.detach() * 2, (X.clone().requires_grad_() * 2)):
        with pytest.raises(ValueError, match="expected outputs that depend on inputs"):
            gk.diagnose(outputs, x)
