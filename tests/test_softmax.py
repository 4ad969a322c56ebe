"""Softmax on the CPU: values, derivatives of every order, the bias, transforms, compilers, bad input."""

import gc
import math
import weakref
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
from torch.utils.checkpoint import checkpoint

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["softmax", "softmax_with_bias", "softmax_backward", "softmax_double_backward"]


@dataclass(frozen=True)
class Case:
    """One row for each shape, dimension and bias; most tests below run on every row."""

    name: str
    shape: tuple
    dim: int = -1
    bias: tuple | None = None

    def __str__(self) -> str:
        return self.name

    def fused(self, x, bias=None):
        return gk.functional.softmax(x, self.dim, bias=bias)

    def stock(self, x, bias=None):
        return F.softmax(x if bias is None else x + bias, self.dim)

    def reference(self, x, bias=None):
        return formulas.softmax(x, self.dim, bias)

    def draw(self, dtype):
        """v, g, then x and the bias: what the double backward is of, and what the forward is of."""
        shapes = [self.shape] * 3 + ([] if self.bias is None else [self.bias])
        v, g, *inputs = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
        return v, g, inputs


CASES = [
    Case("windows", (6, 3, 2, 49, 49), bias=(3, 2, 49, 49)),  # Swin's, with the mask in the bias
    Case("tokens", (4, 3, 197, 197)),  # ViT's
    Case("heads", (5, 3, 17, 17), bias=(1, 3, 17, 17)),
    Case("intricate bias", (2, 3, 4, 5, 16), bias=(2, 1, 4, 1, 16)),
    Case("bias of rows", (7, 33), bias=(33,)),
    # One for all elements of a row, which changes nothing and has no gradient.
    Case("bias of a row", (7, 33), bias=(7, 1)),
    Case("bias of one", (7, 33), bias=()),
    Case("bias across", (3, 50, 7), dim=1, bias=(50, 1)),
    Case("short", (700, 3), dim=1),
    Case("long", (3, 9001)),
    # A vector across neighbouring rows, whole and partly filled.
    Case("across", (3, 50, 71), dim=1),
    Case("first of all", (33, 5), dim=0),
    Case("one column", (33, 1), dim=0),
    Case("rows of one", (5, 1)),
    Case("scalar", (), dim=0),
    Case("no rows", (0, 4)),
]
# Small ones, of which every derivative can be checked.
SMALL = [
    Case("rows", (2, 5)),
    Case("across", (2, 3, 2), dim=1),
    Case("scalar", (), dim=0),
    Case("bias", (2, 3, 4), bias=(3, 4)),
    Case("bias across", (2, 3, 2), dim=-2, bias=(3, 1)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_orders(function, v, g, inputs):
    """Output, the first gradients, then the second ones: of grad_output, x and the bias."""
    g, *inputs = (t.detach().requires_grad_() for t in (g, *inputs))
    output = function(*inputs)
    first = torch.autograd.grad(output, inputs, g, create_graph=True)
    # A second gradient reaches the bias's too.
    weights = [v, *(torch.ones_like(t) for t in inputs[1:])]
    return [output, *first, *torch.autograd.grad(first, (g, *inputs), weights)]


def assert_no_worse_than_stock(ours, stock, exact, ulps=0):
    scale = max(truth.abs().max().item() for truth in exact) if exact[0].numel() else 0
    for k, (a, b, truth) in enumerate(zip(ours, stock, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.numel() == 0:
            continue
        # In float64 the reference itself rounds.
        roundings = max(ulps, 8 * (a.dtype == torch.float64))
        if a.numel() < exact[0].numel():
            # What is left of a sum over the broadcast dimensions, in which terms may cancel.
            roundings = max(1, roundings) * math.sqrt(exact[0].numel() / a.numel())
        tiny = torch.finfo(a.dtype).tiny + roundings * torch.finfo(a.dtype).eps * scale
        error = (a.double() - truth).abs().max().item()
        stock_error = (b.double() - truth).abs().max().item()
        assert error <= 2 * stock_error + tiny, f"result {k}: {error:.3e}, stock {stock_error:.3e}"


@each_case
@each_dtype
def test_error_is_at_most_twice_stocks(case, dtype):
    v, g, inputs = case.draw(dtype)
    exact = all_orders(case.reference, v.double(), g.double(), [t.double() for t in inputs])
    stock = all_orders(case.stock, v, g, inputs)
    # A few elements say little of a maximum.
    ulps = 0 if v.numel() > 2000 else 2
    assert_no_worse_than_stock(all_orders(case.fused, v, g, inputs), stock, exact, ulps)
    with gk.set_fused_double_backward(True):
        switched = all_orders(case.stock, v, g, inputs)
    assert_no_worse_than_stock(switched, stock, exact, ulps)
    for k in range(1 + len(inputs)):
        assert torch.equal(switched[k], stock[k]), "not PyTorch's own forward and first backward"


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_large_gradients_that_nearly_cancel(offset):
    """A constant along the row changes nothing: it must not cost the others' digits."""
    case = Case("rows", (40, 49))
    v, g, inputs = case.draw(torch.float32)
    v, g, x = v + offset, g - offset, 20 * inputs[0]
    exact = all_orders(case.reference, v.double(), g.double(), [x.double()])
    assert_no_worse_than_stock(all_orders(case.fused, v, g, [x]), all_orders(case.stock, v, g, [x]), exact)


@each_case
def test_ops_equal_the_reference(case):
    v, g, inputs = case.draw(torch.float64)
    y = case.reference(*inputs) if v.numel() else v
    torch.testing.assert_close(case.fused(*inputs), y)
    torch.testing.assert_close(
        OPS.softmax_backward(g, y, case.dim, y.dtype), formulas.softmax_backward(g, y, case.dim)
    )
    for to_input in (False, True):
        ours = OPS.softmax_double_backward(v, g, y, case.dim, to_input)
        exact = formulas.softmax_double_backward(v, g, y, case.dim, to_input)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@each_dtype
@pytest.mark.parametrize("n", [3, 49, 64])
def test_masks_and_nan(dtype, n):
    x = torch.randn(6, n).to(dtype)
    mask = torch.zeros(6, n, dtype=dtype)
    mask[0] = -math.inf
    mask[1, 1:] = -math.inf
    mask[2, -1] = mask[3, 0] = -math.inf
    x[4, n // 2] = math.nan
    x[5, n - 1] = math.inf
    ones = torch.ones_like(x)
    exact = all_orders(
        lambda x, b: F.softmax(x + b, -1), *(t.double() for t in (ones, ones)), [x.double(), mask.double()]
    )
    ours = all_orders(lambda x, b: gk.functional.softmax(x, -1, bias=b), ones, ones, [x, mask])
    without = all_orders(lambda x: gk.functional.softmax(x, -1), ones, ones, [x + mask])
    for result, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(result.double(), wanted, equal_nan=True, rtol=0.02, atol=0.02)
    assert torch.equal(ours[0].isnan().all(-1), torch.tensor([True, False, False, False, True, True]))
    for a, b in ((ours[0], without[0]), (ours[1], without[1])):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert (ours[0][1:4][mask[1:4] == -math.inf] == 0).all()


def test_no_columns():
    v, g, x = torch.randn(3, 4, 0)
    for result in all_orders(lambda x: gk.functional.softmax(x, -1), v, g, [x]):
        assert result.shape == (4, 0)
    assert gk.functional.softmax(x, -1, bias=torch.zeros(0)).shape == (4, 0)


def test_large_scores_do_not_overflow():
    x = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3e38, -2e38], [0.0, -200.0, -87.5]])
    assert torch.equal(gk.functional.softmax(x, -1)[:2], F.softmax(x, -1)[:2])
    torch.testing.assert_close(gk.functional.softmax(x, -1), F.softmax(x, -1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, None),
    ],
    ids=str,
)
def test_mixed_dtypes(dtypes):
    x_dtype, b_dtype, dtype = dtypes
    x, b = torch.randn(5, 3, 17, 17).to(x_dtype), torch.randn(3, 17, 17).to(b_dtype)
    result = dtype or torch.promote_types(x_dtype, b_dtype)
    v, g = torch.randn(5, 3, 17, 17).to(x_dtype), torch.randn(5, 3, 17, 17).to(result)
    for biased in (True, False):
        inputs = [x, b] if biased else [x]
        # Where both are given, PyTorch would round the sum to its dtype first.
        stock = all_orders(
            lambda x, b=0: F.softmax(x.to(result) + b, -1, dtype=dtype or result), v, g, inputs
        )
        wanted = dtype or (result if biased else x_dtype)
        ours = all_orders(
            lambda x, b=None: gk.functional.softmax(x, -1, dtype=dtype, bias=b), v, g.to(wanted), inputs
        )
        assert ours[0].dtype == wanted
        exact = all_orders(
            lambda x, b=0: F.softmax(x + b, -1),
            v.double(),
            g.to(wanted).double(),
            [t.double() for t in inputs],
        )
        assert [t.dtype for t in ours[1 : 1 + len(inputs)]] == [t.dtype for t in inputs]
        for a, s, truth in zip(ours, stock, exact, strict=True):
            coarser = max(torch.finfo(a.dtype).eps, torch.finfo(wanted).eps)
            if wanted == torch.float64:
                # Stock's arithmetic is the truth's.
                coarser *= 8
            error, stock_error = ((t.double() - truth).abs().max().item() for t in (a, s))
            assert error <= 2 * stock_error + coarser * max(1, truth.abs().max().item())


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_stocks_strides(case, layout):
    if not case.shape:
        pytest.skip("a scalar has one layout")
    v, g, inputs = case.draw(torch.float32)
    expected = all_orders(case.fused, v, g, inputs)
    arrange = LAYOUTS[layout]
    arranged = [arrange(inputs[0]), *inputs[1:]]
    results = all_orders(case.fused, arrange(v), arrange(g), arranged)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    stock = all_orders(case.stock, arrange(v), arrange(g), arranged)
    for k in range(2):
        assert results[k].stride() == stock[k].stride()


def test_channels_last_and_expanded_gradients():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    g, v = torch.randn(()).expand(x.shape), torch.randn(2, 1, 4, 1).expand(x.shape)
    case = Case("channels", x.shape, dim=1)
    for ours, stock in zip(all_orders(case.fused, v, g, [x]), all_orders(case.stock, v, g, [x]), strict=True):
        torch.testing.assert_close(ours, stock)
    assert case.fused(x).stride() == case.stock(x).stride()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_fuzzed_shapes_dims_biases_and_strides(data, dtype):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shape[-1] = data.draw(st.integers(1, 70))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    kept = data.draw(st.lists(st.booleans(), max_size=len(shape)))
    tail = shape[len(shape) - len(kept) :]
    bias = [n if keep else 1 for n, keep in zip(tail, kept, strict=True)]
    case = Case("fuzzed", tuple(shape), dim, tuple(bias) if data.draw(st.booleans()) else None)
    v, g, inputs = case.draw(dtype)
    if data.draw(st.booleans()):
        v, g = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (v, g))
    exact = all_orders(case.reference, v.double(), g.double(), [t.double() for t in inputs])
    results = all_orders(case.fused, v, g, inputs)
    for result, truth in zip(results, exact, strict=True):
        scale = max(1, truth.abs().max().item())
        # The bias's gradients are sums.
        scale *= math.sqrt(max(1, v.numel() / result.numel()))
        # In float64 the reference errs like what it is compared with.
        units = 16 if dtype == torch.float64 else 8
        assert (result.double() - truth).abs().max().item() <= units * torch.finfo(dtype).eps * scale


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for dtype in t.DTYPES:
    for case in t.CASES[2:]:
        t.test_error_is_at_most_twice_stocks(case, dtype)
    t.test_masks_and_nan(dtype, 49)
