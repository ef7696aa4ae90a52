"""Small learners that the one-pass tests teach."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attent


class Block(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.dropout = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(dropout)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(attended))
        return x + self.feed(self.norm2(x))


class ViT(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 5]."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False, width: int = 16) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x[:, 0])


class GPT(nn.Module):
    """Tokens [B, T] to losses [B]; input and output embeddings are tied."""

    def __init__(self, fused: bool = False, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.fused, self.checkpointed = fused, checkpointed
        self.embedding = nn.Embedding(11, 16)
        self.block = Block(dropout=dropout, causal=True)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = checkpoint(self.block, hidden, use_reentrant=False) if self.checkpointed else self.block(hidden)
        if self.fused:
            return attent.linear_cross_entropy(hidden, self.head.weight, tokens, reduction="example", shift=True)
        logits = self.head(hidden[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).mean(1)


class Encoder(nn.Module):
    """nn.TransformerEncoder over [B, T, D], or over [T, B, D] within; losses [B]."""

    def __init__(self, batch_first: bool, dropout: float) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return out.square().mean((1, 2)) + out[:, 0, 0]


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class LastState(nn.Module):
    """An LSTM read out at each example's own last token, hidden[arange(B), last]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor, last: Tensor, labels: Tensor) -> Tensor:
        hidden = self.lstm(x)[0]
        return F.cross_entropy(self.head(hidden[torch.arange(len(x)), last]), labels, reduction="none")


class Attentive(nn.Module):
    """Ends in attent.AttentiveClassifier; losses and scores come from its one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.classifier = Block(), attent.AttentiveClassifier(16, 2, 5)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.classifier(self.block(x), labels)
        return out.losses, out.scores


def classify(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Per-example cross-entropy of a classifier."""

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels, reduction="none")

    return losses


def gradients(model: nn.Module) -> list[Tensor | None]:
    """The gradients that a backward left, and a clean slate."""
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def relative_error(ours: list[Tensor | None], truth: list[Tensor | None]) -> float:
    """The largest error in norm, relative to the gradient's norm.

    Gradients that are 0 in theory (a key's bias) hold rounding only: the largest norm over a thousand counts for them.
    """
    largest = max(float(t.norm()) for t in truth if t is not None)
    worst = 0.0
    for mine, true in zip(ours, truth, strict=True):
        assert (mine is None) == (true is None)
        if mine is not None and true is not None:
            worst = max(worst, float((mine - true).norm()) / max(float(true.norm()), 1e-3 * largest))
    return worst
