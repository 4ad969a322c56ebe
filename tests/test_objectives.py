"""The objectives against transcriptions of their formulas, and the engines against one another."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradnorm_kernels as gk
from gradnorm_kernels.training import AdversarialLoss, EdgeLoss, GradientNormLoss, NaturalLoss
from gradnorm_kernels.training.attacks import perturb
from gradnorm_kernels.training.objectives.edge import edges

PENALISED = GradientNormLoss(ramp_epochs=0)
OBJECTIVES = [
    NaturalLoss(),
    GradientNormLoss(),
    EdgeLoss(),
    EdgeLoss(gradient_norm=GradientNormLoss()),
    AdversarialLoss(),
    AdversarialLoss(objective=GradientNormLoss()),
]


class Normalize(nn.Module):
    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels):
        return self.model((pixels - self.mean) / self.std)


def small_model(dtype=torch.float64):
    """Normalises with channels' different stds, which the published form handles by a scalar."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 4))
    return Normalize(layers, mean=(0.4, 0.5, 0.6), std=(0.225, 0.225, 0.225)).to(dtype)


def sample_batch(dtype=torch.float64, size=2):
    return torch.rand(5, 3, size, size, dtype=dtype), torch.tensor([0, 3, 1, 1, 2])


def assert_same_gradients(actual, expected, model, **tolerance):
    """Of two losses, with respect to the model's parameters."""
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


