"""Losses and PReLU under the switch: PyTorch's values and derivatives, from fewer ops."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import Calls, assert_close
from test_corrected import check, curvatures, random, up_to_third_order

import gradnorm_kernels as gk


def reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def plain_smooth_l1(x, y, beta=1.0, reduction="mean"):
    d = (x - y).abs()
    inner = d.square() / (2 * beta) if beta else d
    return reduced(torch.where(d < beta, inner, d - beta / 2), reduction)


def plain_huber(x, y, delta=1.0, reduction="mean"):
    d = (x - y).abs()
    return reduced(torch.where(d < delta, d.square() / 2, delta * (d - delta / 2)), reduction)


def plain_soft_margin(x, y, reduction="mean"):
    return reduced((-x * y).exp().add(1).log(), reduction)


def plain_prelu(x, weight):
    shape = [1, -1, *[1] * (x.dim() - 2)] if x.dim() > 1 else [-1]
    return torch.where(x >= 0, x, weight.view(shape) * x)


def plain_logsumexp(x, dim, keepdim=False):
    return x.exp().sum(dim, keepdim).log()


PAIR = random(4, 3, 2), random(4, 3)[:, :, None].expand(4, 3, 2).detach().clone().requires_grad_()
SIGNS = torch.sign(random(3, 2, 4)).detach()
# A function, the same in plain operations that are right to every order, and its inputs.
CASES = {
    "prelu": (F.prelu, plain_prelu, (random(2, 3, 4), random(3))),
    "prelu of one weight": (F.prelu, plain_prelu, (random(2, 3, 4, 2), random(1))),
    "prelu of a vector": (F.prelu, plain_prelu, (random(5), random(1))),
    "logsumexp of several": (
        partial(torch.logsumexp, dim=(0, 2)),
        partial(plain_logsumexp, dim=(0, 2)),
        (random(3, 4, 2),),
    ),
    "logsumexp of a transposed tensor": (
        lambda x: x.mT.logsumexp(1),
        lambda x: plain_logsumexp(x, 2),
        (random(3, 4, 2),),
    ),
}
for reduction in ("none", "mean", "sum"):
    for name, stock, plain, options in (
        ("smooth_l1", F.smooth_l1_loss, plain_smooth_l1, {}),
        ("smooth_l1 of a narrow limit", F.smooth_l1_loss, plain_smooth_l1, {"beta": 0.3}),
        ("smooth_l1 of no limit", F.smooth_l1_loss, plain_smooth_l1, {"beta": 0.0}),
        ("huber", F.huber_loss, plain_huber, {}),
        ("huber of a wide limit", F.huber_loss, plain_huber, {"delta": 1.7}),
    ):
        options = {**options, "reduction": reduction}
        CASES[f"{name}, {reduction}"] = partial(stock, **options), partial(plain, **options), PAIR
    CASES[f"soft_margin, {reduction}"] = (
        partial(F.soft_margin_loss, target=SIGNS, reduction=reduction),
        partial(plain_soft_margin, y=SIGNS, reduction=reduction),
        (random(3, 2, 4),),
    )
    CASES[f"soft_margin of numbers, {reduction}"] = (
        partial(F.soft_margin_loss, target=PAIR[1].detach(), reduction=reduction),
        partial(plain_soft_margin, y=PAIR[1].detach(), reduction=reduction),
        (random(4, 3, 2),),
    )
for dim, keepdim in itertools.product((0, -2, 2), (False, True)):
    CASES[f"logsumexp, {dim}, {keepdim}"] = (
        partial(torch.logsumexp, dim=dim, keepdim=keepdim),
        partial(plain_logsumexp, dim=dim, keepdim=keepdim),
        (random(3, 4, 2),),
    )


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_right(name):
    check(up_to_third_order, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_gradient_that_is_a_variable_is_differentiated(name):
    def derivatives(function, inputs):
        output = function(*inputs)
        g = output.detach().cos().requires_grad_()
        firsts = torch.autograd.grad(output, inputs, g, create_graph=True)
        total = sum(first.sin().sum() for first in firsts)
        seconds = torch.autograd.grad(total, (g, *inputs), create_graph=True, materialize_grads=True)
        total = sum(second.sin().sum() for second in seconds)
        return [*firsts, *seconds, *torch.autograd.grad(total, (g, *inputs), materialize_grads=True)]

    check(derivatives, CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("soft_margin")])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_right(name):
    check(curvatures, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_first_backward_are_pytorchs(name, dtype):
    """Of logsumexp, whose first backward is a softmax, to rounding."""
    function, _, inputs = CASES[name]
    if "soft_margin" in name:
        dtype = torch.float64  # the target's
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]

    def both():
        output = function(*inputs)
        g = output.detach().cos()
        return [output, *torch.autograd.grad(output, inputs, g, create_graph=True)]

    expected = both()
    with gk.set_fused_double_backward(True):
        output, *firsts = both()
    assert torch.equal(output, expected[0])
    error = torch.finfo(dtype).eps if "logsumexp" in name else 0
    assert_close(firsts, expected[1:], rtol=4 * error, atol=error)


@pytest.mark.parametrize(
    "loss",
    [
        partial(F.smooth_l1_loss, beta=0.0),
        partial(F.smooth_l1_loss, beta=0.5),
        partial(F.huber_loss, delta=0.5),
    ],
    ids=["smooth_l1 of no limit", "smooth_l1", "huber"],
)
def test_kinks_are_pytorchs(loss):
    x = torch.tensor([-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0], dtype=torch.float64, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(loss(x, x.new_zeros(7), reduction="sum"), x, create_graph=True)
        return [first, *torch.autograd.grad(first.cos().sum(), x)]

    expected = second()
    with gk.set_fused_double_backward(True):
        assert_close(second(), expected, rtol=1e-15, atol=0)


def test_rows_that_are_infinite_have_pytorchs_gradients():
    x = torch.tensor([[-torch.inf] * 3, [1, -torch.inf, 2]], dtype=torch.float64)
    x.requires_grad_()

    def first():
        return torch.autograd.grad(torch.logsumexp(x, 1).sum(), x, create_graph=True)

    expected = first()
    with gk.set_fused_double_backward(True):
        torch.testing.assert_close(first(), expected, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("prelu", 0.75),
        ("smooth_l1, mean", 0.6),
        ("huber, sum", 0.7),
        ("soft_margin, sum", 0.65),
        ("logsumexp, 2, False", 0.6),
    ],
)
def test_second_backward_moves_less(name, elements):
    """The operand is large, so that what is reduced does not count."""
    function, _, (_, *others) = CASES[name]
    x = random(*{"prelu": (50, 3, 8), "soft_margin, sum": (3, 2, 4)}.get(name, (3, 2, 400)))
    others = [x.detach().cos()] if name.startswith(("smooth", "huber")) else others

    def moved():
        output = function(x, *others)
        g = output.detach().cos().requires_grad_()
        (first,) = torch.autograd.grad(output, x, g, create_graph=True)
        with Calls() as counted:
            torch.autograd.grad(first, (g, x), first.detach(), allow_unused=True)
        return counted.elements

    stock = moved()
    with gk.set_fused_double_backward(True):
        assert moved() <= elements * stock
