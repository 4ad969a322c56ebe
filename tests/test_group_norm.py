"""Group normalisation on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import itertools
import math
from dataclasses import dataclass

import formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_instruction_set, run_under
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
IS_BEFORE_2_15 = torch.__version__ < "2.15"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Case:
    """One row for each way through the kernels; every test below runs on every row or on a few by name."""

    name: str
    shape: tuple
    num_groups: int
    memory_format: torch.memory_format = torch.contiguous_format
    parameters: tuple = PARAMETERS

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype, *, mixed=False):
        """grad_grad_input, grad_output, input, weight, bias, and the last two's own grad_grads."""

        def one(*shape, dtype):
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        v, g, x = (one(*self.shape, dtype=dtype).to(memory_format=self.memory_format) for _ in range(3))
        parameter_dtype = torch.float32 if mixed else dtype
        w, b, p, q = (one(self.shape[1], dtype=parameter_dtype) for _ in range(4))
        w, p = (w, p) if "weight" in self.parameters else (None, None)
        b, q = (b, q) if "bias" in self.parameters else (None, None)
        return Operands(v, p, q, g, x, w, b)


@dataclass
class Operands:
    v: torch.Tensor | None
    p: torch.Tensor | None
    q: torch.Tensor | None
    g: torch.Tensor
    x: torch.Tensor
    w: torch.Tensor | None
    b: torch.Tensor | None

    def map(self, function):
        return Operands(*(None if t is None else function(t) for t in vars(self).values()))

    def tensors(self):
        return [t for t in vars(self).values() if t is not None]


