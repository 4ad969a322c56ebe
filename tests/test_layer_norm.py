"""Layer normalisation on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import itertools
import math
from dataclasses import dataclass, replace

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
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An input's shape, and how it is normalised; every test below that can runs on every row."""

    name: str
    shape: tuple
    # Of the last dimensions; None for the channels of NCHW.
    ndim: int | None = 1
    weight: bool = True
    bias: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def normalized_shape(self):
        return self.shape[1:2] if self.ndim is None else self.shape[-self.ndim :]

    def permuted(self, function, x, *args):
        """Where function is for the last dimensions."""
        if self.ndim is not None:
            return function(x, self.normalized_shape, *args)
        return function(x.permute(0, 2, 3, 1), self.normalized_shape, *args).permute(0, 3, 1, 2)

    def fused(self, x, weight=None, bias=None):
        if self.ndim is None:
            return gk.functional.layer_norm_2d(x, weight, bias, EPS)
        return gk.functional.layer_norm(x, self.normalized_shape, weight, bias, EPS)

    def stock(self, x, weight=None, bias=None):
        return self.permuted(F.layer_norm, x, weight, bias, EPS)

    def reference(self, x, weight=None, bias=None):
        return self.permuted(gk.reference.layer_norm, x, weight, bias, EPS)

    def draw(self, dtype=torch.float32, parameters=None):
        """v, g, x; then weight and bias; then u and t."""
        v, g, x = torch.randn(3, *self.shape, dtype=torch.float64).to(dtype)
        w, b, u, t = torch.randn(4, *self.normalized_shape, dtype=torch.float64).to(parameters or dtype)
        return (v, g, x), [w if self.weight else None, b if self.bias else None], (u, t)

    def statistics(self, x):
        dims = (1,) if self.ndim is None else tuple(range(-self.ndim, 0))
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        return mean, (variance + EPS).rsqrt()


