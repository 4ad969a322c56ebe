"""Linear layers, and operands of linear layers and convolutions that are made again instead of kept."""

import copy
from dataclasses import dataclass

import contract
import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from contract import Call, Case, OpContract, assert_close
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import gradnorm_kernels as gk


@dataclass(frozen=True)
class Linear(Case):
    name: str
    input: tuple
    outputs: int
    has_bias: bool = True
    names = ("input", "weight", "bias")

    def shapes(self):
        weight = (self.outputs, self.input[-1])
        return self.input, weight, (self.outputs,) if self.has_bias else None

    def fused(self, x, weight, bias):
        return gk.functional.linear(x, weight, bias)

    def stock(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def reference(self, x, weight, bias):
        return reference.linear(x, weight, bias)

    def same_bits(self, operands):
        return False

    def calls(self, operands):
        (x, w, b), g, mask = operands.inputs, operands.grad_output, [True] * 3
        yield Call("linear", (x, w, b))
        yield Call("linear_backward", (g, x, w, mask))
        yield Call("linear_double_backward", (*operands.grad_grads, g, x, w, mask))

    def is_pytorchs(self, call):
        return True


LINEAR = [
    Linear("rows", (5, 7), 6),
    Linear("tokens", (2, 5, 7), 3),
    Linear("small", (2, 3), 2),
    Linear("small, no bias", (2, 1, 3), 2, has_bias=False),
    Linear("vector", (7,), 4),
    Linear("no rows", (0, 3, 7), 4),
]


class TestLinear(OpContract):
    cases = LINEAR
    traced = ("small", "small, no bias")
    takes_memory = False
    # PyTorch's own, which the switch leaves alone: it is right to any order.
    outlived = 2
    accepted = (("linear_double_backward", "", ""), ("linear_backward", "input", "device"))
    schemas = """
        linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor;
        linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask)
            -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias);
        linear_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias,
            Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_weight)
    """

    def bad(self):
        x, w, b = LINEAR[0].draw().inputs
        for bad, message in (
            ((x[0, 0], w, b), "expected input of shape"),
            ((x[:, 1:], w, b), "expected input of shape"),
            ((x, w[0], b), "expected weight of shape"),
            ((x, w, b[1:]), "expected bias of shape"),
        ):
            yield lambda bad=bad: gk.functional.linear(*bad), ValueError, message


class Permuted(nn.Module):
    """LayerNorm, then the copy that takes windows apart."""

    def __init__(self):
        super().__init__()
        self.norm = gk.FusedLayerNorm(6)

    def forward(self, x):
        index = torch.tensor([2, 0, 3, 1])
        return torch.ops.gradnorm_kernels.permute_rows(self.norm(x), index, index.argsort())


class ChannelsNorm(nn.LayerNorm):
    def forward(self, x):
        return gk.functional.layer_norm_2d(x, self.weight, self.bias, self.eps)


class Rearranged(nn.Module):
    """Between (N, C, H, W) and (N, H, W, C), as a view."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1) if x.shape[1] == 6 else x.permute(0, 3, 1, 2)


def batch_norm(activation, training=True):
    return gk.fuse(nn.Sequential(nn.BatchNorm2d(6), activation)).train(training)


# What comes before a product.
BEFORE = {
    "gelu": gk.FusedGeLU,
    "silu": gk.FusedSiLU,
    "hardswish": gk.FusedHardswish,
    "layer_norm": lambda: gk.FusedLayerNorm(6),
    "rms_norm": lambda: gk.FusedRMSNorm(6),
    "permuted": Permuted,
    "layer_norm_2d": lambda: ChannelsNorm(6),
    "batch_norm_relu": lambda: batch_norm(nn.ReLU()),
    "batch_norm_silu": lambda: batch_norm(nn.SiLU()),
    "batch_norm_silu, eval": lambda: batch_norm(nn.SiLU(), training=False),
    "view": lambda: nn.Sequential(gk.FusedGeLU(), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1)),
    "permute": lambda: nn.Sequential(Rearranged(), gk.FusedLayerNorm(6), Rearranged()),
}
IMAGES = ("permute", "layer_norm_2d", "batch_norm_relu", "batch_norm_silu", "batch_norm_silu, eval")


def sandwich(name):
    """A product, what `name` says, and a product, as they are and fused; and their input."""
    torch.manual_seed(0)
    product = (lambda: nn.Conv2d(6, 6, 1)) if name in IMAGES else (lambda: nn.Linear(6, 6))
    shape = (3, 6, 4, 5) if name in IMAGES else (3, 4, 6)
    model = nn.Sequential(product(), BEFORE[name](), product()).double()
    return model, gk.fuse(copy.deepcopy(model)), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def orders(model, x):
    """The gradients of a loss, of a penalty of its gradient, and of a penalty of that one's."""
    variables = [x, *model.parameters()]
    loss = model(x).pow(3).sum()
    for _ in range(3):
        gradients = torch.autograd.grad(loss, variables, create_graph=True)
        yield from gradients
        loss = sum(g.square().sum() for g in gradients)


def assert_same_orders(fused, plain, x):
    results, expected = list(orders(fused, x)), list(orders(plain, x))
    # The gradient of a bias before a batch normalisation is zero but for what others leave when they cancel.
    assert_close(results, expected, atol=1e-12 * max(t.abs().max().item() for t in expected))


def is_freed(tensor):
    return StorageWeakRef(tensor.untyped_storage()).expired


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_cheap_to_make_again_is_not_kept(name):
    plain, fused, x = sandwich(name)
    outputs, grads, calls = [], [], contract.Calls()
    fused[1].register_forward_hook(lambda module, args, output: outputs.append(is_freed(output)))
    fused[0].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda grad: grads.append(is_freed(grad))) and None
    )
    loss = fused(x).pow(3).sum()
    assert [freed() for freed in outputs] == [True]
    with calls:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.requires_grad
    # The backward of a batch normalisation would read all of its operands twice.
    assert [freed() for freed in grads] == ["batch_norm" not in name]
    # Nothing is made again for the input's gradient alone, which no operand's values are needed for.
    forwards = {"gelu", "silu", "hardswish", "native_layer_norm", "layer_norm", "rms_norm", "batch_norm_act"}
    assert not forwards & set(calls.names)
    assert_same_orders(fused, plain, x)


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "permuted", "batch_norm_silu"])
def test_a_changed_operand_is_saved(name):
    """In place, where autograd does not see it, before a product or before a copy of it takes it."""
    plain, fused, x = sandwich(name)

    def double(module, args, output):
        with torch.no_grad():
            output.mul_(2)

    for model in (plain, fused):
        place = model[1].norm if name == "permuted" else model[1]
        place.register_forward_hook(double)
    assert_same_orders(fused, plain, x)


