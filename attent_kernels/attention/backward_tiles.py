"""What attention's backward kernels share: whose a tile is, which rows have a gradient, p again from the logsumexp.

Rows that have a gradient are all of an example's, or, where the loss looks at nothing but the pooled row, that one.
Output, logsumexp and what goes with them then hold one row an example, ``[B, H, 1, ·]``, packed examples too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arithmetic import LOG2_E
from .layout import find_packed_tile, find_segment


class Numbers(NamedTuple):
    """A float32 for each row of each head, those of a head one after another; strides in elements."""

    ptr: Any
    example: int
    head: int


@triton.jit
def find_tile(segments, num_examples, program, tiles, heads, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """A program's example, head, first row of the example in its tensor, number of rows, and tile among its own.

    Programs count tiles first, then heads, then examples. EACH: every example has ``tiles`` of them; else packed
    examples share them out, and a tile that is nobody's is one past its example's last, or more.
    """
    tile = program % tiles
    head = (program // tiles) % heads
    if segments.cu_ptr is not None and not EACH:
        example, first, rows, tile, _ = find_packed_tile(segments.cu_ptr, num_examples, segments.most, tile, BLOCK)
    else:
        example = program // tiles // heads
        first, rows = find_segment(segments, example)
    return example, head, first, rows, tile


@triton.jit
def live_rows(first, rows, ONLY: tl.constexpr):
    """Of an example: the first row that has a gradient, one past the last, and where row 0 stands among the results.

    ONLY: None for all rows, else "first" or "last".
    """
    if ONLY is None:
        start = rows * 0
        stop = rows
        shift = rows * 0 + first
    else:
        start = rows * 0 if ONLY == "first" else tl.maximum(rows - 1, 0)
        stop = tl.minimum(start + 1, rows)
        shift = -start
    return start, stop, shift


@triton.jit
def number_pointer(numbers, example, head):
    """Address of the number that belongs to row 0 of an example's head; the next rows' numbers follow."""
    return numbers.ptr + (example.to(tl.int64) * numbers.example + head.to(tl.int64) * numbers.head)


@triton.jit
def load_rows(pointers, row_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [R, BLOCK]; 0 in rows [R] outside the mask, which may be NaN in memory, and in columns from WIDTH on."""
    mask = row_mask[:, None]
    if WIDTH != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return tl.load(pointers, mask, other=0.0)


@triton.jit
def store_rows(pointers, b_rows, row_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The way back, rounded to the tensor's dtype."""
    mask = row_mask[:, None]
    if WIDTH != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    tl.store(pointers, b_rows.to(pointers.dtype.element_ty), mask)


@triton.jit
def store_zeros(p_row_0, stride, start, stop, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in rows [start, stop); ``p_row_0`` [ROWS, BLOCK] are the addresses of the tensor's first rows."""
    b_zero = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_row in range(start, stop, ROWS):
        row_mask = i_row + tl.arange(0, ROWS) < stop
        store_rows(p_row_0 + tl.cast(i_row, tl.int64) * stride, b_zero, row_mask, WIDTH, BLOCK)


@triton.jit
def looks_at(row, key, rows, keys, window):
    """Whether query ``row`` looks at ``key``, of keys that there are; arguments broadcast."""
    position = row + (keys - rows)
    looks = key < keys
    if window.left is not None:
        looks = looks & (key >= position - window.left)
    if window.right is not None:
        looks = looks & (key <= position + window.right)
    return looks


@triton.jit
def probabilities(b_dot, b_logsumexp, scale, softcap):
    """p = exp(s - logsumexp) and ds/d(scale q·k), from q·k and a base-2 logsumexp.

    s = scale q·k, with softcap c: s = c tanh(scale q·k / c). With e = exp(-2|x|), tanh|x| = (1 - e) / (1 + e) and its
    slope 1 - tanh² = 4e / (1 + e)², which does not cancel.
    """
    if softcap is None:
        slope = 1.0
        b_p = tl.exp2(b_dot * (scale * LOG2_E) - b_logsumexp)
    else:
        b_x = b_dot * scale
        b_e = tl.exp2(tl.abs(b_x) * (-2.0 * LOG2_E / softcap))
        b_size = (softcap * LOG2_E) * ((1.0 - b_e) / (1.0 + b_e))
        slope = 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
        b_p = tl.exp2(tl.where(b_x < 0, -b_size, b_size) - b_logsumexp)
    return b_p, slope
