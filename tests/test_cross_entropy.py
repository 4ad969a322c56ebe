"""Cross-entropy on the CPU: its table, and what is its own: targets, reductions, errors, what is saved."""

import itertools
import math
from dataclasses import dataclass, replace

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
from contract import DTYPES, OPS, Call, Case, OpContract, Operands, assert_close, flat, yardstick
from hypothesis import strategies as st
from torch import nn

import gradnorm_kernels as gk

# Of a case, a device and a dtype: the target and the weights.
CONSTANTS = {}


@dataclass(frozen=True)
class CrossEntropy(Case):
    name: str
    shape: tuple
    soft: bool = False
    ignored: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0
    reduction: str = "none"

    @property
    def dim(self):
        return min(len(self.shape), 2) - 1

    @property
    def rows(self):
        return self.shape[: self.dim] + self.shape[self.dim + 1 :]

    def shapes(self):
        return (self.shape,)

    def draw(self, *dtypes):
        # Here, where no mode counts and no transform sees what makes them.
        for device, dtype in itertools.product(("cpu", "meta"), DTYPES):
            made = self.make_target().to(device), self.make_weight().to(device, dtype)
            if self.soft:
                made = made[0].to(dtype), made[1]
            CONSTANTS[self, device, dtype] = made
        return super().draw(*dtypes)

    def make_target(self):
        numbers = torch.arange(math.prod(self.shape if self.soft else self.rows))
        if self.soft:  # whose rows do not sum to 1 exactly
            return (numbers.double().cos().square() * (2 / self.shape[self.dim])).view(self.shape)
        target = (7 * numbers + 3) % self.shape[self.dim]
        target[1::4] = -100 if self.ignored else target[1::4]
        return target.view(self.rows)

    def make_weight(self):
        return torch.arange(self.shape[self.dim]).double().cos() + 2

    def constants_for(self, x):
        target, weight = CONSTANTS[self, x.device.type, x.dtype]
        options = {"label_smoothing": self.label_smoothing, "reduction": self.reduction}
        return target, options | {"weight": weight if self.weighted else None}

    def by(self, function, x):
        target, options = self.constants_for(x)
        return function(x, target, **options)

    def fused(self, x):
        return self.by(gk.functional.cross_entropy, x)

    def stock(self, x):
        return self.by(F.cross_entropy, x)

    def reference(self, x):
        return self.by(reference.cross_entropy, x)

    def calls(self, operands):
        (x,), (v,), g = operands.inputs, operands.grad_grads, operands.grad_output
        target, options = self.constants_for(x)
        g = g if self.reduction == "none" else torch.full(self.rows, 0.7, dtype=x.dtype, device=x.device)
        settings = -100, self.label_smoothing
        enum = {"none": 0, "mean": 1, "sum": 2}[self.reduction]
        yield Call("cross_entropy_loss", (x, target, options["weight"], enum, *settings))
        yield Call("cross_entropy", (x, target, *settings))
        yield Call("cross_entropy_backward", (g, x, target, *settings))
        yield Call("cross_entropy_double_backward", (v, g, x, target, *settings))

    def is_pytorchs(self, call):
        return call.name == "cross_entropy_loss"  # its reductions

    def roundings(self, dtype):
        # A mean's gradients are small beside 1, which the comparison's floor is a rounding of.
        return 4

    @property
    def large(self):
        return replace(self, shape=(300, 512) if len(self.shape) < 3 else (4, 64, 300))

    def passes(self, switch):
        if self.reduction != "none" or self.weighted:
            return None
        names = ("cross_entropy", "cross_entropy_backward", *["cross_entropy_double_backward"] * 2)
        return [([name], moved + self.soft) for name, moved in zip(names, (1, 2, 3, 3), strict=True)]


CASES = [
    CrossEntropy("classes", (40, 100)),
    CrossEntropy("probabilities", (40, 100), soft=True),
    CrossEntropy("smoothed", (40, 100), label_smoothing=0.1),
    CrossEntropy("long", (3, 9001), ignored=True, label_smoothing=0.1),
    CrossEntropy("long probabilities", (3, 9001), soft=True),
    # A vector across neighbouring rows, whole and partly filled.
    CrossEntropy("across", (3, 50, 71), ignored=True, label_smoothing=0.3),
    CrossEntropy("across, probabilities", (3, 50, 71), soft=True, label_smoothing=0.3),
    CrossEntropy("mean", (40, 10), ignored=True, reduction="mean"),
    CrossEntropy("weighted", (40, 10), ignored=True, weighted=True, reduction="mean"),
    CrossEntropy("one row", (33,)),
    CrossEntropy("one class", (5, 1)),
    CrossEntropy("no rows", (0, 4)),
    CrossEntropy("all smoothed", (5, 4), label_smoothing=1.0),
    CrossEntropy("small", (4, 5)),
    CrossEntropy("small, across", (2, 3, 2, 2), ignored=True, label_smoothing=0.2),
    CrossEntropy("small probabilities", (2, 3, 2), soft=True, label_smoothing=0.2),
    CrossEntropy("small sum", (4, 5), weighted=True, ignored=True, reduction="sum"),
    CrossEntropy("small mean", (4, 5), soft=True, weighted=True, label_smoothing=0.2, reduction="mean"),
]