"""
    run_under(capability, __name__, checks)


def test_threads_give_the_same_bits():
    case = CASES[0]
    v, g, inputs = case.draw(torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(all_orders(case.fused, v, g, inputs))
    finally:
        torch.set_num_threads(before)
    for results in runs[1:]:
        assert torch.equal(results[0], runs[0][0]) and torch.equal(results[4], runs[0][4])


@each_small_case
def test_gradcheck_up_to_fourth_order(case):
    v, g, inputs = case.draw(torch.float64)
    for t in (v, g, *inputs):
        t.requires_grad_()
    assert torch.autograd.gradcheck(case.fused, inputs)
    assert torch.autograd.gradgradcheck(case.fused, inputs)

    def gradient(g, *inputs):
        return torch.autograd.grad(case.fused(*inputs), inputs[0], g, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (g, *inputs))

    # As functions of any output, not of a softmax's only.
    y = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)

    def backward(g, y):
        return OPS.softmax_backward(g, y, case.dim, y.dtype)

    assert torch.autograd.gradcheck(backward, (g, y))
    assert torch.autograd.gradgradcheck(backward, (g, y))
    for to_input in (False, True):

        def double_backward(v, g, y, to_input=to_input):
            return OPS.softmax_double_backward(v, g, y, case.dim, to_input)

        assert torch.autograd.gradcheck(double_backward, (v, g, y))
        assert torch.autograd.gradgradcheck(double_backward, (v, g, y))


@each_small_case
def test_fourth_order_equals_stock(case):
    def fourth(function):
        torch.manual_seed(0)
        _, _, inputs = case.draw(torch.float64)
        inputs = [t.requires_grad_() for t in inputs]
        result = [function(*inputs).pow(2)]
        for _ in range(4):
            loss = sum(r.pow(2).sum() for r in result)
            result = torch.autograd.grad(loss, inputs, create_graph=True)
        return result

    for ours, stock in zip(fourth(case.fused), fourth(case.stock), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)
    expected = fourth(case.stock)
    with gk.set_fused_double_backward(True):
        for ours, stock in zip(fourth(case.stock), expected, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() != "aten::empty.memory_format":
            self.calls.append(func.name().removeprefix("gradnorm_kernels::"))
        return func(*args, **(kwargs or {}))


def test_each_pass_is_one_kernel_and_nothing_unneeded_is_computed():
    x, g = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(4, 8)
    with CallCounter() as forward:
        output = gk.functional.softmax(x, -1)
    with CallCounter() as backward:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with CallCounter() as both:
        torch.autograd.grad(grad_input, (g, x), v, retain_graph=True)
    with CallCounter() as only_grad_output:
        torch.autograd.grad(grad_input, g, v)
    assert forward.calls == ["softmax"]
    assert backward.calls == ["softmax_backward"]
    assert both.calls == ["softmax_double_backward"]
    assert only_grad_output.calls == ["softmax_backward"]


def test_the_bias_is_reduced_once_and_only_where_it_is_wanted():
    x, g = (torch.randn(6, 3, 5, requires_grad=True) for _ in range(2))
    bias = torch.randn(3, 5, requires_grad=True)
    v = torch.randn(6, 3, 5)
    with CallCounter() as forward:
        output = gk.functional.softmax(x, -1, bias=bias)
    with CallCounter() as backward:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with CallCounter() as step:
        # Both the loss and its gradient depend on the scores.
        torch.autograd.grad((grad_input, output), (g, x, bias), (v, v))
    assert forward.calls == ["softmax_with_bias"]
    assert backward.calls == ["softmax_backward"]
    counts = {name: step.calls.count(name) for name in set(step.calls)}
    assert counts == {
        "softmax_double_backward": 1,
        "softmax_backward": 1,
        "aten::add.Tensor": 1,
        "aten::sum.dim_IntList": 1,
    }


def test_a_bias_that_needs_no_gradient():
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: gk.functional.softmax(x, -1, bias=bias), x)
    bias.requires_grad_()
    x = x.detach()
    assert torch.autograd.gradgradcheck(lambda b: gk.functional.softmax(x, -1, bias=b), bias)


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


def traffic(function, *, bias=None):
    shape = (10, 4, 25)
    x, g, v = (torch.empty(shape, device="meta", requires_grad=True) for _ in range(3))
    passes = [Traffic() for _ in range(3)]
    with passes[0]:
        output = function(x) if bias is None else function(x, bias)
    with passes[1]:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with passes[2]:
        torch.autograd.grad(grad_input, (g, x), v)
    return [counter.elements / 1000 for counter in passes]


def test_memory_traffic_is_the_least_possible():
    case = Case("meta", (10, 4, 25))
    assert traffic(case.fused) == [2, 3, 5]
    assert traffic(case.stock)[2] > 15
    with gk.set_fused_double_backward(True):
        # 5 and, through PyTorch's own graph, the softmax's backward.
        assert traffic(case.stock) == [2, 3, 8]
    bias = torch.empty(4, 25, device="meta", requires_grad=True)
    assert traffic(case.fused, bias=bias) == [2.101, 3, 5]  # 0.001: an element that stands for the sum


def test_undefined_gradients_stay_undefined():
    undefined = torch._C._functions.UndefinedGrad()
    x, g, bias = (torch.randn(8, requires_grad=True) for _ in range(3))
    for extra in ({}, {"bias": bias}):
        undefined(gk.functional.softmax(x, -1, **extra)).sum().backward()
        output = gk.functional.softmax(x, -1, **extra)
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        undefined(grad_input).sum().backward()
    assert x.grad is None and g.grad is None and bias.grad is None


def test_saved_tensors_are_not_modified_and_runs_repeat_exactly():
    case = CASES[0]
    v, g, inputs = case.draw(torch.float32)
    originals = [t.clone() for t in (v, g, *inputs)]
    first, second = (all_orders(case.fused, v, g, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((v, g, *inputs), originals, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_output_is_saved():
    x = torch.randn(4, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    for extra in ({}, {"bias": bias}):
        scores = x * 2
        freed = weakref.ref(scores)
        output = gk.functional.softmax(scores, -1, **extra)
        wanted = torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
        # Not needed any more, and so free to be overwritten.
        scores.detach().zero_()
        del scores
        gc.collect()
        assert freed() is None
        assert torch.equal(torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0], wanted)
        output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def penalised(function, x, watch):
    """A loss, and the gradients that a gradient-norm step gives; watch sees the softmax's output."""
    scores = x.sin()
    output = function(scores)
    watched = watch(output)
    loss = (output.cos() * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return watched, output, loss + gradient.square().sum()


@pytest.mark.parametrize("how", ["autograd.grad", "retain_grad", "hook", "node hook"])
def test_gradients_of_the_output_itself_equal_stock(how):
    """They would miss a part if the double backward went past the output without looking."""

    def run(function):
        torch.manual_seed(0)
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        seen = []

        def watch(output):
            if how == "retain_grad":
                output.retain_grad()
            elif how == "hook":
                output.register_hook(seen.append)
            elif how == "node hook":
                output.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))

        _, output, loss = penalised(function, x, watch)
        seen.clear()
        if how == "autograd.grad":
            return torch.autograd.grad(loss, (x, output))
        loss.backward()
        if how == "retain_grad":
            return x.grad, output.grad
        return x.grad, *seen

    for ours, stock in zip(
        run(lambda s: gk.functional.softmax(s, -1)), run(lambda s: F.softmax(s, -1)), strict=True
    ):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


