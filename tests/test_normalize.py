"""Division by the Euclidean norm, that norm and weight normalisation on the CPU: their tables, rows of zeros,
similarities."""

from dataclasses import dataclass, replace

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
from contract import OPS, Call, Calls, Case, OpContract, assert_close
from hypothesis import strategies as st
from torch import nn

import gradnorm_kernels as gk


class Rows(Case):
    """With the first row of the input shortened by a factor."""

    shorten = 1.0

    def shapes(self):
        return (self.shape,)

    def draw(self, *dtypes):
        operands = super().draw(*dtypes)
        if self.shorten != 1:
            x = operands.inputs[0].movedim(self.dim, -1)
            x[(0,) * (x.ndim - 1)] *= self.shorten
        return operands

    def roundings(self, dtype):
        return 4


@dataclass(frozen=True)
class Normalize(Rows):
    name: str
    shape: tuple
    dim: int = 1
    shorten: float = 1.0
    eps: float = 1e-12

    def fused(self, x):
        return gk.functional.normalize(x, dim=self.dim, eps=self.eps)

    def stock(self, x):
        return F.normalize(x, dim=self.dim, eps=self.eps)

    def reference(self, x):
        return reference.normalize(x, self.dim, self.eps)

    def calls(self, operands):
        (x,), (v,), g = operands.inputs, operands.grad_grads, operands.grad_output
        yield Call("normalize", (x, self.dim, self.eps))
        yield Call("normalize_backward", (g, x, self.dim, self.eps))
        yield Call("normalize_double_backward", (v, g, x, self.dim, self.eps))

    @property
    def large(self):
        along_rows = self.dim in (-1, len(self.shape) - 1)
        shape, dim = ((300, 512), -1) if along_rows else ((20, 64, 120), 1)
        return replace(self, shape=shape, dim=dim)

    def passes(self, switch):
        if switch:
            return None
        backward = (["normalize_backward"], 3)
        return [(["normalize"], 2), backward, (["normalize_double_backward"], 5), backward]


@dataclass(frozen=True)
class VectorNorm(Rows):
    name: str
    shape: tuple
    dim: int | tuple | None = 1
    keepdim: bool = True
    shorten: float = 1.0

    def fused(self, x):
        return gk.functional.vector_norm(x, self.dim, self.keepdim)

    def stock(self, x):
        return torch.linalg.vector_norm(x, dim=self.dim, keepdim=self.keepdim)

    def reference(self, x):
        return reference.vector_norm(x, self.dim, self.keepdim)

    def calls(self, operands):
        (x,), (v,), g = operands.inputs, operands.grad_grads, operands.grad_output
        yield Call("vector_norm", (x, (self.dim,) if isinstance(self.dim, int) else self.dim, self.keepdim))
        if isinstance(self.dim, int) and self.keepdim:
            yield Call("vector_norm_double_backward", (v, g, x, self.dim))

    def is_pytorchs(self, call):
        return call.name == "vector_norm"

    @property
    def large(self):
        return replace(self, shape=(300, 512), dim=1)

    def passes(self, switch):
        double_backward = (["vector_norm_double_backward"], 3)
        return [(["vector_norm"], 1), (None, 4), double_backward, double_backward]


@dataclass(frozen=True)
class WeightNorm(Case):
    name: str
    shape: tuple
    dim: int = 0

    names = ("v", "g")
    right_in_pytorch = False

    def shapes(self):
        return self.shape, tuple(n if k == self.dim else 1 for k, n in enumerate(self.shape))

    def fused(self, v, g):
        return gk.functional.weight_norm(v, g, self.dim)

    def stock(self, v, g):
        return torch._weight_norm(v, g, self.dim)

    def reference(self, v, g):
        return reference.weight_norm(v, g, self.dim)

    def calls(self, operands):
        (v, g), (u, t), a = operands.inputs, operands.grad_grads, operands.grad_output
        yield Call("weight_norm", (v, g, self.dim))
        yield Call("weight_norm_double_backward", (u, t, a, v, g, self.dim))

    def is_pytorchs(self, call):
        return call.name == "weight_norm"

    def roundings(self, dtype):
        return 4

    @property
    def large(self):
        shape, dim = ((300, 16, 32), 0) if self.dim == 0 else ((1200, 128), 1)
        return replace(self, shape=shape, dim=dim)

    def passes(self, switch):
        double_backward = (["weight_norm_double_backward"], 5)
        return [(None, 2), (["_weight_norm_interface_backward"], 3), double_backward, double_backward]


