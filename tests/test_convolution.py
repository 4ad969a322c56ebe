"""Convolutions on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import itertools
from dataclasses import dataclass

import formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_instruction_set, run_under
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the gradients that autograd computes, in the order of `all_orders`.
RESULTS = ["output", "grad_input", "grad_weight", "grad_bias"]
RESULTS += ["grad_grad_output", "second grad_input", "second grad_weight"]


@dataclass(frozen=True)
class Convolution:
    """One row for each kind of convolution; every test below runs on every row."""

    name: str
    input: tuple
    weight: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int = 1
    output_padding: tuple | None = None  # transposed if there is one
    channels_last: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def transposed(self):
        return self.output_padding is not None

    @property
    def settings(self):
        """What the ops take after their tensors."""
        extra = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, extra, self.groups

    def _call(self, namespace, input, weight, bias):
        name = f"conv{'_transpose' * self.transposed}{len(self.stride)}d"
        options = {"output_padding": self.output_padding} if self.transposed else {}
        return getattr(namespace, name)(
            input,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            **options,
        )

    def fused(self, input, weight, bias):
        return self._call(gk.functional, input, weight, bias)

    def stock(self, input, weight, bias):
        return self._call(F, input, weight, bias)

    def op(self, suffix=""):
        return getattr(OPS, f"convolution{suffix}").default

    def operands(self, dtype=torch.float64):
        """Input, weight, bias."""
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        outputs = self.weight[1] * self.groups if self.transposed else self.weight[0]
        shapes = self.input, self.weight, (outputs,)
        x, w, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
        return x.contiguous(memory_format=format), w, b

    def all_operands(self, dtype=torch.float64):
        """What `all_orders` takes."""
        x, w, b = self.operands(dtype)
        g = torch.randn_like(self.stock(x, w, b))
        return torch.randn_like(x), torch.randn_like(w), torch.randn_like(b), g, x, w, b


CONVOLUTIONS = [
    Convolution("1d", (3, 4, 9), (6, 4, 3), (1,), (1,), (1,)),
    # The last column of the input meets no tap.
    Convolution("patches", (2, 3, 9, 8), (5, 3, 4, 4), (4, 4), (0, 0), (1, 1)),
    Convolution("pointwise", (2, 5, 4, 3), (6, 5, 1, 1), (1, 1), (0, 0), (1, 1), channels_last=True),
    Convolution("channels_last", (2, 4, 7, 6), (8, 4, 3, 3), (1, 1), (1, 1), (1, 1), channels_last=True),
    Convolution("grouped", (2, 6, 8, 7), (4, 3, 3, 2), (2, 1), (1, 2), (1, 2), 2),
    Convolution("many groups", (2, 32, 5, 5), (64, 2, 3, 3), (1, 1), (1, 1), (1, 1), 16),
    Convolution("multiplier", (2, 4, 6, 6), (8, 1, 5, 5), (1, 1), (2, 2), (1, 1), 4),
    # A vector, and what is left of a row.
    Convolution("depthwise", (2, 5, 10, 19), (5, 1, 7, 7), (1, 1), (3, 3), (1, 1), 5),
    Convolution("depthwise 1d", (3, 5, 40), (5, 1, 11), (2,), (4,), (1,), 5),
    Convolution(
        # A vector, and what is left of the channels.
        "depthwise channels_last",
        (2, 19, 11, 10),
        (19, 1, 5, 3),
        (2, 1),
        (2, 1),
        (1, 3),
        19,
        channels_last=True,
    ),
    Convolution("3d", (2, 4, 4, 5, 4), (6, 2, 2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), 2),
    Convolution("transposed 1d", (2, 4, 6), (4, 3, 4), (2,), (1,), (1,), 1, (1,)),
    Convolution("transposed", (2, 6, 5, 4), (6, 2, 3, 3), (2, 2), (1, 0), (1, 2), 3, (1, 0)),
    Convolution(
        "transposed 3d", (2, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2, 1, 1), (0, 0, 1), (1, 1, 1), 2, (0,) * 3
    ),
    Convolution("empty batch", (0, 4, 7, 6), (4, 1, 5, 5), (1, 1), (2, 2), (1, 1), 4),
]
each_convolution = pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["functional", "switch"])
def run_fused(request):
    """A convolution with our double backward: by its own op, or PyTorch's with the switch on."""
    if request.param == "functional":
        yield Convolution.fused
    else:
        with gk.set_fused_double_backward(True):
            yield Convolution.stock