def test_saved_tensor_hooks_and_checkpointing():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def fused(s):
        return gk.functional.softmax(s, -1, bias=bias)

    def gradients(function):
        return torch.autograd.grad(penalised(function, x, lambda output: None)[2], (x, bias))

    expected = gradients(lambda s: F.softmax(s + bias, -1))
    results = [gradients(fused), gradients(lambda s: checkpoint(fused, s, use_reentrant=False))]
    with torch.autograd.graph.save_on_cpu():
        results.append(gradients(fused))
    for result in results:
        torch.testing.assert_close(result, expected)


def test_the_leaf_itself_and_a_view_of_it():
    """The place in the graph that gradients go to: an accumulator, a view's base, one of several outputs."""
    for prepare in (
        lambda x: x,
        lambda x: x.view(5, 4).t(),
        lambda x: x.unbind(0)[1],
        lambda x: x[1:].clone().mul_(2),
    ):

        def gradients(function, prepare=prepare):
            torch.manual_seed(0)
            x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
            scores = prepare(x)
            output = function(scores)
            (gradient,) = torch.autograd.grad(output.square().sum(), scores, create_graph=True)
            (gradient.square().sum() + output.sin().sum()).backward()
            return x.grad

        ours = gradients(lambda s: gk.functional.softmax(s, -1))
        torch.testing.assert_close(ours, gradients(lambda s: F.softmax(s, -1)))


