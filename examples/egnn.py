"""Energy and forces of molecules by an equivariant graph network (Satorras et al., https://arxiv.org/abs/2102.09844)."""

import torch
import torch.nn.functional as F
from torch import nn


def perceptron(inputs, features, outputs):
    return nn.Sequential(nn.Linear(inputs, features), nn.SiLU(), nn.Linear(features, outputs))


class Layer(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.edge = nn.Sequential(perceptron(2 * features + 1, features, features), nn.SiLU())
        self.coordinate = perceptron(features, features, 1)
        self.node = perceptron(2 * features, features, features)

    def forward(self, h, x, i, j):
        difference = x[i] - x[j]
        squared = difference.square().sum(-1, keepdim=True)
        messages = self.edge(torch.cat([h[i], h[j], squared], -1))
        shift = difference / (squared.sqrt() + 1) * self.coordinate(messages)
        gathered = torch.zeros_like(h).index_add(0, i, messages)
        return h + self.node(torch.cat([h, gathered], -1)), x.index_add(0, i, shift)


class EGNN(nn.Module):
    def __init__(self, features=64, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(100, features)
        self.layers = nn.ModuleList(Layer(features) for _ in range(layers))
        self.energy = perceptron(features, features, 1)

    def forward(self, numbers, positions, i, j):
        h, x = self.embedding(numbers), positions
        for layer in self.layers:
            h, x = layer(h, x, i, j)
        return self.energy(h)


def make(device):
    molecules, atoms = 16, 12
    model = EGNN().to(device)
    numbers = torch.randint(1, 10, (molecules * atoms,), device=device)
    positions, forces = torch.randn(2, molecules * atoms, 3, device=device)
    energies = torch.randn(molecules, device=device)
    # Every two different atoms of each molecule.
    molecule = torch.arange(molecules * atoms, device=device) // atoms
    i, j = (molecule[:, None] == molecule).fill_diagonal_(False).nonzero().unbind(1)

    def step():
        model.zero_grad()
        at = positions.clone().requires_grad_()
        energy = model(numbers, at, i, j).view(molecules, atoms).sum(1)
        (gradient,) = torch.autograd.grad(energy.sum(), at, create_graph=True)
        (0.01 * F.mse_loss(energy, energies) + F.mse_loss(-gradient, forces)).backward()

    return model, step


if __name__ == "__main__":
    from compare import compare

    compare("egnn")
