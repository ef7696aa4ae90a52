"""Learners on Fashion-MNIST, 28 x 28 grey: a vision transformer from scratch, and a small masked autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.demo.data import CLASSES, Images

from .variants import variant

SIDE = 28


class Block(nn.Module):
    """Pre-norm: self-attention, then a two-layer perceptron of twice the width, each around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        B, T, D = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, T, D)
        x = x + self.merge(mixed)
        return x + self.perceptron(self.perceptron_norm(x))


def patches(images: Tensor, patch: int) -> Tensor:
    """[B, 28, 28] -> [B, T, patch^2]."""
    across = SIDE // patch
    return images.view(-1, across, patch, across, patch).transpose(2, 3).reshape(len(images), -1, patch * patch)


@dataclass(frozen=True)
class Sizes:
    """Images of each part, and the network's."""

    train: int
    validation: int
    test: int
    width: int
    depth: int
    heads: int
    patch: int
    variant: str = "plain"


class Data:
    """The parts of a study's images, on its device. The training part is the variant's; the others are clean."""

    def __init__(self, images: Images, sizes: Sizes, device: str) -> None:
        # Behind the images to train on stand those that the test part lacks, and the validation part.
        extra = max(0, sizes.test - len(images.test_images))
        pool = len(images.train_images) - sizes.validation - extra
        if sizes.train > pool:
            wanted = f"{sizes.train} + {sizes.validation} + {extra}"
            raise ValueError(f"--images: {wanted} training images wanted, there are {len(images.train_images)}")
        ids, given = variant(sizes.variant, images.train_labels[:pool], len(CLASSES), sizes.train)
        self.images, self.labels = images.train_images[ids].to(device), given.to(device)
        own = slice(0, sizes.test - extra)
        also = slice(pool, pool + extra)
        test = (
            torch.cat([images.test_images[own], images.train_images[also]]).to(device),
            torch.cat([images.test_labels[own], images.train_labels[also]]).to(device),
        )
        rest = slice(pool + extra, None)
        validation = (images.train_images[rest].to(device), images.train_labels[rest].to(device))
        self.parts = {"validation": validation, "test": test}


class VisionTransformer(nn.Module):
    """Patches, learned positions, blocks, and an :class:`attent.AttentiveClassifier`. Metric: accuracy, per cent."""

    def __init__(self, data: Data, sizes: Sizes) -> None:
        super().__init__()
        self.data, self.patch = data, sizes.patch
        self.num_examples = len(data.images)
        self.embed = nn.Linear(sizes.patch**2, sizes.width)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // sizes.patch) ** 2, sizes.width))
        self.blocks = nn.Sequential(*(Block(sizes.width, sizes.heads) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(sizes.width)
        self.classifier = attent.AttentiveClassifier(sizes.width, sizes.heads, len(CLASSES))
        self.to(data.images.device)

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.data.images[ids], self.data.labels[ids]

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        result = self.classifier(self.tokens(images), labels, score=score)
        return result.losses, result.scores

    def tokens(self, images: Tensor) -> Tensor:  # [B, T, D]
        return self.norm(self.blocks(self.embed(patches(images, self.patch)) + self.position))

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        right = 0
        images, labels = self.data.parts[part]
        for some, named in zip(images.split(500), labels.split(500), strict=True):
            right += int((self.classifier(self.tokens(some)).argmax(1) == named).sum())
        return 100 * right / len(labels)


VISIBLE_SHARE = 0.25
DECODER_WIDTH, DECODER_DEPTH = 32, 1


class MaskedAutoencoder(nn.Module):
    """He et al. 2022: encode a quarter of the patches, decode all, squared error of the masked ones' normalised pixels.

    Masks are drawn for each visit. Metric: mean squared error on fixed masks, per masked pixel.
    """

    def __init__(self, data: Data, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.data, self.patch = data, sizes.patch
        self.num_examples = len(data.images)
        self.count = (SIDE // sizes.patch) ** 2
        self.visible = round(VISIBLE_SHARE * self.count)
        self._generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Linear(sizes.patch**2, sizes.width)
        self.position = nn.Parameter(0.02 * torch.randn(self.count, sizes.width))
        self.encoder = nn.Sequential(*(Block(sizes.width, sizes.heads) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(sizes.width)
        self.narrow = nn.Linear(sizes.width, DECODER_WIDTH)
        self.masked = nn.Parameter(torch.zeros(DECODER_WIDTH))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(self.count, DECODER_WIDTH))
        self.decoder = nn.Sequential(*(Block(DECODER_WIDTH, sizes.heads) for _ in range(DECODER_DEPTH)))
        self.pixels = nn.Sequential(nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, sizes.patch**2))
        self.to(data.images.device)

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.data.images[ids], self._orders(len(ids), self._generator)

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        predicted, target = self.masked_patches(*batch)
        losses = 0.5 * (predicted - target).square().sum(2).mean(1)
        if score is None:
            return losses, None
        return losses, attent.example_scores(predicted.detach(), target, loss="squared", score=score)

    def masked_patches(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and targets [B, masked, pixels]; ``order`` [B, T]: the first are visible."""
        B, pixels = len(images), patches(images, self.patch)
        shown, hidden = order[:, : self.visible], order[:, self.visible :]

        def take(values: Tensor, which: Tensor) -> Tensor:  # [B, T, D] -> [B, n, D]
            return values.gather(1, which[..., None].expand(-1, -1, values.shape[2]))

        seen = take(self.embed(pixels) + self.position, shown)
        code = self.narrow(self.norm(self.encoder(seen)))
        both = torch.cat([code, self.masked.expand(B, self.count - self.visible, -1)], dim=1)
        at = take(self.decoder_position.expand(B, -1, -1), order)
        return self.pixels(self.decoder(both + at)[:, self.visible :]), take(pixels, hidden)

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        images, _ = self.data.parts[part]
        orders = self._orders(len(images), torch.Generator().manual_seed(0))
        total = 0.0
        for some, order in zip(images.split(500), orders.split(500), strict=True):
            predicted, target = self.masked_patches(some, order)
            total += float((predicted - target).square().mean()) * len(some)
        return total / len(images)

    def _orders(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, self.count, generator=generator).argsort(1).to(self.data.images.device)