def all_orders(function, v, u, ub, g, x, w, b):
    """The output, its three gradients, and theirs for the gradients v, u and ub."""
    g, x, w, b = (t.detach().requires_grad_() for t in (g, x, w, b))
    output = function(x, w, b)
    first = torch.autograd.grad(output, (x, w, b), g, create_graph=True)
    # Where there is no image, PyTorch's double backward leaves out some.
    second = torch.autograd.grad(first, (g, x, w), (v, u, ub), materialize_grads=True)
    return [output, *first, *second]


def all_orders_of_reference(conv, v, u, ub, g, x, w, b):
    v, u, ub, g, x, w, b = (t.double() for t in (v, u, ub, g, x, w, b))
    return [
        formulas.convolution(x, w, b, *conv.settings),
        *formulas.convolution_backward(g, x, w, *conv.settings),
        *formulas.convolution_double_backward(v, u, ub, g, x, w, *conv.settings),
    ]


def assert_no_worse_than_stock(conv, function, dtype, operands):
    reference = all_orders_of_reference(conv, *operands)
    stock = all_orders(conv.stock, *operands)
    fused = all_orders(function, *operands)
    for name, ours, theirs, exact in zip(RESULTS, fused, stock, reference, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        if exact.numel() == 0:
            continue
        error = (ours.double() - exact).abs().max().item()
        stock_error = (theirs.double() - exact).abs().max().item()
        # In float64 the reference itself rounds.
        floor = (16 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error <= 2 * stock_error + floor, f"{name}: {error:.3e}, stock {stock_error:.3e}"


@each_convolution
@each_dtype
def test_error_is_at_most_twice_stocks(conv, dtype, run_fused):
    operands = conv.all_operands(dtype)
    assert_no_worse_than_stock(conv, lambda *args: run_fused(conv, *args), dtype, operands)


@each_convolution
def test_only_the_double_backward_of_pytorchs_own_op_changes(conv):
    operands = conv.all_operands(torch.float32)
    expected = all_orders(conv.stock, *operands)
    with gk.set_fused_double_backward(True):
        results = all_orders(conv.stock, *operands)
    for ours, stock in list(zip(results, expected, strict=True))[:4]:
        assert torch.equal(ours, stock) and ours.stride() == stock.stride()


def layout(tensor):
    """The stride of a dimension of size 1 says nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


@each_convolution
def test_results_keep_the_memory_format(conv, run_fused):
    v, u, ub, g, x, w, b = conv.all_operands(torch.float32)
    stock = all_orders(conv.stock, v, u, ub, g, x, w, b)
    results = all_orders(lambda *args: run_fused(conv, *args), v, u, ub, g, x, w, b)
    assert [layout(r) for r in results[:3]] == [layout(s) for s in stock[:3]]
    assert layout(results[4]) == layout(g) and layout(results[5]) == layout(x)


@each_convolution
def test_gradcheck_up_to_third_order(conv, run_fused):
    if 0 in conv.input:
        pytest.skip("nothing to perturb")
    operands = [t.requires_grad_() for t in conv.operands()]

    def function(*args):
        return run_fused(conv, *args)

    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)

    def double_backward(v, u, ub, g, x, w):
        return conv.op("_double_backward")(v, u, ub, g, x, w, *conv.settings, [True] * 3)

    operands = [t.detach().requires_grad_() for t in conv.all_operands()[:6]]
    assert torch.autograd.gradcheck(double_backward, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(double_backward, operands, fast_mode=True)


def nth_order(function, x, w, b, order):
    """Of a loss that no derivative of is constant."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    total = function(*leaves).pow(4).sum()
    for _ in range(order):
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        total = sum(gradient.pow(2).sum() for gradient in gradients)
    return gradients


def graph(tensor):
    """Names of the nodes that computed it."""
    names, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            stack += [parent for parent, _ in node.next_functions]
    return names


@each_convolution
def test_third_order_is_exact_and_ours_too(conv, run_fused):
    operands = [t / 4 for t in conv.operands()]
    # Not stock PyTorch, which raises where a transposed convolution has an output_padding.
    expected = nth_order(lambda *args: formulas.convolution(*args, *conv.settings), *operands, order=3)
    results = nth_order(lambda *args: run_fused(conv, *args), *operands, order=3)
    for ours, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    names = graph(results[0])
    assert any("gradnorm_kernels" in name for name in names)
    # Every backward of a convolution in the graph has our formula for its own.
    assert not any("ConvolutionBackwardBackward" in name for name in names)


class Calls(TorchDispatchMode):
    """The convolutions computed; of a backward, which gradients."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.calls.append("convolution")
        elif func is torch.ops.aten.convolution_backward.default:
            self.calls.append(tuple(args[-1]))
        elif func is OPS._depthwise_grad_weight.default:
            self.calls.append((False, True, False))
        return func(*args, **(kwargs or {}))


@each_convolution
def test_a_gradient_norm_step_computes_nothing_unneeded(conv, run_fused):
    x, w, b = (t.requires_grad_() for t in conv.operands())
    x = x * 1  # Not a leaf: as inside a network, its own gradient is wanted too.
    output = run_fused(conv, x, w, b)
    g = torch.randn_like(output).requires_grad_()
    with Calls() as backward:
        (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    with Calls() as double_backward:
        torch.autograd.grad(grad_input, (g, x, w), torch.randn_like(x), allow_unused=True)
    assert backward.calls == [(True, False, False)]
    assert double_backward.calls == ["convolution", (False, True, False)]


@each_convolution
def test_every_combination_of_defined_and_wanted_gradients(conv, run_fused):
    v, u, ub, g, x, w, b = conv.all_operands()
    leaves = g, x, w, b = [t.requires_grad_() for t in (g, x, w, b)]

    def results(function, defined, wanted):
        first = torch.autograd.grad(function(x, w, b), (x, w, b), g, create_graph=True)
        pairs = [(f, t) for f, t, is_defined in zip(first, (v, u, ub), defined, strict=True) if is_defined]
        inputs = [leaf for leaf, is_wanted in zip(leaves, wanted, strict=False) if is_wanted]
        outputs, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)

    masks = [mask for mask in itertools.product((False, True), repeat=3) if any(mask)]
    for defined, wanted in itertools.product(masks, masks):
        ours = results(lambda *args: run_fused(conv, *args), defined, wanted)
        with gk.set_fused_double_backward(False):
            stock = results(conv.stock, defined, wanted)
        for result, expected in zip(ours, stock, strict=True):
            if result is None or expected is None:
                # Without elements PyTorch leaves out what it would compute of them.
                assert result is expected or 0 in conv.input
            else:
                torch.testing.assert_close(result, expected)


@each_convolution
def test_first_backward_of_every_combination(conv, run_fused):
    _, _, _, g, *operands = conv.all_operands()
    for requires_grad in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(r) for t, r in zip(operands, requires_grad, strict=True)]
        if not any(requires_grad):
            assert not run_fused(conv, *leaves).requires_grad
            continue
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        ours = torch.autograd.grad(run_fused(conv, *leaves), wanted, g)
        for result, expected in zip(ours, torch.autograd.grad(conv.stock(*leaves), wanted, g), strict=True):
            torch.testing.assert_close(result, expected)


def test_undefined_gradients_stay_undefined(run_fused):
    conv = CONVOLUTIONS[4]
    undefined = torch._C._functions.UndefinedGrad()
    x, w, b = (t.requires_grad_() for t in conv.operands())
    undefined(run_fused(conv, x, w, b)).sum().backward()
    output = run_fused(conv, x, w, b)
    (grad_input,) = torch.autograd.grad(output, x, torch.ones_like(output), create_graph=True)
    undefined(grad_input).sum().backward()
    assert x.grad is None and w.grad is None and b.grad is None


@each_convolution
def test_saved_tensors_are_not_modified_and_any_number_of_threads_gives_the_same_bits(conv):
    operands = conv.all_operands(torch.float32)
    originals = [t.clone() for t in operands]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = all_orders(conv.fused, *operands)
        assert all(torch.equal(a, b) for a, b in zip(first, all_orders(conv.fused, *operands), strict=True))
        if "depthwise" in conv.name:
            torch.set_num_threads(3)
            assert torch.equal(first[6], all_orders(conv.fused, *operands)[6])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(operands, originals, strict=True))
    x, w, b = (t.clone().requires_grad_() * 1 for t in operands[4:])
    output = conv.fused(x, w, b)
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@st.composite
def depthwise(draw):
    dims = 2
    kernel = [draw(st.integers(1, 9)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 3)) for _ in range(dims)]
    padding = [draw(st.integers(0, 4)) for _ in range(dims)]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [n + draw(st.integers(0, 20)) for n in least]
    images, channels = draw(st.integers(1, 5)), draw(st.integers(1, 35))
    return Convolution(
        "depthwise",
        (images, channels, *size),
        (channels, 1, *kernel),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        channels,
        channels_last=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(conv=depthwise(), dtype=st.sampled_from([torch.float32, torch.float64]), mixed=st.booleans())
def test_fuzzed_depthwise_weight_gradients(conv, dtype, mixed):
    *_, g, x, w, _ = conv.all_operands(dtype)
    if mixed:
        g = g.contiguous()[:, :, ::1].transpose(2, 3).contiguous().transpose(2, 3)
    mask = [False, True, True]
    exact = formulas.convolution_backward(g.double(), x.double(), w.double(), *conv.settings)
    _, grad_weight, grad_bias = OPS.convolution_backward(g, x, w, None, *conv.settings, mask)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(grad_weight.double(), exact[1], **tolerance)
    torch.testing.assert_close(grad_bias.double(), exact[2], **tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_depthwise_weight_gradients_of_infinite_pixels(channels_last, value):
    """Only taps that meet the pixel see it: not the padding of a row to whole vectors."""
    conv = Convolution(
        "", (1, 3, 8, 19), (3, 1, 7, 7), (1, 1), (3, 3), (1, 1), 3, channels_last=channels_last
    )
    *_, g, x, w, _ = conv.all_operands(torch.float32)
    x[0, 0, 2, -1] = x[0, 1, 2, 0] = value
    _, grad_weight, _ = OPS.convolution_backward(g, x, w, None, *conv.settings, [False, True, False])
    _, exact, _ = formulas.convolution_backward(g, x, w, *conv.settings)
    assert not exact.isfinite().all() and exact.isfinite().any()
    assert torch.equal(grad_weight.isfinite(), exact.isfinite())


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for conv in t.CONVOLUTIONS:
    if 'depthwise' in conv.name:
        for dtype in (torch.float32, torch.float64):
            t.assert_no_worse_than_stock(conv, conv.fused, dtype, conv.all_operands(dtype))
"""
    run_under(capability, __name__, checks)


@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit.trace")
def test_signatures_are_pytorchs():
    x, w, b = torch.randn(4, 9, 8), torch.randn(6, 2, 4, 3), torch.randn(6)
    for arguments in (
        (x, w),
        (x, w, b),
        (x, w, b, 2, 1, 1, 2),
        (x[None], w, b, [2, 1], (1, 0), 1, 2),
        (x, w, b, 1, "valid"),
        (x[None], w, b, 1, "same"),
        (x, w, b, 1, "same", (1, 2)),
        (x, w, b, [1], "same", [2]),
        (x, w, b, (1,), (1,)),
    ):
        if len(arguments) < 7:
            arguments = (*arguments, *(None, 1, 0, 1)[len(arguments) - 2 :], 2)
        ours, stock = gk.functional.conv2d(*arguments), F.conv2d(*arguments)
        assert torch.equal(ours, stock) and ours.stride() == stock.stride()
    traced = torch.jit.trace(lambda x: gk.functional.conv2d(x, w, b, padding="same", groups=2), x)
    assert torch.equal(traced(x), F.conv2d(x, w, b, padding="same", groups=2))
    assert torch.equal(
        gk.functional.conv_transpose2d(x[:2], w[:2], None, 2, 1, 1, 1, 2),
        F.conv_transpose2d(x[:2], w[:2], None, 2, 1, 1, 1, 2),
    )
    w.requires_grad_()
    for padding in ("same", "valid"):

        def second(function, padding=padding):
            (first,) = torch.autograd.grad(
                function(x, w, None, 1, padding, 1, 2).pow(3).sum(), w, create_graph=True
            )
            return torch.autograd.grad(first.pow(2).sum(), w)[0]

        torch.testing.assert_close(second(gk.functional.conv2d), second(F.conv2d))


def test_what_is_not_covered_is_pytorchs():
    x, w = torch.randn(2, 3, 5, 5, dtype=torch.complex64), torch.randn(3, 1, 3, 3, dtype=torch.complex64)
    with gk.set_fused_double_backward(True):
        for function in (gk.functional.conv2d, F.conv2d):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            (first,) = torch.autograd.grad(
                function(*leaves, groups=3).abs().pow(4).sum(), leaves[:1], create_graph=True
            )
            torch.autograd.grad(first.abs().pow(2).sum(), leaves)
    ints = torch.ones(1, 1, 3, 3, dtype=torch.int64)
    assert torch.equal(gk.functional.conv2d(ints, ints), F.conv2d(ints, ints))
    if torch.backends.mkldnn.is_available():
        mkldnn = x.real.contiguous().to_mkldnn()
        with torch.no_grad():
            result = gk.functional.conv2d(mkldnn, w.real.contiguous(), groups=3)
        assert torch.equal(result.to_dense(), F.conv2d(mkldnn, w.real.contiguous(), groups=3).to_dense())


def opcheck_samples(conv):
    for dtype, requires_grad in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        yield [t.requires_grad_(requires_grad) for t in conv.all_operands(dtype)]


@each_convolution
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(conv):
    for v, u, ub, g, x, w, b in opcheck_samples(conv):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if conv.name == "grouped" and x.dtype == torch.float32:
            # In torch 2.11 the double backward that is traced, PyTorch's own, takes no symbolic shapes.
            tests.append(
                "test_aot_dispatch_dynamic" if torch.__version__ >= "2.13" else "test_aot_dispatch_static"
            )
        all_wanted = [True, True, True]
        for arguments in (
            (conv.op(), (x, w, b, *conv.settings)),
            (conv.op("_backward"), (g, x, w, b.shape, *conv.settings, all_wanted)),
            (conv.op("_double_backward"), (v, u, ub, g, x, w, *conv.settings, all_wanted)),
        ):
            torch.library.opcheck(*arguments, test_utils=tests)
        if "depthwise" in conv.name and x.dtype == torch.float32:
            arguments = (g, x, w, conv.stride, conv.padding, conv.dilation)
            arguments = (OPS._depthwise_grad_weight.default, [getattr(a, "data", a) for a in arguments])
            torch.library.opcheck(*arguments, test_utils=["test_schema", "test_faketensor"])


def transforms(function, x, w):
    def scalar(function):
        return lambda x, w: function(x, w).pow(3).sum()

    f = scalar(function)
    yield torch.func.grad(f)(x, w)
    yield torch.func.grad(scalar(torch.func.grad(scalar(torch.func.grad(f, argnums=1)))))(x, w)
    yield torch.func.hessian(f)(x, w)
    yield torch.func.vmap(function, in_dims=(1, None))(x.unsqueeze(1).expand(-1, 2, *x.shape[1:]), w)
    yield torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(None, 0))(x, torch.stack([w, w * 2]))
    yield torch.func.jvp(function, (x, w), (x.cos(), w.sin()))[1]
    yield torch.func.grad(lambda x: torch.func.jvp(f, (x, w), (x.cos(), w.sin()))[1])(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf, w), leaf, create_graph=True)
    basis = torch.eye(3, x.numel(), dtype=x.dtype).view(3, *x.shape)
    yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
    # A transform inside ordinary autograd.
    yield torch.autograd.grad(torch.func.grad(f)(leaf, w).sum(), leaf)[0]


