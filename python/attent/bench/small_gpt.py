"""A small language model: what steps are measured on, and what studies on language train, byte by byte."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


class Block(nn.Module):
    """Pre-norm: causal self-attention, then a two-layer perceptron, each around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        B, T, D = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.merge(mixed.transpose(1, 2).reshape(B, T, D))
        changed: Tensor = x + self.perceptron(self.perceptron_norm(x))
        return changed


class SmallGPT(nn.Module):
    """Tokens in, hidden states out; ``head`` [V, D], untied and without bias, makes logits of them."""

    def __init__(
        self,
        context: int,
        width: int = 96,
        heads: int = 4,
        depth: int = 3,
        vocabulary: int = BYTES,
        embedding_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=embedding_std)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
        hidden: Tensor = self.norm(self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]]))
        return hidden