class TestGradientNorm:
    def test_equals_the_published_form(self):
        """Gradient of the batch mean with respect to the normalised input, times B, times epsilon / std."""
        model, (images, targets) = small_model(), sample_batch()
        loss = GradientNormLoss(0.8, 1.2, 4 / 255, ramp_epochs=5)(model, images, targets, epoch=2)

        normalised = ((images - model.mean) / model.std).requires_grad_()
        mean = -model.model(normalised).log_softmax(1)[range(5), targets].sum() / 5
        (gradient,) = torch.autograd.grad(mean, normalised, create_graph=True)
        norms = [sample.abs().sum() for sample in gradient * 5 * (4 / 255) / model.std]
        expected = 0.8 * mean + 1.2 * (2 / 5) * sum(norms) / 5

        torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.parts["cross_entropy"], mean.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.parts["gradient_norm"], sum(norms).detach() / 5, rtol=1e-12, atol=0)
        assert_same_gradients(loss.total, expected, model, rtol=1e-11, atol=1e-14)

    def test_norm_predicts_the_loss_under_attack(self):
        """Moving every pixel by epsilon along its gradient's sign raises the loss by the norm."""
        model, (images, targets) = small_model(), sample_batch()
        epsilon = 1e-6
        norm = GradientNormLoss(epsilon=epsilon)(model, images, targets, epoch=9).parts["gradient_norm"]
        pixels = images.requires_grad_()
        before = F.cross_entropy(model(pixels), targets)
        (gradient,) = torch.autograd.grad(before, pixels)
        after = F.cross_entropy(model(images + epsilon * gradient.sign()), targets)
        torch.testing.assert_close((after - before).detach(), norm, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("objective", [GradientNormLoss(), NaturalLoss()])
    def test_soft_targets_extend_hard_ones(self, objective):
        model, (images, targets) = small_model(), sample_batch()
        hard = objective(model, images, targets, epoch=5)
        one_hot = F.one_hot(targets, 4).double()
        soft = objective(model, images, one_hot, epoch=5)
        torch.testing.assert_close(soft.total, hard.total)
        mixed = objective(model, images, 0.7 * one_hot + 0.3 / 4, epoch=5)
        assert not torch.isclose(mixed.total, hard.total)

    @pytest.mark.parametrize(
        ("ramp_epochs", "epoch", "alpha"),
        [(5, 0, 0.0), (5, 2.5, 0.5), (5, 5, 1.0), (5, 80, 1.0), (0, 0, 1.0)],
    )
    def test_ramp(self, ramp_epochs, epoch, alpha):
        objective = GradientNormLoss(ramp_epochs=ramp_epochs)
        model, batch = small_model(), sample_batch()
        loss = objective(model, *batch, epoch=epoch)
        assert objective.schedule(epoch) == {"alpha": alpha}
        penalty = alpha * 1.2 * loss.parts.get("gradient_norm", 0)
        torch.testing.assert_close(loss.total.detach(), 0.8 * loss.parts["cross_entropy"] + penalty)

    @pytest.mark.parametrize("objective", [GradientNormLoss(), GradientNormLoss(gn_weight=0), NaturalLoss()])
    def test_no_input_gradient_where_it_has_no_weight(self, objective, monkeypatch):
        model, batch = small_model(), sample_batch()
        epoch = 0 if objective == GradientNormLoss() else 10

        def refuse(*args, **kwargs):
            raise AssertionError("took a gradient")

        monkeypatch.setattr(torch.autograd, "grad", refuse)
        assert objective(model, *batch, epoch=epoch).parts.keys() == {"cross_entropy"}
        with pytest.raises(AssertionError, match="took a gradient"):
            GradientNormLoss()(model, *batch, epoch=1)

    def test_leaves_the_images_alone(self):
        model, (images, targets) = small_model(), sample_batch()
        before = images.clone()
        GradientNormLoss()(model, images, targets, epoch=9).total.backward()
        assert not images.requires_grad and images.grad is None and torch.equal(images, before)

    def test_half_precision_norm_does_not_overflow(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2, bias=False)).half()
        nn.init.constant_(model[1].weight[0], 1.0)
        nn.init.constant_(model[1].weight[1], -1.0)
        images = torch.zeros(1, 3, 224, 224, dtype=torch.float16)
        loss = GradientNormLoss(epsilon=1.0)(model, images, torch.tensor([1]), epoch=9)
        # The logits are equal, so d CE / d pixel is (1 - -1) / 2; a float16 ends at 65,504.
        assert loss.parts["gradient_norm"].item() == 3 * 224 * 224

    @pytest.mark.parametrize(
        ("error", "name", "change"),
        [
            (TypeError, "images", {"images": torch.zeros(5, 3, 2, 2, dtype=torch.uint8)}),
            (TypeError, "images", {"images": [0.5]}),
            (ValueError, "images", {"images": torch.zeros(0, 3, 2, 2)}),
            (TypeError, "targets", {"targets": torch.zeros(5, dtype=torch.int32)}),
            (TypeError, "targets", {"targets": [0, 1, 2, 3, 0]}),
            (ValueError, "targets", {"targets": torch.zeros(4, dtype=torch.int64)}),
            (ValueError, "targets", {"targets": torch.full((5, 3), 1 / 3)}),
            (ValueError, "targets", {"targets": torch.tensor([0, 1, 2, 3, 4])}),
            # cross_entropy's ignore_index
            (ValueError, "targets", {"targets": torch.tensor([0, 1, 2, 3, -100])}),
            (ValueError, "targets", {"targets": torch.zeros(5, dtype=torch.int64, device="meta")}),
            (ValueError, "model", {"model": lambda images: images}),
            (TypeError, "model", {"model": lambda images: (images.flatten(1), images)}),
            (TypeError, "model", {"model": lambda images: {"logits": images.flatten(1)}}),
        ],
    )
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_bad_input_is_named(self, objective, error, name, change):
        images, targets = sample_batch(torch.float32)
        arguments = {"model": small_model(torch.float32), "images": images, "targets": targets} | change
        with pytest.raises(error, match=name):
            objective(**arguments, epoch=3)

    @pytest.mark.parametrize("objective", [GradientNormLoss(), EdgeLoss()])
    def test_bad_epoch_is_named(self, objective):
        with pytest.raises(ValueError, match="epoch"):
            objective(small_model(), *sample_batch(), epoch=-1)

    def test_disabled_gradients_are_reported(self):
        with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are disabled"):
            GradientNormLoss()(small_model(), *sample_batch(), epoch=9)

    def test_a_small_swin(self):
        """The published code's form, on a model with every op of Swin-B, fused: loss and every gradient."""
        timm = pytest.importorskip("timm")
        sizes = {"img_size": 56, "embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
        model = timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5)
        model = Normalize(model, (0.485, 0.456, 0.406), (0.225, 0.225, 0.225)).double().eval()
        images = torch.rand(2, 3, 56, 56, dtype=torch.float64)
        targets = torch.rand(2, 5, dtype=torch.float64).softmax(1)

        normalised = ((images - model.mean) / model.std).requires_grad_()
        mean = -(targets * model.model(normalised).log_softmax(1)).sum() / 2
        (gradient,) = torch.autograd.grad(mean, normalised, create_graph=True)
        expected = 0.8 * mean + 1.2 * (gradient * 2 * (4 / 255) / model.std).abs().sum() / 2
        wanted = torch.autograd.grad(expected, list(model.parameters()))

        fused = gk.fuse(copy.deepcopy(model))
        loss = GradientNormLoss()(fused, images, targets, epoch=5)
        torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=0)
        found = torch.autograd.grad(loss.total, list(fused.parameters()))
        for actual, gradient in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