CASES = [
    Normalize("tokens", (40, 197)),
    Normalize("long", (3, 9001)),
    Normalize("short rows", (700, 3)),
    # A vector across neighbouring rows, whole and partly filled.
    Normalize("across", (3, 50, 71)),
    Normalize("first of all", (33, 5), dim=0),
    Normalize("one column", (5, 1)),
    Normalize("scalar", (), dim=0),
    Normalize("no columns", (4, 0)),
    Normalize("a row of zeros, across", (4, 30, 6), shorten=0.0),
    Normalize("small", (4, 5)),
    Normalize("small, across", (2, 3, 2), dim=-2),
    Normalize("small, shorter than eps", (2, 3, 2), shorten=0.01, eps=0.2),
    VectorNorm("norms", (40, 197)),
    VectorNorm("norm, long", (3, 9001), keepdim=False),
    VectorNorm("norms across", (3, 50, 71), keepdim=False),
    VectorNorm("norm of all", (7, 9, 11), dim=None, keepdim=False),
    VectorNorm("norm of the last", (7, 9, 11), dim=(2, 1), keepdim=False),
    VectorNorm("norm of the first and the last", (7, 9, 11), dim=(0, -1)),
    VectorNorm("norm of a scalar", (), dim=0),
    VectorNorm("norm of no columns", (4, 0)),
    VectorNorm("norm of zeros", (12, 30), shorten=0.0),
    VectorNorm("small norm", (4, 5)),
    VectorNorm("small norm of the first", (2, 3, 2), dim=(0, 1), keepdim=False),
]


WEIGHTS = [
    WeightNorm("conv", (40, 12, 3)),
    WeightNorm("linear", (3, 9001)),
    # A vector across neighbouring slices, whole and partly filled.
    WeightNorm("last", (30, 5, 71), dim=2),
    WeightNorm("last of few", (700, 3), dim=1),
    WeightNorm("numbers", (5,)),
    WeightNorm("small", (2, 3, 2)),
    WeightNorm("small, last", (2, 3, 2), dim=2),
]


