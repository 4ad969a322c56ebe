"""The table of activations, and how to differentiate each twice: shared by the tests of every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
from contract import DTYPES, OPS, Call, Case, Operands, flat, yardstick
from torch import Tensor

import gradnorm_kernels as gk

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "NAMES",
    "Activation",
    "all_orders_by_autograd",
    "assert_no_worse_than_stock",
    "third_order",
]
NAMES = ("output", "grad_input", "grad_grad_output", "second grad_input")

FLAT, IDENTITY = (0.0, 0.0), (1.0, 0.0)


@dataclass(frozen=True)
class Activation(Case):
    """An activation at one setting of its parameters.

    Attributes:
        function: PyTorch's own, of the same parameters.
        limits: (slope, intercept) of the lines that it approaches on the left and on the right; None where
            there are none.
        kinks: where it is not smooth.
        gradual: whether its derivatives do not fall exponentially to those of the lines: as powers of x, or
            not at all.
        curved: whether it has a second derivative, and so a double backward of its own.
        saves_output: whether its derivatives are computed from its output.
        aten: the name of PyTorch's own op where it is another; None where PyTorch's own is made of several,
            which the switch leaves alone.
    """

    name: str
    function: Callable[..., Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    limits: tuple[tuple[float, float], tuple[float, float]] | None = (FLAT, IDENTITY)
    kinks: tuple[float, ...] = ()
    gradual: bool = False
    curved: bool = True
    saves_output: bool = False
    aten: str | None = ""
    shape: tuple[int, ...] = (2, 3, 2, 3)

    def __str__(self) -> str:
        shape = [] if self.shape == Activation.shape else ["x".join(map(str, self.shape))]
        return "-".join([self.name, *map(str, self.params.values()), *shape])

    @property
    def wrong_in_pytorch(self) -> tuple[str, ...]:
        """The second derivative of abs, of which softsign is made, is of no subclass."""
        return ("tensor subclasses",) if self.name == "softsign" else ()

    def shapes(self) -> tuple[tuple[int, ...]]:
        return (self.shape,)

    def draw(self, dtype: torch.dtype = torch.float64, parameters: Any = None) -> Operands:
        """No input is so near to a kink that a finite difference would cross it."""
        operands = super().draw()
        for kink in self.kinks:
            near = (operands.inputs[0] - kink).abs() < 0.1
            operands.inputs[0][near] += 0.3
        return operands.map(lambda t: t.to(dtype))

    def same_bits(self, operands: Operands) -> bool:
        # ATen's forward, which saves the output, has a scalar loop that differs from its vectorised one.
        return not self.saves_output

    def fused(self, input: Tensor) -> Tensor:
        if "scale" in self.params:  # of the op alone
            return self.op()(input, **self.params)
        return getattr(gk.functional, self.name)(input, **self.params)

    def stock(self, input: Tensor) -> Tensor:
        return self.function(input, **self.params)

    stock_forward = stock

    def reference(self, input: Tensor) -> Tensor:
        return getattr(reference, self.name)(input, **self.params)

    def op(self, suffix: str = "") -> Callable[..., Any]:
        return getattr(OPS, self.name + suffix).default

    def ops(self) -> dict[str, int]:
        """The suffixes of its ops, with the number of tensors that each takes."""
        of_curved = {"_double_backward": 3, "_triple_backward": 5} if self.curved else {}
        return {"": 1, "_backward": 2} | of_curved

    def calls(self, operands: Operands) -> Any:
        """A backward of the output is of any output, not of this activation's only."""
        v, g, x = operands.grad_grads[0], operands.grad_output, operands.inputs[0]
        tensors = (g, v, v, g, x)
        for suffix, count in self.ops().items():
            yield Call(self.name + suffix, (*tensors[-count:], *self.params.values()))

    def passes(self, switch: bool) -> list[tuple[list[str] | None, float | None]] | None:
        if not self.shape or 0 in self.shape:
            return None
        if switch and self.aten is None:
            return None
        first, double = f"{self.name}_backward", f"{self.name}_double_backward"
        if switch and self.aten:
            return [(None, None), ([f"{self.aten}_backward"], None), ([double], 5), ([first], 3)]
        # From the output to the input is one more first backward.
        second = ([double, first], 8) if self.saves_output else ([double], 5)
        if self.curved:
            return [([self.name], 2), ([first], 3), second, ([first], 3)]
        # Of the double backward, the zeros that torch.autograd.grad asks for: test_piecewise_linear.py.
        if switch:  # under names of PyTorch's own; hard sigmoid is here in parts
            return None if self.name == "hardsigmoid" else [(None, 2), (None, 3), (None, None), (None, 3)]
        return [([self.name], 2), ([first], 3), ([first, "zeros_like"], None), ([first], 3)]

    def limit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f and f' of the line that f approaches at each x, far from 0."""
        assert self.limits is not None
        left, right = (torch.tensor(line, dtype=torch.float64) for line in self.limits)
        slope = torch.where(x > 0, right[0], left[0])
        return x * slope + torch.where(x > 0, right[1], left[1]), slope

    def far_out(self, x: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Gradients, v and g in one, with the NAMES in float64 that they lead to at x far from 0."""
        ones = torch.ones_like(x)
        for gradient in (ones, torch.full_like(x, torch.finfo(x.dtype).max)):
            wide = x.double(), gradient.double()
            if not self.gradual:
                line, slope = self.limit(wide[0])
                yield gradient, [line, wide[1] * slope, wide[1] * slope, torch.zeros_like(wide[0])]
            # Of the largest float64 there is no wider one to multiply.
            elif gradient is ones or x.dtype != torch.float64:
                yield gradient, all_orders_by_autograd(self.reference, wide[1], wide[1], wide[0])

    def all_orders(self, v: Tensor, g: Tensor, x: Tensor, namespace: Any = None) -> list[Tensor]:
        """NAMES by the ops, or by those functions of their names that namespace has."""

        def call(suffix: str, *tensors: Tensor) -> Any:
            function = getattr(namespace, self.name + suffix, None) or self.op(suffix)
            return function(*tensors, **self.params)

        output = call("", x)
        saved = output if self.saves_output else x
        grad_input = call("_backward", g, saved)
        if not self.curved:
            return [output, grad_input, call("_backward", v, x), torch.zeros_like(grad_input)]
        grad_grad_output, second = call("_double_backward", v, g, saved)
        if self.saves_output:
            second = call("_backward", second, saved)
        return [output, grad_input, grad_grad_output, second]


def _hardsigmoid(x: Tensor) -> Tensor:
    """PyTorch's own has no second derivative."""
    return (F.hardtanh(x, -3.0, 3.0) + 3) / 6


def third_order(
    function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, v: Tensor, g: Tensor, x: Tensor
) -> list[Tensor]:
    """The gradients of v, g and x, of the double backward's results, whose gradients are a and b."""
    v, g, x = (t.detach().requires_grad_() for t in (v, g, x))
    (first,) = torch.autograd.grad(function(x), x, g, create_graph=True)
    second = torch.autograd.grad(first, (g, x), v, create_graph=True)
    return list(torch.autograd.grad(second, (v, g, x), (a, b)))


ACTIVATIONS = [
    Activation("gelu", F.gelu, {"approximate": "none"}),
    Activation("gelu", F.gelu, {"approximate": "tanh"}),
    Activation("silu", F.silu),
    Activation("mish", F.mish),
    Activation("softplus", F.softplus, {"beta": 1.0, "threshold": 20.0}, kinks=(20.0,)),
    Activation("softplus", F.softplus, {"beta": 2.5, "threshold": 5.0}, kinks=(2.0,)),
    Activation("elu", F.elu, {"alpha": 1.5}, ((0.0, -1.5), IDENTITY), kinks=(0.0,)),
    Activation(
        "elu",
        torch.ops.aten.elu,
        {"alpha": -0.5, "scale": 0.75, "input_scale": 2.0},
        ((0.0, 0.375), (0.75, 0.0)),
        kinks=(0.0,),
    ),
    Activation("tanh", torch.tanh, limits=((0.0, -1.0), (0.0, 1.0)), saves_output=True),
    Activation("sigmoid", torch.sigmoid, limits=(FLAT, (0.0, 1.0)), saves_output=True),
    Activation("relu", F.relu, kinks=(0.0,), curved=False),
    Activation("relu6", F.relu6, limits=(FLAT, (0.0, 6.0)), kinks=(0.0, 6.0), curved=False),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        {"negative_slope": 0.125},
        ((0.125, 0.0), IDENTITY),
        kinks=(0.0,),
        curved=False,
    ),
    Activation("hardsigmoid", _hardsigmoid, limits=(FLAT, (0.0, 1.0)), kinks=(-3.0, 3.0), curved=False),
    Activation("hardswish", F.hardswish, kinks=(-3.0, 3.0)),
    Activation(
        "softsign", F.softsign, limits=((0.0, -1.0), (0.0, 1.0)), kinks=(0.0,), gradual=True, aten=None
    ),
    Activation("logsigmoid", F.logsigmoid, limits=(IDENTITY, FLAT), aten="log_sigmoid"),
    Activation("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), aten=None),
    Activation(
        "squared_relu",
        lambda x: F.relu(x).square(),
        limits=None,
        kinks=(0.0,),
        gradual=True,
        aten=None,
    ),
    Activation("sin", torch.sin, limits=None, gradual=True),
    Activation("cos", torch.cos, limits=None, gradual=True),
    # A power of two, by which no product is rounded.
    Activation(
        "sin",
        lambda x, frequency: torch.sin(frequency * x),
        {"frequency": 0.5},
        limits=None,
        gradual=True,
        aten=None,
    ),
]
each_activation = pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
# Where the activation's own mathematics has no part: one of each way to save and to differentiate.
KINDS = [act for act in ACTIVATIONS if str(act) in ("gelu-tanh", "tanh", "relu")]
each_kind = pytest.mark.parametrize("act", KINDS, ids=str)


def all_orders_by_autograd(
    function: Callable[[Tensor], Tensor], v: Tensor, g: Tensor, x: Tensor
) -> list[Tensor]:
    """NAMES of any differentiable function."""
    return flat(Operands([x], g, [v]).orders(function))


def assert_no_worse_than_stock(
    act: Activation, fused: list[Tensor], v: Tensor, g: Tensor, x: Tensor, floor: float = 0.0, ulps: int = 0
) -> None:
    operands = Operands([x], g, [v])
    exact = flat(operands.map(Tensor.double).orders(act.reference))
    contract.assert_no_worse_than_stock(act, fused, yardstick(act, operands), exact, ulps, floor)