CASES = [
    Case("odd row", (6, 7)),  # less than a vector
    Case("one column", (40, 1)),
    Case("two dimensions", (2, 3, 5, 8), ndim=2),
    Case("chunks", (150, 96)),  # three chunks of rows, and whole vectors
    Case("long row", (2, 8195)),  # several blocks of a row, and a remainder
    Case("no bias", (5, 33), bias=False),
    Case("no weight", (5, 33), weight=False),
    Case("no parameters", (5, 33), weight=False, bias=False),
    Case("channels", (2, 12, 3, 3), ndim=None),
    Case("channels, tiles", (3, 70, 11, 13), ndim=None),  # 143 positions: a tile of 128 and a rest
    Case("channels, chunks", (20, 6, 8, 8), ndim=None),  # more than 16 tiles
    Case("one channel", (2, 1, 3, 5), ndim=None),
    Case("channels, no bias", (2, 9, 4, 4), ndim=None, bias=False),
    Case("channels, no parameters", (2, 9, 4, 4), ndim=None, weight=False, bias=False),
]
NAMED = {case.name: case for case in CASES}
SMALL = [
    NAMED[name]
    for name in ("odd row", "two dimensions", "no parameters", "channels", "one channel", "channels, no bias")
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def names(case):
    first = ["grad_input", *["grad_weight"] * case.weight, *["grad_bias"] * case.bias]
    return ["output", *first, "grad_grad_output", "second grad_input", *["second grad_weight"] * case.weight]


def all_orders(function, tensors, parameters, u=None, t=None, v_defined=True):
    """Output, first gradients, then the double backward's results, by autograd."""
    v, g, x = tensors
    g, x = g.detach().requires_grad_(), x.detach().requires_grad_()
    w, b = (p if p is None else p.detach().requires_grad_() for p in parameters)
    output = function(x, w, b)
    operands = [p for p in (x, w, b) if p is not None]
    first = torch.autograd.grad(output, operands, g, create_graph=True)
    incoming = [v if v_defined else None, *([u] if w is not None else []), *([t] if b is not None else [])]
    pairs = [(a, i) for a, i in zip(first, incoming, strict=True) if i is not None]
    wanted = [g, x] if w is None else [g, x, w]
    grads, incoming = zip(*pairs, strict=True)
    # retain_graph, so that a graph that wrote into what it saved would be found out by the second run.
    for _ in range(2):
        second = torch.autograd.grad(grads, wanted, incoming, allow_unused=True, retain_graph=True)
    second = [torch.zeros_like(p) if s is None else s for s, p in zip(second, wanted, strict=True)]
    return [output.detach(), *(f.detach() for f in first), *second]


def in_double(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_no_worse_than_stock(case, dtype, ours, stock, exact):
    for name, a, s, e in zip(names(case), ours, stock, exact, strict=True):
        assert a.dtype == s.dtype
        assert a.shape == s.shape
        error = (a.double() - e).abs().max().item()
        stock_error = (s.double() - e).abs().max().item()
        # Sums are rounded in another order than stock's, and those over the rows are as many times longer;
        # in float64 the reference rounds as well. With one column, rstd is over 300 and multiplies what is
        # exactly 0 for stock.
        scale = 1000 if case.normalized_shape == (1,) else 30 if "weight" in name or "bias" in name else 10
        floor = scale * torch.finfo(dtype).eps * (1 if dtype != torch.float64 else e.abs().max().item() + 1)
        if dtype in (torch.float16, torch.bfloat16):
            floor = 0 if scale < 1000 else floor
        if math.isnan(stock_error):  # of one column in float16
            stock_error = 0
        assert error <= 2 * stock_error + floor, f"{name}: {error:.3e}, stock {stock_error:.3e}"


@each_case
@each_dtype
@pytest.mark.parametrize("incoming", ["v", "vu", "vt", "vut", "u", "ut"])
def test_error_is_at_most_twice_stocks(case, dtype, incoming):
    if "v" not in incoming and not (case.weight and case.bias):
        pytest.skip("no gradient would come in")
    tensors, parameters, (u, t) = case.draw(dtype)
    given = {"u": u if "u" in incoming else None, "t": t if "t" in incoming else None}
    in_64 = {name: None if p is None else p.double() for name, p in given.items()}
    v_defined = "v" in incoming
    exact = all_orders(
        case.reference, in_double(tensors), in_double(parameters), **in_64, v_defined=v_defined
    )
    # Stock raises where grad_grad_bias comes in and there is no weight.
    raises = "t" in incoming and case.bias and not case.weight
    by = case.reference if raises else case.stock
    stock = all_orders(by, tensors, parameters, **given, v_defined=v_defined)
    ours = all_orders(case.fused, tensors, parameters, **given, v_defined=v_defined)
    assert_no_worse_than_stock(case, dtype, ours, stock, exact)
    with gk.set_fused_double_backward(True):
        switched = all_orders(case.stock, tensors, parameters, **given, v_defined=v_defined)
    assert_no_worse_than_stock(case, dtype, switched, stock, exact)
    # Forward and first backward are PyTorch's own.
    for a, s in list(zip(switched, stock, strict=True))[: 2 + case.weight + case.bias]:
        assert raises or torch.equal(a, s)


@pytest.mark.parametrize("name", ["chunks", "no bias", "channels", "channels, no bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float_parameters(name, dtype):
    case = NAMED[name]
    tensors, parameters, (u, t) = case.draw(dtype, parameters=torch.float32)
    exact = all_orders(case.reference, in_double(tensors), in_double(parameters), u.double(), t.double())
    stock = all_orders(case.stock, tensors, parameters, u, t)
    assert_no_worse_than_stock(case, dtype, all_orders(case.fused, tensors, parameters, u, t), stock, exact)
    with gk.set_fused_double_backward(True):
        for a, s in zip(all_orders(case.stock, tensors, parameters, u, t), stock, strict=True):
            assert torch.equal(a, s)


@each_small_case
def test_reference_formulas_are_the_derivatives(case):
    """The formulas in reference.py against autograd through its forward."""
    if case.ndim is None:
        pytest.skip("the reference is over the last dimensions")
    shape = case.normalized_shape
    (v, g, x), (w, b), (u, t) = case.draw(torch.float64)
    w, b = (p if p is not None else torch.full(shape, k, dtype=x.dtype) for p, k in ((w, 1.0), (b, 0.0)))
    function = replace(case, weight=True, bias=True).reference
    _, *expected = all_orders(function, (v, g, x), (w, b), u, t)
    first = gk.reference.layer_norm_backward(g, x, shape, w, EPS)
    second = gk.reference.layer_norm_double_backward(v, u, t, g, x, shape, w, EPS)
    for formula, wanted in zip((*first, *second), expected, strict=True):
        torch.testing.assert_close(formula, wanted, rtol=1e-10, atol=1e-12)


def double_backward(case, tensors, weight, u=None, t=None, mask=(True, True, True)):
    v, g, x = tensors
    mask = (*mask[:2], mask[2] and weight is not None)
    return OPS.layer_norm_double_backward(v, u, t, g, x, *case.statistics(x), weight, mask)


@each_case
def test_only_what_the_mask_asks_for(case):
    tensors, (w, _), (u, t) = case.draw()
    for others in ((None, None), (u, t), (u, None), (None, t)):
        full = double_backward(case, tensors, w, *others)
        for mask in itertools.product([True, False], repeat=3):
            for result, wanted, asked in zip(
                double_backward(case, tensors, w, *others, mask), full, mask, strict=True
            ):
                assert (result is None) == (wanted is None or not asked)
                assert result is None or torch.equal(result, wanted)
    if case.ndim is not None:
        return
    _, g, x = tensors
    full = OPS.layer_norm_2d_backward(g, x, *case.statistics(x), w, [True] * 3)
    for mask in itertools.product([True, False], repeat=3):
        results = OPS.layer_norm_2d_backward(g, x, *case.statistics(x), w, mask)
        for result, wanted, asked in zip(results, full, mask, strict=True):
            assert result is None if not asked else torch.equal(result, wanted)


@each_case
def test_same_bits_on_any_number_of_threads(case):
    tensors, parameters, (u, t) = replace(case, shape=(40 * case.shape[0], *case.shape[1:])).draw()
    case = replace(case, shape=tuple(tensors[0].shape))
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(double_backward(case, tensors, parameters[0], u, t))
            if case.ndim is None:
                x = tensors[2]
                runs[-1] += OPS.layer_norm_2d_backward(tensors[1], x, *case.statistics(x), None, [True] * 3)
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for result, wanted in zip(run, runs[0], strict=True):
            assert result is None or torch.equal(result, wanted)


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_row(case, bad):
    tensors, parameters, (u, t) = case.draw()
    rows = case.statistics(tensors[2])[0]
    for which in range(3):
        broken = [tensor.clone() for tensor in tensors]
        broken[which].view(-1)[0] = bad
        hit = torch.zeros_like(rows, dtype=torch.bool)
        hit.view(-1)[0] = True
        hit = hit.expand(case.shape)
        clean = double_backward(case, tensors, parameters[0], u, t)
        results = double_backward(case, broken, parameters[0], u, t)
        for result, wanted in list(zip(results, clean, strict=True))[:2]:
            assert torch.equal(result[~hit], wanted[~hit])
        assert not results[1][hit].isfinite().all()
        if parameters[0] is not None:
            assert not results[2].isfinite().all()
    x = tensors[2].clone()
    x.view(-1)[0] = bad
    output, stock = case.fused(x, *parameters), case.stock(x, *parameters)
    torch.testing.assert_close(output, stock, equal_nan=True)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every other row": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "offset by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
}


@each_case
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(case, dtype, layout):
    tensors, parameters, (u, t) = case.draw(dtype)
    strided = [LAYOUTS[layout](tensor) for tensor in tensors]
    parameters = [p if p is None else torch.stack([p, p], -1)[..., 0] for p in parameters]
    dense = [tensor.contiguous() for tensor in strided]
    for a, b in zip(
        all_orders(case.fused, strided, parameters, u, t),
        all_orders(case.fused, dense, [p if p is None else p.contiguous() for p in parameters], u, t),
        strict=True,
    ):
        assert torch.equal(a, b)
    before = [tensor.clone() for tensor in strided]
    assert case.fused(strided[2], *parameters).is_contiguous()
    assert all(map(torch.equal, strided, before))


@each_dtype
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 8, 1, 1), (2, 1, 5, 3)], ids=str)
def test_channels_last_is_kept_and_gives_stocks_bits(dtype, shape):
    case = Case("", shape, ndim=None)
    tensors, parameters, (u, t) = case.draw(dtype)
    tensors = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    ours = all_orders(case.fused, tensors, parameters, u, t)
    with gk.set_fused_double_backward(True):
        stock = all_orders(case.stock, tensors, parameters, u, t)
    contiguous = all_orders(case.fused, [tensor.contiguous() for tensor in tensors], parameters, u, t)
    for name, a, s, c in zip(names(case), ours, stock, contiguous, strict=True):
        if shape[1] > 1:
            assert torch.equal(a, s), name
        assert a.dim() != 4 or a.is_contiguous(memory_format=torch.channels_last), name
        assert c.is_contiguous(), name