@st.composite
def random_cases(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shape[-1] = draw(st.integers(1, 70))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    # Of a vector of few elements the terms of the derivatives may cancel, of one element they do.
    if shape[dim] > 3 and draw(st.booleans()):
        return Normalize("", tuple(shape), dim)
    dims = draw(st.sets(st.integers(0, len(shape) - 1)))
    return VectorNorm("", tuple(shape), draw(st.sampled_from([dim, tuple(dims)])), draw(st.booleans()))


class TestNormalize(OpContract):
    cases = CASES
    traced = ("small, across", "small norm")
    kernels = (
        *("tokens", "long", "short rows", "across", "first of all", "scalar", "a row of zeros, across"),
        *("norms", "norms across", "norm of zeros"),
    )
    outlived = 3
    random_cases = random_cases()
    accepted = tuple(
        (op, "input", how) for op in ("normalize", "vector_norm") for how in ("shape", "dtype", "device")
    )
    schemas = """
        normalize(Tensor input, int dim, float eps) -> Tensor;
        normalize_backward(Tensor grad_output, Tensor input, int dim, float eps) -> Tensor;
        normalize_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, int dim,
            float eps) -> (Tensor grad_grad_output, Tensor grad_input);
        vector_norm(Tensor input, int[1]? dim, bool keepdim) -> Tensor;
        vector_norm_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, int dim) ->
            (Tensor grad_grad_output, Tensor grad_input)
    """

    def check_strides(self, case, operands, results):
        if isinstance(case, Normalize):
            assert all(result.is_contiguous() for order in results for result in order)

    def bad(self):
        x = torch.randn(4, 3)
        for call in (
            lambda: gk.functional.normalize(x, dim=2),
            lambda: OPS.normalize_backward(x, x, -3, 1e-12),
            lambda: OPS.normalize_double_backward(*[x.to("meta")] * 3, 2, 1e-12),
            lambda: gk.functional.vector_norm(x, 2),
            lambda: OPS.vector_norm_double_backward(x, x, x, 2),
        ):
            yield call, IndexError, "Dimension out of range"
        for eps in (0.0, -1.0, float("nan")):
            yield lambda e=eps: OPS.normalize(x, 1, e), ValueError, "normalize: expected eps to be positive"
        yield lambda: gk.functional.cosine_similarity(x, x, eps=0.0), ValueError, "eps to be positive"
        yield lambda: gk.functional.cosine_similarity(x, x[:2]), RuntimeError, "size of tensor"
        yield lambda: gk.functional.vector_norm(x, (1, 1)), RuntimeError, "multiple times"


def by_both(name):
    return pytest.mark.parametrize(
        ("ours", "switch"), [(getattr(gk.functional, name), False), (getattr(F, name), True)]
    )


def pair(*shapes):
    return [t.double().requires_grad_() for t in map(torch.randn, shapes)]


@st.composite
def random_weights(draw):
    shape = draw(st.lists(st.integers(3, 9), min_size=2, max_size=4))
    shape[-1] = draw(st.integers(4, 70))
    return WeightNorm("", tuple(shape), draw(st.sampled_from([0, len(shape) - 1])))


class TestWeightNorm(OpContract):
    cases = WEIGHTS
    traced = ("small", "small, last")
    kernels = ("conv", "linear", "last", "last of few", "small")
    random_cases = random_weights()
    schemas = """
        weight_norm(Tensor v, Tensor g, int dim) -> Tensor;
        weight_norm_double_backward(Tensor? grad_grad_v, Tensor? grad_grad_g, Tensor grad_output, Tensor v,
            Tensor g, int dim) -> (Tensor grad_grad_output, Tensor grad_v, Tensor grad_g)
    """

    def test_autocast_matches_stock(self, small_case, ours):
        """Which takes no two dtypes."""
        inputs = small_case.draw(torch.float32).inputs
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(small_case)(*inputs), small_case.stock(*inputs))

    def bad(self):
        v, g = torch.randn(4, 3, 2), torch.randn(4, 1, 1)
        for dim in (1, -1, 3):
            yield lambda d=dim: OPS.weight_norm(v, g, d), ValueError, "dim to be the first or the last"
        for shape in ((4,), (4, 1), (3, 1, 1), (1, 1, 2)):
            lengths = torch.randn(shape)
            yield lambda g=lengths: gk.functional.weight_norm(v, g), ValueError, "g to be as long as v"
        yield (
            lambda: OPS.weight_norm_double_backward(v, g[:1], v, v, g, 0),
            ValueError,
            "grad_grad_g to have the shape of g",
        )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_weight_norm_of_nothing(shape):
    v, g = pair(shape, (shape[0], 1))
    first = torch.autograd.grad(gk.functional.weight_norm(v, g).sum(), (v, g), create_graph=True)
    second = torch.autograd.grad(first[1].sum(), (v, g), materialize_grads=True)
    assert [t.shape for t in (*first, *second)] == [v.shape, g.shape] * 2


@pytest.mark.parametrize("dim", [1, -1, None])
@pytest.mark.parametrize("by", ["function", "switch"])
def test_weight_norm_of_other_dimensions(dim, by):
    v, g = pair((3, 4, 2), (1, 4, 1) if dim == 1 else ())
    function = gk.functional.weight_norm if by == "function" else torch._weight_norm
    dims = (0, 2) if dim == 1 else (0, 1, 2)

    def plain(v, g):
        return v * (g / v.square().sum(dims, keepdim=True).sqrt())

    def ours(v, g):
        return function(v, g, -1 if dim is None and by == "switch" else dim)

    with gk.set_fused_double_backward(by == "switch"):
        results = list(contract.nth_gradients(ours, (v, g), 3))
    assert_close(results, list(contract.nth_gradients(plain, (v, g), 3)))


@by_both("cosine_similarity")
@pytest.mark.parametrize("shapes", [((6, 5), (6, 5)), ((6, 5), (6, 1)), ((3, 4, 5), (4, 1))], ids=str)
def test_cosine_similarity(ours, switch, shapes):
    inputs = pair(*shapes)
    with torch.no_grad():
        inputs[0][0] = 0

    def similarity(*inputs):
        return ours(*inputs, eps=0.5)

    def plain(*inputs):
        y1, y2 = (reference.normalize(x, 1, 0.5) for x in torch.broadcast_tensors(*inputs))
        return (y1 * y2).sum(1)

    with gk.set_fused_double_backward(switch):
        results = list(contract.nth_gradients(similarity, inputs, 3))
        assert_close(ours(*inputs).detach(), F.cosine_similarity(*(t.detach() for t in inputs)))
    assert_close(results, list(contract.nth_gradients(plain, inputs, 3)))


