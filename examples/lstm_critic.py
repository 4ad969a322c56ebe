"""A critic of sequences, an LSTM, with the gradient penalty of WGAN-GP (https://arxiv.org/abs/1704.00028)."""

import torch
from torch import nn


class Critic(nn.Module):
    def __init__(self, inputs=16, features=128):
        super().__init__()
        self.lstm = nn.LSTM(inputs, features, batch_first=True)
        self.score = nn.Linear(features, 1)

    def forward(self, sequence):
        # PyTorch cannot differentiate cuDNN's LSTM twice.
        with torch.backends.cudnn.flags(enabled=False):
            states, _ = self.lstm(sequence)
        return self.score(states.mean(1))


def make(device):
    critic = Critic().to(device)
    real, generated = torch.rand(2, 32, 64, 16, device=device)
    share = torch.rand(32, 1, 1, device=device)

    def step():
        critic.zero_grad()
        between = (share * real + (1 - share) * generated).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        (critic(generated).mean() - critic(real).mean() + 10 * penalty).backward()

    return critic, step


if __name__ == "__main__":
    from compare import compare

    compare("lstm_critic")