def test_as_many_channels_as_there_are():
    case = Case("", (1, 4100, 2, 3), ndim=None)
    tensors, parameters, _ = case.draw(torch.float64)
    for a, s in zip(
        all_orders(case.fused, tensors, parameters), all_orders(case.stock, tensors, parameters), strict=True
    ):
        torch.testing.assert_close(a, s)


@pytest.mark.parametrize(
    "case",
    [
        Case("", (0, 4)),
        Case("", (3, 0, 5), ndim=2),
        Case("", (0, 3, 4, 4), ndim=None),
        Case("", (2, 3, 0, 4), ndim=None),
        Case("", (2, 0, 3, 4), ndim=None),
    ],
    ids=lambda case: str(case.shape),
)
def test_empty_tensors(case):
    tensors, parameters, (u, t) = case.draw()
    ours = all_orders(case.fused, tensors, parameters, u, t)
    stock = all_orders(case.stock, tensors, parameters, None, None)
    for a, s in zip(ours, stock, strict=True):
        assert a.shape == s.shape and torch.equal(a, torch.zeros_like(a))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES[:3]))
def test_fuzzed_shapes(data, dtype):
    ndim = data.draw(st.sampled_from([None, 1, 2]))
    if ndim is None:
        shape = tuple(data.draw(st.integers(1, high)) for high in (3, 80, 12, 12))
    else:
        shape = (data.draw(st.integers(1, 200)), *(data.draw(st.integers(2, 40)) for _ in range(ndim)))
    case = Case("", shape, ndim, data.draw(st.booleans()), data.draw(st.booleans()))
    tensors, parameters, (u, t) = case.draw(dtype)
    u, t = (p if data.draw(st.booleans()) else None for p in (u, t))
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 0.3}[dtype]
    in_64 = [in_double(tensors), in_double(parameters), *in_double((u, t))]
    exact = all_orders(case.reference, *in_64)
    for name, a, e in zip(names(case), all_orders(case.fused, tensors, parameters, u, t), exact, strict=True):
        # A channel or two of nearly equal values make rstd, and every error, large.
        scale = 1 + e.abs().max().item()
        if case.normalized_shape[0] > 3:
            assert (a.double() - e).abs().max().item() <= tolerance * scale, name
        assert a.isfinite().all()


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for dtype in t.DTYPES:
    for name in ('chunks', 'odd row', 'channels, tiles'):
        t.test_error_is_at_most_twice_stocks(t.NAMED[name], dtype, 'v')
        t.test_error_is_at_most_twice_stocks(t.NAMED[name], dtype, 'vut')