@pytest.mark.parametrize("case", [SMALL[1], SMALL[3]], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(case):
    for dtype, requires_grad in ((torch.float32, True), (torch.bfloat16, False)):
        v, g, inputs = case.draw(dtype)
        # Not a softmax's: the check differentiates a result's sum, which for a softmax's gradient is 0.
        y = torch.randn(case.shape).to(dtype)
        for t in (v, g, y, *inputs):
            t.requires_grad_(requires_grad)
        torch.library.opcheck(OPS.softmax.default, (inputs[0], case.dim))
        torch.library.opcheck(OPS.softmax.default, (inputs[0], case.dim, torch.float64))
        if len(inputs) > 1:
            torch.library.opcheck(OPS.softmax_with_bias.default, tuple(inputs))
            torch.library.opcheck(OPS.softmax_with_bias.default, (*inputs, torch.float64))
        torch.library.opcheck(OPS.softmax_backward.default, (g, y, case.dim, dtype))
        for to_input in (False, True):
            torch.library.opcheck(OPS.softmax_double_backward.default, (v, g, y, case.dim, to_input))


@pytest.mark.parametrize("biased", [False, True])
def test_torch_func(biased):
    x = torch.randn(4, 3, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64)

    def transforms(function):
        def f(x):
            return (function(x) * weights).pow(2).sum()

        yield torch.func.grad(f)(x)
        yield torch.func.grad(
            lambda x: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum())(x).sum()
        )(x)
        yield torch.func.hessian(f)(x)
        yield torch.func.jacrev(torch.func.jacrev(f))(x)
        yield torch.func.vmap(function)(x)
        yield torch.func.vmap(torch.func.hessian(f))(x)
        yield torch.func.jvp(function, (x,), (x.cos(),))[1]
        yield torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1])(x)
        yield torch.autograd.functional.hessian(f, x, vectorize=True)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        basis = torch.eye(12, dtype=torch.float64).view(12, 4, 3)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
        # A transform inside ordinary autograd.
        yield torch.autograd.grad(torch.func.grad(f)(leaf).sin().sum(), leaf)[0]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            yield torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    def fused(x):
        return gk.functional.softmax(x, -1, bias=bias if biased else None)

    def stock(x):
        return F.softmax(x + bias if biased else x, -1)

    expected = list(transforms(stock))
    for ours, wanted in zip(transforms(fused), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    with gk.set_fused_double_backward(True):
        for ours, wanted in zip(transforms(stock), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [None, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)])
