"""Batch normalisation and the activation after it on the CPU: their table, and the modules that take it."""

from dataclasses import dataclass, replace

import contract
import pytest
import reference
import test_batch_norm
import torch
import torch.nn.functional as F
from contract import OPS, Call, Calls, assert_close
from hypothesis import strategies as st
from test_batch_norm import EPS, BatchNorm
from torch import nn

import gradnorm_kernels as gk

# Of each activation, its parameters, PyTorch's own, and the reference.
ACTIVATIONS = {
    "relu": ((), F.relu, reference.relu),
    "relu6": ((), F.relu6, reference.relu6),
    "leaky_relu": ((0.2,), F.leaky_relu, reference.leaky_relu),
    "hardswish": ((), F.hardswish, reference.hardswish),
    "silu": ((), F.silu, reference.silu),
    "mish": ((), F.mish, reference.mish),
    "gelu_none": ((), F.gelu, reference.gelu),
    "gelu_tanh": ((), lambda x: F.gelu(x, approximate="tanh"), lambda x: reference.gelu(x, "tanh")),
}


@dataclass(frozen=True)
class BatchNormAct(BatchNorm):
    activation: str = "silu"

    def __str__(self):
        return f"{self.activation}-{super().__str__()}"

    @property
    def params(self):
        return ACTIVATIONS[self.activation][0]

    def fused(self, x, weight, bias):
        def function(*args, **options):
            return gk.functional.batch_norm_act(
                *args, **options, activation=self.activation, params=self.params
            )

        return self.bound(function, x, weight, bias)

    def stock(self, x, weight, bias):
        return ACTIVATIONS[self.activation][1](super().stock(x, weight, bias), *self.params)

    def reference(self, x, weight, bias):
        return ACTIVATIONS[self.activation][2](super().reference(x, weight, bias), *self.params)

    def calls(self, operands):
        (x, w, b), g = operands.inputs, operands.grad_output
        end = (self.training, EPS, self.activation, list(self.params))
        yield Call("batch_norm_act", (x, w, b, *self.running(x), self.training, 0.1, *end[1:]))
        tail = (x, w, b, *self.statistics(x, w), *end)
        yield Call("batch_norm_act_backward", (g, *tail, [True, w is not None, b is not None]))
        yield Call("batch_norm_act_double_backward", (operands.grad_grads[0], g, *tail))

    def roundings(self, dtype):
        # Of the activation's input, in which one of ours and one of stock's meet its derivatives.
        return max(super().roundings(dtype), 4)

    def is_pytorchs(self, call):
        return call.name == "batch_norm_act"

    @property
    def large(self):
        return replace(self, shape=super().large.shape)

    def passes(self, switch):
        """The forward is PyTorch's, and then the activation in place."""
        if 0 in self.shape:
            return None
        double = (["batch_norm_act_double_backward"], 5)
        return [(None, 4), (["batch_norm_act_backward"], 3), double, double]


CASES = [
    *(BatchNormAct((3, 19, 7, 11), True, activation=name) for name in ACTIVATIONS),
    *(BatchNormAct((3, 19, 7, 11), False, activation=name) for name in ("silu", "relu", "leaky_relu")),
    *(BatchNormAct((3, 19, 7, 11), training, channels_last=True) for training in (True, False)),
    BatchNormAct((700, 33), True),
    BatchNormAct((2, 2, 40, 50), True, affine=False, activation="hardswish"),
    BatchNormAct((0, 3, 4, 4), True),
    BatchNormAct((2, 3, 0, 4), False, activation="relu"),
    *(BatchNormAct((4, 3, 4), True, activation=name) for name in ("relu", "gelu_none")),
    *(BatchNormAct((4, 3, 4), training) for training in (True, False)),
    BatchNormAct((4, 3, 4), True, affine=False, activation="gelu_tanh"),
]


