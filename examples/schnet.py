"""Energy and forces of molecules by a SchNet (Schütt et al., https://arxiv.org/abs/1706.08566)."""

import torch
import torch.nn.functional as F
from torch import nn


class ShiftedSoftplus(nn.Module):
    def forward(self, x):
        return F.softplus(x) - 0.6931472


class Interaction(nn.Module):
    """A convolution over the neighbours, whose weights are a network's of the distance."""

    def __init__(self, features, gaussians):
        super().__init__()
        self.filters = nn.Sequential(
            nn.Linear(gaussians, features), ShiftedSoftplus(), nn.Linear(features, features)
        )
        self.before = nn.Linear(features, features, bias=False)
        self.after = nn.Sequential(
            nn.Linear(features, features), ShiftedSoftplus(), nn.Linear(features, features)
        )

    def forward(self, x, i, j, expanded):
        messages = self.before(x)[j] * self.filters(expanded)
        return x + self.after(torch.zeros_like(x).index_add(0, i, messages))


class SchNet(nn.Module):
    def __init__(self, features=64, gaussians=50, interactions=3, cutoff=5.0):
        super().__init__()
        self.embedding = nn.Embedding(100, features)
        self.interactions = nn.ModuleList(Interaction(features, gaussians) for _ in range(interactions))
        self.energy = nn.Sequential(nn.Linear(features, 32), ShiftedSoftplus(), nn.Linear(32, 1))
        self.register_buffer("centres", torch.linspace(0, cutoff, gaussians))

    def forward(self, numbers, positions, i, j):
        distances = (positions[i] - positions[j]).norm(dim=-1, keepdim=True)
        expanded = torch.exp(-10 * (distances - self.centres).square())
        x = self.embedding(numbers)
        for interaction in self.interactions:
            x = interaction(x, i, j, expanded)
        return self.energy(x)


def pairs(molecules, atoms, device):
    """Of every two different atoms of each molecule."""
    molecule = torch.arange(molecules * atoms, device=device) // atoms
    same = molecule[:, None] == molecule
    return (same.fill_diagonal_(False)).nonzero().unbind(1)


def make(device):
    molecules, atoms = 16, 20
    model = SchNet().to(device)
    numbers = torch.randint(1, 10, (molecules * atoms,), device=device)
    positions, forces = 2 * torch.randn(2, molecules * atoms, 3, device=device)
    energies = torch.randn(molecules, device=device)
    i, j = pairs(molecules, atoms, device)

    def step():
        model.zero_grad()
        at = positions.clone().requires_grad_()
        energy = model(numbers, at, i, j).view(molecules, atoms).sum(1)
        (gradient,) = torch.autograd.grad(energy.sum(), at, create_graph=True)
        (0.01 * F.mse_loss(energy, energies) + F.mse_loss(-gradient, forces)).backward()

    return model, step


if __name__ == "__main__":
    from compare import compare

    compare("schnet")