"""
    run_under(capability, __name__, checks)


TINY = [
    Case("rows", (2, 3)),
    Case("bare rows", (2, 2, 2), ndim=2, weight=False, bias=False),
    Case("channels", (1, 3, 1, 2), ndim=None),
]
each_tiny_case = pytest.mark.parametrize("case", TINY, ids=str)


def leaves(case, dtype=torch.float64):
    """x, and the parameters that there are."""
    (_, _, x), parameters, _ = case.draw(dtype)
    return [p.requires_grad_() for p in (x, *parameters) if p is not None]


@each_tiny_case
def test_gradcheck_up_to_third_order(case):
    operands = leaves(case)
    assert torch.autograd.gradcheck(case.fused, operands)
    assert torch.autograd.gradgradcheck(case.fused, operands)

    def gradient(*operands):
        output = case.fused(*operands)
        return torch.autograd.grad(output.square().sum(), operands, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, operands)
    with gk.set_fused_double_backward(True):
        assert torch.autograd.gradgradcheck(case.stock, operands)


@each_tiny_case
def test_gradcheck_of_the_ops(case):
    (v, g, x), (w, _), (u, t) = case.draw(torch.float64)
    operands = [p.requires_grad_() for p in (v, g, x)]
    if w is not None:
        operands += [p.requires_grad_() for p in (w, u, t)]

    def function(v, g, x, w=None, u=None, t=None):
        mask = [True, True, w is not None]
        # The statistics of this x, which the op takes for functions of it.
        mean, rstd = (s.detach() for s in case.statistics(x))
        results = OPS.layer_norm_double_backward(v, u, t, g, x, mean, rstd, w, mask)
        return tuple(r for r in results if r is not None)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)
    if case.ndim is None:

        def backward(g, x, w):
            return OPS.layer_norm_2d_backward(g, x, *(s.detach() for s in case.statistics(x)), w, [True] * 3)

        assert torch.autograd.gradcheck(backward, (g, x, w))
        assert torch.autograd.gradgradcheck(backward, (g, x, w))


def derivatives(function, operands, order):
    result = function(*operands).sin()
    for _ in range(order):
        grads = torch.autograd.grad(result.sum(), operands, create_graph=True, allow_unused=True)
        result = sum(g.sin().sum() for g in grads if g is not None)
    return grads


@each_small_case
def test_third_and_fourth_order_equal_the_references(case):
    """Where stock is wrong: its third order takes the saved statistics for constants."""
    operands = leaves(case)
    for order in (3, 4):
        expected = derivatives(case.reference, operands, order)
        ours = derivatives(case.fused, operands, order)
        with gk.set_fused_double_backward(True):
            switched = derivatives(case.stock, operands, order)
        for results in (ours, switched):
            for a, e in zip(results, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


class Calls(TorchDispatchMode):
    """The kernels called, and the elements of the tensors that they read and write; views are none."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.elements += sum(t.numel() for t in tensors)
        return result


