"""A small language model and the texts it reads, byte by byte: what studies on language train."""

from __future__ import annotations

import tarfile
from pathlib import Path

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
        return x + self.perceptron(self.perceptron_norm(x))


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
        return self.norm(self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]]))


def read_texts(source: str | Path) -> Tensor:
    """All ``.txt`` files of a folder or a tar archive, in the order of their names, as one uint8 tensor."""
    path = Path(source).expanduser()
    if path.is_dir():
        contents = [file.read_bytes() for file in sorted(path.glob("*.txt"))]
    else:
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
            contents = [archive.extractfile(m).read() for m in members]
    if not contents:
        raise ValueError(f"--texts: got {source}; takes a folder or a tar archive with .txt files")
    return torch.frombuffer(bytearray(b"\n".join(contents)), dtype=torch.uint8)