@pytest.mark.parametrize("name", ["1d", "depthwise", "transposed 3d"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func(name):
    conv = next(c for c in CONVOLUTIONS if c.name == name)
    x, w, b = conv.operands()
    x, w = x[..., :7, :7] if len(conv.stride) > 1 else x, w
    ours = transforms(lambda x, w: conv.fused(x, w, b), x, w)
    expected = list(transforms(lambda x, w: conv.stock(x, w, b), x, w))
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)
    with gk.set_fused_double_backward(True):
        ours = transforms(lambda x, w: conv.stock(x, w, b), x, w)
        for result, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_whole_compiled_step_gives_eagers_gradients(fresh_dynamo):
    class Net(nn.Module):
        def __init__(self, conv2d):
            super().__init__()
            torch.manual_seed(0)
            self.depthwise, self.head = nn.Conv2d(4, 4, 5, groups=4), nn.Linear(16, 3)
            self.conv2d = conv2d

        def forward(self, x):
            features = self.conv2d(x, self.depthwise.weight, self.depthwise.bias, padding=2, groups=4)
            return self.head(F.gelu(features).flatten(1)[:, :16])

    def penalised(model, params, x, target):
        def loss(params, x):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), target)

        def total(params):
            return loss(params, x) + torch.func.grad(loss, argnums=1)(params, x).abs().sum()

        return torch.func.grad(total)(params)

    x, target = torch.randn(2, 4, 6, 6), torch.randint(3, (2,))
    expected = penalised(Net(F.conv2d), dict(Net(F.conv2d).named_parameters()), x, target)
    for fused in (False, True):
        with gk.set_fused_double_backward(not fused):
            model = Net(gk.functional.conv2d if fused else F.conv2d)
            step = torch.compile(penalised, backend="aot_eager", fullgraph=True)
            gradients = step(model, dict(model.named_parameters()), x, target)
            for name, wanted in expected.items():
                torch.testing.assert_close(gradients[name], wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_ops_themselves_trace(dynamic, fresh_dynamo):
    """Called by name inside a compiled region, the ops become ATen's."""
    conv = CONVOLUTIONS[4]

    def step(v, u, ub, g, x, w, b):
        return (
            conv.op()(x, w, b, *conv.settings),
            *conv.op("_backward")(g, x, w, b.shape, *conv.settings, [True] * 3),
            *conv.op("_double_backward")(v, u, ub, g, x, w, *conv.settings, [True] * 3),
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for images in (2, 3):
        operands = list(conv.all_operands())
        for i in (0, 3, 4):
            operands[i] = torch.cat([operands[i]] * images)
        # PyTorch's double backward of a convolution, which takes over here, fails with symbolic shapes.
        operands = [t.requires_grad_(not dynamic) for t in operands]
        results, expected = compiled(*operands), step(*operands)
        for ours, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, wanted)
        if dynamic:
            continue
        gradients = torch.autograd.grad(sum(r.sum() for r in results), operands)
        expected = torch.autograd.grad(sum(r.sum() for r in expected), operands)
        for ours, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, wanted)


