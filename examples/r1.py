"""A discriminator's step of StyleGAN2 (Karras et al., https://arxiv.org/abs/1912.04958).

Its gradient at real images is to vanish: R1 (Mescheder et al., https://arxiv.org/abs/1801.04406). Residual
blocks with leaky ReLUs halve the image after a blur.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Blur(nn.Module):
    def __init__(self, channels, padding):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row).expand(channels, 1, 4, 4).contiguous())
        self.padding = padding

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=self.padding, groups=x.shape[1])


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1),
            nn.LeakyReLU(0.2),
            Blur(inputs, 2),
            nn.Conv2d(inputs, outputs, 3, stride=2),
            nn.LeakyReLU(0.2),
        )
        self.skip = nn.Sequential(Blur(inputs, 1), nn.Conv2d(inputs, outputs, 1, stride=2, bias=False))

    def forward(self, x):
        return (self.main(x) + self.skip(x)) / 2**0.5


class MinibatchDeviation(nn.Module):
    """One more channel: how much the images of the batch differ."""

    def forward(self, x):
        deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1)


def make(device):
    discriminator = nn.Sequential(
        nn.Conv2d(3, 32, 1),
        nn.LeakyReLU(0.2),
        Block(32, 64),
        Block(64, 128),
        Block(128, 128),
        MinibatchDeviation(),
        nn.Conv2d(129, 128, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(128 * 8 * 8, 128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 1),
    ).to(device)
    real, generated = torch.rand(2, 8, 3, 64, 64, device=device)

    def step():
        discriminator.zero_grad()
        images = real.clone().requires_grad_()
        scores = discriminator(images)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        penalty = gradient.square().sum([1, 2, 3]).mean()
        loss = F.softplus(-scores).mean() + F.softplus(discriminator(generated)).mean()
        (loss + 10 / 2 * penalty).backward()

    return discriminator, step


if __name__ == "__main__":
    from compare import compare

    compare("r1")