def test_gradient_of_the_forward_mode_derivative(bias):
    """Where PyTorch's own softmax raises."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    v, weights = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(x):
        return (gk.functional.softmax(x, -1, bias=bias) * weights).square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        (ours,) = torch.autograd.grad(tangent, x)
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (wanted,) = torch.autograd.grad((grad * v).sum(), x)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


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


def test_tensor_subclasses():
    def second(function, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    x = torch.randn(2, 5, dtype=torch.float64)
    expected = second(lambda x: F.softmax(x, -1), x.clone())
    with gk.set_fused_double_backward(True):
        for function in (gk.functional.softmax, F.softmax):
            ours = second(lambda x, function=function: function(x, -1), AtenOnly(x))
            torch.testing.assert_close(ours.wrapped, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors():
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    nested = torch.nested.nested_tensor(parts)
    for output, part in zip(gk.functional.softmax(nested, -1).unbind(), parts, strict=True):
        torch.testing.assert_close(output, F.softmax(part, -1))


def test_autocast_matches_stock():
    x = torch.randn(4, 8).requires_grad_()
    linear = torch.nn.Linear(8, 8)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            plain, after_linear = function(x), function(linear(x))
            (grad,) = torch.autograd.grad(
                plain.square().sum() + after_linear.float().square().sum(), x, create_graph=True
            )
        return plain, after_linear, grad, torch.autograd.grad(grad.pow(2).sum(), x)[0]

    for ours, stock in zip(
        run(lambda x: gk.functional.softmax(x, -1)), run(lambda x: F.softmax(x, -1)), strict=True
    ):
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    for op in ("softmax", "softmax_with_bias"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gradnorm_kernels::{op}", "AutocastCUDA")


def test_inference_mode_and_devices_without_a_kernel():
    x = torch.randn(5, 3)
    with torch.inference_mode():
        assert torch.equal(
            gk.functional.softmax(x, -1), gk.functional.softmax(x.clone().requires_grad_(), -1)
        )
    for case in CASES:
        v, g, inputs = (
            [t.to("meta") for t in ts] if isinstance(ts, list) else ts.to("meta")
            for ts in case.draw(torch.float32)
        )
        for ours, stock in zip(
            all_orders(case.fused, v, g, inputs), all_orders(case.stock, v, g, inputs), strict=True
        ):
            assert ours.device.type == "meta" and ours.shape == stock.shape and ours.dtype == stock.dtype


def test_half_in_float_out_as_on_cuda():
    """PyTorch's CUDA kernel reads float16 and writes float32; gradients go back to float16."""
    x = torch.empty(3, 5, device="meta", dtype=torch.float16)
    y, g = (torch.empty(3, 5, device="meta") for _ in range(2))
    grad_grad_output, grad = OPS.softmax_double_backward(x, g, y, -1, True)
    assert (grad_grad_output.dtype, grad.dtype) == (torch.float32, torch.float16)
    _, grad = OPS.softmax_double_backward(x, g, y, -1, False)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("bad", ["dtype", "complex", "shape", "other dtype", "device", "sparse"])
