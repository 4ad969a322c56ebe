"""fuse() on timm's modules one by one: the same output, gradients and second derivatives."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm import layers  # noqa: E402
from timm.layers import filter_response_norm, norm_act  # noqa: E402
from timm.models import (  # noqa: E402
    _efficientnet_blocks,
    beit,
    cait,
    convit,
    convnext,
    edgenext,
    eva,
    hgnet,
    levit,
    mambaout,
    metaformer,
    mlp_mixer,
    swin_transformer_v2,
    xcit,
)
from timm.models import vision_transformer_relpos as relpos  # noqa: E402
from timm.models import vision_transformer_sam as sam  # noqa: E402

import gradnorm_kernels as gk  # noqa: E402
from gradnorm_kernels import timm_modules  # noqa: E402
from gradnorm_kernels.diagnose import graph_nodes  # noqa: E402

TOKENS, IMAGE = (2, 5, 16), (2, 16, 4, 4)
NORM = {"norm_layer": layers.LayerNorm}


def constant(*shape):
    """The same, whatever other tests have drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def masks(n):
    """Bool and floating, and the causal one."""
    takes_part = torch.ones(n, n, dtype=torch.bool).tril(1)
    return [{"attn_mask": takes_part}, {"attn_mask": constant(n, n)}, {"is_causal": True}]


