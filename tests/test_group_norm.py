"""Group normalisation on the CPU: its table, and what is its own."""

import math
from dataclasses import dataclass, replace

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import Call, Case, OpContract, assert_close, each_dtype
from hypothesis import strategies as st
from torch import Tensor

import gradnorm_kernels as gk

IS_BEFORE_2_15 = torch.__version__ < "2.15"


@dataclass(frozen=True)
class GroupNorm(Case):
    name: str
    shape: tuple
    num_groups: int
    channels_last: bool = False
    weight: bool = True
    bias: bool = True
    names = ("input", "weight", "bias")

    @property
    def parameters(self):
        # PyTorch's backward raises there.
        return 0 if IS_BEFORE_2_15 and self.bias and not self.weight else 2

    def shapes(self):
        of_channels = self.shape[1:2]
        return self.shape, of_channels if self.weight else None, of_channels if self.bias else None

    def fused(self, x, weight, bias):
        return gk.functional.group_norm(x, self.num_groups, weight, bias)

    def stock(self, x, weight, bias):
        if IS_BEFORE_2_15 and weight is None and bias is not None:
            weight = torch.ones_like(bias)  # its backward raises without one
        return F.group_norm(x, self.num_groups, weight, bias)

    def reference(self, x, weight, bias):
        return reference.group_norm(x, self.num_groups, weight, bias)

    def roundings(self, dtype):
        return 1 if dtype == torch.float32 else 0  # sums are rounded in another order than stock's

    def same_bits(self, operands):
        return False

    def calls(self, operands):
        (x, w, b), g = operands.inputs, operands.grad_output
        sizes = (*x.shape[:2], math.prod(x.shape[2:]))
        statistics = torch.native_group_norm(
            x.detach().contiguous(), None, None, *sizes, self.num_groups, 1e-5
        )[1:]
        yield Call("group_norm", (x, self.num_groups, w, b, 1e-5))
        tail = (g, x, *statistics, w, self.num_groups, 1e-5, [True] * 3)
        yield Call("group_norm_backward", tail)
        yield Call("group_norm_double_backward", (*operands.grad_grads, *tail))

    def is_pytorchs(self, call):
        return call.name != "group_norm_double_backward"

    @property
    def large(self):
        groups = 64 if self.num_groups == self.shape[1] else 32
        return replace(self, shape=(8, 64, 28, 28), num_groups=groups)

    def is_small(self):
        # In torch before 2.14 vmap raises for interleaved channels; why was not found out.
        return super().is_small() and not (self.channels_last and torch.__version__ < "2.14")

    def passes(self, switch):
        double = ["group_norm_double_backward"]
        # stock's own adds a weight, and PyTorch before 2.14 copies.
        adds = IS_BEFORE_2_15 and self.bias and not self.weight
        copies = self.channels_last and torch.__version__ < "2.14"
        forward = None if switch and (adds or copies) else ["native_group_norm"]
        return [
            (forward, None if forward is None else 2),
            (["group_norm_backward"], 3),
            (double, 5),
            (double, 4),
        ]


CASES = [
    # Odd sizes, so that a remainder is left of every vector.
    GroupNorm("rows", (2, 6, 5, 7), 3),
    GroupNorm("rows channels_last", (2, 6, 5, 7), 3, channels_last=True),
    GroupNorm("one group", (2, 10, 3, 5), 1),
    GroupNorm("instances", (3, 5, 4, 5), 5),
    GroupNorm("instances channels_last", (3, 5, 4, 5), 5, channels_last=True),
    GroupNorm("no inner dimension", (4, 33), 3),
    # More than the kernel adds up at once, in a row or in rows.
    GroupNorm("sequence", (1, 4, 1301), 2),
    GroupNorm("large channels_last", (1, 34, 13, 11), 2, channels_last=True),
    GroupNorm("volume channels_last", (2, 4, 3, 2, 5), 2, channels_last=True),
    GroupNorm("no parameters", (2, 6, 5, 7), 3, weight=False, bias=False),
    GroupNorm("no bias", (2, 6, 17), 2, bias=False),
    GroupNorm("no weight", (2, 6, 17), 2, weight=False),
    GroupNorm("empty batch", (0, 6, 5, 7), 3),
    GroupNorm("small", (2, 4, 3), 2),
    GroupNorm("small channels_last", (2, 4, 2, 2), 2, channels_last=True),
    GroupNorm("small without parameters", (2, 4, 3), 1, weight=False, bias=False),
]
BY_NAME = {case.name: case for case in CASES}


@st.composite
def random_cases(draw):
    inner = draw(st.lists(st.integers(1, 12), max_size=3))
    groups, size, batch = (draw(st.integers(1, 6)) for _ in range(3))
    # In groups of a few elements the condition of the statistics decides how large errors are.
    size = max(size, math.ceil(8 / math.prod(inner)))
    return GroupNorm("", (batch, groups * size, *inner), groups, draw(st.booleans()))


