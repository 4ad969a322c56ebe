"""Activations on the CPU: what is their own; activations.py has the table."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from activations import (
    ACTIVATIONS,
    KINDS,
    all_orders_by_autograd,
    assert_no_worse_than_stock,
    each_activation,
    third_order,
)
from contract import OPS, OpContract, assert_close, by_function, each_dtype, nth_gradients, strides
from hypothesis import strategies as st
from torch import nn

import gradnorm_kernels as gk
from gradnorm_kernels.diagnose import graph_nodes

# Element i of the double backward's inputs; drawn once, in float64.
RANGES = {
    "normal": lambda: torch.randn(50_001, dtype=torch.float64),
    # Both saturated tails, where 1 + erf and 1 + tanh cancel.
    "wide": lambda: torch.linspace(-30, 30, 50_001, dtype=torch.float64),
}
# An odd size in every dimension, so that vectors straddle rows and a remainder is left; more than one
# thread's share of work (32768 elements); no element; one element; no dimension.
SHAPES = [(3, 5, 7, 9), (2, 3, 97, 61), (2, 0, 3, 4), (1, 1, 1, 1), ()]
PARAMETERS = {
    "cos": "float frequency=1.",
    "elu": "float alpha=1., float scale=1., float input_scale=1.",
    "gelu": 'str approximate="none"',
    "leaky_relu": "float negative_slope=0.01",
    "sin": "float frequency=1.",
    "softplus": "float beta=1., float threshold=20.",
}


def schemas():
    for act in {act.name: act for act in ACTIVATIONS}.values():
        parameters = f", *, {PARAMETERS[act.name]}" if act.name in PARAMETERS else ""
        saved, grad = ("output", "grad_of_output") if act.saves_output else ("input", "grad_input")
        yield f"{act.name}(Tensor input{parameters}) -> Tensor"
        yield f"{act.name}_backward(Tensor grad_output, Tensor {saved}{parameters}) -> Tensor"
        if act.curved:
            yield (
                f"{act.name}_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor {saved}"
                f"{parameters}) -> (Tensor grad_grad_output, Tensor {grad})"
            )
            yield (
                f"{act.name}_triple_backward(Tensor grad_of_grad_grad_output, Tensor grad_of_grad_input,"
                f" Tensor grad_grad_input, Tensor grad_output, Tensor {saved}{parameters}) ->"
                " (Tensor grad_of_grad_grad_input, Tensor grad_of_grad_output, Tensor grad_of_operand)"
            )


class TestActivation(OpContract):
    cases = (*ACTIVATIONS, *(replace(act, shape=shape) for act in KINDS for shape in SHAPES))
    traced = tuple(map(str, KINDS))
    kernels = tuple(map(str, ACTIVATIONS))
    schemas = "; ".join(schemas())
    # PyTorch's to compute: see below.
    accepted = tuple((act.name, "", "") for act in ACTIVATIONS)
    outlived = 3
    random_cases = st.builds(
        replace,
        st.sampled_from(ACTIVATIONS),
        shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    )

    def bad(self):
        x = torch.randn(3)
        approximate = "approximate to be 'none' or 'tanh', got 'sigmoid'"
        for call in (
            lambda: gk.functional.gelu(x, "sigmoid"),
            lambda: gk.functional.gelu(x.clone().requires_grad_(), "sigmoid"),
            lambda: OPS.gelu_backward(x, x, approximate="sigmoid"),
            lambda: OPS.gelu_double_backward(x, x, x, approximate="sigmoid"),
            lambda: OPS.gelu(x.to("meta"), approximate="sigmoid"),
            lambda: gk.FusedGeLU("sigmoid"),
        ):
            yield call, ValueError, approximate
        negative = "elu: expected input_scale to be 0 or more, got -1"
        yield lambda: OPS.elu(x, input_scale=-1), ValueError, negative
        for alpha in 0.0, -1.0, math.nan:
            wanted = f"celu: expected alpha to be greater than 0, got {alpha}"
            yield lambda alpha=alpha: gk.functional.celu(x, alpha), ValueError, wanted

    def test_switch_keeps_the_forward_and_the_first_backward(self, case, dtype):
        if case.name in ("sin", "cos"):
            pytest.skip("of whose backward PyTorch makes two ops")
        super().test_switch_keeps_the_forward_and_the_first_backward(case, dtype)

    def check_strides(self, case, operands, results):
        # PyTorch's log-sigmoid is contiguous on the CPU.
        stock = F.silu if case.name == "logsigmoid" else case.stock
        for a, e in zip(results[:2], operands.orders(stock), strict=False):
            # Of relu's operands, PyTorch takes the layout of the second.
            assert strides(a[0]) == strides(e[0]) or (results[1] is a and not case.curved)

    def check_kernels(self):
        for act in ACTIVATIONS:
            for dtype in torch.float64, torch.float32, torch.bfloat16, torch.float16:
                torch.manual_seed(0)
                test_error_is_at_most_twice_stocks(act, dtype, "wide")
                self.test_nan_and_inf_reach_what_they_reach_in_the_reference(act, dtype, by_function)

    def test_nan_and_inf_reach_what_they_reach_in_the_reference(self, case, dtype, ours):
        """PyTorch's own, at kinks and where a derivative is 0."""
        act = case
        inf = torch.tensor([math.inf, -math.inf], dtype=dtype)
        # Stock's own float32 kernels differ here: gelu(inf) is NaN in some releases.
        torch.testing.assert_close(
            act.fused(inf).double(), act.stock(inf.double()), equal_nan=True, rtol=0, atol=0
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
                stock = all_orders_by_autograd(act.stock, v.double(), g.double(), points.double())
                for ours, theirs in zip(act.all_orders(v, g, points), stock, strict=True):
                    assert torch.equal(ours.isnan(), theirs.isnan())


@each_activation
@each_dtype
@pytest.mark.parametrize("values", RANGES)
def test_error_is_at_most_twice_stocks(act, dtype, values):
    x = RANGES[values]().to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    assert_no_worse_than_stock(act, act.all_orders(v, g, x), v, g, x)
    assert_no_worse_than_stock(act, all_orders_by_autograd(act.fused, v, g, x), v, g, x)


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.curved], ids=str)
@each_dtype
@pytest.mark.parametrize("values", RANGES)
def test_error_of_third_order_is_at_most_twice_stocks(act, dtype, values):
    x = RANGES[values]().to(dtype)
    grads = [torch.randn(x.numel(), dtype=torch.float64).to(dtype) for _ in range(4)]
    exact = third_order(act.reference, *(t.double() for t in (*grads, x)))
    ours, stock = (third_order(function, *grads, x) for function in (act.fused, act.stock))
    for a, s, e in zip(ours, stock, exact, strict=True):
        # In float64 the reference rounds as stock does. Stock's third derivatives may be NaN in the tails.
        rounding = e.abs().max() * torch.finfo(dtype).eps * (3 if dtype == torch.float64 else 1)
        assert (a - e).abs().max() <= 2 * (s - e).abs()[s.isfinite()].max() + rounding


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.curved and not act.gradual], ids=str)
@each_dtype
def test_third_order_is_finite_where_second_derivatives_vanish(act, dtype):
    largest = torch.finfo(dtype).max
    # Of the output there is no larger value than 1.
    x = torch.tensor([-1.0, 1.0] if act.saves_output else [-largest, -1e4, 1e4, largest], dtype=dtype)
    huge = torch.full_like(x, math.sqrt(largest) if act.saves_output else largest)
    zero = torch.zeros_like(x)
    op = act.op("_triple_backward")
    assert all(t.isfinite().all() for t in op(zero, zero + 1, huge, huge / 4, x, **act.params))


