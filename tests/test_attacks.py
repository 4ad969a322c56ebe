"""PGD against its definition: ball, box, ascent, and what it must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_kernels.training.attacks import input_gradient, loss_surface, perturb

EPS = 0.05
PGD = {"eps": EPS, "steps": 5, "step_size": EPS / 2, "random_start": True}


def small_model(dtype=torch.float32):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 9), nn.GELU(), nn.Linear(9, 4)).to(dtype)


def sample_batch(dtype=torch.float32):
    """Some pixels at the ends of [0, 1], where the box cuts the ball."""
    images = (torch.rand(6, 3, 4, 4) * 1.2 - 0.1).clamp(0, 1)
    return images.to(dtype), torch.tensor([0, 3, 1, 1, 2, 0])


def length(perturbation, norm):
    order = float("inf") if norm == "Linf" else 2
    return torch.linalg.vector_norm(perturbation.double().flatten(1), order, dim=1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("random_start", [False, True])
def test_stays_in_ball_and_box_and_raises_the_loss(norm, dtype, random_start):
    model, (images, labels) = small_model(dtype), sample_batch(dtype)
    adversarial = perturb(model, images, labels, **{**PGD, "random_start": random_start}, norm=norm)

    assert adversarial.dtype == dtype and adversarial.shape == images.shape
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    # In bfloat16 a pixel is rounded by at most 2 ** -9, and an image's 48 pixels by sqrt(48) times that.
    rounding = 2**-9 * (48**0.5 if norm == "L2" else 1) if dtype == torch.bfloat16 else 1e-6
    lengths = length(adversarial - images.double(), norm)
    assert (lengths <= EPS + rounding).all() and (lengths > 0.8 * EPS).all()

    def loss(pixels):
        return F.cross_entropy(model(pixels).double(), labels, reduction="none")

    assert (loss(adversarial) > loss(images)).all()


def test_one_step_is_the_fast_gradient_sign_method():
    model, (images, labels) = small_model(), sample_batch()
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)
    actual = perturb(model, images, labels, eps=EPS, steps=1, step_size=EPS, random_start=False)
    assert torch.equal(actual, (images + EPS * gradient.sign()).clamp(0, 1))


def test_loss_surface():
    """Its middle is the image, the middle line runs through FGSM's images, the other axis is its own."""
    model, (images, labels) = small_model(), sample_batch()
    losses, right = loss_surface(model, images, labels, 2 * EPS, points=5)
    assert losses.shape == right.shape == (6, 5, 5) and right.dtype == torch.bool

    def check(row, column, pixels):
        logits = model(pixels.clamp(0, 1))
        expected = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(losses[:, row, column], expected.detach())
        assert torch.equal(right[:, row, column], logits.argmax(1) == labels)

    signs = input_gradient(model, images, labels).sign()
    for column, factor in enumerate((-2, -1, 0, 1, 2)):
        check(2, column, images + factor * EPS * signs)
    across = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    check(4, 1, images + 2 * EPS * across - EPS * signs)


def test_one_step_in_l2_has_the_gradient_s_direction_and_the_radius():
    model, labels = small_model(torch.float64), sample_batch()[1]
    images = torch.full((6, 3, 4, 4), 0.5, dtype=torch.float64)
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)
    moved = perturb(model, images, labels, eps=EPS, norm="L2", steps=1, step_size=1.0, random_start=False)
    torch.testing.assert_close(moved - images, EPS * gradient / length(gradient, "L2").view(-1, 1, 1, 1))


def test_tiny_gradients_still_point_somewhere():
    """Their squares underflow in float32."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e-30)
    _, labels = sample_batch()
    images = torch.full((6, 3, 4, 4), 0.5)
    moved = perturb(model, images, labels, eps=EPS, norm="L2", steps=1, step_size=EPS, random_start=False)
    torch.testing.assert_close(length(moved - images, "L2"), torch.full((6,), EPS, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_model_that_ignores_its_input_leaves_the_images_alone(norm):
    images, labels = sample_batch()
    adversarial = perturb(
        lambda pixels: 0 * pixels.flatten(1), images, labels, **{**PGD, "random_start": False}, norm=norm
    )
    assert torch.equal(adversarial, images) and adversarial.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_generator_makes_it_reproducible(norm):
    model, batch = small_model(), sample_batch()

    def run(seed):
        return perturb(model, *batch, **PGD, norm=norm, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_start_is_uniform_in_the_ball(norm):
    """In two dimensions, a ball of half the radius has a quarter of the volume in either norm."""
    images = torch.full((4000, 2), 0.5)
    options = {"eps": 0.4, "steps": 1, "step_size": 0.0, "random_start": True, "norm": norm}
    start = perturb(lambda pixels: pixels, images, torch.zeros(4000, dtype=torch.int64), **options)
    inside = (length(start - images, norm) <= 0.2).double().mean()
    assert length(start - images, norm).max() <= 0.4 + 1e-6
    assert abs(inside - 0.25) < 0.03 and (start - images).mean(0).abs().max() < 0.02


def test_soft_labels_extend_hard_ones():
    model, (images, labels) = small_model(), sample_batch()
    options = {"eps": EPS, "steps": 3, "step_size": 0.02, "random_start": False}
    hard = perturb(model, images, labels, **options)
    one_hot = F.one_hot(labels, 4)
    # In float64, although the logits are float32.
    torch.testing.assert_close(perturb(model, images, one_hot.double(), **options), hard)
    assert not torch.equal(perturb(model, images, one_hot.float().roll(1, 1), **options), hard)


@pytest.mark.parametrize("enabled", [False, True])
def test_parameters_are_not_differentiated_nor_the_images_changed(enabled):
    model, (images, labels) = small_model(), sample_batch()
    images.requires_grad_()
    before = images.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3)
        parameter.register_hook(lambda gradient: pytest.fail("took a parameter's gradient"))
    with torch.set_grad_enabled(enabled):
        adversarial = perturb(model, images, labels, **PGD)
    assert not adversarial.requires_grad and images.grad is None and torch.equal(images, before)
    assert all((p.grad == 3).all() and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "eps", {"eps": -0.1}),
        (ValueError, "eps", {"eps": float("nan")}),
        (ValueError, "norm", {"norm": "L1"}),
        (ValueError, "steps", {"steps": 0}),
        (ValueError, "steps", {"steps": 1.5}),
        (ValueError, "step_size", {"step_size": float("inf")}),
        (TypeError, "images", {"images": [0.5]}),
        (TypeError, "images", {"images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}),
        (ValueError, "images", {"images": torch.zeros(0, 3, 4, 4)}),
        (ValueError, "images", {"images": torch.full((6, 3, 4, 4), 1.1)}),
        (ValueError, "images", {"images": torch.full((6, 3, 4, 4), float("nan"))}),
        (TypeError, "targets", {"targets": [0]}),
        (TypeError, "targets", {"targets": torch.zeros(6, dtype=torch.int32)}),
        (ValueError, "targets", {"targets": torch.zeros(5, dtype=torch.int64)}),
        (ValueError, "targets", {"targets": torch.full((6,), 4)}),
        # cross_entropy's ignore_index
        (ValueError, "targets", {"targets": torch.full((6,), -100)}),
        (ValueError, "targets", {"targets": torch.full((6, 3), 1 / 3)}),
        (ValueError, "model", {"model": lambda pixels: pixels}),
    ],
)
def test_bad_arguments_are_named(error, name, change):
    images, labels = sample_batch()
    arguments = {"model": small_model(), "images": images, "targets": labels, **PGD} | change
    with pytest.raises(error, match=f"^{name}:"):
        perturb(**arguments)