@by_both("pairwise_distance")
@pytest.mark.parametrize("keepdim", [False, True])
def test_pairwise_distance(ours, switch, keepdim):
    x1, x2 = pair((6, 5), (5,))
    with torch.no_grad():
        x1[1] = x2
    with gk.set_fused_double_backward(switch):
        results = list(contract.nth_gradients(lambda *x: ours(*x, eps=0.0, keepdim=keepdim), (x1, x2), 3))
        assert_close(ours(x1, x2, 1.0), F.pairwise_distance(x1, x2, 1.0))
    expected = contract.nth_gradients(lambda a, b: reference.vector_norm(a - b, -1, keepdim), (x1, x2), 3)
    assert_close(results, list(expected))
    assert_close(ours(x1, x2), F.pairwise_distance(x1, x2))


def test_rows_of_zeros_have_finite_derivatives_where_pytorchs_are_not():
    case = Normalize("", (4, 5))
    operands = case.draw(torch.float32)
    operands.inputs[0][1] = 0
    stock, ours = (contract.flat(operands.orders(f)) for f in (case.stock, case.fused))
    assert stock[-1].isnan().any() and all(t.isfinite().all() for t in ours)
    assert (ours[-1][1] == 0).all() and (ours[0][1] == 0).all()


def test_what_is_pytorchs():
    x = torch.randn(3, 4, 5, requires_grad=True)
    for arguments in ({"p": 1.0}, {"dim": (1, 2)}, {"eps": 0.0}, {"out": torch.empty(3, 4, 5)}):
        leaf = x.detach() if "out" in arguments else x
        assert torch.equal(gk.functional.normalize(leaf, **arguments), F.normalize(leaf, **arguments))


def test_norms_that_stay_pytorchs_under_the_switch():
    x = torch.randn(3, 4, requires_grad=True)
    for function in (
        lambda: torch.linalg.vector_norm(x, 1, dim=1),
        lambda: torch.linalg.vector_norm(x.to(torch.complex64), dim=1),
        lambda: torch.linalg.vector_norm(x.detach(), dim=1),
        lambda: F.pairwise_distance(x, x.detach().cos(), 3.0),
        lambda: F.cosine_similarity(x, x.detach().cos(), eps=0.0),
    ):
        expected = function()
        with gk.set_fused_double_backward(True):
            result = function()
        assert torch.equal(result, expected)
        assert result.grad_fn is None or "gradnorm" not in result.grad_fn.name()


def test_a_norm_in_a_wider_dtype():
    x = torch.randn(3, 4).bfloat16().requires_grad_()
    with gk.set_fused_double_backward(True):
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        assert norm.dtype == torch.float32 and "gradnorm" in norm.grad_fn.name()
        with pytest.raises(RuntimeError, match="narrowing"):
            torch.linalg.vector_norm(x.double(), dim=1, dtype=torch.float32)
    assert torch.equal(norm, torch.linalg.vector_norm(x.float(), dim=1))


def test_normalize_under_the_switch_moves_less():
    def moved(switch):
        x, g = (torch.empty(64, 512, device="meta", requires_grad=True) for _ in range(2))
        with gk.set_fused_double_backward(switch):
            (first,) = torch.autograd.grad(F.normalize(x), x, g, create_graph=True)
            with Calls() as calls:
                torch.autograd.grad(first, (g, x), torch.empty_like(x))
        return calls.elements / x.numel()

    assert moved(True) < 0.8 * moved(False)


def test_modules():
    x1, x2 = pair((6, 5), (6, 5))
    for module in (nn.CosineSimilarity(dim=0), nn.PairwiseDistance(keepdim=True), nn.PairwiseDistance(1.0)):
        expected = module(x1, x2)
        fused = gk.fuse(module)
        assert type(fused).__name__.startswith("Fused")
        assert_close(fused(x1, x2), expected)


@pytest.mark.parametrize("op", ["normalize", "vector_norm"])
def test_autocast_on_cuda_makes_it_float32(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gradnorm_kernels::{op}", "AutocastCUDA")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [gk.functional.normalize, lambda x: gk.functional.cosine_similarity(x, torch.ones_like(x))],
    ids=["normalize", "cosine_similarity"],
)
def test_zero_rows_of_half_types_are_not_nan(function, dtype):
    """In float16 the default eps of PyTorch's own is 0."""
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    output = function(x)
    (first,) = torch.autograd.grad(output, x, torch.ones_like(output), create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.ones_like(x))
    assert torch.equal(output, torch.zeros_like(output)) and not second.isnan().any()