def test_bad_input_is_named(bad):
    good = torch.randn(4, 3)
    broken = {
        "dtype": torch.ones(4, 3, dtype=torch.int64),
        "complex": torch.ones(4, 3, dtype=torch.complex64),
        "shape": torch.randn(2),
        "other dtype": torch.randn(4, 3, dtype=torch.float64),
        "device": torch.empty(4, 3, device="meta"),
        "sparse": torch.eye(4, 3).to_sparse(),
    }[bad]
    errors = (TypeError, ValueError, RuntimeError)
    if bad in ("dtype", "complex", "sparse"):
        with pytest.raises(errors, match="softmax: expected input"):
            gk.functional.softmax(broken, -1)
        with pytest.raises(errors, match="softmax_with_bias: expected input"):
            gk.functional.softmax(broken, -1, bias=good)
    if bad != "other dtype":
        with pytest.raises(errors, match="softmax_with_bias: expected bias"):
            gk.functional.softmax(good, -1, bias=broken)
        with pytest.raises(errors, match="softmax_double_backward: expected grad_grad_input"):
            OPS.softmax_double_backward(broken, good, good, -1, True)
    with pytest.raises(errors, match="softmax_backward: expected grad_output"):
        OPS.softmax_backward(broken, good, -1, torch.float32)
    with pytest.raises(errors, match="softmax_double_backward: expected grad_output"):
        OPS.softmax_double_backward(good, broken, good, -1, True)
    with pytest.raises(ValueError, match=r"bias to broadcast to input's shape \(\[4, 3\]\), got \[2, 4, 3\]"):
        gk.functional.softmax(good, -1, bias=torch.randn(2, 4, 3))
    for call in (
        lambda: gk.functional.softmax(good, 2),
        lambda: gk.functional.softmax(good, -3),
        lambda: OPS.softmax_backward(good, good, 2, good.dtype),
        lambda: OPS.softmax_double_backward(good, good, good, -3, True),
        lambda: OPS.softmax_double_backward(*[good.to("meta")] * 3, -3, True),
    ):
        with pytest.raises(IndexError, match="Dimension out of range"):
            call()