class Attention(nn.Module):
    """Attention and softmaxes as a model may call them."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(tokens, tokens * 0.5, tokens).transpose(1, 2)
        return mixed.reshape(x.shape) + torch.softmax(x, -1) + x.softmax(1) + F.log_softmax(x, dim=1)


NETWORKS = {
    "batch_norm": [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU()],
    "instance_norm": [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.GELU()],
    "layer_norm": [nn.Conv2d(3, 6, 3), nn.LayerNorm((6, 3, 3)), nn.Dropout(0.5), nn.Tanh()],
    "group_norm": [nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Softplus()],
    "attention": [nn.Conv2d(3, 6, 3), Attention(), nn.Mish()],
    "depthwise": [nn.Conv2d(3, 6, 3, groups=3), nn.ELU(), nn.Hardsigmoid()],
}


def network(name):
    layers = [copy.deepcopy(layer) for layer in NETWORKS[name]]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 4)).double()


def gradients_of(objective, model, batch):
    """The loss, its gradient, and the buffers after it; random numbers and buffers as at the start."""
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    loss = objective(model, *batch, epoch=1)
    gradients = torch.autograd.grad(loss.total, list(model.parameters()))
    return loss.total.detach(), torch.cat([g.flatten() for g in gradients]), list(model.buffers())


def assert_engine_is_right(engine, model, batch, wanted, norm="l1", tolerance=1e-4):
    options = {"ramp_epochs": 0, "epsilon": 0.1, "norm": norm, "difference_step": 1e-7}
    loss, gradient, buffers = gradients_of(GradientNormLoss(**options, engine=engine), model, batch)
    # PyTorch's hardsigmoid divides by a 6 in float32.
    torch.testing.assert_close(loss, wanted[0], rtol=1e-8, atol=0)
    assert (gradient - wanted[1]).norm() <= tolerance * wanted[1].norm()
    assert all(map(torch.equal, buffers, wanted[2])) and len(buffers) == len(wanted[2])


class TestEngines:
    @pytest.mark.parametrize("norm", ["l1", "l2", "squared_l2"])
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("engine", ["finite_difference", "forward_over_reverse"])
    def test_equals_double_backprop(self, engine, name, training, fused, norm):
        model = network(name).train(training)
        batch = sample_batch(size=5)
        exact = GradientNormLoss(ramp_epochs=0, norm=norm, epsilon=0.1)
        # PyTorch alone cannot differentiate hardsigmoid and attention twice.
        wanted = gradients_of(exact, gk.fuse(copy.deepcopy(model)), batch)
        if fused:
            gk.fuse(model)
        with gk.set_fused_double_backward(name == "attention"):
            if name == "attention":
                wanted = gradients_of(exact, model, batch)
        assert_engine_is_right(
            engine, model, batch, wanted, norm, 1e-8 if engine == "forward_over_reverse" else 1e-4
        )

    @pytest.mark.parametrize("norm", ["l1", "l2", "squared_l2"])
    def test_norms(self, norm):
        model, (images, targets) = small_model(), sample_batch()
        pixels = images.clone().requires_grad_()
        cross_entropy = F.cross_entropy(model(pixels), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(cross_entropy, pixels)
        length = torch.linalg.vector_norm(gradient.flatten(1), 1 if norm == "l1" else 2, dim=1)
        expected = 0.3 * (length**2 if norm == "squared_l2" else length).mean()
        loss = GradientNormLoss(norm=norm, epsilon=0.3, ramp_epochs=0)(model, images, targets, epoch=0)
        torch.testing.assert_close(loss.parts["gradient_norm"], expected)

    @pytest.mark.parametrize("engine", ["double_backprop", "finite_difference", "forward_over_reverse"])
    @pytest.mark.parametrize("norm", ["l1", "l2", "squared_l2"])
    def test_a_gradient_of_zero(self, engine, norm):
        """Of a network that ignores some images, or all."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
        nn.init.zeros_(model[1].weight)
        objective = GradientNormLoss(ramp_epochs=0, norm=norm, engine=engine)
        loss = objective(model, *sample_batch(), epoch=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.total, list(model.parameters())))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("engine", ["finite_difference", "forward_over_reverse"])
    @pytest.mark.parametrize("kind", ["spectral_norm", "old_spectral_norm", "scripted", "exported"])
    def test_models_that_are_more_than_their_layers(self, kind, engine):
        """Parametrised weights with a state of their own, and graphs of no Python."""
        model = network("depthwise")
        batch = sample_batch(size=5)
        if kind == "spectral_norm":
            nn.utils.parametrizations.spectral_norm(model[-1])
        elif kind == "old_spectral_norm":
            nn.utils.spectral_norm(model[-1])
        elif kind == "scripted":
            model = nn.Sequential(torch.jit.script(model[:2]), *model[2:])
        else:
            model = torch.export.export(nn.Sequential(*model[:2], *model[3:]), (batch[0],)).module()
        with gk.set_fused_double_backward(True):
            wanted = gradients_of(GradientNormLoss(ramp_epochs=0, epsilon=0.1), model, batch)
            assert_engine_is_right(engine, model, batch, wanted)

    def test_finite_difference_refuses_coarse_arithmetic(self):
        images, targets = sample_batch(torch.float32)
        objective = GradientNormLoss(ramp_epochs=0, engine="finite_difference")
        with pytest.raises(RuntimeError, match="bfloat16 in model or images would round the difference away"):
            objective(small_model(torch.bfloat16), images.bfloat16(), targets, epoch=0)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
            objective(small_model(torch.float32), images, targets, epoch=0)

    def test_activation_checkpointing(self):
        """Right, or an error that names both."""

        def checkpointed(x):
            return checkpoint(model, x, use_reentrant=False)

        model, batch = small_model(), sample_batch()
        exact = GradientNormLoss(ramp_epochs=0)
        wanted = exact(model, *batch, epoch=0).total
        with pytest.raises(RuntimeError, match=r"forward_over_reverse: .*activation checkpointing"):
            replace(exact, engine="forward_over_reverse")(checkpointed, *batch, epoch=0)
        torch.testing.assert_close(exact(checkpointed, *batch, epoch=0).total, wanted)
        # Which saves tensors elsewhere, and computes nothing again.
        with torch.autograd.graph.save_on_cpu():
            loss = replace(exact, engine="forward_over_reverse")(model, *batch, epoch=0)
        torch.testing.assert_close(loss.total, wanted)
        loss.total.backward()

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_forward_over_reverse_refuses_what_it_cannot_make_right(self):
        class Direct(nn.Module):
            def forward(self, x):
                return torch.layer_norm(x.flatten(1), (12,))[:, :4] * self.scale

            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

        objective = GradientNormLoss(ramp_epochs=0, engine="forward_over_reverse")
        with pytest.raises(RuntimeError, match="layer_norm wrongly"):
            objective(Direct().double(), *sample_batch(), epoch=0)
        normalised = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        scripted = nn.Sequential(normalised, nn.Flatten())
        with pytest.raises(RuntimeError, match="native_batch_norm wrongly"):
            objective(scripted.double(), *sample_batch(), epoch=0)
        constant = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
        with pytest.raises(RuntimeError):
            objective(lambda x: constant, *sample_batch(), epoch=0)


