"""A signed distance by implicit geometric regularisation (Gropp et al., https://arxiv.org/abs/2002.10099).

A network of sharp Softplus units with weight normalisation and a skip connection vanishes on the points of a
surface, and its gradient has norm 1 (the eikonal equation) around it.
"""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class Distance(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        sizes = [(3, width), (width, width), (width, width - 3), (width, width), (width, width)]
        self.layers = nn.ModuleList(weight_norm(nn.Linear(*size)) for size in sizes)
        self.last = nn.Linear(width, 1)
        self.activation = nn.Softplus(beta=100)

    def forward(self, at):
        x = at
        for index, layer in enumerate(self.layers):
            if index == 3:
                x = torch.cat([x, at], -1) / 2**0.5
            x = self.activation(layer(x))
        return self.last(x)


def make(device):
    network = Distance().to(device)
    surface = 0.5 * nn.functional.normalize(torch.randn(2048, 3, device=device), dim=-1)
    around = torch.cat([surface + 0.1 * torch.randn_like(surface), 2 * torch.rand_like(surface) - 1])

    def step():
        network.zero_grad()
        at = around.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(at).sum(), at, create_graph=True)
        eikonal = (gradient.norm(dim=-1) - 1).square().mean()
        (network(surface).abs().mean() + 0.1 * eikonal).backward()

    return network, step


if __name__ == "__main__":
    from compare import compare

    compare("sdf")
