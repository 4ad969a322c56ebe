"""The table of activations, and how to differentiate each twice: shared by the tests of every device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradnorm_kernels as gk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("output", "grad_input", "grad_grad_output", "second grad_input")

FLAT, IDENTITY = (0.0, 0.0), (1.0, 0.0)


@dataclass(frozen=True)
class Activation:
    """An activation at one setting of its parameters.

    Attributes:
        stock: PyTorch's own, of the same parameters.
        limits: (slope, intercept) of the lines that it approaches on the left and on the right.
        kinks: where it is not smooth.
        curved: whether it has a second derivative, and so a double backward of its own.
        saves_output: whether its derivatives are computed from its output.
        switched: whether the switch gives PyTorch's own a fused double backward.
    """

    name: str
    stock: Callable[..., Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    limits: tuple[tuple[float, float], tuple[float, float]] = (FLAT, IDENTITY)
    kinks: tuple[float, ...] = ()
    curved: bool = True
    saves_output: bool = False
    switched: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.params.values())])

    def fused(self, input: Tensor) -> Tensor:
        if "scale" in self.params:  # of the op alone
            return self.op()(input, **self.params)
        return getattr(gk.functional, self.name)(input, **self.params)

    def stock_forward(self, input: Tensor) -> Tensor:
        return self.stock(input, **self.params)

    def reference(self, input: Tensor) -> Tensor:
        return getattr(gk.reference, self.name)(input, **self.params)

    def op(self, suffix: str = "") -> Callable[..., Any]:
        return getattr(torch.ops.gradnorm_kernels, self.name + suffix).default

    def ops(self) -> dict[str, int]:
        """The suffixes of its ops, with the number of tensors that each takes."""
        return {"": 1, "_backward": 2} | ({"_double_backward": 3} if self.curved else {})

    def limit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f and f' of the line that f approaches at each x, far from 0."""
        left, right = (torch.tensor(line, dtype=torch.float64) for line in self.limits)
        slope = torch.where(x > 0, right[0], left[0])
        return x * slope + torch.where(x > 0, right[1], left[1]), slope

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
    Activation("relu", F.relu, kinks=(0.0,), curved=False, switched=False),
    Activation("relu6", F.relu6, limits=(FLAT, (0.0, 6.0)), kinks=(0.0, 6.0), curved=False, switched=False),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        {"negative_slope": 0.125},
        ((0.125, 0.0), IDENTITY),
        kinks=(0.0,),
        curved=False,
        switched=False,
    ),
    Activation("hardsigmoid", _hardsigmoid, limits=(FLAT, (0.0, 1.0)), kinks=(-3.0, 3.0), curved=False),
    Activation("hardswish", F.hardswish, kinks=(-3.0, 3.0)),
]
each_activation = pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
# Where the activation's own mathematics has no part: one of each way to save and to differentiate.
each_kind = pytest.mark.parametrize(
    "act", [act for act in ACTIVATIONS if str(act) in ("gelu-tanh", "tanh", "relu")], ids=str
)


def all_orders_by_autograd(
    function: Callable[[Tensor], Tensor], v: Tensor, g: Tensor, x: Tensor
) -> list[Tensor]:
    """NAMES of any differentiable function."""
    g, x = g.detach().requires_grad_(), x.detach().requires_grad_()
    output = function(x)
    (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
    second = torch.autograd.grad(grad_input, (g, x), v, materialize_grads=True)
    return [output.detach(), grad_input.detach(), *second]


def assert_no_worse_than_stock(
    act: Activation, fused: list[Tensor], v: Tensor, g: Tensor, x: Tensor, floor: float = 0.0, ulps: int = 0
) -> None:
    """The error is at most twice stock's, plus a floor and, if allowed, units in the last place.

    A comparison of two maxima says something of accuracy only over many elements.
    """
    if x.dtype == torch.float64:
        # The reference itself rounds: a few units in the last place of values up to 30.
        floor = max(floor, 5e-14)
    reference = all_orders_by_autograd(act.reference, v.double(), g.double(), x.double())
    stock = all_orders_by_autograd(act.stock_forward, v, g, x)
    for name, ours, theirs, exact in zip(NAMES, fused, stock, reference, strict=True):
        assert (ours.dtype, ours.shape, ours.device) == (x.dtype, exact.shape, x.device), name
        if ours.numel():
            error = (ours.double() - exact).abs().max().item()
            stock_error = (theirs.double() - exact).abs().max().item()
            ulp = torch.finfo(x.dtype).eps * exact.abs().max().item()
            if math.isnan(stock_error):  # mish, whose intermediates overflow in float16
                stock_error = ulp
            tiny = floor + ulps * ulp
            assert error <= 2 * stock_error + tiny, f"{name}: {error:.3e}, stock {stock_error:.3e}"