@each_dtype
def test_third_derivative_of_tanh_gelu_in_its_tails(dtype):
    """PyTorch's own is NaN there."""
    for at in (6.0, 14.0, 27.0):
        x = torch.tensor([at, -at], dtype=dtype, requires_grad=True)
        with gk.set_fused_double_backward(True):
            *_, third = nth_gradients(lambda x: F.gelu(x, approximate="tanh"), [x], 3)
        assert all(t.isfinite().all() for t in third)


def test_third_order_is_one_kernel_a_pass():
    """Also where one of the double backward's results leads nowhere."""
    x = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    g, v = (torch.ones_like(x).requires_grad_() for _ in range(2))
    (first,) = torch.autograd.grad(gk.functional.silu(x), x, g, create_graph=True)
    second = torch.autograd.grad(first, (g, x), v, create_graph=True)
    for one, name in zip(second, ("first", "second"), strict=True):
        assert one.grad_fn is second[0].grad_fn, name
        with torch.profiler.profile() as profiler:
            ours = torch.autograd.grad(one.sum(), (v, g, x), retain_graph=True)
        assert [e.key for e in profiler.key_averages() if "silu" in e.key and "::" in e.key] == [
            "gradnorm_kernels::silu_triple_backward"
        ]
        stock = third_order(F.silu, *((1.0 * (one is s)) * torch.ones_like(x) for s in second), v, g, x)
        assert_close(ours, stock)


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
    for gradient, expected in act.far_out(x):
        *results, second = act.all_orders(gradient, gradient, x)
        for ours, wanted in zip(results, expected, strict=False):
            torch.testing.assert_close(ours, wanted.to(dtype))
        if act.gradual:
            torch.testing.assert_close(second, expected[3].to(dtype))
        elif not act.saves_output or gradient[0] == 1:  # else a product of both gradients is between the ops
            assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.kinks], ids=str)
