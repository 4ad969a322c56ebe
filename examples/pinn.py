"""Physics-informed networks (Raissi et al., https://arxiv.org/abs/1711.10561).

The residual of a differential equation is to vanish: Burgers' by a tanh network, and Poisson's by a tanh and
by a SiLU network. The second derivatives in it are differentiated once more, by the parameters.
"""

import torch
from torch import nn


def burgers(u, first, at):
    (second,) = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)
    return first[:, 1] + u * first[:, 0] - 0.01 / torch.pi * second[:, 0]


def poisson(u, first, at):
    second = [torch.autograd.grad(first[:, k].sum(), at, create_graph=True)[0][:, k] for k in range(2)]
    return torch.stack(second).sum(0) + at.sin().prod(1)


def make(device, residual=burgers, activation=nn.Tanh):
    width = 256
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), activation())]
    network = nn.Sequential(nn.Linear(2, width), activation(), *layers, nn.Linear(width, 1)).to(device)
    points = torch.rand(4096, 2, device=device)

    def step():
        network.zero_grad()
        at = points.clone().requires_grad_()
        u = network(at)[:, 0]
        (first,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        residual(u, first, at).square().mean().backward()

    return network, step


if __name__ == "__main__":
    from compare import compare

    compare("pinn", "poisson", "poisson_tanh")