@each_convolution
def test_autocast_matches_stock(conv, run_fused):
    x, w, b = (t.float().requires_grad_() for t in conv.operands())

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            output = function(x, w, b)
            (grad,) = torch.autograd.grad(output.float().pow(2).sum(), x, create_graph=True)
        return output, grad, *torch.autograd.grad(grad.pow(2).sum(), (x, w), materialize_grads=True)

    ours = run(lambda *args: run_fused(conv, *args))
    with gk.set_fused_double_backward(False):
        expected = run(conv.stock)
    for result, stock in zip(ours, expected, strict=True):
        assert result.dtype == stock.dtype
        scale = stock.abs().max().item() if stock.numel() else 1.0
        torch.testing.assert_close(result, stock, rtol=2e-2, atol=2e-2 * scale)


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


def test_tensor_subclasses(run_fused):
    conv = CONVOLUTIONS[4]

    def second(function, *operands):
        x, w, b = (t.requires_grad_() for t in operands)
        (gradient,) = torch.autograd.grad(function(x, w, b).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), w)[0]

    operands = conv.operands()
    expected = second(conv.stock, *(t.clone() for t in operands))
    result = second(lambda *args: run_fused(conv, *args), *(AtenOnly(t.clone()) for t in operands))
    torch.testing.assert_close(result.wrapped, expected)


