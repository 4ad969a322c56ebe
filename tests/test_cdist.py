"""Distances between the points of two sets on the CPU: their table, points that coincide, matrix products."""

from dataclasses import dataclass, replace

import contract
import pytest
import reference
import torch
from contract import HALF, OPS, Call, Calls, Case, OpContract, assert_close, by_function
from hypothesis import strategies as st

import gradnorm_kernels as gk

MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")
# PyTorch's own, but for that of a product.
HAS_SECOND_DERIVATIVE = torch.__version__ >= "2.14"


@dataclass(frozen=True)
class Cdist(Case):
    name: str
    first: tuple
    second: tuple
    p: float = 2.0
    mode: int = 0
    # Points of the first set that are points of the second.
    coincide: int = 0

    names = ("x1", "x2")

    @property
    def curved(self):
        return self.p == 2

    def shapes(self):
        return self.first, self.second

    def draw(self, *dtypes):
        operands = super().draw(*dtypes)
        x1, x2 = operands.inputs
        if self.coincide:
            x1[..., : self.coincide, :] = x2[..., : self.coincide, :]
        return operands

    def fused(self, x1, x2):
        return gk.functional.cdist(x1, x2, self.p, MODES[self.mode])

    def stock(self, x1, x2):
        return torch.cdist(x1, x2, self.p, MODES[self.mode])

    def reference(self, x1, x2):
        return reference.cdist(x1, x2, self.p)

    @property
    def by_product(self):
        several = max(self.first[-2], self.second[-2]) > 25
        return self.p == 2 and (self.mode == 1 or (self.mode == 0 and several))

    def calls(self, operands):
        (x1, x2), (u, v), g = operands.inputs, operands.grad_grads, operands.grad_output
        yield Call("cdist", (x1, x2, self.p, self.mode))
        if self.first[:-2] == self.second[:-2]:
            output = reference.cdist(x1, x2, self.p)
            yield Call("cdist_backward", (g, x1, x2, output, self.p, self.by_product, [True, True]))
            yield Call("cdist_double_backward", (u, v, g, x1, x2, self.p, [True, True, True]))

    def is_pytorchs(self, call):
        return call.name != "cdist_double_backward"

    def roundings(self, dtype):
        # Of neighbours among many, the squares of whose distances matrix products cancel to.
        return 64 if self.by_product else 8

    def same_bits(self, operands):
        return False

    @property
    def large(self):
        return replace(self, first=(3, 90, *self.first[-1:]), second=(3, 300, *self.second[-1:]))


CASES = [
    Cdist("points", (2, 20, 3), (2, 24, 3)),
    Cdist("many points", (70, 3), (140, 3)),
    Cdist("many points of many coordinates", (30, 90), (35, 90)),
    Cdist("few points of many coordinates", (3, 90), (4, 90)),
    Cdist("one by one", (70, 5), (33, 5), mode=2),
    Cdist("coincide", (3, 10, 4), (3, 12, 4), mode=2, coincide=7),
    Cdist("absolute", (2, 20, 5), (2, 33, 5), p=1.0),
    Cdist("absolute, many coordinates", (40, 130), (70, 130), p=1.0),
    Cdist("absolute, coincide", (9, 4), (9, 4), p=1.0, coincide=9),
    Cdist("batches", (2, 1, 9, 3), (3, 11, 3)),
    Cdist("one coordinate", (5, 1), (4, 1), p=1.0),
    Cdist("nothing", (0, 3), (4, 3)),
    Cdist("nothing of many", (3, 0, 3), (3, 4, 3)),
    Cdist("small", (4, 3), (3, 3)),
    Cdist("small, by product", (4, 3), (3, 3), mode=1),
    Cdist("small, absolute", (4, 2), (3, 2), p=1.0),
    Cdist("small batches", (2, 3, 2), (2, 2, 2)),
]


@st.composite
def random_cases(draw):
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    n, m = draw(st.integers(1, 25)), draw(st.integers(1, 25))
    coordinates = draw(st.integers(2, 20))
    p = draw(st.sampled_from([1.0, 2.0]))
    return Cdist("", (*batch, n, coordinates), (*batch, m, coordinates), p)


