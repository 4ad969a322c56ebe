"""Activations on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from activations import (
    ACTIVATIONS,
    DTYPES,
    all_orders_by_autograd,
    assert_no_worse_than_stock,
    each_activation,
    each_kind,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_instruction_set, run_under
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Element i of the double backward's inputs; drawn once, in float64.
RANGES = {
    "normal": lambda: torch.randn(50_001, dtype=torch.float64),
    # Both saturated tails, where 1 + erf and 1 + tanh cancel.
    "wide": lambda: torch.linspace(-30, 30, 50_001, dtype=torch.float64),
}


@each_activation
@each_dtype
@pytest.mark.parametrize("values", RANGES)
def test_error_is_at_most_twice_stocks(act, dtype, values):
    x = RANGES[values]().to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    assert_no_worse_than_stock(act, act.all_orders(v, g, x), v, g, x)
    assert_no_worse_than_stock(act, all_orders_by_autograd(act.fused, v, g, x), v, g, x)


@each_activation
@each_dtype
def test_denormals(act, dtype):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    x = torch.linspace(-1, 1, 4097, dtype=torch.float64).mul(info.tiny).to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    assert x.abs()[x != 0].min() < info.tiny
    assert_no_worse_than_stock(act, act.all_orders(v, g, x), v, g, x, smallest)


@each_activation
@each_dtype
def test_every_finite_input_has_finite_derivatives(act, dtype):
    largest = torch.finfo(dtype).max
    root = math.sqrt(largest)
    x = torch.tensor([-largest, -root, -1e4, 1e4, root, largest], dtype=torch.float64).to(dtype)
    line, slope = act.limit(x.double())
    for gradient in (torch.ones_like(x), torch.full_like(x, largest)):
        output, first, grad_grad_output, second = act.all_orders(gradient, gradient, x)
        torch.testing.assert_close(output, line.to(dtype))
        torch.testing.assert_close(first, (gradient * slope).to(dtype))
        torch.testing.assert_close(grad_grad_output, (gradient * slope).to(dtype))
        if not act.saves_output or gradient[0] == 1:  # else a product of both gradients is between the ops
            assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.kinks], ids=str)
@each_dtype
def test_derivatives_at_kinks_are_stocks(act, dtype):
    # Whole vectors, and a remainder.
    x = torch.tensor(act.kinks, dtype=dtype)[:, None].expand(-1, 41).contiguous()
    v, g = torch.full_like(x, 2), torch.full_like(x, 3)
    stock = all_orders_by_autograd(act.stock_forward, v, g, x)
    for ours, theirs in zip(act.all_orders(v, g, x), stock, strict=True):
        torch.testing.assert_close(ours, theirs)


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
    output, *derivatives = act.all_orders(ones, ones, x)
    assert torch.equal(output.isnan(), x.isnan())
    for result in derivatives:
        assert not result[~x.isnan()].isnan().any()
        if not act.kinks:  # stock's kernels differ from each other in which piece NaN belongs to
            assert result[x.isnan()].isnan().all()
    # NaN gradients where f' is 0 or 1, and where it is neither: they pass as stock lets them.
    for point in (-20.0, -1.0, 1.0, 30.0):
        points = torch.full_like(x, point)
        for v, g in ((x, ones), (ones, x)):
            stock = all_orders_by_autograd(act.stock_forward, v.double(), g.double(), points.double())
            for ours, theirs in zip(act.all_orders(v, g, points), stock, strict=True):
                assert torch.equal(ours.isnan(), theirs.isnan())


def assert_equal(act, results, expected):
    for result, wanted in zip(results, expected, strict=True):
        if act.saves_output:  # by ATen's forward, whose scalar loop differs from its vectorised one
            torch.testing.assert_close(result, wanted)
        else:
            assert torch.equal(result, wanted)


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


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_stocks_strides(act, dtype, shape, layout):
    v, g, x = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    expected = act.all_orders(v, g, x)
    x_strided = LAYOUTS[layout](x)
    for others in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        results = act.all_orders(others(v), others(g), x_strided)
        stock = all_orders_by_autograd(act.stock_forward, others(v), others(g), x_strided)
        assert_equal(act, results, expected)
        assert results[0].stride() == stock[0].stride()
        if act.curved:  # of relu's operands, PyTorch takes the layout of the second
            assert results[1].stride() == stock[1].stride()


@each_kind
def test_zero_dimensions_and_expanded_operands(act):
    for shape in ((), (4, 6)):
        v, g, x = (torch.randn(()).expand(shape) for _ in range(3))
        expected = act.all_orders(*(t.contiguous() for t in (v, g, x)))
        for result, wanted in zip(act.all_orders(v, g, x), expected, strict=True):
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


@settings(max_examples=100, deadline=None)
@given(data=st.data(), act=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from(DTYPES))
def test_fuzzed_shapes_and_strides(data, act, dtype):
    shape, build = data.draw(strided())
    v, g, x = torch.randn(3, *shape, dtype=torch.float64).to(dtype)
    mixed = [build(t) if data.draw(st.booleans()) else t for t in (v, g, x)]
    expected = act.all_orders(v, g, x)
    assert_equal(act, act.all_orders(*mixed), expected)
    assert_equal(act, all_orders_by_autograd(act.fused, *mixed), expected)


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for act in t.ACTIVATIONS:
    for dtype in t.DTYPES:
        torch.manual_seed(0)
        t.test_error_is_at_most_twice_stocks(act, dtype, 'wide')
        t.test_nan_and_inf_propagate(act, dtype)
"""
    run_under(capability, __name__, checks)