@each_dtype
def test_derivatives_at_kinks_are_stocks(act, dtype):
    # Whole vectors, and a remainder.
    x = torch.tensor(act.kinks, dtype=dtype)[:, None].expand(-1, 41).contiguous()
    v, g = torch.full_like(x, 2), torch.full_like(x, 3)
    stock = all_orders_by_autograd(act.stock, v, g, x)
    for ours, theirs in zip(act.all_orders(v, g, x), stock, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_activation
def test_torch_func_in_float32_is_as_accurate_as_stock(act):
    x = torch.linspace(-12, 12, 5001)

    def transforms(function, x):
        grad = torch.func.grad(lambda x: function(x).sum())
        yield torch.func.grad(lambda x: grad(x).sum())(x)
        yield torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    exact = list(transforms(act.stock, x.double()))
    for ours, stock, wanted in zip(transforms(act.fused, x), transforms(act.stock, x), exact, strict=True):
        assert (ours - wanted).abs().max() <= 2 * (stock - wanted).abs().max()


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
        aten = torch.ops.aten if act.aten is not None else None
        expected = getattr(aten, act.aten or act.name, act.function)(x, **act.params)
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
        act.stock(leaves[1]).abs().sum().backward()
        assert torch.equal(*(leaf.grad for leaf in leaves))


@pytest.mark.parametrize(
    "name", sorted({act.name for act in ACTIVATIONS if hasattr(F, act.name)} | {"celu", "selu"})
)
def test_functional_has_torchs_signature_and_is_never_in_place(name):
    ours, stock = (getattr(namespace, name) for namespace in (gk.functional, F))
    try:
        theirs = inspect.signature(stock)
    except ValueError:  # of a builtin: what the documentation says
        theirs = {
            "gelu": inspect.signature(lambda input, approximate="none": None),
            "logsigmoid": inspect.signature(lambda input: None),
            "softplus": inspect.signature(lambda input, beta=1, threshold=20: None),
        }[name]
    for wanted, parameter in zip(
        theirs.parameters.values(), inspect.signature(ours).parameters.values(), strict=True
    ):
        assert (parameter.name, parameter.default) == (wanted.name, wanted.default)
    if "inplace" in theirs.parameters:
        x = torch.randn(5)
        before = x.clone()
        assert torch.equal(ours(x, inplace=True), ours(x))
        assert torch.equal(x, before)


@each_dtype
def test_switch_covers_hardsigmoid_which_pytorch_cannot_differentiate_twice(dtype):
    (act,) = (act for act in ACTIVATIONS if act.name == "hardsigmoid")
    x = RANGES["wide"]().to(dtype)
    v, g = torch.randn(2, x.numel(), dtype=torch.float64).to(dtype)
    leaf = x.clone().requires_grad_()
    output = F.hardsigmoid(leaf)
    (grad_input,) = torch.autograd.grad(output, leaf, g)
    with gk.set_fused_double_backward(True):
        switched = all_orders_by_autograd(F.hardsigmoid, v, g, x)
    assert torch.equal(switched[0], output) and torch.equal(switched[1], grad_input)
    # PyTorch's own hardsigmoid_backward knows 1/6 in float32 alone.
    assert_no_worse_than_stock(act, switched, v, g, x, floor=2e-7)
    points = torch.linspace(-4, 4, 102, dtype=torch.float64, requires_grad=True)
    with gk.set_fused_double_backward(True):
        ours = list(nth_gradients(F.hardsigmoid, [points], 4))
    assert_close(ours, list(nth_gradients(act.stock, [points], 4)), rtol=1e-6)


@each_dtype
@pytest.mark.parametrize("frequency", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_waves_far_out(name, frequency, dtype):
    """Around the largest argument that ours computes, and where next to it lie larger ones and NaN."""
    ours, stock = getattr(gk.functional, name), getattr(torch, name)
    around = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    values = torch.cat([around * 1e4, 131_072 + around * 100, around.sign() * 10.0 ** (38 * around.abs())])
    x = (values / frequency).to(dtype)
    x = x[x.isfinite()]
    phase = x.to(torch.float64 if dtype == torch.float64 else torch.float32) * frequency
    x.requires_grad_()
    output = ours(x, frequency)
    (slope,) = torch.autograd.grad(output.sum(), x)
    exact = phase.detach().double().requires_grad_()
    (exact_slope,) = torch.autograd.grad(stock(exact).sum(), exact)
    limit = {torch.float64: 1e-15, torch.float32: 7e-8}.get(dtype, torch.finfo(dtype).eps)
    # The frequency and the product with it are rounded.
    relative = slope.double() / frequency, exact_slope, 1 if frequency == 1 else 2
    for result, wanted, roundings in (output, stock(exact), 1), relative:
        error = (result.double() - wanted).abs() / roundings
        # Twice stock's is 7.2e-8 on x86, where it is MKL's; at::vec's, which ours is beyond, is 1.2e-7.
        assert error[phase.abs() <= 131_072].max() <= limit
        assert error.max() <= 2 * limit


def test_waves_of_a_vector_do_not_depend_on_its_other_elements():
    x = torch.linspace(-50, 50, 1024)
    broken = x.clone()
    broken[::7], broken[3::7] = 1e30, math.nan
    kept = broken == x
    for v in OPS.sin(x), OPS.cos_backward(x, x, frequency=2.0), *OPS.sin_double_backward(x, x, x):
        assert v.isfinite().all()
    pairs = zip(
        (OPS.sin(x), *OPS.cos_double_backward(x, x, x)),
        (OPS.sin(broken), *OPS.cos_double_backward(x, x, broken)),
        strict=True,
    )
    assert all(torch.equal(a[kept], b[kept]) for a, b in pairs)


@pytest.mark.parametrize(
    ("ours", "stock", "module"),
    [
        (gk.functional.selu, F.selu, nn.SELU()),
        (gk.functional.celu, F.celu, nn.CELU()),
        # PyTorch rounds 1 / alpha to float32 in its derivatives.
        (lambda x: gk.functional.celu(x, 0.5), lambda x: F.celu(x, 0.5), nn.CELU(0.5)),
        (gk.functional.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), gk.FusedQuickGELU()),
        (lambda x: gk.functional.sin(x, 3), lambda x: torch.sin(3 * x), None),
        (lambda x: gk.functional.cos(x, 0.3), lambda x: torch.cos(0.3 * x), None),
    ],
)
def test_other_parameters_and_their_modules(ours, stock, module):
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64, requires_grad=True)
    for function in [ours] if module is None else [ours, gk.fuse(module)]:
        assert_close(function(x), stock(x))
        for order, expected in zip(
            nth_gradients(function, [x], 3), nth_gradients(stock, [x], 3), strict=True
        ):
            assert_close(order, expected)
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        assert any("gradnorm_kernels" in node.name() for node in graph_nodes([first]))


