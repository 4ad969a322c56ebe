"""Convolutions on the CPU: their table, and what is their own: what is computed, depthwise, signatures."""

import itertools
from dataclasses import dataclass

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
from contract import OPS, Call, Case, OpContract, assert_close, channels_last, flat, nth_gradients, strides
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradnorm_kernels as gk
from gradnorm_kernels.diagnose import graph_nodes


@dataclass(frozen=True)
class Convolution(Case):
    name: str
    input: tuple
    weight: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int = 1
    output_padding: tuple | None = None  # transposed if there is one
    channels_last: bool = False
    names = ("input", "weight", "bias")

    @property
    def transposed(self):
        return self.output_padding is not None

    @property
    def settings(self):
        """What the ops take after their tensors."""
        extra = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, extra, self.groups

    def shapes(self):
        outputs = self.weight[1] * self.groups if self.transposed else self.weight[0]
        return self.input, self.weight, (outputs,)

    def _call(self, namespace, *tensors):
        name = f"conv{'_transpose' * self.transposed}{len(self.stride)}d"
        options = {"output_padding": self.output_padding} if self.transposed else {}
        options |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return getattr(namespace, name)(*tensors, groups=self.groups, **options)

    def fused(self, x, weight, bias):
        return self._call(gk.functional, x, weight, bias)

    def stock(self, x, weight, bias):
        return self._call(F, x, weight, bias)

    def reference(self, x, weight, bias):
        return reference.convolution(x, weight, bias, *self.settings)

    def same_bits(self, operands):
        return False

    def calls(self, operands):
        (x, w, b), g, mask = operands.inputs, operands.grad_output, [True] * 3
        yield Call("convolution", (x, w, b, *self.settings))
        yield Call("convolution_backward", (g, x, w, tuple(b.shape), *self.settings, mask))
        yield Call("convolution_double_backward", (*operands.grad_grads, g, x, w, *self.settings, mask))
        if self.name in DEPTHWISE:
            geometry = (self.stride, self.padding, self.dilation)
            yield Call("_depthwise_grad_weight", (g.detach(), x.detach(), w.detach(), *geometry))

    def is_pytorchs(self, call):
        return call.name != "_depthwise_grad_weight"


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
    # A vector, and what is left of the channels.
    Convolution("depthwise NHWC", (2, 19, 11, 10), (19, 1, 5, 3), (2, 1), (2, 1), (1, 3), 19, None, True),
    Convolution("3d", (2, 4, 4, 5, 4), (6, 2, 2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), 2),
    Convolution("transposed 1d", (2, 4, 6), (4, 3, 4), (2,), (1,), (1,), 1, (1,)),
    Convolution("transposed", (2, 6, 5, 4), (6, 2, 3, 3), (2, 2), (1, 0), (1, 2), 3, (1, 0)),
    Convolution(
        "transposed 3d", (2, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2, 1, 1), (0, 0, 1), (1, 1, 1), 2, (0,) * 3
    ),
    Convolution("small", (1, 2, 4, 3), (2, 1, 2, 2), (1, 2), (1, 0), (1, 1), 2),
    # With an output_padding PyTorch's own third order, which transforms take, raises.
    Convolution("small, transposed", (1, 2, 3), (2, 2, 2), (2,), (1,), (1,), 1, (0,)),
    Convolution("small, depthwise", (1, 3, 5), (3, 1, 2), (1,), (1,), (2,), 3),
    Convolution("empty batch", (0, 4, 7, 6), (4, 1, 5, 5), (1, 1), (2, 2), (1, 1), 4),
]
BY_NAME = {conv.name: conv for conv in CONVOLUTIONS}
each_convolution = pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
DEPTHWISE = ("depthwise", "depthwise 1d", "depthwise NHWC")


class TestConvolution(OpContract):
    cases = CONVOLUTIONS
    traced = ("small", "small, transposed", "small, depthwise")
    # In torch 2.11 the double backward that is traced, PyTorch's own, takes no symbolic shapes.
    traced_by = "test_aot_dispatch_dynamic" if torch.__version__ >= "2.13" else "test_aot_dispatch_static"
    outlived = 2
    # PyTorch's own ops check the shapes, and the ops that a double backward calls the rest.
    accepted = (("", "", "shape"), ("convolution_double_backward", "", ""))
    # PyTorch's own kernels differ in whether a weight that is NaN meets what pads an image.
    test_nan_and_inf_reach_what_they_reach_in_the_reference = None
    schemas = """
        convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,
            SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor;
        convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes,
            SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding,
            SymInt groups, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        convolution_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias,
            Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding,
            SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight);
        _depthwise_grad_weight(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride,
            SymInt[] padding, SymInt[] dilation) -> Tensor
    """

    def bad(self):
        x, w, b = BY_NAME["grouped"].draw().inputs
        for bad, message in (
            ((x[0, 0], w), "Expected 3D"),
            ((x, w[0]), "stride"),
            ((x, w, b[1:]), "expected bias"),
            ((x, w, b, 1, "circular"), "Invalid padding string"),
            ((x, w, b, 2, "same"), "padding='same' is not supported for strided"),
            ((x, w, b, 1, "same", (1, 1, 1)), "dilation"),
        ):
            yield lambda bad=bad: gk.functional.conv2d(*bad, groups=2), RuntimeError, message

    def check_strides(self, case, operands, results):
        """PyTorch's own where all operands lie in one memory format; the second ones as what they are of."""
        for lie in (torch.Tensor.contiguous, channels_last)[: 1 + (len(case.stride) == 2)]:
            if all(strides(t) == strides(lie(t)) for t in operands.tensors()):
                expected = operands.orders(case.stock)
                with gk.set_fused_double_backward(True):
                    switched = operands.orders(case.stock)
                for first, second in zip(flat(results)[:3], flat(expected)[:3], strict=True):
                    assert strides(first) == strides(second)
                for _, _, second in (results, switched):
                    assert strides(second[0]) == strides(operands.grad_output)
                    assert strides(second[1]) == strides(operands.inputs[0])

    def check_meta(self, on_meta, on_cpu, with_strides=True):
        super().check_meta(on_meta, on_cpu, with_strides=False)  # which are PyTorch's own on each

    def check_kernels(self):
        for name, dtype in itertools.product(DEPTHWISE, (torch.float32, torch.float64)):
            self.check_accuracy(BY_NAME[name], BY_NAME[name].draw(dtype), contract.by_function)