# Of each: how to make it, the shape of its input, and what else it is called with.
ATTENTIONS = {
    "AttentionRope": (
        lambda: layers.AttentionRope(16, 2, qk_norm=True, scale_norm=True, attn_drop=0.5, gated=True, **NORM),
        TOKENS,
        [{}, {"rope": constant(4, 16)}, *masks(5)],
    ),
    "AttentionRope-grouped": (
        lambda: layers.AttentionRope(16, 4, qkv_fused=False, num_kv_heads=2, rotate_half=True),
        TOKENS,
        [{"rope": constant(4, 8), "is_causal": True}],
    ),
    "AttentionPoolLatent": (
        lambda: layers.AttentionPoolLatent(16, num_heads=2, latent_len=3, pool_type="avg", qk_norm=True),
        TOKENS,
        [{}, {"attn_mask": constant(3, 5)}],
    ),
    "AttentionPoolPrr": (lambda: layers.AttentionPoolPrr(16, num_heads=2, pre_norm=True), TOKENS, [{}]),
    "AttentionPool2d": (
        lambda: layers.AttentionPool2d(16, 4, 8, num_heads=2, qkv_separate=True, drop_rate=0.5),
        IMAGE,
        [{}],
    ),
    "RotAttentionPool2d": (
        lambda: layers.RotAttentionPool2d(16, 8, ref_feat_size=4, num_heads=2),
        IMAGE,
        [{}, {"pre_logits": True}],
    ),
    "Attention2d": (
        lambda: layers.Attention2d(16, num_heads=2, attn_drop=0.5),
        IMAGE,
        [{}, {"attn_mask": constant(16, 16)}],
    ),
    "Attention2d-head_first": (
        lambda: layers.Attention2d(16, 8, num_heads=2, head_first=True, expand_first=True),
        IMAGE,
        [{}],
    ),
    "MultiQueryAttention2d": (
        lambda: layers.MultiQueryAttention2d(16, num_heads=2, kv_stride=2, query_strides=2, attn_drop=0.5),
        IMAGE,
        [{}],
    ),
    "DiffAttention": (
        # Without dropout, which timm draws otherwise where its attention is fused.
        lambda: layers.DiffAttention(16, 2, norm_layer=layers.RmsNorm),
        TOKENS,
        [{}, *masks(5)],
    ),
    "EvaAttention": (
        lambda: eva.EvaAttention(16, 2, attn_drop=0.5, qkv_bias_separate=True, **NORM),
        TOKENS,
        [{}, {"rope": constant(4, 16)}, *masks(5)],
    ),
    "EvaBlock": (
        lambda: eva.EvaBlock(16, 2, swiglu_mlp=True, scale_mlp=True, init_values=0.5, qkv_fused=False),
        TOKENS,
        [{"rope": constant(4, 16)}],
    ),
    "EvaBlock-rope": (
        lambda: eva.EvaBlock(16, 2, attn_type="rope", scale_attn_inner=True),
        TOKENS,
        [{"rope": constant(4, 16), "attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}],
    ),
    "SimPool2d": (lambda: layers.SimPool2d(16, num_heads=2, gamma=1.5), IMAGE, [{}]),
    "Beit": (
        lambda: beit.Attention(16, 2, window_size=(2, 2), qkv_bias=True, attn_drop=0.5),
        TOKENS,
        [{}, {"shared_rel_pos_bias": constant(1, 2, 5, 5)}],
    ),
    "Sam": (lambda: sam.Attention(16, 2, attn_drop=0.5), (2, 4, 3, 16), [{}]),
    "ClassAttn": (lambda: cait.ClassAttn(16, 2, attn_drop=0.5), TOKENS, [{}]),
    "TalkingHead": (lambda: cait.TalkingHeadAttn(16, 2, attn_drop=0.5), TOKENS, [{}]),
    "GPSA": (lambda: convit.GPSA(16, 2), (2, 4, 16), [{}]),
    "CrossCovariance": (lambda: edgenext.CrossCovarianceAttn(16, 2), TOKENS, [{}]),
    "LeViT": (lambda: levit.Attention(16, 4, 2, resolution=(2, 2)), (2, 4, 16), [{}]),
    "RelPos": (
        lambda: relpos.RelPosAttention(16, 2, rel_pos_cls=lambda **kw: layers.RelPosBias((2, 2), **kw)),
        (2, 4, 16),
        [{}],
    ),
    "SwinV2": (
        lambda: swin_transformer_v2.WindowAttention(16, (2, 2), 2, attn_drop=0.5),
        (4, 4, 16),
        [{}, {"mask": constant(2, 4, 4)}],
    ),
    "XCA": (lambda: xcit.XCA(16, 2, attn_drop=0.5), TOKENS, [{}]),
}
NORMS = {
    **{
        kind.__name__: (
            lambda kind=kind: kind(16, act_layer="silu"),
            IMAGE if "2d" in kind.__name__ else TOKENS,
        )
        for kind in (
            norm_act.LayerNormAct,
            norm_act.LayerNormAct2d,
            norm_act.LayerNormAct2dFp32,
            norm_act.LayerNormActFp32,
            norm_act.RmsNormAct,
            norm_act.RmsNormAct2d,
            norm_act.RmsNormAct2dFp32,
            norm_act.RmsNormActFp32,
        )
    },
    "GroupNormAct": (lambda: norm_act.GroupNormAct(16, 4, act_layer="gelu"), IMAGE),
    "GroupNorm1Act": (lambda: norm_act.GroupNorm1Act(16, act_layer="gelu"), IMAGE),
    "LayerNormAct-drop": (lambda: norm_act.LayerNormAct(16, drop_layer=nn.Dropout, affine=False), TOKENS),
    "LayerNorm2dFp32": (lambda: layers.LayerNorm2dFp32(16), IMAGE),
    "LayerNormExp2d": (lambda: layers.norm.LayerNormExp2d(16), IMAGE),
    "FilterResponseNormAct2d": (
        lambda: filter_response_norm.FilterResponseNormAct2d(16, act_layer=nn.SiLU),
        IMAGE,
    ),
    "FilterResponseNormTlu2d": (lambda: filter_response_norm.FilterResponseNormTlu2d(16), IMAGE),
    **{
        f"{kind.__name__}{suffix}": (lambda kind=kind, options=options: kind(16, groups=4, **options), IMAGE)
        for kind in (
            layers.EvoNorm2dS0,
            layers.EvoNorm2dS0a,
            layers.EvoNorm2dS1,
            layers.EvoNorm2dS1a,
            layers.EvoNorm2dS2,
            layers.EvoNorm2dS2a,
        )
        for suffix, options in (("", {}), ("-no_act", {"apply_act": False}))
    },
    "GlobalResponseNorm": (lambda: layers.grn.GlobalResponseNorm(16), (2, 4, 3, 16)),
    "GlobalResponseNorm-first": (lambda: layers.grn.GlobalResponseNorm(16, channels_last=False), IMAGE),
    "SEModule": (lambda: layers.SEModule(16, add_maxpool=True), IMAGE),
    "EffectiveSEModule": (lambda: layers.EffectiveSEModule(16, gate_layer="sigmoid"), IMAGE),
    "SqueezeExcite": (lambda: _efficientnet_blocks.SqueezeExcite(16), IMAGE),
    "LayerScale": (lambda: layers.LayerScale(16), TOKENS),
    "LayerScale-image": (lambda: layers.LayerScale(4), IMAGE),
    "LayerScale2d": (lambda: layers.LayerScale2d(16), IMAGE),
    "LearnableAffineBlock": (lambda: hgnet.LearnableAffineBlock(2.0), IMAGE),
    "StarReLU": (lambda: metaformer.StarReLU(0.8, 0.3), IMAGE),
    "LayerNormNoBias": (lambda: metaformer.LayerNorm2dNoBias(16), IMAGE),
    "GatedConvBlock": (lambda: mambaout.GatedConvBlock(16, conv_ratio=0.5, ls_init_value=0.5), (2, 4, 3, 16)),
    "EcaModule": (lambda: layers.EcaModule(16, use_mlp=True), IMAGE),
    "ConvNeXtBlock": (lambda: convnext.ConvNeXtBlock(16, ls_init_value=0.5), IMAGE),
    "ResBlock": (lambda: mlp_mixer.ResBlock(16, 5), TOKENS),
    "StdConv2d": (lambda: layers.StdConv2d(16, 8, 3), IMAGE),
    "ScaledStdConv2dSame": (lambda: layers.ScaledStdConv2dSame(16, 8, 3, stride=2), IMAGE),
    "GlobalContext": (lambda: layers.GlobalContext(16), IMAGE),
    "BlurPool2d": (lambda: layers.BlurPool2d(16), IMAGE),
    "SplitAttn": (lambda: layers.SplitAttn(16, radix=2), IMAGE),
}
CASES = ATTENTIONS | {name: (make, shape, [{}]) for name, (make, shape) in NORMS.items()}


def make(name, mode="eval"):
    torch.manual_seed(0)
    module = CASES[name][0]()
    module.train(mode == "train")
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            # PyTorch's fused attention has no double backward.
            part.fused_attn = False
    for parameter in module.parameters():
        # Neither zeros nor ones, with which errors would not show.
        nn.init.normal_(parameter, std=0.5)
    return module


def call(module, name, dtype, seed=0, **arguments):
    _, shape, _ = CASES[name]
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    cast = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()
    }
    torch.manual_seed(seed)  # of dropout
    return x, module(x, **cast)


def derivatives(module, name, dtype=torch.float64, **arguments):
    """Of the output and the norm of its gradient, by the input and the parameters."""
    x, output = call(module, name, dtype, **arguments)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(dtype).view_as(output)
    (gradient,) = torch.autograd.grad((output * weights).sum(), x, create_graph=True)
    loss = output.square().mean() + gradient.square().sum()
    parameters = [p for p in module.parameters() if p.requires_grad]
    return output, gradient, *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_stocks(name, mode):
    # Of some the statistics are float32, whatever comes in.
    rtol = 1e-5 if re.search("Fp32|Evo|Response", name) else 1e-10
    stock = make(name, mode).double()
    fused = gk.fuse(copy.deepcopy(stock))
    assert any(timm_modules.__name__ in type(part).__module__ for part in fused.modules())
    for arguments in CASES[name][2]:
        expected, found = (derivatives(module, name, **arguments) for module in (stock, fused))
        # Some are 0 but for rounding.
        largest = max(tensor.abs().max().item() for tensor in expected if tensor is not None)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_stocks(name):
    for arguments in CASES[name][2]:
        # In evaluation mode LeViT's keeps a tensor with the graph that made it.
        stock = make(name, "train")
        ours, theirs = (
            sum(error(module, stock, name, seed, arguments) for seed in range(4))
            for module in (gk.fuse(copy.deepcopy(stock)), stock)
        )
        assert ours <= 2 * theirs + 1e-6


def error(module, stock, name, seed, arguments):
    """Of all derivatives in float32, relatively."""
    exact = derivatives(copy.deepcopy(stock).double(), name, seed=seed, **arguments)
    found = derivatives(module, name, torch.float32, seed=seed, **arguments)
    with torch.no_grad():
        pairs = [(a.double(), b) for a, b in zip(found, exact, strict=True) if b is not None]
        return (
            sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        ).sqrt()


STOCK = re.compile(
    "Softmax|Sigmoid|ScaledDotProduct|LayerNorm|RmsNorm|GroupNorm|BatchNorm|Convolution|Silu|Gelu"
)


@pytest.mark.parametrize("name", CASES)
def test_no_formula_of_pytorchs_is_left_that_ours_replace(name):
    module = gk.fuse(make(name).double())
    for arguments in CASES[name][2]:
        _, output = call(module, name, torch.float64, **arguments)
        nodes = {node.name() for node in graph_nodes([output])}
        assert not [node for node in nodes if STOCK.match(node)]


@pytest.mark.parametrize("name", CASES)
def test_everything_but_the_class_is_kept(name):
    stock = make(name)
    fused = gk.fuse(copy.deepcopy(stock))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    again = pickle.loads(pickle.dumps(fused))
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert [type(m) for m in gk.fuse(again).modules()] == [type(m) for m in fused.modules()]
    assert [type(m) for m in gk.unfuse(again).modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize(
    "name", ["AttentionPoolLatent", "AttentionRope", "LayerScale", "SEModule", "StdConv2d"]
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_traces_transforms_and_compilers(name):
    module = gk.fuse(make(name))
    x = torch.randn(CASES[name][1])
    expected = module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for run in (
        torch.jit.trace(module, x),
        torch.export.export(module, (x,)).module(),
        compiled,
        torch.func.vmap(lambda row: module(row[None])[0]),
    ):
        torch.testing.assert_close(run(x), expected)