@pytest.mark.parametrize("change", ["input", "norm.weight", "norm.bias"])
def test_a_changed_source_raises(change):
    """What an operand is made of, between the passes."""
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    norm, product = gk.FusedLayerNorm(6).double(), gk.fuse(nn.Linear(6, 6).double())
    source = h * 2
    output = product(norm(source))
    with torch.no_grad():
        {"input": source, "norm.weight": norm.weight, "norm.bias": norm.bias}[change].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), product.weight)


def test_hooks_on_saved_tensors_see_the_operands():
    plain, fused, x = sandwich("gelu")
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = list(orders(fused, x))
    assert_close(results, list(orders(plain, x)))
    assert packed.count(x.shape) > 5


@pytest.mark.parametrize("boundary", [1, 2])
def test_operands_from_a_checkpoint(boundary):
    """The packed tensors of a checkpoint may not be unpacked while a forward runs."""
    plain, fused, x = sandwich("gelu")
    count = 0

    def forward(x):
        nonlocal count
        count += 1
        return fused[:boundary](x)

    def checkpointed(x):
        return fused[boundary:](torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False))

    output = checkpointed(x)
    assert count == 1
    assert_close(torch.autograd.grad(output.pow(3).sum(), x), torch.autograd.grad(plain(x).pow(3).sum(), x))


class Quantised(torch.Tensor):
    """Knows one function by name, as weights of quantisation libraries do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:])
        return super().__torch_function__(function, types, args, kwargs)


def test_weights_that_know_pytorchs_function_by_name():
    x, product = torch.randn(3, 4), gk.fuse(nn.Linear(4, 5, bias=False))
    wanted = 2 * product(x)
    product.weight = nn.Parameter(product.weight.detach().as_subclass(Quantised))
    assert_close(product(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_source_may_be_freed_first():
    x = torch.randn(3, 6, requires_grad=True)
    activation, products = gk.FusedGeLU(), [gk.fuse(nn.Linear(6, 6)) for _ in range(2)]
    h = activation(x * 2)
    losses = [product(h).sum() for product in products]
    losses[0].backward()
    losses[1].backward(inputs=[products[1].weight])
    assert_close(products[1].weight.grad, activation(x * 2).sum(0).expand(6, 6), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_made_operand_arrive():
    """At its hooks, and where it retains them, in both passes."""
    plain, fused, x = sandwich("silu")
    seen = []
    for model in (plain, fused):
        grads = []
        seen.append(grads)

        def watch(module, args, output, grads=grads):
            output.register_hook(lambda grad: grads.append(grad.detach()))
            output.retain_grad()
            grads.append(output)

        model[1].register_forward_hook(watch)
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        grads[0] = grads[0].grad
    assert len(seen[0]) == 3
    assert_close(seen[1], seen[0])
