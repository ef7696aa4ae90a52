"""Where examples are in memory, padded [B, H, T, ·] or packed [total, H, ·], and which tile of rows is whose.

Kernels take these records as arguments: a field that is None is None at compile time, so what is not there costs
nothing. Offsets into tensors are 64-bit, row numbers 32-bit.

Lengths and cu_seqlens come unread: lengths are clamped to the tensor, cu_seqlens are clamped and made non-decreasing.
So whatever they hold no address lies outside, and every example gets its tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

#: Entries of cu_seqlens that are looked at together. Batches of packed examples are rarely larger.
CU_BLOCK = tl.constexpr(256)


class Rows(NamedTuple):
    """A tensor's rows by example, head and row; strides in elements. Of a packed tensor the example's stride is 0."""

    ptr: Any
    example: int
    head: int
    row: int
    column: int
    aligned: Any = None  # 1: rows start at multiples of 16 bytes, though not all strides are multiples of 16


class Segments(NamedTuple):
    """How many rows each example has, and where they start. At most one of the pointers is there."""

    cu_ptr: Any  # int32 [B + 1], packed
    length_ptr: Any  # int32 or int64 [B], padded; None: all rows
    most: int  # T, or all rows of a packed tensor


def rows_of(tensor: Tensor | None) -> Rows:
    """[B, H, T, ·] or packed [total, H, ·]; None stays None."""
    if tensor is None:
        return Rows(None, 0, 0, 0, 0)
    if tensor.dim() == 3:
        row, head, column = tensor.stride()
        example = 0
    else:
        example, head, row, column = tensor.stride()
    # Triton sees by itself that an integer is a multiple of 16, but not that a head dimension such as 72 is one of 8.
    # Without knowing that it loads element by element.
    strides = (example, head, row)
    by_8 = column == 1 and tensor.data_ptr() % 16 == 0 and not any(stride % 8 for stride in strides)
    return Rows(tensor, example, head, row, column, 1 if by_8 and any(stride % 16 for stride in strides) else None)


@triton.jit
def row_pointers(rows, example, head, row, column):
    """Addresses [R, C] of rows [R] and columns [C] of one example's head; ``row`` counts from the tensor's first."""
    start = example.to(tl.int64) * rows.example + head.to(tl.int64) * rows.head
    if rows.aligned is not None:
        start = tl.multiple_of(start, 8)
    return rows.ptr + start + row[:, None].to(tl.int64) * row_stride(rows) + column[None, :].to(tl.int64) * rows.column


@triton.jit
def row_stride(rows):
    """From one row to the next, in elements, 64-bit."""
    stride = tl.cast(rows.row, tl.int64)
    if rows.aligned is not None:
        stride = tl.multiple_of(stride, 8)
    return stride


@triton.jit
def find_segment(segments, example):
    """First row of an example in its tensor (0 if padded) and its number of rows."""
    if segments.cu_ptr is not None:
        first, length = _packed_segment(segments.cu_ptr, example, segments.most)
    else:
        first = 0
        length = segments.most
        if segments.length_ptr is not None:
            given = tl.load(segments.length_ptr + example)
            length = tl.minimum(tl.maximum(given, 0), segments.most).to(tl.int32)
    return first, length


@triton.jit
def _packed_segment(cu_ptr, example, total):
    first = 0
    for start in range(0, example + 1, CU_BLOCK):
        i = start + tl.arange(0, CU_BLOCK)
        first = tl.maximum(first, tl.max(tl.minimum(tl.load(cu_ptr + i, i <= example, other=0), total)))
    last = tl.minimum(tl.load(cu_ptr + example + 1), total)
    return first, tl.maximum(last, first) - first


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def find_packed_tile(cu_ptr, num_examples, total, tile, BLOCK: tl.constexpr):
    """Of the tiles of BLOCK rows that packed examples are cut into: whose the ``tile``-th is, and which of its own.

    Example b's tiles start at ``first_row // BLOCK + b``, which leaves room for ceil(rows / BLOCK) of them and for one
    if it has no rows; so ``total // BLOCK + 1 + num_examples`` tiles hold all. Some are nobody's.

    Returns:
        example, the example's first row, its number of rows, the tile's number within it (one past the last or more:
        nobody's tile), the number of its first tile.
    """
    started = 0
    first = 0
    highest = 0  # of cu_seqlens so far
    for start in range(0, num_examples, CU_BLOCK):
        i = start + tl.arange(0, CU_BLOCK)
        row = tl.minimum(tl.load(cu_ptr + i, i < num_examples, other=0), total)
        row = tl.maximum(tl.associative_scan(row, 0, _larger), highest)
        highest = tl.max(row)
        has_started = (row // BLOCK + i <= tile) & (i < num_examples)
        started += tl.sum(has_started.to(tl.int32))
        first = tl.maximum(first, tl.max(tl.where(has_started, row, 0)))
    example = tl.maximum(started - 1, 0)
    last = tl.minimum(tl.load(cu_ptr + example + 1), total)
    first_tile = first // BLOCK + example
    rows = tl.maximum(last, first) - first
    # Before the first example's first tile, which a cu_seqlens that does not start at 0 has, nobody has started.
    own_tile = tl.where(started == 0, num_tiles(rows, BLOCK), tile - first_tile)
    return example, first, rows, own_tile, first_tile


@triton.jit
def num_tiles(rows, BLOCK: tl.constexpr):
    """How many tiles an example owns: at least one, so that somebody counts for it."""
    return tl.maximum(tl.cdiv(rows, BLOCK), 1)


def packed_tiles(total: int, num_examples: int, block: int) -> int:
    """How many tiles hold all packed examples, whatever cu_seqlens holds."""
    return total // block + 1 + num_examples