class TestCdist(OpContract):
    cases = CASES
    traced = ("small", "small, absolute")
    kernels = ("points", "one by one", "coincide", "absolute", "absolute, coincide")
    outlived = 2
    random_cases = random_cases()
    accepted = (("cdist", "x1", "shape"), ("cdist", "x2", "shape"))
    schemas = """
        cdist(Tensor x1, Tensor x2, float p, int? compute_mode) -> Tensor;
        cdist_backward(Tensor grad_output, Tensor x1, Tensor x2, Tensor output, float p, bool by_product,
            bool[2] output_mask) -> (Tensor grad_x1, Tensor grad_x2);
        cdist_double_backward(Tensor? grad_grad_x1, Tensor? grad_grad_x2, Tensor grad_output, Tensor x1,
            Tensor x2, float p, bool[3] output_mask) ->
            (Tensor grad_grad_output, Tensor grad_x1, Tensor grad_x2)
    """

    def test_switch_keeps_the_forward_and_the_first_backward(self, case, dtype):
        # PyTorch's own has no half types but in a matrix product.
        if dtype not in HALF:
            super().test_switch_keeps_the_forward_and_the_first_backward(case, dtype)

    def test_hooks_and_checkpoints(self, small_case, ours):
        # PyTorch's own product is returned as a view, of which nobody sees the gradient that goes past it.
        if not small_case.by_product and HAS_SECOND_DERIVATIVE:
            super().test_hooks_and_checkpoints(small_case, ours)

    def test_tensor_subclasses(self, small_case, ours):
        # Under the switch they are PyTorch's own.
        if HAS_SECOND_DERIVATIVE or ours is by_function:
            super().test_tensor_subclasses(small_case, ours)

    def is_reached(self, ours, exact):
        """PyTorch's own first backward spreads them further."""
        return not (ours.isfinite() & ~exact.isfinite()).any()

    def check_strides(self, case, operands, results):
        assert all(result.is_contiguous() for order in results for result in order)

    def bad(self):
        x = torch.randn(4, 3)
        for x1, x2 in ((x, x[:, :2]), (x[0], x), (x, x[0])):
            yield (
                lambda a=x1, b=x2: OPS.cdist(a, b, 2.0, None),
                ValueError,
                "expected x1 and x2 of at least two",
            )
        yield lambda: OPS.cdist(x, x, 3.0, None), ValueError, "p to be 1 or 2"
        yield lambda: gk.functional.cdist(x, x, 2.0, "fast"), ValueError, "expected compute_mode"
        yield lambda: gk.functional.cdist(x.expand(2, 4, 3), x.expand(3, 4, 3)), RuntimeError, "must match"
        g = torch.randn(4, 4)
        yield (
            lambda: OPS.cdist_double_backward(None, None, g[:3], x, x, 2.0, [True] * 3),
            ValueError,
            "expected grad_output of shape",
        )


@pytest.mark.skipif(not HAS_SECOND_DERIVATIVE, reason="PyTorch's own has no derivative of its backward")
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_double_backward_holds_no_difference_of_pairs(p):
    """Nor does the second derivative to the points, which goes through one more backward."""
    n, m, coordinates = 256, 192, 32 if p == 2 else 64
    x1, x2 = (torch.empty(k, coordinates, device="meta", requires_grad=True) for k in (n, m))
    g = torch.empty(n, m, device="meta", requires_grad=True)

    def moved(switch):
        with gk.set_fused_double_backward(switch):
            first = torch.autograd.grad(torch.cdist(x1, x2, p), (x1, x2), g, create_graph=True)
            with Calls() as calls:
                torch.autograd.grad(first, (g, x1, x2), first)
        return calls.elements / (n * m)

    # The distances' gradient and that of it, and points.
    assert moved(True) < 2 + 9 * coordinates * (n + m) / (n * m) < 0.2 * moved(False)


def test_products_of_many_coordinates_move_less():
    x1, x2 = (torch.empty(300, 256, device="meta", requires_grad=True) for _ in range(2))
    g = torch.empty(300, 300, device="meta", requires_grad=True)

    def moved(switch):
        with gk.set_fused_double_backward(switch):
            first = torch.autograd.grad(torch.cdist(x1, x2), (x1, x2), g, create_graph=True)
            with Calls() as calls:
                torch.autograd.grad(first, (g, x1, x2), first)
        return calls.elements

    assert moved(True) < 0.8 * moved(False)


@pytest.mark.parametrize("coordinates", [3, 90])
def test_coinciding_points_have_zero_derivatives(coordinates):
    x = torch.randn(6, coordinates, dtype=torch.float64, requires_grad=True)
    g = torch.diag(torch.randn(6, dtype=torch.float64)).requires_grad_()
    with gk.set_fused_double_backward(True):
        first = torch.autograd.grad(
            torch.cdist(x, x.detach().clone().requires_grad_()), x, g, create_graph=True
        )
        second = torch.autograd.grad(first, (x, g), torch.randn_like(x), create_graph=True)
    assert (first[0] == 0).all() and (second[0] == 0).all() and (second[1].diagonal() == 0).all()
    assert second[1].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.5, 3.0, float("inf")])
def test_other_distances_are_pytorchs(p):
    x1, x2 = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    expected = torch.cdist(x1, x2, p)
    with gk.set_fused_double_backward(True):
        for result in (torch.cdist(x1, x2, p), gk.functional.cdist(x1, x2, p)):
            assert torch.equal(result, expected) and "gradnorm" not in result.grad_fn.name()


def test_three_orders_of_products():
    """Of more coordinates than a kernel takes, by matrix products."""
    x1, x2 = (torch.randn(n, 70, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    for function, switch in ((gk.functional.cdist, False), (torch.cdist, True)):
        with gk.set_fused_double_backward(switch):
            results = list(contract.nth_gradients(function, (x1, x2), 3))
        expected = contract.nth_gradients(lambda a, b: reference.cdist(a, b, 2.0), (x1, x2), 3)
        assert_close(results, list(expected))


def test_no_coordinates():
    x1, x2 = (torch.empty(n, 0, requires_grad=True) for n in (5, 4))
    assert torch.equal(gk.functional.cdist(x1, x2), torch.zeros(5, 4))
    (gradient,) = torch.autograd.grad(gk.functional.cdist(x1, x2).sum(), x1)
    assert gradient.shape == (5, 0)
