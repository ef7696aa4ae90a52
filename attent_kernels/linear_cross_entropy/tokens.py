"""Which example a token belongs to, what it is to predict, and whether it has to be computed: on the device.

Tokens are numbered r = 0 … N − 1 through all examples. Packed examples begin where ``cu_seqlens`` says, whose values
nobody has checked. They are sanitised by how they are searched: a binary search takes the same way for all rows until
one turns left and a later row right, so whatever the numbers are, the example found never falls as r rises. That cuts
the rows into B runs, and :func:`first_token` finds where a run begins by walking the same way: for offsets that rise
from 0 to N it is the offset itself. So every row has one example, every address lies inside, and every program agrees
on how many tiles an example spans, from O(log B) reads each and with no pass over ``cu_seqlens`` before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def example_of(row, cu_seqlens, tokens_each, batch, PACKED: tl.constexpr):
    """The example of each row [n]; rows may be N, which counts as one more token of the last example."""
    if PACKED:
        example = row * 0
        size = tl.full([], batch, tl.int32)
        while size > 1:
            half = size // 2
            middle = example + half
            begins = tl.load(cu_seqlens.ptr + middle * cu_seqlens.stride)
            example = tl.where(begins <= row, middle, example)
            size -= half
    else:
        example = row // tokens_each
    return example


@triton.jit
def first_token(example, cu_seqlens, tokens, tokens_each, batch, PACKED: tl.constexpr):
    """The first row of each example [n], N for example B: the smallest r with example_of(r) >= example."""
    if PACKED:
        below = example * 0  # where the search is
        low = example * 0  # the rows whose search comes the same way are low ... high - 1
        high = low + tokens
        size = tl.full([], batch, tl.int32)
        while size > 1:
            half = size // 2
            middle = below + half
            begins = tl.load(cu_seqlens.ptr + middle * cu_seqlens.stride)
            begins = tl.minimum(tl.maximum(begins, low), high)
            is_below = middle < example
            low = tl.where(is_below, begins, low)
            below = tl.where(is_below, middle, below)
            high = tl.where(is_below, high, begins)
            size -= half
        first = tl.where(example <= 0, 0, high)
    else:
        first = tl.minimum(example * tokens_each, tokens)  # tokens_each is 1 where there is no token
    return first


@triton.jit
def rows_at(rows, tokens_each):
    """Where rows [n] stand in a :class:`TokenRows`: (r // T, r % T), int64."""
    return (rows // tokens_each).to(tl.int64), (rows % tokens_each).to(tl.int64)


@triton.jit
def read_tokens(
    rows,  # int32 [BM], also N and beyond
    target, target_example_stride, target_token_stride,
    cu_seqlens, example_weight,  # Vector or None
    tokens, tokens_each, batch, classes, ignore_index,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """label, counted, computed, factor [BM], and the row [BM] that holds the target.

    counted: the token has a target, and is in its example's count. computed: its example has a weight, ``factor``, too.
    label: -1 below the classes, -2 above them; anything where the token is not counted, or targets are probabilities.
    """
    counted = rows < tokens
    inside = tl.minimum(rows, tl.maximum(tokens - 1, 0))
    source = inside
    if SHIFT:
        if PACKED:
            here = example_of(inside, cu_seqlens, tokens_each, batch, PACKED)
            following = example_of(inside + 1, cu_seqlens, tokens_each, batch, PACKED)
            counted &= (here == following) & (rows + 1 < tokens)
        else:
            counted &= rows % tokens_each != tokens_each - 1
        source = tl.where(counted, inside + 1, inside)

    label = tl.zeros_like(rows) - 1
    if not SOFT:
        i_example, i_token = source // tokens_each, source % tokens_each
        at = i_example.to(tl.int64) * target_example_stride + i_token.to(tl.int64) * target_token_stride
        given = tl.load(target + at, counted, other=0)
        counted &= given != ignore_index
        label = tl.where(given < 0, -1, tl.where(given < classes, given, -2)).to(tl.int32)

    computed = counted
    factor = tl.full(rows.shape, 1.0, tl.float32)
    if example_weight is not None:
        example = example_of(inside, cu_seqlens, tokens_each, batch, PACKED)
        factor = tl.load(example_weight.ptr + example * example_weight.stride, counted, other=0.0).to(tl.float32)
        computed &= factor != 0.0
    return label, counted, computed, factor, source


@triton.jit
def blocks_of_tile(
    tile, row_tiles, blocks, cu_seqlens, tokens_each, batch, PACKED: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr
):
    """The first and the last block of BE examples that have a token, or begin, in a tile of BM rows."""
    begin = tile * BM
    here = example_of(begin, cu_seqlens, tokens_each, batch, PACKED)
    before = example_of(tl.maximum(begin - 1, 0), cu_seqlens, tokens_each, batch, PACKED)
    first = tl.where(tile == 0, 0, tl.minimum(here // BE, before // BE + 1))  # blocks between the two have no token
    last = example_of(begin + (BM - 1), cu_seqlens, tokens_each, batch, PACKED) // BE
    last = tl.where(tile == row_tiles - 1, blocks - 1, last)
    return first, last


@triton.jit
def tiles_of_block(
    block, row_tiles, cu_seqlens, tokens, tokens_each, batch, PACKED: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr
):
    """How many tiles :func:`blocks_of_tile` gives the block to."""
    begin = first_token(block * BE, cu_seqlens, tokens, tokens_each, batch, PACKED)
    end = first_token(tl.minimum(block * BE + BE, batch), cu_seqlens, tokens, tokens_each, batch, PACKED)
    first = tl.minimum(begin // BM, row_tiles - 1)
    return tl.maximum(first, (end - 1) // BM) - first + 1