class TestBatchNormAct(test_batch_norm.TestBatchNorm):
    cases = CASES
    traced = ("silu-4x3x4-train", "silu-4x3x4-eval")
    kernels = tuple(str(case) for case in CASES if case.shape == (3, 19, 7, 11))
    schemas = """
        batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,
            Tensor(b!)? running_var, bool training, float momentum, float eps, str activation,
            float[] params) -> Tensor;
        batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias,
            Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd,
            bool training, float eps, str activation, float[] params, bool[3] output_mask)
            -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        batch_norm_act_double_backward(Tensor grad_grad_input, Tensor grad_output, Tensor input,
            Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? save_mean,
            Tensor? save_invstd, bool training, float eps, str activation, float[] params)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)
    """
    accepted = (
        *(("batch_norm_act", *rest) for _, *rest in test_batch_norm.TestBatchNorm.accepted[:2]),
        *test_batch_norm.TestBatchNorm.accepted[2:],
        ("", "bias", "dtype"),
    )
    random_cases = st.builds(
        BatchNormAct,
        st.tuples(st.integers(8, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
        *[st.booleans()] * 3,
        st.sampled_from(list(ACTIVATIONS)),
    )

    @pytest.fixture
    def ours(self):
        """The switch has nothing to do with the op: what it makes of the two parts is in their own tests."""
        return contract.by_function

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nan_and_inf_reach_what_they_reach_in_the_reference(self, case, dtype, ours):
        # Of the others a piece is chosen for a NaN, by PyTorch and by us.
        if case.activation in ("silu", "mish", "gelu_none", "gelu_tanh"):
            super().test_nan_and_inf_reach_what_they_reach_in_the_reference(case, dtype, ours)

    def bad(self):
        x, c = torch.randn(4, 3), torch.ones(3)
        call = gk.functional.batch_norm_act
        yield lambda: call(x, c, c, activation="tanh"), ValueError, "activation to be one of 'relu', .*'tanh'"
        yield lambda: call(x, c, c, activation="leaky_relu"), ValueError, "params to have 1 values"
        yield lambda: call(x, None, c, activation="relu"), ValueError, "running_mean to be given"
        yield lambda: call(x[0], c, c, activation="relu"), ValueError, "input to have at least 2 dimensions"
        tail = (c, c, c, c, False, EPS, "relu", [0.1])
        backward, double = OPS.batch_norm_act_backward, OPS.batch_norm_act_double_backward
        yield lambda: backward(x, x, c, c, *tail, [True] * 3), ValueError, "params to have 0 values"
        yield lambda: double(x, x, x, c, c, *tail), ValueError, "params to have 0 values"
        tail = (c, c, None, c, True, EPS, "relu", [])
        yield lambda: double(x, x, x, c, c, *tail), ValueError, "save_mean to be given where training"


def pair(act=nn.SiLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), act(), nn.Conv2d(5, 2, 1)).double()


def ops_of(model, x):
    """Names of the nodes of the graph of the output."""
    seen, todo = set(), [model(x).grad_fn]
    names = []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            todo += [function for function, _ in node.next_functions]
    return names


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ReLU6, nn.LeakyReLU])
def test_fuse_takes_pairs_in_a_sequential(act):
    model, x = pair(act=act), torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert type(gk.fuse(pair(act=act)[1:3])) is not nn.Sequential  # the pair alone
    fused = gk.fuse(pair(act=act))
    assert_close(fused(x), model(x))
    assert len(ops_of(fused, x)) == len(ops_of(model, x)) - 1
    assert_close(fused[1].running_var, model[1].running_var)
    gk.unfuse(fused)
    assert type(fused) is nn.Sequential


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_float16_alone_is_two_ops(dtype):
    model, x = gk.fuse(pair()).to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    # The one op has PyTorch's own activation, in place.
    assert {"silu", "silu_"} & set(names_of(lambda: model(x))) == {
        "silu" if dtype == torch.float16 else "silu_"
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_float32", [True, False], ids=["float32", "bfloat16"])
def test_running_statistics_beside_a_bfloat16_input(training, of_float32):
    """They are updated once, in their own dtype, which autograd is told of."""
    x = torch.randn(4, 3, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    running = [t if of_float32 else t.bfloat16() for t in (torch.zeros(3), torch.ones(3))]
    expected = [t.double() for t in running]
    F.batch_norm(x.double(), *expected, training=training)
    versions = [t._version for t in running]
    gk.functional.batch_norm_act(x, *running, activation="silu", training=training).sum().backward()
    for value, wanted, before in zip(running, expected, versions, strict=True):
        assert_close(value.double(), wanted, rtol=1e-5 if of_float32 else 1e-2, atol=1e-6)
        assert value._version == before + training


def names_of(run):
    with Calls() as calls:
        run()
    return calls.names


def test_hooks_of_the_parts_are_called():
    model, x = gk.fuse(pair()), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    seen = []
    for k in (1, 2):
        handle = model[k].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        y = model(x)
        handle.remove()
        assert_close(model(x), y)
    (_, z), (z_again, a) = seen
    assert_close(z, z_again)
    assert_close(F.silu(z), a)


def test_fused_blocks_of_resnet():
    timm = pytest.importorskip("timm")
    for name, pairs in (("resnet18", 9), ("resnet50", 33), ("seresnet50", 33)):
        model = timm.create_model(name, num_classes=0).double().eval()
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        expected = model(x)
        gk.fuse(model)
        assert_close(model(x), expected)
        assert sum("batch_norm_act" in op for op in ops_of(model, x)) == pairs, name
        assert_close(model.forward_intermediates(x)[0], model.forward_features(x))
