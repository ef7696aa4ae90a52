"""Exact "head" scores of multi-token examples: ‖Σ_t g_t h_tᵀ‖_F, cross-token terms included.

The Gram form ⟨GGᵀ, HHᵀ⟩ multiplies T²(V + D) times, the direct form ‖GᵀH‖ T·V·D times: the cheaper one is taken for
each example, from its own T. Both read the gradient g of the logits written out without cancellation. The Gram form
sums terms of either sign: its square is off by some units of Σ_ts |g_t·g_s| |h_t·h_s|, however small it is itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Bytes of logits, of a [T, T] Gram matrix or of a slab of the direct product: the promised ceiling of a chunk.
MAX_BYTES = 64 << 20


def head_features(hidden: Tensor, scale: Tensor | None, with_bias: bool, dtype: torch.dtype) -> Tensor:
    """What multiplies g_t in the weight's gradient: h_t, and 1 for a bias, times the token's scale [C, D(+1)]."""
    features = hidden.to(dtype)
    if with_bias:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    return features if scale is None else features * scale[:, None]


def gram_is_cheaper(length: int, classes: int, width: int, itemsize: int) -> bool:
    """Whether the Gram form takes fewer multiplications, and its [T, T] fits in a chunk."""
    return length * (classes + width) <= classes * width and length * length * itemsize <= MAX_BYTES


def head_square(gradient: Tensor, features: Tensor) -> Tensor:
    """‖Σ_t g_t h_tᵀ‖² of one example whose gradient g [T, V] is written out, with its features [T, D]."""
    length, classes = gradient.shape
    width, itemsize = features.shape[1], features.element_size()
    if gram_is_cheaper(length, classes, width, itemsize):
        return torch.vdot((gradient @ gradient.t()).flatten(), (features @ features.t()).flatten()).clamp_(min=0)
    slab = max(1, MAX_BYTES // (max(1, width) * itemsize))
    square = gradient.new_zeros(())
    for v in range(0, classes, slab):
        square += torch.linalg.vector_norm(gradient[:, v : v + slab].t() @ features).square_()
    return square


def long_head_square(write_gradient: Callable[[int, int], Tensor], classes: int, slab: int, features: Tensor) -> Tensor:
    """The same where g does not fit: ``write_gradient(first, last)`` gives its columns [T, last − first]."""
    length, width = features.shape
    square = features.new_zeros(())
    if not gram_is_cheaper(length, classes, width, features.element_size()):
        for v in range(0, classes, slab):
            gradient = write_gradient(v, min(v + slab, classes))
            square += torch.linalg.vector_norm(gradient.t() @ features).square_()
        return square
    gram = features.new_zeros(length, length)
    for v in range(0, classes, slab):
        gradient = write_gradient(v, min(v + slab, classes))
        gram.addmm_(gradient, gradient.t())
    return torch.vdot(gram.flatten(), (features @ features.t()).flatten()).clamp_(min=0)
