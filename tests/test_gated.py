"""Gated linear units on the CPU: their table, glu under the switch, and timm's modules."""

from dataclasses import dataclass, replace

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import OPS, Call, Case, OpContract, assert_close, strides
from hypothesis import strategies as st
from torch import nn

import gradnorm_kernels as gk

STOCK = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu_none": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}
REFERENCE = {
    "sigmoid": reference.sigmoid,
    "silu": reference.silu,
    "gelu_none": reference.gelu,
    "gelu_tanh": lambda gate: reference.gelu(gate, "tanh"),
}


@dataclass(frozen=True)
class GatedUnit(Case):
    activation: str
    shape: tuple
    names = ("gate", "value")

    def __str__(self):
        return f"{self.activation} {self.shape}"

    def shapes(self):
        return self.shape, self.shape

    def fused(self, gate, value):
        if self.activation == "silu":
            return gk.functional.swiglu(gate, value)
        if self.activation.startswith("gelu"):
            return gk.functional.geglu(gate, value, self.activation.removeprefix("gelu_"))
        return gk.functional._gated_unit(gate, value, self.activation)

    def stock(self, gate, value):
        return STOCK[self.activation](gate) * value

    def reference(self, gate, value):
        return REFERENCE[self.activation](gate) * value

    def calls(self, operands):
        (gate, value), g = operands.inputs, operands.grad_output
        yield Call("gated_unit", (gate, value, self.activation))
        yield Call("gated_unit_backward", (g, gate, value, self.activation))
        grads = operands.grad_grads
        yield Call("gated_unit_double_backward", (*grads, g, gate, value, self.activation))

    def same_bits(self, operands):
        return False  # Products and sums are contracted in one way in whole vectors and in another in a rest.

    @property
    def wrong_in_pytorch(self):
        return ("reverse over dual numbers",) if self.activation == "silu" else ()

    @property
    def large(self):
        return replace(self, shape=(300, 512))


@dataclass(frozen=True)
class Glu(Case):
    shape: tuple
    dim: int = -1

    def __str__(self):
        return f"glu {self.shape} {self.dim}"

    def shapes(self):
        return (self.shape,)

    def fused(self, x):
        return gk.functional.glu(x, self.dim)

    def stock(self, x):
        return F.glu(x, self.dim)

    def reference(self, x):
        value, gate = x.chunk(2, self.dim)
        return value * reference.sigmoid(gate)

    def calls(self, operands):
        yield from ()  # GatedUnit's

    def same_bits(self, operands):
        return False  # as GatedUnit

    @property
    def large(self):
        return replace(self, shape=(2 * self.shape[0], 40, 512), dim=self.dim)


CASES = [
    *(GatedUnit(activation, (3, 5, 7)) for activation in STOCK),
    *(GatedUnit("silu", shape) for shape in [(2, 97, 661), (2, 0, 3), ()]),
    *(GatedUnit(activation, (2, 3)) for activation in STOCK),
    Glu((5, 14)),
    Glu((6, 4, 33), 1),
    Glu((4, 0)),
    Glu((2, 6)),
]


class TestGated(OpContract):
    cases = CASES
    traced = ("silu (2, 3)", "gelu_tanh (2, 3)")
    outlived = 3
    random_cases = st.builds(
        GatedUnit,
        st.sampled_from(list(STOCK)),
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    )
    schemas = """
        gated_unit(Tensor gate, Tensor value, str activation) -> Tensor;
        gated_unit_backward(Tensor grad_output, Tensor gate, Tensor value, str activation) ->
            (Tensor grad_gate, Tensor grad_value);
        gated_unit_double_backward(Tensor grad_grad_gate, Tensor grad_grad_value, Tensor grad_output,
            Tensor gate, Tensor value, str activation) ->
            (Tensor grad_grad_output, Tensor grad_gate, Tensor grad_value)
    """

    def bad(self):
        x, tell = torch.randn(3, 4), "'sigmoid', 'silu', 'gelu_none' or 'gelu_tanh', got 'relu'"
        yield lambda: OPS.gated_unit(x, x, "relu"), ValueError, tell
        yield lambda: OPS.gated_unit(x.to("meta"), x.to("meta"), "relu"), ValueError, tell
        yield lambda: gk.functional.swiglu(x, x[:2]), ValueError, "value to have the shape of gate"
        yield lambda: OPS.gated_unit(x, x.double(), "silu"), TypeError, "value to have the dtype of gate"
        yield lambda: gk.functional.geglu(x, x, "erf"), ValueError, "approximate to be 'none' or 'tanh'"
        yield lambda: gk.functional.glu(x[:, :3]), RuntimeError, "even"

    def check_strides(self, case, operands, results):
        if isinstance(case, GatedUnit):
            assert strides(results[0][0]) == strides(case.stock(*operands.inputs))


def test_one_kernel_a_pass():
    x, z, g = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    with torch.profiler.profile() as profile:
        output = gk.functional.swiglu(x, z)
        first = torch.autograd.grad(output, (x, z), g, create_graph=True)
        torch.autograd.grad(first, (x, z, g), [torch.ones_like(x), torch.ones_like(x)])
    ours = [event.name for event in profile.events() if event.name.startswith("gradnorm_kernels::gated")]
    names = ["gated_unit", "gated_unit_backward", "gated_unit_double_backward"]
    assert ours == [f"gradnorm_kernels::{name}" for name in names]
    assert not any(event.name in ("aten::mul", "aten::add") for event in profile.events())


def modules():
    layers = pytest.importorskip("timm").layers
    yield layers.SwiGLU(6, 8)
    yield layers.SwiGLU(6, 8, norm_layer=nn.LayerNorm)
    yield layers.SwiGLUPacked(6, 8)
    yield layers.GluMlp(6, 8)
    yield layers.GluMlp(6, 8, act_layer=nn.GELU)
    yield nn.Sequential(nn.Linear(6, 6), nn.GLU())


def test_modules():
    for module in modules():
        module = module.double()
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

        def gradients(module=module, x=x):
            (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
            wanted = [p for name, p in module.named_parameters() if not name.startswith("fc2.bias")]
            return first, *torch.autograd.grad(first.sin().sum(), wanted, allow_unused=True)

        expected = gradients()
        gk.fuse(module)
        assert_close(gradients(), expected)
        assert not any(type(m) in (nn.GLU, nn.SiLU, nn.GELU) for m in module.modules())
