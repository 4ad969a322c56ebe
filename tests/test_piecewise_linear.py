"""Ops of linear pieces under the switch: PyTorch's derivatives, without zeros that nobody asked for."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from contract import Calls, assert_close
from torch import nn

import gradnorm_kernels as gk

FUNCTIONS = {
    "relu": F.relu,
    "relu, in place": lambda x: F.relu(x * 1, inplace=True),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu of a negative slope": lambda x: F.leaky_relu(x, -0.5),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.7),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 2),
    "reflection_pad2d": lambda x: F.pad(x, (1, 2, 1, 1), "reflect"),
    "replication_pad3d": lambda x: F.pad(x, (1, 2, 1, 1, 0, 1), "replicate"),
}


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_pytorchs(name, x):
    function = FUNCTIONS[name]

    def gradients():
        output = function(x.expm1())  # not a sine, whose backward under the switch is ours
        g = output.detach().cos().requires_grad_()
        (first,) = torch.autograd.grad(output, x, g, create_graph=True)
        second = torch.autograd.grad(first.expm1().sum(), (x, g), create_graph=True)
        return output, first, *second, *torch.autograd.grad(second[0].expm1().sum(), (x, g))

    def of_the_input_alone():
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)

    expected, zeros = gradients(), torch.zeros_like(x)
    with gk.set_fused_double_backward(True):
        assert_close(gradients(), expected, rtol=0, atol=0)
        assert_close(of_the_input_alone(), [zeros], rtol=0, atol=0)
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        first.sum().backward()
        if name != "relu, in place":  # whose input is no leaf
            assert torch.equal(x.grad, zeros)
        torch.func.hessian(lambda x: function(x).square().sum())(x.detach())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_writes_no_zeros(name, x):
    """What comes from elsewhere is not added to."""
    with gk.set_fused_double_backward(True):
        ours = calls_of_a_step(FUNCTIONS[name], x)
    assert "zeros_like" not in ours and x.grad is None
    assert len(ours) < len(calls_of_a_step(FUNCTIONS[name], x)) + (name == "relu, in place")


def calls_of_a_step(function, x):
    x.grad, grad = None, torch.ones_like(function(x)).requires_grad_()
    with Calls() as counted:
        (first,) = torch.autograd.grad(function(x * 2), x, grad, create_graph=True)
        first.square().sum().backward()
    return counted.names


MODULES = [
    nn.AdaptiveAvgPool2d(3),
    nn.AdaptiveMaxPool2d(2, return_indices=True),
    nn.AvgPool2d(2),
    nn.Hardshrink(),
    nn.Hardtanh(-0.3, 0.7),
    nn.MaxPool2d(2),
    nn.MaxPool3d(2),
    nn.ReflectionPad2d(1),
    nn.ReplicationPad3d(1),
    nn.Softshrink(),
    nn.Threshold(0.1, 20.0),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_fused_modules(module, x):
    """By fuse as by the switch, after which a model may be saved."""

    def function(x):
        result = module(x)
        return result[0] if isinstance(result, tuple) else result

    expected, stock = function(x), calls_of_a_step(function, x)
    gk.fuse(module)
    assert torch.equal(function(x), expected)
    ours = calls_of_a_step(function, x)
    assert "zeros_like" not in ours and x.grad is None and len(ours) < len(stock)
    assert type(pickle.loads(pickle.dumps(module))) is type(module)

    def slope(x):
        return torch.func.grad(lambda x: function(x).sum())(x).sum()

    assert torch.equal(torch.func.grad(slope)(x.detach()), torch.zeros_like(x))


def test_fused_modules_do_the_same(x):
    for module in (gk.FusedReLU(), gk.FusedReLU6(), gk.FusedLeakyReLU(0.2), gk.FusedHardsigmoid()):
        (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        assert torch.equal(second, torch.zeros_like(x))
        hidden = x * 2
        (first,) = torch.autograd.grad(module(hidden).sum(), hidden, create_graph=True)
        first.sum().backward(inputs=[x])
        assert torch.equal(x.grad, torch.zeros_like(x))
        x.grad = None
        (first,) = torch.autograd.grad(module(x * 2).sum(), x, create_graph=True)
        first.sum().backward()
        assert x.grad is None