class TestGroupNorm(OpContract):
    cases = CASES
    traced = ("small channels_last", "small without parameters")
    kernels = ("rows", "large channels_last", "no inner dimension", "sequence")
    random_cases = random_cases()
    # To an input of another shape, dtype or device the parameters do not fit: they are named.
    accepted = (
        *(("group_norm", "input", how) for how in ("shape", "dtype", "device")),
        *(("", name, "dtype") for name in ("mean", "rstd")),
    )
    schemas = """
        group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None,
            float eps=1.0000000000000001e-05) -> Tensor;
        group_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight,
            int num_groups, float eps, bool[3] output_mask)
            -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias,
            Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int num_groups,
            float eps, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)
    """

    def bad(self):
        x, group_norm = torch.randn(2, 4, 3), gk.functional.group_norm
        for wrong in (3, 0, -1):
            yield lambda wrong=wrong: group_norm(x, wrong), ValueError, "expected num_groups"
        yield lambda: group_norm(x[0, 0], 1), ValueError, "expected input to have at least 2 dimensions"
        yield lambda: group_norm(x[:1, :, :1], 4), ValueError, "more than one value"
        integers = torch.ones(3, 2, 4, dtype=torch.int64)
        yield lambda: torch.func.vmap(lambda x: group_norm(x, 2))(integers), TypeError, "expected input"

    @pytest.mark.skipif(IS_BEFORE_2_15, reason="PyTorch's own double backward raises for this subclass")
    def test_tensor_subclasses(self, small_case, ours):
        super().test_tensor_subclasses(small_case, ours)


@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_pytorchs_has_its_bits(case, dtype):
    """All but the second order; PyTorch's fused first backward, which it takes to pieces for that."""
    operands = case.draw(dtype).map(Tensor.requires_grad_)
    (output,), first, _ = operands.orders(case.fused)
    inputs = [t for t in operands.inputs if t is not None]
    expected = case.stock(*operands.inputs)
    expected_first = torch.autograd.grad(expected, inputs, operands.grad_output)
    for a, e in zip((output, *first), (expected, *expected_first), strict=True):
        assert torch.equal(a, e) and a.stride() == e.stride()


@pytest.mark.parametrize("name", ["rows", "large channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_from_zero(name, dtype):
    """A mean far above the deviation, where sums of x instead of x - mean would cancel."""
    operands = BY_NAME[name].draw(dtype)
    operands.inputs[0] = operands.inputs[0] + 100
    TestGroupNorm().check_accuracy(BY_NAME[name], operands, lambda case: case.fused)


def test_switch_differentiates_the_statistics_too():
    case = BY_NAME["small"]
    operand, w, b = case.draw().inputs

    def native(x):
        return torch.native_group_norm(x, w, b, 2, 4, 3, case.num_groups, 1e-5)

    def second():
        x = operand.clone().requires_grad_()
        loss = sum((k + 2) * result.pow(3).sum() for k, result in enumerate(native(x)))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient, torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = second()
    with gk.set_fused_double_backward(True):
        assert_close(second(), expected)
        # Only a statistic, which PyTorch before 2.15 cannot differentiate by itself.
        (gradient,) = torch.autograd.grad(native(x := operand.clone().requires_grad_())[2].sum(), x)
    x = operand.clone().requires_grad_()
    variance = x.reshape(2, case.num_groups, -1).var(-1, correction=0)
    assert_close(gradient, torch.autograd.grad((variance + 1e-5).rsqrt().sum(), x)[0])


def test_switch_leaves_what_ours_does_not_cover():
    """The input as PyTorch's own op also takes it: of another shape than (N, C, HxW) says."""
    x = torch.randn(24, dtype=torch.float64, requires_grad=True)

    def native(x):
        return torch.native_group_norm(x, None, None, 2, 4, 3, 2, 1e-5)[0]

    expected = torch.autograd.grad(native(x).pow(3).sum(), x)[0]
    with gk.set_fused_double_backward(True):
        torch.testing.assert_close(torch.autograd.grad(native(x).pow(3).sum(), x)[0], expected)


@each_dtype
@pytest.mark.parametrize("case", [BY_NAME["instances"], GroupNorm("line", (2, 3, 65), 3)], ids=str)
def test_instance_norm(case, dtype):
    x, w, b = case.draw(dtype).inputs
    ours = gk.functional.instance_norm(x, weight=w, bias=b, eps=1e-3)
    assert torch.equal(ours, gk.functional.group_norm(x, case.num_groups, w, b, eps=1e-3))
    exact = F.instance_norm(x.double(), weight=w.double(), bias=b.double(), eps=1e-3)
    theirs = F.instance_norm(x, weight=w, bias=b, eps=1e-3)
    error, stock_error = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
    assert error <= 2 * stock_error + 1e-14


def test_instance_norm_with_running_statistics_is_stocks():
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 4), 5, 5))
    running = [torch.zeros(5).double(), torch.ones(5).double()]
    expected = [t.clone() for t in running]
    for options in ({"use_input_stats": True, "momentum": 0.3}, {"use_input_stats": False}):
        ours = gk.functional.instance_norm(x, *running, w, b, **options)
        assert_close([ours, *running], [F.instance_norm(x, *expected, w, b, **options), *expected])
    assert running[0].abs().sum() > 0
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        gk.functional.instance_norm(x[..., :1])