@each_convolution
def test_inference_mode_and_devices_without_a_kernel(conv):
    operands = conv.operands()
    with torch.inference_mode():
        assert torch.equal(conv.fused(*operands), conv.stock(*operands))
    operands = [t.to("meta") for t in conv.all_operands()]
    on_cpu = all_orders(conv.stock, *(torch.zeros_like(t, device="cpu") for t in operands))
    for result, expected in zip(all_orders(conv.fused, *operands), on_cpu, strict=True):
        assert result.device.type == "meta" and result.shape == expected.shape


def test_bad_input_is_named():
    conv = CONVOLUTIONS[4]
    *_, g, x, w, b = conv.all_operands()
    with pytest.raises(TypeError, match="convolution: expected weight to have the dtype of input"):
        conv.fused(x, w.float(), b)
    with pytest.raises(TypeError, match="convolution: expected bias to have the dtype of input"):
        conv.fused(x, w, b.float())
    with pytest.raises(TypeError, match="convolution: expected input to be float16"):
        conv.op()(x.to(torch.complex128), w, b, *conv.settings)
    with pytest.raises(RuntimeError, match="convolution: expected weight to be on the device of input"):
        conv.fused(x, w.to("meta"), b)
    with pytest.raises(TypeError, match="convolution_backward: expected grad_output to have the dtype"):
        conv.op("_backward")(g.float(), x, w, None, *conv.settings, [True] * 3)
    for bad in ((x[0, 0], w), (x, w[0]), (x, w, b[1:]), (x, w, b, 1, "circular"), (x, w, b, 2, "same")):
        with pytest.raises((RuntimeError, ValueError)):
            gk.functional.conv2d(*bad, groups=2)
    for function in (gk.functional.conv2d, F.conv2d):
        with pytest.raises(RuntimeError):
            function(x, w, b, padding="same", dilation=(1, 1, 1), groups=2)


