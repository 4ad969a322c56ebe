"""fuse() and the switch on timm's models: the same gradients of the gradient-norm objective."""

import copy

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm", reason="timm is not installed")

import gradnorm_kernels as gk  # noqa: E402

# A transformer with nn.GELU, a windowed one, a convolutional one whose stages are channels_last inside,
# MLP-Mixer, and a ResNet whose activation is passed by name.
# Shallow and small: each block is like the next.
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (2, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64},
    "resnet18": {"act_layer": "gelu"},
}


def make_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name]).double().eval()
    # SDPA's fused kernel has no double backward.
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    size = MODELS[name].get("img_size", 32)
    return model, torch.rand(2, 3, size, size, dtype=torch.float64)


def penalised_gradients(model, images):
    images = images.clone().requires_grad_()
    target = torch.tensor([1, 3])
    loss = F.cross_entropy(model(images), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    total = 0.8 * loss + 1.2 * 4 / 255 * gradient.abs().sum()
    return torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_gradients_equal_stocks(name):
    model, images = make_model(name)
    stock = penalised_gradients(model, images)
    state = copy.deepcopy(model.state_dict())

    with gk.set_fused_double_backward(True):
        switched = penalised_gradients(model, images)
    fused_model = gk.fuse(model)
    assert any(type(module) is gk.FusedGeLU for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    fused = penalised_gradients(fused_model, images)

    for ours in (fused, switched):
        for gradient, expected in zip(ours, stock, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize(("layer", "approximate"), [("GELU", "none"), ("GELUTanh", "tanh")])
def test_timms_own_classes(layer, approximate):
    module = getattr(timm.layers, layer)()
    x = torch.randn(3, 5)
    expected = module(x)
    fused = gk.fuse(torch.nn.Sequential(module))[0]
    assert repr(fused) == f"FusedGeLU(approximate='{approximate}')"
    torch.testing.assert_close(fused(x), expected)


def test_act_layer():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, act_layer=gk.FusedGeLU)
    assert type(model.blocks[0].mlp.act) is gk.FusedGeLU
    resnet = timm.create_model("resnet18", act_layer=gk.FusedGeLU)
    assert type(resnet.act1) is gk.FusedGeLU