@each_convolution
@pytest.mark.parametrize("switch", [False, True])
def test_the_third_order_is_exact_and_every_backward_in_it_ours(conv, switch):
    inputs = [t.requires_grad_() for t in conv.draw().map(lambda t: t / 4).inputs]
    with gk.set_fused_double_backward(switch):
        *_, gradients = nth_gradients(conv.stock if switch else conv.fused, inputs, 3)
    *_, expected = nth_gradients(conv.reference, inputs, 3)
    assert_close(gradients, expected)
    names = [node.name() for node in graph_nodes(gradients[:1])]
    assert any("gradnorm_kernels::convolution" in name for name in names)
    assert not any("ConvolutionBackwardBackward" in name for name in names)


class Convolutions(TorchDispatchMode):
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
@pytest.mark.parametrize("switch", [False, True])
def test_a_gradient_norm_step_computes_nothing_unneeded(conv, switch):
    x, w, b = (t.requires_grad_() for t in conv.draw().inputs)
    x = x * 1  # Not a leaf: as inside a network, its own gradient is wanted too.
    with gk.set_fused_double_backward(switch):
        output = (conv.stock if switch else conv.fused)(x, w, b)
        g = torch.randn_like(output).requires_grad_()
        with Convolutions() as backward:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        with Convolutions() as double_backward:
            torch.autograd.grad(grad_input, (g, x, w), torch.randn_like(x), allow_unused=True)
    assert backward.calls == [(True, False, False)]
    assert double_backward.calls == ["convolution", (False, True, False)]


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
    shapes = (images, channels, *size), (channels, 1, *kernel)
    geometry = map(tuple, (stride, padding, dilation))
    return Convolution("", *shapes, *geometry, channels, channels_last=draw(st.booleans()))


@settings(deadline=None)
@given(conv=depthwise(), dtype=st.sampled_from([torch.float32, torch.float64]), mixed=st.booleans())
def test_fuzzed_depthwise_weight_gradients(conv, dtype, mixed):
    operands = conv.draw(dtype)
    (x, w, _), g = operands.inputs, operands.grad_output
    if mixed:
        g = g.transpose(2, 3).contiguous().transpose(2, 3)
    mask = [False, True, True]
    _, exact, _ = operands.map(torch.Tensor.double).orders(conv.reference)
    _, grad_weight, grad_bias = OPS.convolution_backward(g, x, w, None, *conv.settings, mask)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(grad_weight.double(), exact[1], **tolerance)
    torch.testing.assert_close(grad_bias.double(), exact[2], **tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_depthwise_weight_gradients_of_infinite_pixels(channels_last, value):
    """Only taps that meet the pixel see it: not the padding of a row to whole vectors."""
    conv = Convolution("", (1, 3, 8, 19), (3, 1, 7, 7), (1, 1), (3, 3), (1, 1), 3, None, channels_last)
    operands = conv.draw(torch.float32)
    (x, w, _), g = operands.inputs, operands.grad_output
    x[0, 0, 2, -1] = x[0, 1, 2, 0] = value
    _, grad_weight, _ = OPS.convolution_backward(g, x, w, None, *conv.settings, [False, True, False])
    _, (_, exact, _), _ = operands.orders(conv.reference)
    assert not exact.isfinite().all() and exact.isfinite().any()
    assert torch.equal(grad_weight.isfinite(), exact.isfinite())


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


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_weight_gradients_by_themselves(name):
    conv = BY_NAME[name]
    operands = conv.draw(torch.float32)
    (x, w, _), g = operands.inputs, operands.grad_output
    *_, call = conv.calls(operands)
    TestConvolution().opcheck(call, "test_schema", "test_faketensor")
    given = dict(zip(Call("convolution", ()).arguments[3:], conv.settings, strict=True))
    for bad in (g[..., :-1], g[:1], g[:, :-1], torch.cat([g, g], -1)):
        with pytest.raises(ValueError, match="convolution_backward: expected grad_output"):
            OPS.convolution_backward(bad, x, w, None, *given.values(), [False, True, False])
    for name in ("stride", "padding", "dilation"):
        with pytest.raises(RuntimeError, match=f"expected {name}"):
            OPS.convolution_backward(g, x, w, None, *(given | {name: ()}).values(), [False, True, False])