def test_arguments_of_stock():
    x = torch.randn(2, 3, 4)
    assert torch.equal(gk.functional.softmax(x, 1, 3, torch.float64), F.softmax(x, 1, 3, torch.float64))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        assert torch.equal(gk.functional.softmax(x), F.softmax(x, 0))
    whole = torch.arange(6).view(2, 3)
    torch.testing.assert_close(
        gk.functional.softmax(whole, -1, dtype=torch.float32), F.softmax(whole, -1, dtype=torch.float32)
    )
    scalar = torch.tensor(2.0)
    assert (
        gk.functional.softmax(scalar, 0, bias=scalar) == gk.functional.softmax(scalar, -1, bias=scalar) == 1
    )


def test_schemas():
    assert [str(getattr(OPS, op).default._schema) for op in KERNELS] == [
        "gradnorm_kernels::softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor",
        "gradnorm_kernels::softmax_with_bias(Tensor input, Tensor bias, ScalarType? dtype=None) -> Tensor",
        "gradnorm_kernels::softmax_backward(Tensor grad_output, Tensor output, int dim, "
        "ScalarType input_dtype) -> Tensor",
        "gradnorm_kernels::softmax_double_backward(Tensor grad_grad_input, Tensor grad_output, "
        "Tensor output, int dim, bool to_input) -> (Tensor grad_grad_output, Tensor grad)",
    ]


@pytest.mark.parametrize("by", ["functional", "switch", "ops"])
def test_compiled_step(by):
    torch._dynamo.reset()
    bias = torch.randn(3, requires_grad=True)
    x = torch.randn(4, 3)

    def softmax(x, bias):
        if by == "functional":
            return gk.functional.softmax(x, -1, bias=bias)
        if by == "ops":
            return OPS.softmax_with_bias(x, bias)
        return F.softmax(x + bias, -1)

    def step(x, bias):
        def loss(x, bias):
            return softmax(x, bias).square().sum()

        def penalty(bias):
            return loss(x, bias) + torch.func.grad(loss)(x, bias).abs().sum()

        return torch.func.grad(penalty)(bias)

    expected = step(x, bias)
    with gk.set_fused_double_backward(by == "switch"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, bias), expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    # Just past 2^31, so that a 32-bit index of the last elements would wrap around.
    x = torch.zeros(2**26 + 1, 32, dtype=torch.bfloat16)
    x[-1, 0] = 5
    output = gk.functional.softmax(x, -1)
    torch.testing.assert_close(output[-1], F.softmax(x[-1], -1))
    assert (output[:-1] == 1 / 32).all()
