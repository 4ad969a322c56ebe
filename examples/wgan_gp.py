"""A critic's step of WGAN-GP (Gulrajani et al., https://arxiv.org/abs/1704.00028).

Between real and generated images of 32x32 pixels, the critic's gradient is to have norm 1.
"""

import torch
from torch import nn


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.InstanceNorm2d(outputs, affine=True), nn.SiLU()]


def make(device):
    critic = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.SiLU(), *block(64, 128), *block(128, 256), nn.Conv2d(256, 1, 4)
    ).to(device)
    real, generated = torch.rand(2, 64, 3, 32, 32, device=device)
    share = torch.rand(64, 1, 1, 1, device=device)

    def step():
        critic.zero_grad()
        between = (share * real + (1 - share) * generated).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        (critic(generated).mean() - critic(real).mean() + 10 * penalty).backward()

    return critic, step


if __name__ == "__main__":
    from compare import compare

    compare("wgan_gp")
