"""Activations on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Activation:
    """One row for each activation and parameter setting; every test below runs on every row."""

    name: str
    params: dict
    stock: Callable[..., torch.Tensor]

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.params.values())])

    def fused(self, input):
        return getattr(gk.functional, self.name)(input, **self.params)

    def stock_forward(self, input):
        return self.stock(input, **self.params)

    def op(self, suffix=""):
        return getattr(OPS, self.name + suffix).default

    def reference(self, suffix=""):
        return getattr(gk.reference, self.name + suffix)


ACTIVATIONS = [
    Activation("gelu", {"approximate": "none"}, F.gelu),
    Activation("gelu", {"approximate": "tanh"}, F.gelu),
]
each_activation = pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Element i of the double backward's inputs; drawn once, in float64.
RANGES = {
    "normal": lambda: torch.randn(50_001, dtype=torch.float64),
    # Both saturated tails, where 1 + erf and 1 + tanh cancel.
    "wide": lambda: torch.linspace(-30, 30, 50_001, dtype=torch.float64),
}


def all_orders(act, v, g, x):
    """Output, grad_input, then the double backward's two results, by the three ops."""
    return [
        act.op()(x, **act.params),
        act.op("_backward")(g, x, **act.params),
        *act.op("_double_backward")(v, g, x, **act.params),
    ]


def all_orders_by_autograd(function, v, g, x):
    g, x = g.detach().requires_grad_(), x.detach().requires_grad_()
    output = function(x)
    (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    return [output, grad_input, *torch.autograd.grad(grad_input, (g, x), v)]


def all_orders_of_reference(act, v, g, x):
    v, g, x = v.double(), g.double(), x.double()
    return [
        act.reference()(x, **act.params),
        act.reference("_backward")(g, x, **act.params),
        *act.reference("_double_backward")(v, g, x, **act.params),
    ]


def assert_no_worse_than_stock(act, fused, v, g, x, floor=0.0):
    if x.dtype == torch.float64:
        # The reference itself rounds: a few units in the last place of values up to 30.
        floor = 2e-14
    reference = all_orders_of_reference(act, v, g, x)
    stock = all_orders_by_autograd(act.stock_forward, v, g, x)
    names = ["output", "grad_input", "grad_grad_output", "second grad_input"]
    for name, ours, theirs, exact in zip(names, fused, stock, reference, strict=True):
        assert ours.dtype == x.dtype
        error = (ours.double() - exact).abs().max().item()
        stock_error = (theirs.double() - exact).abs().max().item()
        assert error <= 2 * stock_error + floor, f"{name}: {error:.3e}, stock {stock_error:.3e}"


@each_activation
@each_dtype
@pytest.mark.parametrize("values", RANGES)
def test_error_is_at_most_twice_stocks(act, dtype, values):
    x = RANGES[values]().to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    assert_no_worse_than_stock(act, all_orders(act, v, g, x), v, g, x)
    assert_no_worse_than_stock(act, all_orders_by_autograd(act.fused, v, g, x), v, g, x)


@each_activation
@each_dtype
def test_denormals(act, dtype):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    x = torch.linspace(-1, 1, 4097, dtype=torch.float64).mul(info.tiny).to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    assert x.abs()[x != 0].min() < info.tiny
    assert_no_worse_than_stock(act, all_orders(act, v, g, x), v, g, x, smallest)


@each_activation
@each_dtype
def test_every_finite_input_has_finite_derivatives(act, dtype):
    largest = torch.finfo(dtype).max
    root = math.sqrt(largest)
    x = torch.tensor([-largest, -root, -1e4, 1e4, root, largest], dtype=torch.float64).to(dtype)
    slope = (x > 0).to(dtype)
    for gradient in (torch.ones_like(x), torch.full_like(x, largest)):
        output, first, grad_grad_output, second = all_orders(act, gradient, gradient, x)
        assert torch.equal(output, torch.relu(x))
        assert torch.equal(first, gradient * slope)
        assert torch.equal(grad_grad_output, gradient * slope)
        assert torch.equal(second, torch.zeros_like(x))


@each_activation
@each_dtype
def test_nan_and_inf_propagate(act, dtype):
    inf = torch.tensor([math.inf, -math.inf], dtype=dtype)
    # Stock's own float32 kernels differ here: gelu(inf) is NaN in some releases.
    torch.testing.assert_close(
        act.fused(inf).double(), act.stock_forward(inf.double()), equal_nan=True, rtol=0, atol=0
    )
    # Whole vectors and a remainder, NaN in each.
    x = torch.randn(37).to(dtype)
    x[[3, 36]] = math.nan
    ones = torch.ones_like(x)
    for result in all_orders(act, ones, ones, x):
        assert torch.equal(result.isnan(), x.isnan())
    zeros = torch.zeros_like(x)
    _, _, *from_v = all_orders(act, x, ones, zeros)
    _, *from_g, with_g = all_orders(act, ones, x, zeros)
    for result in (*from_v, from_g[0], with_g):
        assert torch.equal(result.isnan(), x.isnan())


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every other row": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    "offset by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}
# An odd size in every dimension, so that vectors straddle rows and a remainder is left; more than one
# thread's share of work (32768 elements); no element; one element.
SHAPES = [(3, 5, 7, 9), (2, 3, 97, 61), (2, 0, 3, 4), (1, 1, 1, 1)]