@st.composite
def random_cases(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shape[min(len(shape), 2) - 1] = draw(st.integers(1, 70))
    soft, ignored = draw(st.sampled_from([(True, False), (False, False), (False, True)]))
    smoothing, weighted = draw(st.sampled_from([(0.0, False), (0.0, True), (0.1, False)]))
    reduction = draw(st.sampled_from(["none", "sum"]))
    return CrossEntropy("", tuple(shape), soft, ignored, weighted, smoothing, reduction)


class TestCrossEntropy(OpContract):
    cases = CASES
    traced = ("small", "small probabilities", "small sum")
    kernels = (
        "classes",
        "probabilities",
        "smoothed",
        "long",
        "across",
        "across, probabilities",
        "one row",
        "small",
    )
    outlived = 2
    random_cases = random_cases()
    accepted = (
        ("cross_entropy_loss", "", ""),  # PyTorch's own
        ("", "target", "integers"),
        ("cross_entropy", "input", "dtype"),
    )
    # Under the switch they are ours: PyTorch's are several ops.
    test_switch_keeps_the_forward_and_the_first_backward = None
    schemas = """
        cross_entropy_loss(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index,
            float label_smoothing) -> Tensor;
        cross_entropy(Tensor input, Tensor target, int ignore_index, float label_smoothing) -> Tensor;
        cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, int ignore_index,
            float label_smoothing) -> Tensor;
        cross_entropy_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input,
            Tensor target, int ignore_index, float label_smoothing)
            -> (Tensor grad_grad_output, Tensor grad_input)
    """

    def bad(self):
        x, classes = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
        loss = gk.functional.cross_entropy
        for wrong in (3, -1):
            target = torch.tensor([0, wrong, 0, 0])
            for x_, t in ((x, target), (x.view(1, 3, 4), target.view(1, 4)), (x[0], target[1])):
                yield lambda x=x_, t=t: loss(x, t), IndexError, f"Target {wrong} is out of bounds"
        g, settings = torch.ones(4), (-100, 0.0)
        target = torch.tensor([0, 3, 0, 0])
        yield lambda: OPS.cross_entropy_backward(g, x, target, *settings), IndexError, "Target 3"
        yield lambda: OPS.cross_entropy_double_backward(x, g, x, target, *settings), IndexError, "Target 3"
        for device in ("cpu", "meta"):
            none, t = torch.empty(4, 0, device=device), classes.to(device)
            yield lambda x=none, t=t: OPS.cross_entropy(x, t, *settings), ValueError, "at least one class"
        yield lambda: loss(x, classes.int()), RuntimeError, "Long or Byte"
        yield lambda: loss(x, classes, reduction="all"), ValueError, "all is not a valid value for reduction"
        yield lambda: loss(x, classes, label_smoothing=2.0), RuntimeError, "label_smoothing must be between"
        yield lambda: loss(x, classes, torch.ones(4)), RuntimeError, "weight tensor should be defined"
        yield lambda: loss(x, classes[:3]), ValueError, "batch_size"


KINDS = [
    dict(zip(("soft", "ignored", "weighted", "label_smoothing", "reduction"), kind, strict=True))
    for kind in itertools.product(
        (False, True), (False, True), (False, True), (0.0, 0.1), ("none", "sum", "mean")
    )
    if not (kind[0] and kind[1])
]


@pytest.mark.parametrize("shape", [(7,), (6, 7), (4, 7, 3, 2)], ids=str)
def test_every_kind_equals_stock(shape):
    for kind in KINDS:
        case = CrossEntropy("", shape, **kind)
        operands = case.draw()
        expected = flat(operands.orders(case.stock))
        assert_close(flat(operands.orders(case.fused)), expected)
        with gk.set_fused_double_backward(True):
            assert_close(flat(operands.orders(case.stock)), expected)


def test_nothing_counted():
    x = torch.randn(3, 4, requires_grad=True)
    ignored = torch.full((3,), -100)
    assert gk.functional.cross_entropy(x, ignored).isnan()
    (gradient,) = torch.autograd.grad(gk.functional.cross_entropy(x, ignored, reduction="sum"), x)
    assert (gradient == 0).all()
    assert gk.functional.cross_entropy(x[:0], ignored[:0]).isnan()
    assert gk.functional.cross_entropy(x[:0], x[:0].detach()).isnan()


def test_a_class_that_is_ignored():
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    for reduction in ("none", "mean"):
        results = [f(x, target, ignore_index=1, reduction=reduction) for f in both()]
        torch.testing.assert_close(*results)


def both():
    return gk.functional.cross_entropy, F.cross_entropy


@pytest.mark.parametrize("switch", [False, True])
def test_probabilities_that_are_differentiated(switch):
    """As in distillation, with zeros among them: up to the third order, by the composite."""

    def gradients(function):
        x = torch.linspace(-1, 2, 12, dtype=torch.float64).sin().view(4, 3).requires_grad_()
        target = F.relu(x.detach().cos() - 0.5).requires_grad_()
        return list(contract.nth_gradients(lambda *a: function(*a, label_smoothing=0.1), (x, target), 3))

    expected = gradients(lambda x, t, label_smoothing: reference.cross_entropy(x, t, None, label_smoothing))
    with gk.set_fused_double_backward(switch):
        assert_close(gradients(both()[switch]), expected)


def test_logits_of_minus_infinity():
    x = torch.randn(5, 6, dtype=torch.float64)
    x[:, 3] = x[2, 4:] = -math.inf
    target = torch.tensor([0, 1, 2, 5, 3])
    operands = Operands([x], torch.ones(5).double(), [torch.randn(5, 6).double()])
    stock, ours = (flat(operands.orders(lambda x, f=f: f(x, target, reduction="none"))) for f in both())
    assert_close(ours, stock)
    assert ours[0][4] == math.inf and ours[0][:4].isfinite().all() and ours[1].isfinite().all()
    results = torch.func.grad(lambda x: gk.functional.cross_entropy(x[:4], target[:4]))(x)
    assert results.isfinite().all()


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("shape", [(40, 49), (2, 49, 20)], ids=str)
def test_an_offset_of_the_logits_costs_no_digits(shape, offset):
    for kind in ({}, {"soft": True}, {"label_smoothing": 0.1}):
        case = CrossEntropy("", shape, **kind)
        operands = case.draw(torch.float32)
        operands = Operands([20 * operands.inputs[0] + offset], operands.grad_output, operands.grad_grads)
        exact = flat(operands.map(torch.Tensor.double).orders(case.reference))
        ours = flat(operands.orders(case.fused))
        contract.assert_no_worse_than_stock(case, ours, yardstick(case, operands), exact)


@pytest.mark.parametrize("soft", [False, True])
def test_the_mean_of_many_half_losses_is_finite(soft):
    x = torch.zeros(1 << 15, 8, dtype=torch.float16)
    target = torch.full_like(x, 0.125) if soft else torch.zeros(1 << 15, dtype=torch.int64)
    loss = gk.functional.cross_entropy(x, target)
    assert loss.dtype == torch.float16
    torch.testing.assert_close(loss.item(), math.log(8), rtol=1e-3, atol=0)


def test_arguments_of_stock():
    x, target, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, -7]), torch.rand(3)
    for arguments in itertools.product((None, weight), (None, False), (-7,), (None, True, False)):
        results = [function(x, target, *arguments) for function in both()]
        torch.testing.assert_close(*results)
    module = nn.CrossEntropyLoss(weight, ignore_index=-7, reduction="sum")
    fused = gk.fuse(nn.CrossEntropyLoss(weight, ignore_index=-7, reduction="sum"))
    assert type(fused) is gk.FusedCrossEntropyLoss
    torch.testing.assert_close(fused(x, target), module(x, target))


def test_only_the_logits_and_the_target_are_saved():
    x, target = torch.randn(64, 1000, requires_grad=True), torch.randint(1000, (64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = gk.functional.cross_entropy(x, target, reduction="sum")
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), target.data_ptr()}
    loss.backward()
    loss = gk.functional.cross_entropy(x, target)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_makes_it_float32(device):
    key = f"Autocast{device.upper()}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("gradnorm_kernels::cross_entropy", key)
