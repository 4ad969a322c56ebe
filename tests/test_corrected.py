"""What PyTorch gets wrong, or NaN, at second order, and is right under the switch or after ``fuse``."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from contract import assert_close
from torch import nn

import gradnorm_kernels as gk


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def with_zero_rows():
    x = random(5, 4).detach()
    x[1] = x[3] = 0
    return x.requires_grad_()


def plain_norm(x, dim, keepdim=True):
    return x.square().sum(dim, keepdim).sqrt()


def plain_normalize(x):
    """Rows shorter than eps are divided by it."""
    is_short = (x == 0).all(-1, keepdim=True)
    return torch.where(is_short, x / 1e-12, x / plain_norm(x.masked_fill(is_short, 1), -1))


# A function, the same in plain operations that are right to every order, and its inputs.
CASES = {
    "weight_norm": (
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda v, g: v * (g / plain_norm(v, (1, 2))),
        (random(3, 4, 2), random(3, 1, 1)),
    ),
    "weight_norm of the last dimension": (
        lambda v, g: torch._weight_norm(v, g, 2),
        lambda v, g: v * (g / plain_norm(v, (0, 1))),
        (random(3, 4, 2), random(1, 1, 2)),
    ),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x, dim=(0, -1)),
        lambda x: plain_norm(x, (0, 2), False),
        (random(3, 4, 2),),
    ),
    "vector_norm of all": (torch.linalg.vector_norm, lambda x: x.square().sum().sqrt(), (random(3, 2),)),
    "norm of one number": (torch.linalg.vector_norm, torch.abs, (random(),)),
    "normalize": (F.normalize, plain_normalize, (with_zero_rows(),)),
    "cosine_similarity": (
        F.cosine_similarity,
        lambda x, y: (x * y).sum(1) / (plain_norm(x, 1, False) * plain_norm(y.expand_as(x), 1, False)),
        (random(5, 4), random(5, 1)),
    ),
    "pairwise_distance": (
        F.pairwise_distance,
        lambda x, y: plain_norm(x - y + 1e-6, 1, False),
        (random(5, 4), random(5, 1)),
    ),
    "sinc": (
        torch.sinc,
        lambda x: torch.sin(math.pi * x) / (math.pi * x),
        (torch.linspace(0.2, 3, 41, dtype=torch.float64).requires_grad_(),),
    ),
    "layer_norm with a bias alone": (
        lambda x, b: F.layer_norm(x, (4,), None, b),
        lambda x, b: (x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() + b,
        (random(5, 4), random(4)),
    ),
    "batch_norm with a bias alone": (
        lambda x, b: F.batch_norm(x, None, None, None, b, True),
        lambda x, b: (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + b,
        (random(5, 4), random(4)),
    ),
}


def up_to_third_order(function, inputs):
    results = values = [function(*inputs)]
    for _ in range(3):
        total = sum(value.sin().sum() for value in values)
        values = torch.autograd.grad(
            total, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        results = [*results, *values]
    return results


def check(derivatives, case):
    """Of a case, they are right under the switch."""
    function, plain, inputs = case
    expected = derivatives(plain, inputs)
    with gk.set_fused_double_backward(True):
        assert_close(derivatives(function, inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_right(name):
    check(up_to_third_order, CASES[name])


def curvatures(function, inputs):
    """Second derivatives by torch.func: forward over reverse, forward over forward, reverse over reverse."""
    inputs = [t.detach() for t in inputs]
    which = tuple(range(len(inputs)))

    def total(*inputs):
        return function(*inputs).sin().sum()

    hessian = torch.func.hessian(total, which)(*inputs)
    forward = torch.func.jacfwd(torch.func.jacfwd(total, which), which)(*inputs)
    reverse = torch.func.jacrev(torch.func.jacrev(total, which), which)(*inputs)
    return [h for rows in (*hessian, *forward, *reverse) for h in rows]


@pytest.mark.parametrize("name", CASES)
def test_transforms_are_right(name):
    check(curvatures, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinc_near_zero(dtype):
    """sinc x = 1 - (pi x)^2 / 6 + (pi x)^4 / 120 - ..., of the derivatives 0, -pi^2/3, 0 and pi^4/5 at 0."""
    x = torch.tensor([0.0, 1e-3, -0.02, 0.1, 0.31, 0.33], dtype=dtype, requires_grad=True)
    with gk.set_fused_double_backward(True):
        (first,) = torch.autograd.grad(torch.sinc(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x, create_graph=True)
        (fourth,) = torch.autograd.grad(third.sum(), x)
    for order, value in enumerate((first, second, third, fourth), 1):
        expected = torch.zeros_like(x, dtype=torch.float64)
        for k in range(12):
            power = 2 * k - order
            if power >= 0:
                coefficient = (-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1)
                expected += coefficient * math.perm(2 * k, order) * x.detach().double() ** power
        largest = expected.abs().max()
        assert_close(
            [value.double() / largest], [expected / largest], rtol=0, atol=100 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("zero", ["first", "second", "both"])
def test_cosine_similarity_of_zero_rows_is_finite(zero):
    x, y = random(5, 4), random(5, 4).detach().flip(0).requires_grad_()
    x = with_zero_rows() if zero != "second" else x
    y = with_zero_rows() if zero != "first" else y
    with gk.set_fused_double_backward(True):
        results = up_to_third_order(F.cosine_similarity, (x, y))
    rows = [0, 2, 4]
    expected = up_to_third_order(CASES["cosine_similarity"][1], (x, y))
    for ours, plain in zip(results, expected, strict=True):
        assert ours.isfinite().all()
        assert_close([ours[rows]], [plain[rows]], rtol=1e-9, atol=1e-9)


def test_other_norms_are_pytorchs():
    x = random(5, 4)
    for options in ({"ord": 1}, {"ord": 3}, {"ord": math.inf}, {"dtype": torch.float64, "ord": 0.5}):
        expected = up_to_third_order(lambda x, o=options: torch.linalg.vector_norm(x, **o), (x,))
        with gk.set_fused_double_backward(True):
            ours = up_to_third_order(lambda x, o=options: torch.linalg.vector_norm(x, **o), (x,))
        # The last bits are those of the sines around the norm, whose backward is ours.
        assert_close(ours, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(4, 3), lambda: nn.Conv1d(4, 3, 2)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("api", ["function", "parametrization", "parametrization, fused"])
def test_a_critic_of_weight_norm(api, dim, build):
    torch.manual_seed(0)
    layer = build().double()
    x = random(2, 4) if isinstance(layer, nn.Linear) else random(2, 4, 3)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if api == "function":
        layer = nn.utils.weight_norm(layer, dim=dim)
        parameters = layer.weight_v, layer.weight_g
    else:
        layer = nn.utils.parametrizations.weight_norm(layer, dim=dim)
        parameters = layer.parametrizations.weight.original1, layer.parametrizations.weight.original0
    if api == "parametrization, fused":
        before = layer.weight
        assert torch.equal(gk.fuse(layer).weight, before)

    def penalty(output):
        (gradient,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameters)

    def plain():
        v, g = parameters
        dims = [d for d in range(v.dim()) if dim is not None and d != dim] or tuple(range(v.dim()))
        w = v * (g / plain_norm(v, dims, dim is not None))
        return F.linear(x, w, bias) if weight.dim() == 2 else F.conv1d(x, w, bias)

    with gk.set_fused_double_backward(api != "parametrization, fused"):
        assert_close(penalty(layer(x)), penalty(plain()), rtol=1e-10, atol=1e-10)
    if api == "parametrization, fused":
        assert type(gk.unfuse(layer).parametrizations.weight[0]) is nn.utils.parametrizations._WeightNorm


@pytest.mark.parametrize("by", ["fuse", "switch"])
@pytest.mark.parametrize("groups", [1, 2])
def test_third_order_of_a_transposed_convolution_with_output_padding(by, groups):
    x, w, b = random(2, 4, 3), random(4, 2, 3), random(2 * groups)
    function = gk.functional.conv_transpose1d if by == "fuse" else F.conv_transpose1d
    settings = {"stride": 3, "padding": 1, "output_padding": 2, "groups": groups, "dilation": 2}

    def plain(x, w, b):
        """Of the matrix that a convolution with the same settings multiplies by."""
        points = torch.eye(4 * 3, dtype=x.dtype).view(12, 4, 3)
        columns = F.conv_transpose1d(points, torch.ones_like(w), None, **settings)
        length = columns.shape[-1]
        out = torch.zeros(2, 2 * groups, length, dtype=x.dtype) + b[:, None]
        for i in range(3):
            for k in range(3):
                at = i * 3 - 1 + k * 2
                if 0 <= at < length:
                    taps = w[:, :, k].view(groups, 4 // groups, 2)
                    term = torch.einsum("ngc,gco->ngo", x[:, :, i].view(2, groups, -1), taps).flatten(1)
                    out = out + term[..., None] * F.one_hot(torch.tensor(at), length)
        return out

    with gk.set_fused_double_backward(by == "switch"):
        ours = up_to_third_order(lambda *t: function(*t, **settings), (x, w, b))
        assert_close(ours, up_to_third_order(plain, (x, w, b)), rtol=1e-9, atol=1e-8)

        def third(of):
            def total(w):
                return of(x.detach(), w, b.detach()).sin().sum()

            once = torch.func.grad(total)
            twice = torch.func.grad(lambda w: once(w).sin().sum())
            return torch.func.grad(lambda w: twice(w).sin().sum())(w.detach())

        assert_close([third(lambda *t: function(*t, **settings))], [third(plain)], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_running_statistics_that_changed_are_named(order):
    norm = gk.FusedBatchNorm1d(4).double().eval()
    x = random(5, 4)
    output = norm(x)
    if order == 2:
        (output,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    norm.train()(x)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation.*in train mode changed it.*copy"
    ):
        output.sum().backward()


def test_switch_is_flipped_while_threads_run():
    """PyTorch's formulas and ours give the same, whichever an op takes."""
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4), nn.Softmax(-1)).double()
    x = random(3, 4)

    def gradients():
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), tuple(net.parameters())[:-1])

    expected, stop, failures = gradients(), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                assert_close(gradients(), expected, rtol=1e-10, atol=1e-10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(2000):
            gk.set_fused_double_backward(not gk.is_fused_double_backward_enabled())
            threading.Event().wait(0.0005)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        gk.set_fused_double_backward(False)
    assert not failures, failures[0]