@each_activation
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_stocks_strides(act, dtype, shape, layout):
    v, g, x = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    expected = all_orders(act, v, g, x)
    x_strided = LAYOUTS[layout](x)
    for others in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        results = all_orders(act, others(v), others(g), x_strided)
        stock = all_orders_by_autograd(act.stock_forward, others(v), others(g), x_strided)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)
        for result, theirs in list(zip(results, stock, strict=True))[:2]:
            assert result.stride() == theirs.stride()


@each_activation
def test_zero_dimensions_and_expanded_operands(act):
    for shape in ((), (4, 6)):
        v, g, x = (torch.randn(()).expand(shape) for _ in range(3))
        expected = all_orders(act, *(t.contiguous() for t in (v, g, x)))
        for result, wanted in zip(all_orders(act, v, g, x), expected, strict=True):
            assert result.shape == shape and torch.equal(result, wanted)


@st.composite
def strided(draw, max_elements=600):
    """A recipe for a tensor: permuted, sliced with steps, and offset in its storage."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]

    def build(tensor):
        padded = torch.full([n * s + 1 for n, s in zip(shape, steps, strict=True)], math.nan)
        padded = padded.to(tensor.dtype).permute(order).contiguous().permute(_inverse(order))
        view = padded[tuple(slice(1, None, s) for s in steps)]
        return view.copy_(tensor)

    return shape, build


def _inverse(order):
    return [order.index(i) for i in range(len(order))]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), act=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from(DTYPES))
def test_fuzzed_shapes_and_strides(data, act, dtype):
    shape, build = data.draw(strided())
    v, g, x = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    mixed = [build(t) if data.draw(st.booleans()) else t for t in (v, g, x)]
    expected = all_orders(act, v, g, x)
    for result, wanted in zip(all_orders(act, *mixed), expected, strict=True):
        assert torch.equal(result, wanted)
    _, grad_input, *_ = all_orders_by_autograd(act.fused, *mixed)
    assert torch.equal(grad_input, expected[1])


@each_activation
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(act, capability):
    """The kernels of the instruction sets below this machine's, which only they would run."""
    code = (
        "import torch, test_activation as t\n"
        f"act = next(a for a in t.ACTIVATIONS if str(a) == {str(act)!r})\n"
        "for dtype in t.DTYPES:\n"
        "    t.test_error_is_at_most_twice_stocks(act, dtype, 'wide')\n"
        "    t.test_nan_and_inf_propagate(act, dtype)\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    chosen = run.stdout.strip().lower().replace("no avx", "default")
    if chosen != capability:
        pytest.skip(f"this processor has no {capability}: torch chose {chosen}")


@each_activation
def test_gradcheck_up_to_fourth_order(act):
    # Zero is where a derivative through |x| would be wrong.
    x = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    v, g = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(act.fused, x)
    assert torch.autograd.gradgradcheck(act.fused, x)

    def backward(g, x):
        return act.op("_backward")(g, x, **act.params)

    def double_backward(v, g, x):
        return act.op("_double_backward")(v, g, x, **act.params)

    assert torch.autograd.gradgradcheck(backward, (g, x))
    assert torch.autograd.gradcheck(double_backward, (v, g, x))
    assert torch.autograd.gradgradcheck(double_backward, (v, g, x))


@each_activation
def test_third_order_equals_stock(act):
    def third(function):
        x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
        result = function(x)
        for _ in range(3):
            (result,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        return result

    torch.testing.assert_close(third(act.fused), third(act.stock_forward), rtol=1e-10, atol=1e-12)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name().removeprefix("gradnorm_kernels::"))
        return func(*args, **(kwargs or {}))


@each_activation
def test_each_pass_is_one_kernel_and_nothing_unneeded_is_computed(act):
    x, g = (torch.randn(8, requires_grad=True) for _ in range(2))
    with CallCounter() as forward:
        output = act.fused(x)
    with CallCounter() as backward:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    v = torch.randn(8)
    with CallCounter() as both:
        torch.autograd.grad(grad_input, (g, x), v, retain_graph=True)
    with CallCounter() as only_grad_output:
        torch.autograd.grad(grad_input, g, v)
    assert forward.calls == [act.name]
    assert backward.calls == [f"{act.name}_backward"]
    assert both.calls == [f"{act.name}_double_backward"]
    assert only_grad_output.calls == [f"{act.name}_backward"]


class Traffic(TorchDispatchMode):
    """Elements that all ops but views read and write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.elements += sum(t.numel() for t in tensors)
        return result


@each_activation
def test_memory_traffic_is_the_least_possible(act):
    def traffic(function):
        n = 1000
        x, g, v = (torch.empty(n, device="meta", requires_grad=True) for _ in range(3))
        passes = [Traffic() for _ in range(3)]
        with passes[0]:
            output = function(x)
        with passes[1]:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        with passes[2]:
            torch.autograd.grad(grad_input, (g, x), v)
        return [counter.elements / n for counter in passes]

    assert traffic(act.fused) == [2, 3, 5]
    assert traffic(act.stock_forward)[2] > 15


@each_activation
def test_undefined_gradients_stay_undefined(act):
    undefined = torch._C._functions.UndefinedGrad()
    x, g = (torch.randn(8, requires_grad=True) for _ in range(2))
    undefined(act.fused(x)).sum().backward()
    (grad_input,) = torch.autograd.grad(act.fused(x), x, g, create_graph=True)
    undefined(grad_input).sum().backward()
    assert x.grad is None and g.grad is None


@each_activation
def test_saved_tensors_are_not_modified_and_runs_repeat_exactly(act):
    v, g, x = torch.randn(3, 40_000)
    originals = [t.clone() for t in (v, g, x)]
    first, second = (all_orders_by_autograd(act.fused, v, g, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((v, g, x), originals, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y = x.clone().requires_grad_() * 1
    output = act.fused(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def opcheck_samples(act):
    def draw(*shape, requires_grad=False, dtype=torch.float32):
        return torch.randn(shape).to(dtype).requires_grad_(requires_grad)

    for dtype in (torch.float32, torch.bfloat16):
        yield [draw(3, 5, dtype=dtype) for _ in range(3)]
    yield [draw(3, 5, requires_grad=True) for _ in range(3)]
    yield [draw(5, 3).t(), draw(3, 5), draw(3, 10)[:, ::2]]
    yield [draw(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(3)]
    yield [draw(0, 4) for _ in range(3)]


@each_activation
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(act):
    for v, g, x in opcheck_samples(act):
        for suffix, operands in (("", (x,)), ("_backward", (g, x)), ("_double_backward", (v, g, x))):
            torch.library.opcheck(act.op(suffix), operands, act.params)


@each_activation
def test_torch_func(act):
    x = torch.randn(4, 3, dtype=torch.float64)
    x[0, 0] = 0

    def scalar(function):
        return lambda x: function(x).pow(2).sum()

    def transforms(function):
        f = scalar(function)
        yield torch.func.grad(f)(x)
        yield torch.func.grad(scalar(torch.func.grad(scalar(torch.func.grad(f)))))(x)
        yield torch.func.hessian(f)(x)
        yield torch.func.jacrev(torch.func.jacrev(f))(x)
        yield torch.func.vmap(function, in_dims=1)(x)
        yield torch.func.vmap(torch.func.hessian(f))(x)
        yield torch.func.jvp(function, (x,), (x.cos(),))[1]
        yield torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1])(x)
        yield torch.func.vmap(torch.func.jvp, in_dims=(None, (0,), (0,)))(function, (x,), (x.cos(),))[1]
        yield torch.autograd.functional.hessian(f, x, vectorize=True)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        basis = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
        # A transform inside ordinary autograd.
        (yield torch.autograd.grad(torch.func.grad(f)(leaf).sum(), leaf)[0])

    for ours, stock in zip(transforms(act.fused), transforms(act.stock_forward), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)
    with gk.set_fused_double_backward(True):
        for ours, stock in zip(transforms(act.stock_forward), transforms(act.fused), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)


@each_activation
def test_torch_func_in_float32_is_as_accurate_as_stock(act):
    x = torch.linspace(-12, 12, 5001)

    def transforms(function, x):
        grad = torch.func.grad(lambda x: function(x).sum())
        yield torch.func.grad(lambda x: grad(x).sum())(x)
        yield torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    exact = list(transforms(act.stock_forward, x.double()))
    for ours, stock, wanted in zip(
        transforms(act.fused, x), transforms(act.stock_forward, x), exact, strict=True
    ):
        assert (ours - wanted).abs().max() <= 2 * (stock - wanted).abs().max()


@each_activation
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors(act):
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    expected = [
        all_orders_by_autograd(act.stock_forward, *[torch.ones_like(part)] * 2, part)[1] for part in parts
    ]
    with gk.set_fused_double_backward(True):
        for function in (act.fused, act.stock_forward):
            nested = torch.nested.nested_tensor(parts, requires_grad=True)
            function(nested).to_padded_tensor(0.0).sum().backward()
            for gradient, wanted in zip(nested.grad.unbind(), expected, strict=True):
                torch.testing.assert_close(gradient, wanted)


class AtenOnly(torch.Tensor):
    """A tensor subclass that knows ATen's ops alone, as DTensor does."""

    @staticmethod
    def __new__(cls, wrapped):
        return torch.Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype)

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return NotImplemented
        result = func(*tree_map_only(cls, lambda t: t.wrapped, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, cls, result)


@each_activation
def test_tensor_subclasses(act):
    def second(function, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    x = torch.randn(5, dtype=torch.float64)
    expected = second(act.stock_forward, x.clone())
    with gk.set_fused_double_backward(True):
        for function in (act.fused, act.stock_forward):
            torch.testing.assert_close(second(function, AtenOnly(x)).wrapped, expected)


@each_activation
def test_forward_mode(act):
    def dual_derivative(function):
        with torch.autograd.forward_ad.dual_level():
            x = torch.linspace(-2, 2, 7, dtype=torch.float64)
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    torch.testing.assert_close(dual_derivative(act.fused), dual_derivative(act.stock_forward))


@each_activation
def test_autocast_matches_stock(act):
    x = torch.randn(4, 8, requires_grad=True)
    linear = torch.nn.Linear(8, 8)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            plain, after_linear = function(x), function(linear(x))
            loss = plain.sum() + after_linear.float().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x)
        return plain, after_linear, grad, second

    for ours, stock in zip(run(act.fused), run(act.stock_forward), strict=True):
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


@each_activation
def test_inference_mode_and_devices_without_a_kernel(act):
    x = torch.randn(5, 3)
    with torch.inference_mode():
        assert torch.equal(act.fused(x), act.fused(x.clone().requires_grad_()))
    meta = [torch.empty(5, 3, device="meta").t() for _ in range(3)]
    for result in all_orders(act, *meta):
        assert result.device.type == "meta" and result.stride() == (1, 3)


@each_activation
@pytest.mark.parametrize("bad", ["dtype", "complex", "shape", "other dtype", "device", "sparse"])
def test_bad_input_is_named(act, bad):
    good = torch.randn(4, 3)
    broken = {
        "dtype": torch.ones(4, 3, dtype=torch.int64),
        "complex": torch.ones(4, 3, dtype=torch.complex64),
        "shape": torch.randn(3),
        "other dtype": torch.randn(4, 3, dtype=torch.float64),
        "device": torch.empty(4, 3, device="meta"),
        "sparse": torch.eye(4, 3).to_sparse(),
    }[bad]
    errors = (TypeError, ValueError, RuntimeError)
    if bad in ("dtype", "complex", "sparse"):
        with pytest.raises(errors, match=f"{act.name}: expected input"):
            act.op()(broken, **act.params)
    with pytest.raises(errors, match="_backward: expected grad_output"):
        act.op("_backward")(broken, good, **act.params)
    with pytest.raises(errors, match="_double_backward: expected grad_grad_input"):
        act.op("_double_backward")(broken, good, good, **act.params)
    if bad in ("dtype", "complex"):
        with pytest.raises(errors, match="expected input"):
            torch.func.vmap(act.fused)(broken)


def test_unknown_approximate_is_named():
    x = torch.randn(3)
    for call in (
        lambda: gk.functional.gelu(x, "sigmoid"),
        lambda: gk.functional.gelu(x.clone().requires_grad_(), "sigmoid"),
        lambda: OPS.gelu_backward(x, x, approximate="sigmoid"),
        lambda: OPS.gelu_double_backward(x, x, x, approximate="sigmoid"),
        lambda: OPS.gelu(x.to("meta"), approximate="sigmoid"),
        lambda: gk.FusedGeLU("sigmoid"),
    ):
        with pytest.raises(ValueError, match="approximate to be 'none' or 'tanh', got 'sigmoid'"):
            call()


def test_schemas():
    assert str(OPS.gelu.default._schema) == (
        'gradnorm_kernels::gelu(Tensor input, *, str approximate="none") -> Tensor'
    )
    assert str(OPS.gelu_backward.default._schema) == (
        "gradnorm_kernels::gelu_backward(Tensor grad_output, Tensor input, *, "
        'str approximate="none") -> Tensor'
    )
    assert str(OPS.gelu_double_backward.default._schema) == (
        "gradnorm_kernels::gelu_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, "
        '*, str approximate="none") -> (Tensor grad_grad_output, Tensor grad_input)'
    )


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    # Just past 2^31, so that a 32-bit index of the last elements would wrap around.
    x = torch.zeros(2**31 + 3, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([-1.0, 0.5, 2.0])
    output = gk.functional.gelu(x)
    torch.testing.assert_close(output[-3:], F.gelu(x[-3:]))
    assert output[:-3].count_nonzero() == 0
