"""The signed distance to a sphere by a network of sines (Sitzmann et al., https://arxiv.org/abs/2006.09661).

Its gradient is to have norm 1 everywhere (the eikonal equation) and to be the normal on the surface.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def make(device):
    width = 256
    layers = [nn.Linear(3, width), *(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, 1)]
    for index, layer in enumerate(layers):
        bound = 1 / layer.in_features if index == 0 else (6 / layer.in_features) ** 0.5 / 30
        nn.init.uniform_(layer.weight, -bound, bound)
    network = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, Sine())), layers[-1])
    network.to(device)
    normals = F.normalize(torch.randn(2048, 3, device=device), dim=-1)
    points = torch.cat([0.5 * normals, 2 * torch.rand(2048, 3, device=device) - 1])

    def step():
        network.zero_grad()
        at = points.clone().requires_grad_()
        distance = network(at)
        (gradient,) = torch.autograd.grad(distance.sum(), at, create_graph=True)
        on_surface, elsewhere = distance.chunk(2)
        loss = 3000 * on_surface.abs().mean() + 100 * torch.exp(-100 * elsewhere.abs()).mean()
        loss = loss + 100 * (1 - F.cosine_similarity(gradient[:2048], normals, dim=-1)).mean()
        (loss + 50 * (gradient.norm(dim=-1) - 1).abs().mean()).backward()

    return network, step


if __name__ == "__main__":
    from compare import compare

    compare("siren")
