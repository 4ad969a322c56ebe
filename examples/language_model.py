"""A small Llama-like language model whose loss is to change little with its embeddings.

The squared norm of the loss's gradient with respect to the embedded tokens is the penalty.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = (
            nn.Linear(*size, bias=False)
            for size in [(width, 3 * width), (width, 3 * width), (3 * width, width)]
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # PyTorch cannot differentiate its fused kernels of attention twice.
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def make(device):
    vocabulary, width = 1000, 128
    embedding = nn.Embedding(vocabulary, width)
    body = nn.Sequential(
        *(Block(width, heads=4) for _ in range(3)), nn.RMSNorm(width), nn.Linear(width, vocabulary)
    )
    model = nn.ModuleList([embedding, body]).to(device)
    tokens = torch.randint(vocabulary, (8, 65), device=device)

    def step():
        model.zero_grad()
        embedded = embedding(tokens[:, :-1])
        loss = F.cross_entropy(body(embedded).flatten(0, 1), tokens[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        (loss + gradient.square().sum()).backward()

    return model, step


if __name__ == "__main__":
    from compare import compare

    compare("language_model")
