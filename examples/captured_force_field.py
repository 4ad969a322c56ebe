"""Energy and forces captured by ``make_fx``, compiled, and trained: stock and fused.

    python examples/captured_force_field.py [--backend aot_eager]

As force-field projects do it for a compiler, which cannot differentiate twice: the graph holds the energy and
its gradient at the positions, with symbolic shapes, and is differentiated once more, by the parameters. The
model is a transformer over atoms, whose attention is biased by their distances.
"""

import argparse
import copy
import functools
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

import gradnorm_kernels as gk


class Layer(nn.Module):
    def __init__(self, width, heads, gaussians):
        super().__init__()
        self.bias = nn.Sequential(nn.Linear(gaussians, width), nn.SiLU(), nn.Linear(width, heads))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, expanded):
        normed = self.norm1(x)
        bias = self.bias(expanded).permute(0, 3, 1, 2).flatten(0, 1)
        x = x + self.attention(normed, normed, normed, attn_mask=bias, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width=64, heads=4, gaussians=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.layers = nn.ModuleList(Layer(width, heads, gaussians) for _ in range(layers))
        self.energy = nn.Linear(width, 1)
        self.register_buffer("centres", torch.linspace(0, 6, gaussians))

    def forward(self, numbers, positions):
        difference = positions[:, :, None] - positions[:, None]
        # An atom is a little away from itself, where a distance has no derivative.
        distances = (difference.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        expanded = torch.exp(-(distances - self.centres).square())
        x = self.embedding(numbers)
        for layer in self.layers:
            x = layer(x, expanded)
        return self.energy(x).sum([1, 2])


def molecules(number, atoms):
    return torch.randint(1, 10, (number, atoms)), *torch.randn(2, number, atoms, 3)


def energy_and_forces(model, numbers, positions):
    energy = model(numbers, positions)
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    return energy, -gradient


def capture(model, numbers, positions):
    """The graph of the function above for any number of molecules and atoms; parameters are the model's."""
    graph = make_fx(
        functools.partial(energy_and_forces, model), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(numbers, positions.clone().requires_grad_())
    # What autograd saved for the gradient is detached there, and would have no derivative.
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def gradients(model, function, numbers, positions, forces):
    """Of a loss of energy and forces, by each parameter."""
    model.zero_grad()
    energy, predicted = function(numbers, positions.clone().requires_grad_())
    (energy.square().mean() + F.mse_loss(predicted, forces)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    backend = parser.parse_args().backend
    torch.manual_seed(0)
    stock = Transformer()
    # Of other sizes than the heads, to which the symbols would be tied.
    batches = [molecules(6, 10), molecules(5, 14)]
    expected = [gradients(stock, functools.partial(energy_and_forces, stock), *batch) for batch in batches]
    for name, model in {"stock": stock, "fused": gk.fuse(copy.deepcopy(stock))}.items():
        graph = capture(model, *batches[0][:2])
        compiled = torch.compile(graph, backend=backend, dynamic=True)
        for batch, wanted in zip(batches, expected, strict=True):
            # Some are 0 but for rounding.
            smallest = max(gradient.abs().max() for gradient in wanted.values()) / 1000
            for key, gradient in gradients(model, compiled, *batch).items():
                unit = wanted[key].abs().max().clamp(min=smallest)
                torch.testing.assert_close(gradient / unit, wanted[key] / unit, rtol=0, atol=1e-4)
        ops = Counter(str(node.target) for node in graph.graph.nodes if isinstance(node.target, OpOverload))
        print(f"\n{name}, compiled: gradients are those of stock's eager step. Ops in the graph:")
        print(", ".join(f"{count} {op}" for op, count in ops.most_common()))


if __name__ == "__main__":
    main()