def sin(x, inplace=False):
    return x.sin_() if inplace else x.sin()


def cos(x, inplace=False):
    return x.cos_() if inplace else x.cos()


@pytest.mark.parametrize(
    "function",
    [
        *(F.silu, F.mish, F.elu, F.celu, F.selu, F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.leaky_relu),
        *(sin, cos),
    ],
    ids=lambda function: function.__name__,
)
def test_in_place_under_the_switch(function):
    """Of whole tensors and of views: the values and errors of PyTorch's own, and our double backward."""
    x = torch.linspace(-4, 4, 102, dtype=torch.float64, requires_grad=True)

    def first(inplace, view):
        hidden = x * 1
        part = hidden.view(2, 51)[1] if view else hidden
        output = function(part, inplace=inplace)
        assert (output is part) == inplace and (part._version == 0 or inplace)
        return torch.autograd.grad(hidden.exp().sum() + output.pow(3).sum(), x, create_graph=True)[0]

    def orders(inplace, view):
        return list(nth_gradients(lambda x: first(inplace, view), [x], 2))

    for view in (False, True):
        with gk.set_fused_double_backward(True):
            ours = orders(True, view)
            assert any("gradnorm_kernels" in node.name() for node in graph_nodes([first(True, view)]))
        if function is not F.hardsigmoid:
            assert_close(ours, orders(True, view))
    with gk.set_fused_double_backward(True):
        with pytest.raises(RuntimeError, match="leaf"):
            function(x, inplace=True)
        saved = x * 1
        saved.sin().sum(), function(saved, inplace=True)
        y = torch.ones(3)
        assert function(y, inplace=True) is y and torch.equal(y, function(torch.ones(3)))


def test_switch_leaves_what_ours_does_not_cover_to_pytorch():
    def second(function, dtype):
        x = torch.linspace(-1, 1, 11).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).abs().square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.abs().square().sum(), x)[0]

    cases = (
        (torch.tanh, torch.complex128),
        (torch.sigmoid, torch.complex128),
        (torch.sin, torch.complex128),
        (torch.cos, torch.complex64),
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
