"""fuse() and the switch on timm's models: the same gradients of the gradient-norm objective."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import gradnorm_kernels as gk  # noqa: E402
from gradnorm_kernels import timm_modules  # noqa: E402

# One model of each backbone family; shallow and small: each block is like the next.
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 96, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (2, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64},
    "resnet18": {"act_layer": "gelu", "channels": (16, 32, 64, 128)},
    "resnet50": {"act_layer": "gelu", "layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "efficientnet_b0": {},
    "regnety_002": {},
    "mobilenetv3_small_050": {},
}
HAS_BATCH_NORM = {"resnet18", "resnet50", "efficientnet_b0", "regnety_002", "mobilenetv3_small_050"}
# In train mode BatchNorm uses the batch's statistics; dropout, the other difference, is off in all of these.
CASES = [(name, "eval") for name in MODELS] + [(name, "train") for name in MODELS if name in HAS_BATCH_NORM]
each_model = pytest.mark.parametrize(
    ("name", "mode"),
    [
        # `make test` takes each model once.
        pytest.param(
            name,
            mode,
            id=f"{name}-{mode}",
            marks=[pytest.mark.slow] * (name in HAS_BATCH_NORM and mode == "eval"),
        )
        for name, mode in CASES
    ],
)


def make_model(name, mode="eval"):
    torch.manual_seed(0)
    extra = {"drop_rate": 0.0} if mode == "train" else {}
    model = timm.create_model(name, num_classes=5, **MODELS[name], **extra).double()
    model.train(mode == "train")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            # PyTorch's fused attention has no double backward.
            module.fused_attn = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Not the statistics of a fresh model, in which errors of mean and variance would not show.
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    size = MODELS[name].get("img_size", 64)
    return model, torch.rand(4, 3, size, size, dtype=torch.float64)


def penalised_gradients(model, images):
    images = images.clone().requires_grad_()
    target = torch.tensor([1, 3, 0, 4])
    loss = F.cross_entropy(model(images), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    total = 0.8 * loss + 1.2 * 4 / 255 * gradient.abs().sum()
    return torch.autograd.grad(total, list(model.parameters()))


def switched_gradients(model, images):
    with gk.set_fused_double_backward(True):
        return penalised_gradients(model, images)


def fused_gradients(model, images):
    return penalised_gradients(gk.fuse(copy.deepcopy(model)), images)


def distance(gradients, reference):
    return (
        sum((a.double() - b).square().sum().item() for a, b in zip(gradients, reference, strict=True)) ** 0.5
    )


def without_hardsigmoid_and_fused_attention(model):
    """PyTorch's Hardsigmoid has no double backward: for stock, a composition that has."""
    for module in model.modules():
        for child_name, child in module.named_children():
            if type(child) is nn.Hardsigmoid:
                setattr(module, child_name, timm.layers.activations.HardSigmoid())
    return model


@each_model
def test_parameter_gradients_equal_stocks(name, mode):
    model, images = make_model(name, mode)
    stock = without_hardsigmoid_and_fused_attention(copy.deepcopy(model))
    exact = penalised_gradients(copy.deepcopy(stock), images)
    # Under the switch the first derivatives are PyTorch's own: its hardsigmoid has 1/6 in float32.
    switch_rtol = 1e-7 if "mobilenet" in name else 1e-9
    # Some gradients are 0 but for rounding: that of a weight whose output is normalised next.
    largest = max(gradient.abs().max().item() for gradient in exact)
    for run, rtol in ((fused_gradients, 1e-9), (switched_gradients, switch_rtol)):
        for gradient, expected in zip(run(copy.deepcopy(model), images), exact, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * largest)

    model, stock, images = model.float(), stock.float(), images.float()
    stock_error = distance(penalised_gradients(copy.deepcopy(stock), images), exact)
    for run in (fused_gradients, switched_gradients):
        error = distance(run(copy.deepcopy(model), images), exact)
        assert error <= 2 * stock_error, f"{run.__name__}: {error}, stock {stock_error}"


def test_fused_attention_under_the_switch():
    model, images = make_model("vit_tiny_patch16_224")
    exact = penalised_gradients(model, images)
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    assert attentions
    for module in attentions:
        module.fused_attn = True
    for gradient, expected in zip(switched_gradients(model, images), exact, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@each_model
def test_fuse_keeps_the_model_and_its_output(name, mode):
    model, images = make_model(name, mode)
    fused = gk.fuse(copy.deepcopy(model))
    state = model.state_dict()
    assert fused.state_dict().keys() == state.keys()
    assert all(torch.equal(a, state[key]) for key, a in fused.state_dict().items())
    torch.testing.assert_close(fused(images), model(images))
    # The running statistics of train mode.
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    again = pickle.load(io.BytesIO(pickle.dumps(fused)))
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert [type(m) for m in gk.fuse(again).modules()] == [type(m) for m in fused.modules()]


def in_inference_mode(model, images):
    with torch.inference_mode():
        return model(images)


def with_fake_tensors(model, images):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(images))


@pytest.mark.parametrize("first", [in_inference_mode, with_fake_tensors])
def test_swin_works_after_its_first_forward_in_a_mode(first):
    """What it keeps of a forward is of no mode."""
    model, images = make_model("swin_tiny_patch4_window7_224")
    expected, exact = model(images), penalised_gradients(model, images)
    fused = gk.fuse(copy.deepcopy(model))
    timm_modules._window_order.cache_clear()
    output = first(fused, images)
    assert output.shape == expected.shape
    if first is not with_fake_tensors:
        torch.testing.assert_close(output, expected)
    for gradient, wanted in zip(penalised_gradients(fused, images), exact, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_fused_models_trace_and_export(name):
    model, images = make_model(name)
    fused = gk.fuse(model)
    expected = fused(images)
    torch.testing.assert_close(torch.jit.trace(fused, images)(images), expected)
    torch.testing.assert_close(torch.export.export(fused, (images,)).module()(images), expected)