CASES = [
    # Odd sizes, so that a remainder is left of every vector.
    Case("rows", (2, 6, 5, 7), 3),
    Case("rows channels_last", (2, 6, 5, 7), 3, torch.channels_last),
    Case("one group", (2, 10, 3, 5), 1),
    Case("instances", (3, 5, 4, 5), 5),
    Case("instances channels_last", (3, 5, 4, 5), 5, torch.channels_last),
    Case("no inner dimension", (4, 33), 3),
    # More than the kernel adds up at once, in a row or in rows.
    Case("sequence", (1, 4, 1301), 2),
    Case("large channels_last", (1, 34, 13, 11), 2, torch.channels_last),
    Case("volume channels_last", (2, 4, 3, 2, 5), 2, torch.channels_last_3d),
    Case("no parameters", (2, 6, 5, 7), 3, parameters=()),
    Case("no bias", (2, 6, 17), 2, parameters=("weight",)),
    Case("no weight", (2, 6, 17), 2, parameters=("bias",)),
    Case("empty batch", (0, 6, 5, 7), 3),
]
BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_full_case = pytest.mark.parametrize("case", [c for c in CASES if math.prod(c.shape)], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ["output", "grad_input", "grad_weight", "grad_bias", "grad_grad_output", "second grad_input"]
NAMES += ["second grad_weight"]


def fused(case):
    return lambda x, w, b: gk.functional.group_norm(x, case.num_groups, w, b)


def stock(case):
    def call(x, w, b):
        if IS_BEFORE_2_15 and w is None and b is not None:
            w = torch.ones_like(b)  # PyTorch's backward raises there
        return F.group_norm(x, case.num_groups, w, b)

    return call


def reference(case):
    return lambda x, w, b: formulas.group_norm(x, case.num_groups, w, b)


def statistics(case, x):
    """What the forward saves of x: mean and rstd."""
    sizes = (*x.shape[:2], math.prod(x.shape[2:]))
    return torch.native_group_norm(x.detach(), None, None, *sizes, case.num_groups, 1e-5)[1:]


def all_orders(function, operands, create_graph=True):
    """By name, what autograd makes of the function: all of the second order, unless asked not to."""
    g, x, w, b = (
        t if t is None else t.detach().requires_grad_()
        for t in (operands.g, operands.x, operands.w, operands.b)
    )
    output = function(x, w, b)
    inputs = {"grad_input": x, "grad_weight": w, "grad_bias": b}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    first = dict(
        zip(
            inputs,
            torch.autograd.grad(output, tuple(inputs.values()), g, create_graph=create_graph),
            strict=True,
        )
    )
    results = {"output": output, **first}
    if not create_graph:
        return results
    grads = {"grad_input": operands.v, "grad_weight": operands.p, "grad_bias": operands.q}
    grads = {name: t for name, t in grads.items() if t is not None}
    wanted = {"grad_grad_output": g, "second grad_input": x, "second grad_weight": w}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    second = torch.autograd.grad(
        [first[name] for name in grads], list(wanted.values()), list(grads.values()), allow_unused=True
    )
    return results | {n: t for n, t in zip(wanted, second, strict=True) if t is not None}


def assert_no_worse_than_stock(case, operands, ours=None):
    ours = all_orders(fused(case), operands) if ours is None else ours
    theirs = all_orders(stock(case), operands)
    exact = all_orders(reference(case), operands.map(torch.Tensor.double))
    assert ours.keys() == theirs.keys()
    # PyTorch's fused first backward, and not its other one for where it will be differentiated again.
    for name, result in all_orders(stock(case), operands, create_graph=False).items():
        assert torch.equal(ours[name], result) and ours[name].stride() == result.stride(), name
    for name in ("grad_grad_output", "second grad_input", "second grad_weight"):
        if name in ours and ours[name].numel():
            a, s, e = ours[name], theirs[name], exact[name]
            assert (a.dtype, a.shape) == (s.dtype, s.shape), name
            error, stock_error = ((t.double() - e).abs().max().item() for t in (a, s))
            # Two units in the last place: the two maxima are over few elements.
            tiny = 1e-13 if a.dtype == torch.float64 else 2 * torch.finfo(a.dtype).eps * e.abs().max().item()
            assert error <= 2 * stock_error + tiny, f"{name}: {error:.3e}, stock {stock_error:.3e}"


@each_full_case
def test_reference_is_its_own_derivative(case):
    operands = case.draw(torch.float64)
    v, p, q, g, x, w, _ = vars(operands).values()
    expected = all_orders(reference(case), operands)
    first = formulas.group_norm_backward(g, x, case.num_groups, w)
    second = formulas.group_norm_double_backward(v, p, q, g, x, case.num_groups, w)
    for name, result in zip(NAMES[1:], (*first, *second), strict=True):
        if name in expected:
            torch.testing.assert_close(result, expected[name], rtol=1e-10, atol=1e-12)


@each_case
@each_dtype
def test_error_is_at_most_twice_stocks(case, dtype):
    operands = case.draw(dtype)
    assert_no_worse_than_stock(case, operands)
    operands.p = operands.q = None
    assert_no_worse_than_stock(case, operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_full_case
def test_half_input_with_float32_parameters(case, dtype):
    operands = case.draw(dtype, mixed=True)
    if case.name != "no weight":
        return assert_no_worse_than_stock(case, operands)
    if IS_BEFORE_2_15:
        pytest.skip("handed to PyTorch, whose backward raises there")
    # Which PyTorch's fused backward does not take, and its other one does.
    with gk.set_fused_double_backward(True):
        ours, switched = (all_orders(f(case), operands) for f in (fused, stock))
    for name, theirs in all_orders(stock(case), operands).items():
        assert torch.equal(ours[name], theirs) and torch.equal(switched[name], theirs), name


@pytest.mark.parametrize("name", ["rows", "large channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_from_zero(name, dtype):
    """A mean far above the deviation, where sums of x instead of x - mean would cancel."""
    case = BY_NAME[name]
    operands = case.draw(dtype)
    operands.x = operands.x + 100
    assert_no_worse_than_stock(case, operands)


@each_full_case
def test_every_choice_of_defined_gradients(case):
    for given_ in itertools.product([True, False], repeat=3):
        operands = case.draw(torch.float64)
        for name, keep in zip("vpq", given_, strict=True):
            if not keep:
                setattr(operands, name, None)
        if not any(t is not None for t in (operands.v, operands.p, operands.q)):
            continue
        ours, exact = (all_orders(f(case), operands) for f in (fused, reference))
        for name, wanted in exact.items():
            torch.testing.assert_close(ours[name], wanted, rtol=1e-10, atol=1e-11, msg=name)


@each_full_case
def test_every_choice_of_results(case):
    operands = case.draw(torch.float32)
    v, p, q, g, x, w, _ = vars(operands).values()
    call = [v, p, q, g, x, *statistics(case, x), w, case.num_groups, 1e-5]
    everything = OPS.group_norm_double_backward(*call, [True] * 3)
    for mask in itertools.product([True, False], repeat=3):
        results = OPS.group_norm_double_backward(*call, mask)
        for result, wanted, asked in zip(results, everything, mask, strict=True):
            assert torch.equal(result, wanted) if asked else result is None


@each_dtype
@each_full_case
def test_nan_and_inf_stay_in_their_group(case, dtype):
    for bad, name in itertools.product((math.nan, math.inf), "vgx"):
        operands = case.draw(dtype)
        operands.p = operands.q = None
        getattr(operands, name)[0, 0].fill_(0.5)
        getattr(operands, name)[0, 0].view(-1)[-1:] = bad
        ours = all_orders(fused(case), operands)
        exact = all_orders(reference(case), operands.map(torch.Tensor.double))
        for result in ("grad_grad_output", "second grad_input", "second grad_weight"):
            if result in ours:
                assert torch.equal(ours[result].isfinite(), exact[result].isfinite()), (bad, name, result)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["all", "input", "others"])
@pytest.mark.parametrize("name", ["rows", "instances"])
def test_layouts(name, layout, which):
    case, change = BY_NAME[name], LAYOUTS[layout]
    operands = case.draw(torch.float32)
    if which != "others":
        operands.x = change(operands.x)
    if which != "input":
        operands.v, operands.g = change(operands.v), change(operands.g)
    assert_no_worse_than_stock(case, operands)
    ours = all_orders(fused(case), operands)
    assert ours["second grad_input"].stride() == ours["output"].stride()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_fuzzed_shapes(data, dtype):
    inner = data.draw(st.lists(st.integers(1, 40), max_size=3))
    groups, size, batch = (data.draw(st.integers(1, 6)) for _ in range(3))
    shape = (batch, groups * size, *inner)
    channels_last = len(shape) == 4 and data.draw(st.booleans())
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # In groups of a few elements the condition of the statistics decides how large errors are.
    if size * math.prod(inner) < 8:
        return
    case = Case("fuzzed", shape, groups, memory_format)
    # With statistics of half precision their rounding would hide everything else.
    operands = case.draw(dtype, mixed=dtype in (torch.bfloat16, torch.float16))
    ours = all_orders(fused(case), operands)
    exact = all_orders(reference(case), operands.map(torch.Tensor.double))
    for name in ("grad_grad_output", "second grad_input", "second grad_weight"):
        result, wanted = ours[name].double(), exact[name]
        scale = wanted.abs().max().item()
        rounding = torch.finfo(dtype).eps if result.ndim > 1 else 0
        noise = 1e-11 if dtype == torch.float64 else 1e-4
        assert (result - wanted).abs().max().item() <= (rounding + noise) * scale, name


@each_full_case
def test_threads_change_no_bit(case):
    operands = case.draw(torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        # Fewer threads than groups, and more than there are: the work is divided differently.
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(all_orders(fused(case), operands))
    finally:
        torch.set_num_threads(threads)
    for name in ("grad_grad_output", "second grad_input", "second grad_weight"):
        if name in results[0]:
            assert all(torch.equal(result[name], results[0][name]) for result in results[1:])


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for name in ('rows', 'large channels_last', 'no inner dimension', 'sequence'):
    for case, dtype in t.itertools.product([t.BY_NAME[name]], t.DTYPES):
        t.test_error_is_at_most_twice_stocks(case, dtype)
"""
    run_under(capability, __name__, checks)


SMALL = [Case("small", (2, 4, 3), 2), Case("small channels_last", (2, 4, 1, 2), 2, torch.channels_last)]
SMALL += [Case("small without parameters", (2, 4, 2), 1, parameters=())]
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@each_small_case
def test_gradcheck_up_to_fourth_order(case):
    operands = case.draw(torch.float64).map(lambda t: t.requires_grad_())
    v, p, q, g, x, w, b = vars(operands).values()
    assert torch.autograd.gradcheck(fused(case), (x, w, b))
    assert torch.autograd.gradgradcheck(fused(case), (x, w, b))

    def backward(g, x, w):
        return OPS.group_norm_backward(g, x, *statistics(case, x), w, case.num_groups, 1e-5, [True] * 3)

    def double_backward(v, p, q, g, x, w):
        return OPS.group_norm_double_backward(
            v, p, q, g, x, *statistics(case, x), w, case.num_groups, 1e-5, [True] * 3
        )

    assert torch.autograd.gradcheck(backward, (g, x, w))
    assert torch.autograd.gradgradcheck(backward, (g, x, w))
    assert torch.autograd.gradcheck(double_backward, (v, p, q, g, x, w))
    assert torch.autograd.gradgradcheck(double_backward, (v, p, q, g, x, w), atol=1e-4)


@each_small_case
def test_third_order_equals_the_references(case):
    operands = case.draw(torch.float64)

    def third(function):
        x = operands.x.clone().requires_grad_()
        result = function(x, operands.w, operands.b).sin()
        for _ in range(3):
            (result,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
        return result

    expected = third(reference(case))
    torch.testing.assert_close(third(fused(case)), expected, rtol=1e-9, atol=1e-10)
    with gk.set_fused_double_backward(True):
        torch.testing.assert_close(third(stock(case)), expected, rtol=1e-9, atol=1e-10)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.name(), args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("switch", [False, True])
def test_each_pass_is_one_op_and_nothing_unneeded_is_computed(switch):
    case = BY_NAME["rows"]
    operands = case.draw(torch.float32).map(lambda t: t.requires_grad_())
    v, _, _, g, x, w, b = vars(operands).values()
    counters = [CallCounter() for _ in range(4)]
    with gk.set_fused_double_backward(switch):
        with counters[0]:
            output = (stock if switch else fused)(case)(x, w, b)
        with counters[1]:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        v = v.detach()
        with counters[2]:
            torch.autograd.grad(grad_input, (g, x, w), v, retain_graph=True)
        with counters[3]:
            torch.autograd.grad(grad_input, w, v)
    # Autograd detaches a result that it has saved, as the statistics under the switch.
    calls = [[call for call in counter.calls if call[0] != "aten::detach"] for counter in counters]
    assert [name for name, _ in calls[0]] == ["aten::native_group_norm"]
    assert calls[1] == [("gradnorm_kernels::group_norm_backward", [True, False, False])]
    assert calls[2] == [("gradnorm_kernels::group_norm_double_backward", [True, True, True])]
    assert calls[3] == [("gradnorm_kernels::group_norm_double_backward", [False, False, True])]


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


def test_memory_traffic_is_the_least_possible():
    case = Case("large", (8, 64, 28, 28), 32)

    def traffic(function):
        v, g, x = (torch.empty(case.shape, device="meta", requires_grad=True) for _ in range(3))
        w, b = (torch.empty(case.shape[1], device="meta", requires_grad=True) for _ in range(2))
        passes = [Traffic() for _ in range(3)]
        with passes[0]:
            output = function(x, w, b)
        with passes[1]:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        with passes[2]:
            torch.autograd.grad(grad_input, (g, x, w), v)
        return [counter.elements / x.numel() for counter in passes]

    assert traffic(fused(case)) == pytest.approx([2, 3, 5], rel=0.01)
    _, backward, double_backward = traffic(stock(case))
    assert backward > 10 and double_backward > 30


def test_undefined_gradients_stay_undefined():
    case = BY_NAME["rows"]
    undefined = torch._C._functions.UndefinedGrad()
    operands = case.draw(torch.float32).map(lambda t: t.requires_grad_())
    g, x, w, b = operands.g, operands.x, operands.w, operands.b
    undefined(fused(case)(x, w, b)).sum().backward()
    (grad_input,) = torch.autograd.grad(fused(case)(x, w, b), x, g, create_graph=True)
    undefined(grad_input).sum().backward()
    assert all(t.grad is None for t in (g, x, w, b))


@each_case
def test_saved_tensors_are_not_modified_and_runs_repeat_exactly(case):
    operands = case.draw(torch.float32)
    originals = operands.map(torch.clone)
    first, second = (all_orders(fused(case), operands) for _ in range(2))
    for a, b in zip(operands.tensors(), originals.tensors(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if operands.x.numel():
        y = operands.x.requires_grad_() * 1
        output = fused(case)(y, operands.w, operands.b)
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("name", ["rows channels_last", "no inner dimension", "no parameters", "empty batch"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(name):
    case = BY_NAME[name]
    operands = case.draw(torch.float32).map(torch.Tensor.requires_grad_)
    v, p, q, g, x, w, b = vars(operands).values()
    tail = (*statistics(case, x), w, case.num_groups, 1e-5, [True] * 3)
    torch.library.opcheck(OPS.group_norm, (x, case.num_groups, w, b, 1e-5))
    torch.library.opcheck(OPS.group_norm_backward, (g, x, *tail))
    torch.library.opcheck(OPS.group_norm_double_backward, (v, p, q, g, x, *tail))


def test_torch_func():
    case = Case("small", (2, 4, 3), 2)
    operands = case.draw(torch.float64)
    x, w, b = operands.x, operands.w, operands.b

    def transforms(function):
        def of_input(x):
            return function(x, w, b)

        def f(x):
            return of_input(x).pow(3).sum()

        yield torch.func.grad(f)(x)
        yield torch.func.grad(lambda x: torch.func.grad(f)(x).pow(2).sum())(x)
        yield torch.func.hessian(f)(x)
        yield torch.func.jacrev(torch.func.jacrev(f))(x)
        yield torch.func.hessian(lambda w: function(x, w, b).pow(3).sum())(w)
        yield torch.func.vmap(of_input)(torch.stack([x, x + 1, x.cos()]))
        yield torch.func.vmap(torch.func.hessian(f))(torch.stack([x, x.cos()]))
        yield torch.func.vmap(lambda w: function(x, w, b))(torch.stack([w, w + 1]))
        yield torch.func.jvp(of_input, (x,), (x.cos(),))[1]
        yield torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1])(x)
        yield torch.func.jacfwd(torch.func.hessian(f))(x)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        basis = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
        # A transform inside ordinary autograd.
        (yield torch.autograd.grad(torch.func.grad(f)(leaf).pow(2).sum(), leaf)[0])

    def check(function):
        for ours, wanted in zip(transforms(function), transforms(reference(case)), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)

    check(fused(case))
    with gk.set_fused_double_backward(True):
        check(stock(case))


def test_forward_mode():
    case = Case("small", (2, 4, 3), 2)
    operands = case.draw(torch.float64)

    def dual_derivative(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(operands.x, operands.g)
            return torch.autograd.forward_ad.unpack_dual(function(dual, operands.w, operands.b)).tangent

    torch.testing.assert_close(dual_derivative(fused(case)), dual_derivative(reference(case)))


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


@pytest.mark.skipif(IS_BEFORE_2_15, reason="PyTorch's own double backward raises for this subclass")
def test_tensor_subclasses():
    case = BY_NAME["no parameters"]

    def second(function, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, None, None).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    x = torch.randn(case.shape, dtype=torch.float64)
    expected = second(reference(case), x.clone())
    with gk.set_fused_double_backward(True):
        for function in (fused, stock):
            torch.testing.assert_close(second(function(case), AtenOnly(x)).wrapped, expected)


def test_autocast_matches_stock():
    case = Case("small", (2, 4, 3), 2)
    operands = case.draw(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = operands.x.to(dtype), operands.w, operands.b
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (f(case)(x, w, b) for f in (fused, stock))
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@each_full_case
def test_switch(case):
    operands = case.draw(torch.float32)
    without = all_orders(stock(case), operands, create_graph=False)
    ours = all_orders(fused(case), operands)
    with gk.set_fused_double_backward(True):
        switched = all_orders(stock(case), operands)
        once = all_orders(stock(case), operands, create_graph=False)
    assert all(torch.equal(once[name], without[name]) for name in without)
    assert switched.keys() == ours.keys()
    assert all(torch.equal(switched[name], ours[name]) for name in ours)


def test_switch_differentiates_the_statistics_too():
    case = Case("small", (2, 4, 3), 2)
    operands = case.draw(torch.float64)

    def second(native):
        x = operands.x.clone().requires_grad_()
        results = native(x)
        loss = sum((k + 2) * result.pow(3).sum() for k, result in enumerate(results))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient, torch.autograd.grad(gradient.square().sum(), x)[0]

    def native(x):
        return torch.native_group_norm(x, operands.w, operands.b, 2, 4, 3, case.num_groups, 1e-5)

    expected = second(native)
    with gk.set_fused_double_backward(True):
        for result, wanted in zip(second(native), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-10)
        # Only a statistic, which PyTorch before 2.15 cannot differentiate by itself.
        (gradient,) = torch.autograd.grad(native(x := operands.x.clone().requires_grad_())[2].sum(), x)
    x = operands.x.clone().requires_grad_()
    variance = x.reshape(2, case.num_groups, -1).var(-1, correction=0)
    torch.testing.assert_close(gradient, torch.autograd.grad((variance + 1e-5).rsqrt().sum(), x)[0])


def test_switch_leaves_what_ours_does_not_cover():
    """The input as PyTorch's own op also takes it: of another shape than (N, C, HxW) says."""
    x = torch.randn(24, dtype=torch.float64, requires_grad=True)

    def native(x):
        return torch.native_group_norm(x, None, None, 2, 4, 3, 2, 1e-5)[0]

    expected = torch.autograd.grad(native(x).pow(3).sum(), x)[0]
    with gk.set_fused_double_backward(True):
        torch.testing.assert_close(torch.autograd.grad(native(x).pow(3).sum(), x)[0], expected)


@pytest.mark.parametrize("fused_by", ["function", "switch"])
def test_whole_step_compiles_to_eagers_gradients(fused_by):
    case = BY_NAME["rows"]
    operands = case.draw(torch.float32)

    def loss(x, w, b):
        return (fused if fused_by == "function" else stock)(case)(x, w, b).pow(3).sum()

    def penalised(x, w, b):
        return loss(x, w, b) + torch.func.grad(loss)(x, w, b).abs().sum()

    step = torch.func.grad(penalised, argnums=(0, 1, 2))
    expected = step(operands.x, operands.w, operands.b)
    torch._dynamo.reset()
    with gk.set_fused_double_backward(fused_by == "switch"):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for ours, wanted in zip(compiled(operands.x, operands.w, operands.b), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_ops_themselves_trace(dynamic):
    """Called by name inside a compiled region, the ops become plain ATen ops."""

    def step(v, p, q, g, x, mean, rstd, w, b):
        tail = (mean, rstd, w, 2, 1e-5, [True] * 3)
        return (
            OPS.group_norm(x, 2, w, b),
            *OPS.group_norm_backward(g, x, *tail),
            *OPS.group_norm_double_backward(v, p, q, g, x, *tail),
        )

    torch._dynamo.reset()
    for shape in ((3, 4, 5), (2, 4, 7)):
        operands = Case("traced", shape, 2).draw(torch.float64)
        v, p, q, g, x, w, b = (t.requires_grad_() for t in operands.tensors())
        with torch.no_grad():
            _, mean, rstd = torch.native_group_norm(x, w, b, *shape, 2, 1e-5)
        everything = (v, p, q, g, x, mean, rstd, w, b)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*everything)
        eager = step(*everything)
        leaves = (v, p, q, g, x, w, b)
        for ours, wanted in zip(compiled, eager, strict=True):
            torch.testing.assert_close(ours, wanted)
        gradients = torch.autograd.grad(sum(c.sum() for c in compiled), leaves)
        expected = torch.autograd.grad(sum(c.sum() for c in eager), leaves)
        for ours, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_inference_mode_and_the_meta_device():
    case = BY_NAME["rows channels_last"]
    operands = case.draw(torch.float32)
    expected = fused(case)(operands.x, operands.w, operands.b)
    with torch.inference_mode():
        assert torch.equal(fused(case)(operands.x.clone(), operands.w, operands.b), expected)
    on_meta = all_orders(fused(case), operands.map(lambda t: t.to("meta")))
    for name, result in all_orders(fused(case), operands).items():
        assert on_meta[name].device.type == "meta"
        # The forward is PyTorch's own, whose layout on meta another release corrected.
        if name != "output" or torch.__version__ >= "2.15":
            assert on_meta[name].stride() == result.stride(), name


INSTANCES = [Case("instances", (3, 5, 4, 5), 5), Case("instances of a line", (2, 3, 65), 3)]


@each_dtype
@pytest.mark.parametrize("case", INSTANCES, ids=str)
def test_instance_norm(case, dtype):
    operands = case.draw(dtype)
    x, w, b = operands.x, operands.w, operands.b
    ours = gk.functional.instance_norm(x, weight=w, bias=b, eps=1e-3)
    assert torch.equal(ours, gk.functional.group_norm(x, case.num_groups, w, b, eps=1e-3))
    exact = F.instance_norm(x.double(), weight=w.double(), bias=b.double(), eps=1e-3)
    theirs = F.instance_norm(x, weight=w, bias=b, eps=1e-3)
    error, stock_error = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
    assert error <= 2 * stock_error + 1e-14


def test_instance_norm_with_running_statistics_is_stocks():
    x, w, b = torch.randn(3, 5, 4), torch.randn(5), torch.randn(5)
    running = [torch.zeros(5), torch.ones(5)]
    expected = [t.clone() for t in running]
    for options in ({"use_input_stats": True, "momentum": 0.3}, {"use_input_stats": False}):
        ours = gk.functional.instance_norm(x, *running, w, b, **options)
        assert torch.equal(ours, F.instance_norm(x, *expected, w, b, **options))
        assert all(map(torch.equal, running, expected))
    assert running[0].abs().sum() > 0
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        gk.functional.instance_norm(x[..., :1])


GOOD = {
    "grad_grad_input": torch.randn(2, 4, 3),
    "grad_grad_weight": torch.randn(4),
    "grad_grad_bias": torch.randn(4),
    "grad_output": torch.randn(2, 4, 3),
    "input": torch.randn(2, 4, 3),
    "mean": torch.randn(2, 2),
    "rstd": torch.randn(2, 2),
    "weight": torch.randn(4),
    "bias": torch.randn(4),
    "num_groups": 2,
}
BAD = {
    "integers": lambda t: t.long(),
    "complex": lambda t: t.cfloat(),
    "shape": lambda t: t[..., :1] if t.ndim < 3 else t[..., 0],
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


def arguments(op, operands):
    names = [a.name for a in op.default._schema.arguments]
    extra = {"eps": 1e-5, "output_mask": [True] * 3}
    return [(operands | extra)[name] for name in names]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("suffix", ["", "_backward", "_double_backward"])
def test_bad_input_is_named(suffix, bad):
    op = getattr(OPS, f"group_norm{suffix}")
    for name, tensor in GOOD.items():
        if name not in [a.name for a in op.default._schema.arguments] or name == "num_groups":
            continue
        if name == "input" and bad in ("shape", "dtype", "device"):
            continue
        if bad == "dtype" and name in ("mean", "rstd"):
            continue
        broken = GOOD | {name: BAD[bad](tensor)}
        with pytest.raises(
            (TypeError, ValueError, RuntimeError), match=f"group_norm{suffix}: expected {name}"
        ):
            op(*arguments(op, broken))


def test_bad_groups_and_shapes_are_named():
    x = torch.randn(2, 4, 3)
    for wrong in (3, 0, -1):
        with pytest.raises(ValueError, match="expected num_groups"):
            gk.functional.group_norm(x, wrong)
    with pytest.raises(ValueError, match="expected input to have at least 2 dimensions"):
        gk.functional.group_norm(x[0, 0], 1)
    with pytest.raises(ValueError, match="more than one value"):
        gk.functional.group_norm(x[:1, :, :1], 4)
    with pytest.raises(TypeError, match="expected input"):
        torch.func.vmap(lambda x: gk.functional.group_norm(x, 2))(torch.ones(3, 2, 4, dtype=torch.int64))


def test_schemas():
    assert str(OPS.group_norm.default._schema) == (
        "gradnorm_kernels::group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, "
        "float eps=1.0000000000000001e-05) -> Tensor"
    )
    assert str(OPS.group_norm_backward.default._schema) == (
        "gradnorm_kernels::group_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, "
        "Tensor? weight, int num_groups, float eps, bool[3] output_mask) -> "
        "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    )
    assert str(OPS.group_norm_double_backward.default._schema) == (
        "gradnorm_kernels::group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
        "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
        "int num_groups, float eps, bool[3] output_mask) -> "
        "(Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)"
    )