class TestEdges:
    def test_equals_scipys_filters(self):
        ndimage = pytest.importorskip("scipy.ndimage")
        image = torch.rand(3, 9, 12, dtype=torch.float64)

        def blur(x):
            return ndimage.gaussian_filter(x, 1, mode="nearest", truncate=3)

        total = 0
        for channel in image.numpy():
            smooth = blur(channel)
            total = total + sum(ndimage.sobel(smooth, axis, mode="nearest") ** 2 for axis in (0, 1))
        expected = torch.from_numpy(blur(total**0.5))
        torch.testing.assert_close(edges(image.unsqueeze(0))[0, 0], expected)

    def test_constant_images(self):
        assert not edges(torch.full((1, 3, 8, 8), 0.5)).abs().max() > 1e-6
        loss = EdgeLoss()(
            small_model(torch.float32), torch.full((5, 3, 2, 2), 0.5), sample_batch()[1], epoch=0
        )
        assert loss.total.isfinite()

    @pytest.mark.parametrize("variant", ["signed", "magnitude"])
    @pytest.mark.parametrize("gradient_norm", [None, GradientNormLoss(ramp_epochs=0)])
    def test_equals_a_transcription(self, variant, gradient_norm):
        model, (images, targets) = small_model(torch.float32), sample_batch(torch.float32)
        torch.manual_seed(7)
        objective = EdgeLoss(variant=variant, gradient_norm=gradient_norm)
        loss = objective(model, images, targets, epoch=10)

        torch.manual_seed(7)
        pixels = images.clone().requires_grad_()
        logits = model(pixels)
        classes = torch.multinomial((logits / 0.5).softmax(1), 1)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes).sum(), pixels, create_graph=True)
        target = edges(images)
        if variant == "magnitude":
            gradient = gradient.abs().max(dim=1, keepdim=True).values
        target = target.expand_as(gradient)
        error = (
            (gradient / gradient.pow(2).mean().sqrt() - target / target.pow(2).mean().sqrt()) ** 2
        ).mean()
        if gradient_norm:
            rest = gradient_norm(model, images, targets, epoch=10).total
        else:
            rest = F.cross_entropy(model(images), targets)
        expected = rest + 1.9 * error
        torch.testing.assert_close(loss.total, expected)
        torch.testing.assert_close(loss.parts["edge"], error.detach())
        assert_same_gradients(loss.total, expected, model)

    def test_schedule(self):
        assert EdgeLoss().schedule(0) == {"edge_weight": 1.0}
        assert EdgeLoss().schedule(1000) == {"edge_weight": 19.0}
        assert EdgeLoss(gradient_norm=GradientNormLoss()).schedule(2.5) == {
            "alpha": 0.5,
            "edge_weight": pytest.approx(1.225),
        }


