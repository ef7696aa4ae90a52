"""Where the batch sits in a tensor, and how chosen rows are cut out of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Dimension ``dim`` has size ``outer · B · inner``: (B, T) merged is inner = T, (T, B) merged is outer = T."""

    dim: int
    outer: int
    inner: int


#: A saved index that counts the batch's own rows, 0..B−1, as in ``hidden[torch.arange(B), last]``.
ROW_NUMBERS = Layout(-1, 1, 1)


def cut(tensor: Tensor, layout: Layout, index: Tensor) -> Tensor:
    """Rows ``index`` [k] of a tensor, [.., outer · k · inner, ..], its dimensions in the same order in memory."""
    if layout == ROW_NUMBERS:
        return torch.arange(len(index), dtype=tensor.dtype, device=tensor.device)
    dim, outer, inner = layout
    if outer == inner == 1:
        return _select(tensor, dim, index)
    batch = tensor.shape[dim] // (outer * inner)
    return _select(tensor.unflatten(dim, (outer, batch, inner)), dim + 1, index).flatten(dim, dim + 2)


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    strides = tensor.stride()
    if strides[dim] == 0:  # an expanded tensor: all rows are one
        sizes = list(tensor.shape)
        sizes[dim] = len(index)
        return tensor.narrow(dim, 0, 1).expand(sizes)
    # index_select writes its result contiguously, and a transposed tensor would pay for that with copies later on.
    order = sorted(range(tensor.dim()), key=lambda i: -strides[i])
    if order == list(range(tensor.dim())) or 0 in strides:
        return tensor.index_select(dim, index)
    back = [order.index(i) for i in range(tensor.dim())]
    return tensor.permute(order).index_select(order.index(dim), index).permute(back)


def moved_by_view(shape: tuple[int, ...], layout: Layout, batch: int, new_shape: tuple[int, ...]) -> Layout | None:
    """Where the batch is after a view of ``shape`` as ``new_shape``; None: the view splits it."""
    blocks = layout.outer  # how often the batch is run through from first to last row
    for size in shape[: layout.dim]:
        blocks *= size
    before = 1
    for dim, size in enumerate(new_shape):
        if before <= blocks < before * size:
            if blocks % before or size % (blocks // before * batch):
                return None
            outer = blocks // before
            return Layout(dim, outer, size // (outer * batch))
        before *= size
    return None