@each_case
@pytest.mark.parametrize("switch", [False, True], ids=["fused", "switch"])
def test_each_pass_is_one_kernel_of_the_least_traffic(case, switch):
    if switch and case.ndim is None:
        pytest.skip("stock copies NCHW")
    # Statistics and parameters are small beside it.
    case = replace(
        case, shape=(*case.shape[:1], 128, 64, 64) if case.ndim is None else (*case.shape[:-1], 4096)
    )
    (v, g, x), parameters, _ = case.draw()
    v, g, x = (tensor.to("meta").requires_grad_() for tensor in (v, g, x))
    parameters = [p if p is None else p.to("meta").requires_grad_() for p in parameters]
    passes = [Calls() for _ in range(4)]
    with gk.set_fused_double_backward(switch):
        with passes[0]:
            output = (case.stock if switch else case.fused)(x, *parameters)
        with passes[1]:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    wanted = [p for p in (g, x, parameters[0]) if p is not None]
    with passes[2]:
        torch.autograd.grad(grad_input, wanted, v.detach(), retain_graph=True)
    with passes[3]:
        torch.autograd.grad(grad_input, g, v.detach())
    kinds = [
        "gradnorm_kernels::layer_norm_2d" if case.ndim is None else "aten::native_layer_norm",
        "gradnorm_kernels::layer_norm_2d_backward"
        if case.ndim is None
        else "aten::native_layer_norm_backward",
        "gradnorm_kernels::layer_norm_double_backward",
        "gradnorm_kernels::layer_norm_double_backward",
    ]
    for calls, kind, least in zip(passes, kinds, (2, 3, 5, 4), strict=True):
        assert calls.names == [kind]
        rows = x.numel() // math.prod(case.normalized_shape)
        small = 4 * rows + 4 * math.prod(case.normalized_shape)
        assert least * x.numel() <= calls.elements <= least * x.numel() + small


@each_small_case
def test_undefined_gradients_stay_undefined(case):
    undefined = torch._C._functions.UndefinedGrad()
    (_, g, x), parameters, _ = case.draw()
    g.requires_grad_(), x.requires_grad_()
    undefined(case.fused(x, *parameters)).sum().backward()
    (grad_input,) = torch.autograd.grad(case.fused(x, *parameters), x, g, create_graph=True)
    undefined(grad_input).sum().backward()
    assert x.grad is None and g.grad is None


def test_statistics_have_no_gradient():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    output, mean, rstd = OPS.layer_norm_2d(x)
    assert output.requires_grad and not mean.requires_grad and not rstd.requires_grad


@each_case
def test_strided_input_is_copied_once(case):
    """And saved as it is then: PyTorch's own op would copy it again in each pass."""
    (v, g, x), parameters, _ = case.draw()
    x = LAYOUTS["sliced"](x).requires_grad_()
    with Calls() as calls:
        output = case.fused(x, *parameters)
        (grad_input,) = torch.autograd.grad(output, x, g.requires_grad_(), create_graph=True)
        torch.autograd.grad(grad_input, (g, x), v)
    assert calls.names.count("aten::clone") == (x.shape[0] * x.shape[-1] > 1)