class TestAdversarial:
    def test_fgsm(self):
        model, (images, targets) = small_model(), sample_batch()
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), targets), pixels)
        moved = (images + 0.1 * gradient.sign()).clamp(0, 1)
        loss = AdversarialLoss(0.1, steps=1, random_start=False)(model, images, targets, epoch=0)
        torch.testing.assert_close(loss.total, F.cross_entropy(model(moved), targets))

    @pytest.mark.parametrize(
        ("steps", "random_start", "factor"), [(1, False, 1), (1, True, 1.25), (4, True, 0.5)]
    )
    def test_step_sizes(self, steps, random_start, factor):
        model, (images, targets) = small_model(), sample_batch()
        torch.manual_seed(2)
        loss = AdversarialLoss(0.1, steps, random_start=random_start)(model, images, targets, epoch=0)
        torch.manual_seed(2)
        options = {"eps": 0.1, "steps": steps, "step_size": 0.1 * factor, "random_start": random_start}
        moved = perturb(model, images, targets, **options)
        torch.testing.assert_close(loss.total, F.cross_entropy(model(moved), targets))

    def test_hybrid_takes_the_norm_at_the_perturbed_images(self):
        model, (images, targets) = small_model(), sample_batch()
        hybrid = AdversarialLoss(0.1, 1, random_start=False, objective=PENALISED)
        moved = perturb(model, images, targets, eps=0.1, steps=1, step_size=0.1, random_start=False)
        loss = hybrid(model, images, targets, epoch=0)
        torch.testing.assert_close(loss.total, PENALISED(model, moved, targets, epoch=0).total)
        assert hybrid.schedule(0) == {"alpha": 1.0}

    def test_leaves_the_model_as_it_was(self):
        """The search sees it in eval mode; running statistics count the batch once."""
        model = network("batch_norm").train()
        model[1].eval()
        before = model[0].weight.clone()
        batch = sample_batch(size=5)
        AdversarialLoss()(model, *batch, epoch=0)
        assert model.training and model[0].training and not model[1].training
        assert all(p.grad is None for p in model.parameters()) and torch.equal(model[0].weight, before)
        model.train()
        AdversarialLoss()(model, *batch, epoch=0)
        assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(
            (GradientNormLoss, name, value)
            for name in ("ce_weight", "gn_weight", "epsilon", "ramp_epochs", "difference_step")
            for value in (-1.0, float("nan"), float("inf"))
        ),
        (GradientNormLoss, "norm", "l3"),
        (GradientNormLoss, "engine", "magic"),
        (EdgeLoss, "start", -1.0),
        (EdgeLoss, "temperature", 0.0),
        (EdgeLoss, "variant", "other"),
        (EdgeLoss, "maximum", float("nan")),
        (AdversarialLoss, "epsilon", -1.0),
        (AdversarialLoss, "steps", 0),
        (AdversarialLoss, "step_size", float("inf")),
    ],
)
def test_bad_settings_are_named(kind, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kind(**{name: value})
