"""The demo's learner: a small vision transformer whose last layer is an attention pool with a readout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attent

from .data import CLASSES, IMAGE_SIZE

PATCH = 7
TOKENS = (IMAGE_SIZE // PATCH) ** 2
WIDTH = 64
HEADS = 4
DEPTH = 2
EXPANSION = 2


class Block(nn.Module):
    """One pre-norm transformer block: self-attention, then a two-layer perceptron, each around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, EXPANSION * WIDTH),
            nn.GELU(),
            nn.Linear(EXPANSION * WIDTH, WIDTH),
        )

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        B, T, D = tokens.shape
        qkv = self.qkv(self.attention_norm(tokens)).view(B, T, 3, HEADS, D // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, T, D)
        tokens = tokens + self.merge(mixed)
        return tokens + self.perceptron(tokens)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches of 7 x 7 pixels, learned positions, two blocks, and :class:`attent.AttentiveClassifier` at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = attent.AttentiveClassifier(WIDTH, HEADS, len(CLASSES))

    def forward(self, images: Tensor, target: Tensor, score: str | None) -> attent.ScoredAttention:
        """Losses [B] of images [B, 28, 28] with labels [B] and, if a score is named, the scores [B], in one pass."""
        result: attent.ScoredAttention = self.classifier(self.tokens(images), target, score=score)
        return result

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.classifier(self.tokens(images))
        return logits

    def tokens(self, images: Tensor) -> Tensor:
        """What the classifier reads of the images, [B, T, D]."""
        side = IMAGE_SIZE // PATCH
        patches = images.view(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, TOKENS, PATCH * PATCH)
        return self.norm(self.blocks(self.embed(patches) + self.position))  # type: ignore[no-any-return]