def away_from_kinks(act, x):
    """x, less the elements that finite differences would take over a kink."""
    return x[[all((value - kink).abs() > 0.1 for kink in act.kinks) for value in x]]


@each_activation
def test_gradcheck_up_to_fourth_order(act):
    # Zero is where a derivative through |x| would be wrong.
    x = torch.tensor([-3.3, -0.7, 0.0, 0.4, 2.5, 6.5], dtype=torch.float64)
    x = away_from_kinks(act, x).requires_grad_()
    v, g = (torch.randn(len(x), dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(act.fused, x)
    assert torch.autograd.gradgradcheck(act.fused, x)

    def backward(g, x):
        return act.op("_backward")(g, x, **act.params)

    def double_backward(v, g, x):
        return act.op("_double_backward")(v, g, x, **act.params)

    assert torch.autograd.gradgradcheck(backward, (g, x))
    if act.curved:
        assert torch.autograd.gradcheck(double_backward, (v, g, x))
        assert torch.autograd.gradgradcheck(double_backward, (v, g, x))


@each_activation
def test_third_order_equals_stock(act):
    def third(function):
        x = torch.linspace(-4, 4, 102, dtype=torch.float64, requires_grad=True)  # no kink among them
        result = function(x)
        for _ in range(3):
            # The sine keeps a gradient of zeros, for the activations of linear pieces.
            (result,) = torch.autograd.grad(result.sin().sum(), x, create_graph=True)
        return result

    torch.testing.assert_close(third(act.fused), third(act.stock_forward), rtol=1e-10, atol=1e-12)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
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
        torch.autograd.grad(grad_input, (g, x), v, retain_graph=True, allow_unused=True)
    with CallCounter() as only_grad_output:
        torch.autograd.grad(grad_input, g, v)
    first = f"{act.name}_backward"
    assert forward.calls == [act.name]
    assert backward.calls == [first]
    to_input = [first] if act.saves_output else []
    assert both.calls == ([f"{act.name}_double_backward", *to_input] if act.curved else [first])
    assert only_grad_output.calls == [first]


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


def traffic(function):
    """Tensors of the input's size that the three passes read and write."""
    n = 1000
    x, g, v = (torch.empty(n, device="meta", requires_grad=True) for _ in range(3))
    passes = [Traffic() for _ in range(3)]
    with passes[0]:
        output = function(x)
    with passes[1]:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with passes[2]:
        torch.autograd.grad(grad_input, (g, x), v, allow_unused=True)
    return [counter.elements / n for counter in passes]


def least_traffic(act):
    # From the output to the input is one more first backward.
    return [2, 3, 3 if not act.curved else 8 if act.saves_output else 5]


@each_activation
def test_memory_traffic_is_the_least_possible(act):
    assert traffic(act.fused) == least_traffic(act)
    assert traffic(act.stock_forward)[2] > least_traffic(act)[2]


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
    (output if act.saves_output else y).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def opcheck_samples():
    def draw(*shape, requires_grad=False, dtype=torch.float32):
        return torch.randn(shape).to(dtype).requires_grad_(requires_grad)

    for dtype in (torch.float32, torch.bfloat16):
        yield [draw(3, 5, dtype=dtype) for _ in range(3)]
    yield [draw(3, 5, requires_grad=True) for _ in range(3)]
    yield [draw(5, 3).t(), draw(3, 5), draw(3, 10)[:, ::2]]
    yield [draw(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(3)]
    yield [draw(0, 4) for _ in range(3)]


@each_kind
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(act):
    for sample in opcheck_samples():
        for suffix, operands in act.ops().items():
            torch.library.opcheck(act.op(suffix), sample[-operands:], act.params)


@each_activation
def test_opcheck_of_one_sample(act):
    sample = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    for suffix, operands in act.ops().items():
        torch.library.opcheck(act.op(suffix), sample[-operands:], act.params)


@each_activation
def test_torch_func(act):
    x = torch.randn(4, 3, dtype=torch.float64)
    if 0.0 not in act.kinks:
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

    def gradients(function):
        nested = torch.nested.nested_tensor(parts, requires_grad=True)
        function(nested).to_padded_tensor(0.0).sum().backward()
        return nested.grad.unbind()

    try:
        expected = gradients(act.stock_forward)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            gradients(act.fused)
        return
    with gk.set_fused_double_backward(True):
        for function in (act.fused, act.stock_forward):
            for gradient, wanted in zip(gradients(function), expected, strict=True):
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
        (second,) = torch.autograd.grad(grad.pow(2).sum(), x, materialize_grads=True)
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
    for result in act.all_orders(*meta):
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
    with pytest.raises(errors, match="_backward: expected grad_output"):
        act.op("_backward")(broken, good, **act.params)
    if act.curved:
        with pytest.raises(errors, match="_double_backward: expected grad_grad_input"):
            act.op("_double_backward")(broken, good, good, **act.params)


UNCOVERED = {
    "integers": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x * (1 + 1j),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


def dense(tensor):
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


@each_activation
@pytest.mark.parametrize("kind", UNCOVERED)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_what_ours_does_not_cover_is_pytorchs(act, kind):
    """Or, where PyTorch refuses it as well, named."""
    x = UNCOVERED[kind](torch.randn(4, 3).mul(4).relu())
    try:
        # The op, since ELU's function has not all of these parameters.
        expected = getattr(torch.ops.aten, act.name)(x, **act.params)
    except (RuntimeError, TypeError):
        for inference in (False, True):
            with (
                torch.inference_mode(inference),
                pytest.raises((TypeError, RuntimeError), match=f"{act.name}: expected input"),
            ):
                act.fused(x)
        return
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert torch.equal(dense(act.fused(x)), dense(expected))
    if x.layout == torch.strided:
        assert torch.equal(torch.func.vmap(act.fused)(x), expected)
        meta = act.fused(x.to("meta"))
        assert (meta.dtype, meta.shape) == (expected.dtype, expected.shape)
    if kind == "complex" and act.saves_output:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        act.fused(leaves[0]).abs().sum().backward()
        act.stock_forward(leaves[1]).abs().sum().backward()
        assert torch.equal(*(leaf.grad for leaf in leaves))


def test_bad_parameters_are_named():
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
    with pytest.raises(ValueError, match="elu: expected input_scale to be 0 or more, got -1"):
        OPS.elu(x, input_scale=-1)


@each_activation
def test_functional_has_torchs_signature_and_is_never_in_place(act):
    ours, stock = (getattr(namespace, act.name) for namespace in (gk.functional, F))
    try:
        theirs = inspect.signature(stock)
    except ValueError:  # of a builtin: what the documentation says
        theirs = {
            "gelu": inspect.signature(lambda input, approximate="none": None),
            "softplus": inspect.signature(lambda input, beta=1, threshold=20: None),
        }[act.name]
    for wanted, parameter in zip(
        theirs.parameters.values(), inspect.signature(ours).parameters.values(), strict=True
    ):
        assert (parameter.name, parameter.default) == (wanted.name, wanted.default)
    if "inplace" in theirs.parameters:
        x = torch.randn(5)
        before = x.clone()
        assert torch.equal(ours(x, inplace=True), ours(x))
        assert torch.equal(x, before)


def test_schemas():
    def schema(op):
        return str(op.default._schema).removeprefix("gradnorm_kernels::")

    assert schema(OPS.gelu) == 'gelu(Tensor input, *, str approximate="none") -> Tensor'
    assert schema(OPS.gelu_backward) == (
        'gelu_backward(Tensor grad_output, Tensor input, *, str approximate="none") -> Tensor'
    )
    assert schema(OPS.gelu_double_backward) == (
        "gelu_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input, "
        '*, str approximate="none") -> (Tensor grad_grad_output, Tensor grad_input)'
    )
    assert schema(OPS.elu) == (
        "elu(Tensor input, *, float alpha=1., float scale=1., float input_scale=1.) -> Tensor"
    )
    assert schema(OPS.tanh_backward) == "tanh_backward(Tensor grad_output, Tensor output) -> Tensor"
    assert schema(OPS.tanh_double_backward) == (
        "tanh_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor output)"
        " -> (Tensor grad_grad_output, Tensor grad_of_output)"
    )
    assert not hasattr(OPS, "relu_double_backward")


def pytorchs_own(act, x):
    """act.stock_forward, and for hardsigmoid the op that cannot be differentiated twice."""
    return F.hardsigmoid(x) if act.name == "hardsigmoid" else act.stock_forward(x)


@each_activation
def test_switch_makes_stocks_traffic_the_least_possible(act):
    stock = traffic(act.stock_forward)
    with gk.set_fused_double_backward(True):
        switched = traffic(lambda x: pytorchs_own(act, x))
    assert switched == (least_traffic(act) if act.switched else stock)


@each_activation
@each_dtype
def test_switch_keeps_stocks_values_and_is_as_accurate(act, dtype):
    x = RANGES["wide"]().to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    leaf = x.clone().requires_grad_()
    output = pytorchs_own(act, leaf)
    (grad_input,) = torch.autograd.grad(output, leaf, g)
    with gk.set_fused_double_backward(True):
        switched = all_orders_by_autograd(lambda x: pytorchs_own(act, x), v, g, x)
    assert torch.equal(switched[0], output) and torch.equal(switched[1], grad_input)
    # PyTorch's own hardsigmoid_backward knows 1/6 in float32 alone.
    assert_no_worse_than_stock(act, switched, v, g, x, floor=2e-7 if act.name == "hardsigmoid" else 0)


@each_activation
@pytest.mark.parametrize("outlived", [False, True])
def test_switch_is_exact_to_fourth_order(act, outlived):
    if outlived and act.name == "hardsigmoid":
        pytest.skip("what PyTorch's own node records later, it cannot differentiate")

    def derivatives(function, switch):
        x = torch.linspace(-4, 4, 102, dtype=torch.float64, requires_grad=True)
        with gk.set_fused_double_backward(switch):
            result = function(x)
            (result,) = torch.autograd.grad(result.sin().sum(), x, create_graph=True)
        yield result
        with gk.set_fused_double_backward(switch and not outlived):
            for _ in range(3):
                (result,) = torch.autograd.grad(result.sin().sum(), x, create_graph=True)
                yield result

    ours = list(derivatives(lambda x: pytorchs_own(act, x), True))
    # PyTorch's own hardsigmoid_backward knows 1/6 in float32 alone.
    rtol = 1e-6 if act.name == "hardsigmoid" else 1e-9
    for result, wanted in zip(ours, derivatives(act.stock_forward, False), strict=True):
        torch.testing.assert_close(result, wanted, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize(
    "function",
    [F.silu, F.mish, F.elu, F.relu, F.hardswish, F.leaky_relu],
    ids=lambda function: function.__name__,
)
def test_switch_leaves_in_place_ops_alone(function):
    def second():
        x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x * 1, inplace=True).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.sin().sum(), x)[0]

    expected = second()
    with gk.set_fused_double_backward(True):
        torch.testing.assert_close(second(), expected)


def test_switch_leaves_what_ours_does_not_cover_to_pytorch():
    def second(function, dtype):
        x = torch.linspace(-1, 1, 11).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).abs().square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.abs().square().sum(), x)[0]

    cases = (
        (torch.tanh, torch.complex128),
        (torch.sigmoid, torch.complex128),
        (lambda x: F.celu(x, alpha=-2.0), torch.float64),  # elu_backward with a negative input_scale
    )
    for case in cases:
        expected = second(*case)
        with gk.set_fused_double_backward(True):
            assert torch.equal(second(*case), expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    # Just past 2^31, so that a 32-bit index of the last elements would wrap around.
    x = torch.zeros(2**31 + 3, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([-1.0, 0.5, 2.0])
    output = gk.functional.gelu(x)
    torch.testing.assert_close(output[-3:], F.gelu(x[-3:]))
    assert output[:-3].count_nonzero() == 0
