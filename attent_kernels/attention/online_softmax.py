"""The loop of attention: a tile of queries over the keys that it looks at, with an online softmax.

Base-2 logarithms: s' = s log2(e), so that exp(s - m) is one exp2. Kept for each query: m, the largest s' so far; l, the
sum of exp2(s' - m); and the sum of exp2(s' - m) v. A new maximum scales the two sums. Both sums and all products are
accumulated in float32; what multiplies v is rounded to v's dtype first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LN_2, LOG2_E, add_product, rounded
from .layout import row_pointers, row_stride
from .masks import keys_of


@triton.jit
def attend(
    b_query,  # [BLOCK_M, BLOCK_D]
    key,
    value,
    example,
    kv_head,
    first_key,  # of the example in its tensors
    first_row,  # of the tile in its example
    end_row,  # one past the last row to compute
    rows,  # of the example
    keys,
    split,
    num_splits,
    window,
    scale,  # above 0
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The running maximum [BLOCK_M], sum [BLOCK_M] and weighted sum [BLOCK_M, BLOCK_DV] over this split's keys."""
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Keys rise with rows: those that any row looks at are [low, high), those that all look at [inner_low, inner_high).
    last_row = tl.minimum(first_row + BLOCK_M, end_row) - 1
    low, inner_high = keys_of(first_row, rows, keys, window)
    inner_low, high = keys_of(last_row, rows, keys, window)
    low = (low // BLOCK_N) * BLOCK_N
    if last_row < first_row:
        high = low
    if num_splits is not None:
        per_split = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), num_splits) * BLOCK_N
        low += split * per_split
        high = tl.minimum(high, low + per_split)

    o_row = first_row + tl.arange(0, BLOCK_M)
    o_key = tl.arange(0, BLOCK_N)
    p_key = row_pointers(key, example, kv_head, first_key + o_key, tl.arange(0, BLOCK_D))
    p_value = row_pointers(value, example, kv_head, first_key + o_key, tl.arange(0, BLOCK_DV))

    start = low
    if window.left is not None:  # the keys that only the first rows look at
        stop = tl.minimum(tl.cdiv(inner_low, BLOCK_N) * BLOCK_N, high)
        b_max, b_sum, b_acc = _attend_to(
            b_query, b_max, b_sum, b_acc, p_key, p_value, key, value, start, stop, o_row, rows, keys, window, scale,
            softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
        start = tl.maximum(start, stop)
    stop = tl.minimum((inner_high // BLOCK_N) * BLOCK_N, high)
    b_max, b_sum, b_acc = _attend_to(
        b_query, b_max, b_sum, b_acc, p_key, p_value, key, value, start, stop, o_row, rows, keys, window, scale,
        softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    start = tl.maximum(start, stop)
    return _attend_to(
        b_query, b_max, b_sum, b_acc, p_key, p_value, key, value, start, high, o_row, rows, keys, window, scale,
        softcap, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip


@triton.jit
def _attend_to(
    b_query, b_max, b_sum, b_acc, p_key, p_value, key, value, start, stop, o_row, rows, keys, window, scale,
    softcap, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Go on over keys [start, stop), a multiple of BLOCK_N unless MASKED."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_key in range(start, stop, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        i_key64 = tl.cast(i_key, tl.int64)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        b_key = _load(p_key + i_key64 * row_stride(key), o_key[:, None] < keys, o_d[None, :] < D, MASKED, D != BLOCK_D)
        b_value = _load(
            p_value + i_key64 * row_stride(value), o_key[:, None] < keys, o_dv[None, :] < DV, MASKED, DV != BLOCK_DV
        )

        b_s = add_product(b_query, tl.trans(b_key))  # [BLOCK_M, BLOCK_N]
        if softcap is not None:
            b_s = cap(b_s * scale, softcap) * LOG2_E
            factor = 1.0
        elif MASKED:
            b_s = b_s * (scale * LOG2_E)
            factor = 1.0
        else:  # the product is left to the subtraction below, as one fused multiply-add
            factor = scale * LOG2_E
        if MASKED:
            first, last = keys_of(o_row, rows, keys, window)
            b_s = tl.where((o_key[None, :] >= first[:, None]) & (o_key[None, :] < last[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s * factor - b_pivot[:, None])
        b_scale = tl.exp2(b_max - b_pivot)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = add_product(rounded(b_p, b_value.dtype), b_value, b_acc * b_scale[:, None])
        b_max = b_new
    return b_max, b_sum, b_acc


@triton.jit
def _load(pointers, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Load a tile; what is outside is 0. Masks that cannot be False cost nothing."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, row_mask & column_mask, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, row_mask, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, column_mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def cap(s, softcap):
    """c tanh(s / c), off by a few units of c 2^-24. libdevice's tanh is not in the interpreter."""
    e = tl.exp2(tl.abs(s) * (-2.0 * LOG2_E / softcap))
    size = softcap * ((1.0 - e) / (1.0 + e))
    return tl.where(s < 0, -size, size)


@triton.jit
def fold(b_max, b_sum, b_acc, b_other_max, b_other_sum, b_other_acc):
    """Two runs over different keys as one."""
    b_new = tl.maximum(b_max, b_other_max)
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_scale = tl.exp2(b_max - b_pivot)
    b_other = tl.exp2(b_other_max - b_pivot)
    b_acc = b_acc * b_scale[:, None] + b_other_acc * b_other[:, None]
    return b_new, b_sum * b_scale + b_other_sum * b_other, b_acc


@triton.jit
def finish(b_max, b_sum, b_acc):
    """Output [M, DV] and logsumexp [M] (natural logarithm); 0 and -inf of a row without a key."""
    has_key = b_sum != 0  # a sum that is NaN comes from keys
    b_output = b_acc / tl.where(has_key, b_sum, 1.0)[:, None]
    b_logsumexp = tl.where(has_key, (b_max + tl.log2(tl.where(has_key, b_sum, 1.0))) * LN_2, float("-inf"))
    return b_output, b_logsumexp