def opcheck_samples(case):
    yield case.draw(torch.bfloat16)
    tensors, parameters, others = case.draw()
    tensors = [LAYOUTS["transposed"](t).requires_grad_() for t in tensors]
    yield tensors, [p if p is None else p.requires_grad_() for p in parameters], others


@pytest.mark.parametrize("case", [NAMED["no bias"], NAMED["channels"]], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(case):
    for (v, g, x), (w, b), (u, t) in opcheck_samples(case):
        mean, rstd = (s.detach() for s in case.statistics(x))
        mask = [True, True, w is not None]
        if case.ndim is None:
            torch.library.opcheck(OPS.layer_norm_2d.default, (x, w, b, EPS))
            torch.library.opcheck(OPS.layer_norm_2d_backward.default, (g, x, mean, rstd, w, [True] * 3))
        else:
            torch.library.opcheck(OPS.layer_norm.default, (x, case.normalized_shape, w, b, EPS))
        for others in ((None, None), (u, t)):
            torch.library.opcheck(
                OPS.layer_norm_double_backward.default, (v, *others, g, x, mean, rstd, w, mask)
            )


@each_small_case
def test_torch_func(case):
    operands = [p.detach() for p in leaves(case)]
    x, *parameters = operands

    def transforms(function):
        def f(x):
            return function(x, *parameters).sin().sum()

        tangent = x.cos()
        yield torch.func.grad(f)(x)
        yield torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum())(x)
        yield torch.func.grad(
            lambda x: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum())(x).sin().sum()
        )(x)
        yield torch.func.hessian(f)(x)
        yield torch.func.jacrev(torch.func.jacrev(f))(x)
        yield torch.func.vmap(lambda x: function(x, *parameters))(torch.stack([x, x.cos()]))
        yield torch.func.vmap(torch.func.grad(f))(torch.stack([x, x.cos()]))
        yield torch.func.jvp(f, (x,), (tangent,))[1]
        yield torch.func.grad(lambda x: torch.func.jvp(f, (x,), (tangent,))[1])(x)
        for k in range(len(parameters)):
            argnum = k + 1
            yield torch.func.hessian(lambda *a: function(*a).sin().sum(), argnums=argnum)(*operands)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
        output = function(leaf, *parameters)
        yield torch.autograd.grad(output, leaf, basis, is_grads_batched=True)[0]
        # A transform inside ordinary autograd.
        (yield torch.autograd.grad(torch.func.grad(f)(leaf).sin().sum(), leaf)[0])

    for ours, wanted in zip(transforms(case.fused), transforms(case.reference), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors(switch):
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    w, b = torch.randn(2, 3)
    with gk.set_fused_double_backward(switch):
        nested = torch.nested.nested_tensor(parts, requires_grad=True)
        output = gk.functional.layer_norm(nested, (3,), w, b)
        for part, result in zip(parts, output.unbind(), strict=True):
            torch.testing.assert_close(result, F.layer_norm(part, (3,), w, b))
        output.to_padded_tensor(0.0).sin().sum().backward()
        assert nested.grad.is_nested


class AtenOnly(torch.Tensor):
    """A tensor subclass that knows ATen's ops alone, as DTensor does."""

    @staticmethod
    def __new__(cls, wrapped):
        return torch.Tensor._make_wrapper_subclass(
            cls, wrapped.shape, strides=wrapped.stride(), dtype=wrapped.dtype
        )

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return NotImplemented
        result = func(*tree_map_only(cls, lambda t: t.wrapped, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, cls, result)


@each_small_case
def test_tensor_subclasses(case):
    def second(function, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    (_, _, x), _, _ = case.draw(torch.float64)
    expected = second(case.reference, x.clone())
    with gk.set_fused_double_backward(True):
        for function in (case.fused, case.stock):
            torch.testing.assert_close(second(function, AtenOnly(x)).wrapped, expected)


@each_small_case
def test_forward_mode(case):
    """Also of the backward, where stock is wrong."""
    (_, g, x), parameters, _ = case.draw(torch.float64)

    def dual_derivative(function):
        leaf = x.clone().requires_grad_()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf, x.cos())
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual, *parameters)).tangent
            return tangent, torch.autograd.grad(tangent, leaf, g)[0]

    for ours, wanted in zip(dual_derivative(case.fused), dual_derivative(case.reference), strict=True):
        torch.testing.assert_close(ours, wanted)


