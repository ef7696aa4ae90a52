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


def cut_aliases(tensors: list[Tensor], layouts: list[Layout], index: Tensor) -> list[Tensor] | None:
    """Rows of tensors that are views of one storage with the batch outermost in it, such as q, k and v.

    The storage's rows are copied once and every view made anew in them. None: the tensors are not laid out so, or cover
    less than half of the storage.
    """
    first, layout = tensors[0], layouts[0]
    row = first.stride(layout.dim) * layout.inner  # elements in memory from one example to the next
    batch = first.shape[layout.dim] // (layout.outer * layout.inner)
    stored = first.untyped_storage().nbytes() // first.element_size()
    if row == 0 or stored < batch * row or 2 * sum(x.numel() for x in tensors) < batch * row:
        return None
    if not all(_lies_in_rows(x, place, row, first.dtype) for x, place in zip(tensors, layouts, strict=True)):
        return None
    rows = first.as_strided((batch, row), (row, 1), 0).index_select(0, index)
    views = []
    for tensor, place in zip(tensors, layouts, strict=True):
        shape = list(tensor.shape)
        shape[place.dim] = len(index) * place.inner
        views.append(rows.as_strided(shape, tensor.stride(), tensor.storage_offset()))
    return views


def _lies_in_rows(tensor: Tensor, layout: Layout, row: int, dtype: torch.dtype) -> bool:
    """Whether each example's part of a tensor lies in its own ``row`` elements of the storage."""
    dim, outer, inner = layout
    last = tensor.storage_offset() + (inner - 1) * tensor.stride(dim)
    last += sum((size - 1) * tensor.stride(i) for i, size in enumerate(tensor.shape) if i != dim)
    return outer == 1 and tensor.dtype == dtype and tensor.stride(dim) * inner == row and last < row
