"""A force field of pairs: the negative gradient of an energy of distances, by a SiLU network, is fitted."""

import torch
import torch.nn.functional as F
from torch import nn


def make(device):
    atoms, features = 24, 64
    pair = nn.Sequential(
        nn.Linear(features, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1)
    ).to(device)
    positions, forces = torch.randn(2, 32, atoms, 3, device=device)
    centres = torch.linspace(0, 6, features, device=device)
    i, j = torch.triu_indices(atoms, atoms, 1, device=device)

    def step():
        pair.zero_grad()
        at = positions.clone().requires_grad_()
        distances = (at[:, i] - at[:, j]).norm(dim=-1, keepdim=True)
        energy = pair(torch.exp(-(distances - centres).square())).sum()
        (gradient,) = torch.autograd.grad(energy, at, create_graph=True)
        F.mse_loss(-gradient, forces).backward()

    return pair, step


if __name__ == "__main__":
    from compare import compare

    compare("force_field")