@each_small_case
def test_autocast_matches_stock(case):
    x, *parameters = leaves(case, torch.float32)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function(x, *parameters), function(x.bfloat16() * 1, *parameters)
            loss = sum(output.float().sin().sum() for output in outputs)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return *outputs, grad, *torch.autograd.grad(grad.pow(2).sum(), (x, *parameters), allow_unused=True)

    for ours, stock in zip(run(case.fused), run(case.stock), strict=True):
        if stock is not None:
            assert ours.dtype == stock.dtype
            torch.testing.assert_close(ours, stock, rtol=5e-2, atol=1e-1)


@each_small_case
def test_inference_mode_and_devices_without_a_kernel(case):
    (v, g, x), (w, b), (u, t) = case.draw()
    with torch.inference_mode():
        assert torch.equal(case.fused(x, w, b), case.fused(x.clone().requires_grad_(), w, b))
    on_meta = [[None if p is None else p.to("meta") for p in group] for group in ((v, g, x), (w, b), (u, t))]
    expected = all_orders(case.fused, (v, g, x), (w, b), u, t)
    for result, wanted in zip(all_orders(case.fused, *on_meta[:2], *on_meta[2]), expected, strict=True):
        assert result.device.type == "meta"
        assert (result.shape, result.stride(), result.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


@pytest.mark.parametrize("ndim", [1, None], ids=["rows", "channels"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_step_gives_eagers_gradients(ndim):
    case = Case("", (4, 6, 3, 5), ndim)
    x, weight, bias = leaves(case, torch.float32)

    def step(x, weight, bias):
        def loss(x, weight, bias):
            return case.fused(x, weight, bias).sin().sum()

        def penalised(x, weight, bias):
            return torch.func.grad(loss)(x, weight, bias).abs().sum() + loss(x, weight, bias)

        return torch.func.grad(penalised, argnums=(0, 1, 2))(x, weight, bias)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = [p.detach() for p in (x, weight, bias)]
    for ours, wanted in zip(compiled(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(ours, wanted)

    def ops(v, g, x, w):
        results = OPS.layer_norm_double_backward(v, None, None, g, x, *case.statistics(x), w, [True] * 3)
        if case.ndim is None:
            return (
                *results,
                *OPS.layer_norm_2d(x, w),
                *OPS.layer_norm_2d_backward(g, x, *case.statistics(x), w, [True] * 3),
            )
        return *results, OPS.layer_norm(x, case.normalized_shape, w)

    (v, g, x), (w, _), _ = case.draw()
    compiled = torch.compile(ops, backend="aot_eager", fullgraph=True, dynamic=True)
    for ours, wanted in zip(compiled(v, g, x, w), ops(v, g, x, w), strict=True):
        torch.testing.assert_close(ours, wanted)
    torch._dynamo.reset()


ROWS, CHANNELS = Case("", (4, 3)), Case("", (2, 3, 4, 5), ndim=None)
ERRORS = (TypeError, ValueError, RuntimeError)


@pytest.mark.parametrize("case", [ROWS, CHANNELS], ids=["rows", "channels"])
@pytest.mark.parametrize("bad", ["dtype", "complex", "sparse", "shape", "other dtype", "device"])
def test_bad_input_is_named(case, bad):
    (v, g, x), (w, b), _ = case.draw()
    mean, rstd = case.statistics(x)

    def broken(good):
        return {
            "dtype": lambda: good.long(),
            "complex": lambda: good.to(torch.complex64),
            "shape": lambda: good.new_ones(*good.shape, 7),
            "other dtype": lambda: good.double(),
            "device": lambda: good.to("meta"),
            "sparse": lambda: good.to_sparse(),
        }[bad]()

    name = "layer_norm_2d" if case.ndim is None else "layer_norm"
    for requires_grad in (False, True):
        x = x.detach().requires_grad_(requires_grad)
        if bad in ("dtype", "complex", "sparse", "shape"):
            with pytest.raises(ERRORS, match=rf"{name}: expected .*input"):
                case.fused(broken(x.detach()), w, b)
        if bad != "other dtype":
            with pytest.raises(ERRORS, match=f"{name}: expected weight"):
                case.fused(x, broken(w), b)
            with pytest.raises(ERRORS, match=f"{name}: expected bias"):
                case.fused(x, w, broken(b))
        op = OPS.layer_norm_double_backward
        mask = [True] * 3
        with pytest.raises(ERRORS, match="layer_norm_double_backward: expected grad_grad_input"):
            op(broken(v), None, None, g, x, mean, rstd, w, mask)
        with pytest.raises(ERRORS, match="layer_norm_double_backward: expected grad_output"):
            op(v, None, None, broken(g), x, mean, rstd, w, mask)
        if bad != "other dtype":
            with pytest.raises(ERRORS, match="layer_norm_double_backward: expected mean"):
                op(v, None, None, g, x, broken(mean), rstd, w, mask)
            with pytest.raises(ERRORS, match="layer_norm_double_backward: expected rstd"):
                op(v, None, None, g, x, mean, broken(rstd), w, mask)
            with pytest.raises(ERRORS, match="layer_norm_double_backward: expected weight"):
                op(v, None, None, g, x, mean, rstd, broken(w), mask)
            with pytest.raises(ERRORS, match="layer_norm_double_backward: expected grad_grad_weight"):
                op(v, broken(w), None, g, x, mean, rstd, w, mask)
        if case.ndim is None:
            with pytest.raises(ERRORS, match="layer_norm_2d_backward: expected grad_output"):
                OPS.layer_norm_2d_backward(broken(g), x, mean, rstd, w, mask)


def test_bad_arguments_are_named():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="expected normalized_shape"):
        gk.functional.layer_norm(x, ())
    with pytest.raises(ValueError, match=r"input to end in normalized_shape \(\[3\]\)"):
        gk.functional.layer_norm(x, (3,))
    with pytest.raises(ValueError, match=r"input to be of shape \(N, C, H, W\)"):
        gk.functional.layer_norm_2d(x)
    mean = torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match="expected weight, whose gradient"):
        OPS.layer_norm_double_backward(x, None, None, x, x, mean, mean, None, [True] * 3)
    apart = torch.randn(1, 3, 1)
    with pytest.raises(ValueError, match=r"expected mean .* adjacent"):
        OPS.layer_norm_double_backward(x, None, None, x, x, apart, apart, None, [True, True, False])


def test_schemas():
    assert [
        str(getattr(OPS, name).default._schema)
        for name in ("layer_norm", "layer_norm_2d", "layer_norm_2d_backward", "layer_norm_double_backward")
    ] == [
        "gradnorm_kernels::layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, "
        "Tensor? bias=None, float eps=1.0000000000000001e-05) -> Tensor",
        "gradnorm_kernels::layer_norm_2d(Tensor input, Tensor? weight=None, Tensor? bias=None, "
        "float eps=9.9999999999999995e-07) -> (Tensor output, Tensor mean, Tensor rstd)",
        "gradnorm_kernels::layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor mean, "
        "Tensor rstd, Tensor? weight, bool[3] output_mask) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        "gradnorm_kernels::layer_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, "
        "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
        "bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**25 + 1, 64), (2**16 + 1, 64, 16, 32)], ids=["rows", "channels"])
def test_more_than_2_to_the_31_elements(shape):
    """An address that wrapped around would leave the last rows unwritten."""
    case = Case("", shape, ndim=1 if len(shape) == 2 else None)
    x = torch.zeros(shape, dtype=torch.bfloat16)
    x[-1].normal_()
    x[0].normal_()
    dims = 1 if case.ndim is None else -1
    mean = torch.zeros([1 if d == dims % x.dim() else s for d, s in enumerate(shape)], dtype=torch.bfloat16)
    rstd = torch.ones_like(mean)
    (result, _, _) = OPS.layer_norm_double_backward(
        x, None, None, x, x, mean, rstd, None, [True, False, False]
    )
    for part in (slice(0, 1), slice(-1, None)):
        parts = [t[part].clone() for t in (x, mean, rstd)]
        wanted = OPS.layer_norm_double_backward(
            parts[0], None, None, parts[0], *parts, None, [True, False, False]
        )[0]
        assert torch.equal(result[part], wanted)
    assert result[1:-1].count_nonzero() == 0