@pytest.mark.parametrize("name", ["depthwise", "depthwise 1d", "depthwise channels_last"])
def test_a_gradient_of_another_shape_is_rejected(name):
    conv = next(c for c in CONVOLUTIONS if c.name == name)
    *_, g, x, w, _ = conv.all_operands(torch.float32)
    for bad in (g[..., :-1], g[:1], g[:, :-1], torch.cat([g, g], -1)):
        with pytest.raises((RuntimeError, ValueError)):
            conv.op("_backward")(bad, x, w, None, *conv.settings, [False, True, False])
    for i in range(3):
        broken = list(conv.settings)
        broken[i] = ()
        with pytest.raises((RuntimeError, ValueError)):
            conv.op("_backward")(g, x, w, None, *broken, [False, True, False])


def test_schemas():
    settings = (
        "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
        "SymInt groups"
    )
    assert str(OPS.convolution.default._schema) == (
        f"gradnorm_kernels::convolution(Tensor input, Tensor weight, Tensor? bias, {settings}) -> Tensor"
    )
    assert str(OPS.convolution_backward.default._schema) == (
        "gradnorm_kernels::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, "
        f"SymInt[]? bias_sizes, {settings}, bool[3] output_mask) -> "
        "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    )
    assert str(OPS.convolution_double_backward.default._schema) == (
        "gradnorm_kernels::convolution_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
        f"Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor weight, {settings}, "
        "bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)"
    )
