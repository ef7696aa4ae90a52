"""Gradients in keys and values: a program for each block of keys and key head, over the queries that look at it.

With p = exp(s - logsumexp), s = scale q·k (softcap: see backward_tiles), delta = Σ dO · O::

    dV_j = Σ_i p_ij dO_i        dK_j = scale Σ_i ds_ij q_i        ds_ij = p_ij (dO_i · v_j - delta_i) slope_ij

i runs over the rows of all query heads that read this key head, in a fixed order: no atomics, the same bits every time.
Scores are held transposed, [keys, queries], so that p and ds are the left operands of their products as they come.
FLOPs: 2 (3 D + 2 DV) for each pair of query and key; 2 (D + DV) of them are computed again by the queries' kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import add_product
from .backward_tiles import (
    find_tile,
    live_rows,
    load_rows,
    looks_at,
    number_pointer,
    probabilities,
    store_rows,
    store_zeros,
)
from .layout import find_segment, num_tiles, row_pointers, row_stride
from .masks import queries_of


@triton.jit
def key_value_gradients(
    query,  # Rows of [B, H, Tq, D]
    key,  # Rows of [B, KV, Tk, D]
    value,  # Rows of [B, KV, Tk, DV]
    grad_output,  # Rows of [B, H, Tq, DV], all of the output's gradient
    logsumexp,  # Numbers: of a query's scores, in base 2; +inf without a key
    delta,  # Numbers: of a query
    grad_key,  # Rows like key; not written unless WANT_KEY
    grad_value,  # Rows like value; not written unless WANT_VALUE
    query_segments,
    key_segments,
    num_examples,
    tiles,
    kv_heads,
    group,  # query heads that read one key head
    window,
    scale,
    softcap,
    WANT_KEY: tl.constexpr,
    WANT_VALUE: tl.constexpr,
    ONLY: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    example, kv_head, first_key, keys, tile = find_tile(
        key_segments, num_examples, tl.program_id(0), tiles, kv_heads, False, BLOCK_N
    )
    first_query, rows = find_segment(query_segments, example)
    start, stop, shift = live_rows(first_query, rows, ONLY)

    i_key = tile * BLOCK_N
    o_key = i_key + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    p_key = row_pointers(key, example, kv_head, first_key + o_key, o_d)
    p_value = row_pointers(value, example, kv_head, first_key + o_key, o_dv)
    b_key = load_rows(p_key, o_key < keys, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_value = load_rows(p_value, o_key < keys, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # Queries rise with keys: those that look at any of these are [low, high). Keys past the last need no mask: nobody
    # stores their gradients.
    last_key = tl.minimum(i_key + BLOCK_N, keys) - 1
    low, _ = queries_of(i_key, rows, keys, window)
    _, high = queries_of(last_key, rows, keys, window)
    low, high = tl.maximum(low, start), tl.minimum(high, stop)
    low = start + (low - start) // BLOCK_M * BLOCK_M
    high = tl.where(last_key < i_key, low, high)

    for i in range(group):
        head = kv_head * group + i
        o_row = start + tl.arange(0, BLOCK_M)
        p_query = row_pointers(query, example, head, first_query + o_row, o_d)
        p_grad = row_pointers(grad_output, example, head, shift + o_row, o_dv)
        p_logsumexp = number_pointer(logsumexp, example, head) + shift
        p_delta = number_pointer(delta, example, head) + shift
        for i_row in range(low, high, BLOCK_M):
            o_row = i_row + tl.arange(0, BLOCK_M)
            m_row = o_row < stop
            step = tl.cast(i_row - start, tl.int64)
            b_query = load_rows(p_query + step * row_stride(query), m_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            b_grad = load_rows(p_grad + step * row_stride(grad_output), m_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
            b_logsumexp = tl.load(p_logsumexp + o_row, m_row, other=float("inf"))  # [BLOCK_M]; +inf: p = 0

            b_dot = add_product(b_key, tl.trans(b_query))  # [BLOCK_N, BLOCK_M], as all below
            b_p, slope = probabilities(b_dot, b_logsumexp[None, :], scale, softcap)
            if window.left is not None or window.right is not None:
                # Of every tile: loops of their own for tiles that need no mask took many more registers, and so did a
                # branch on sm_80.
                b_p = tl.where(looks_at(o_row[None, :], o_key[:, None], rows, keys, window), b_p, 0.0)
            if WANT_VALUE:
                b_grad_value = add_product(b_p.to(b_grad.dtype), b_grad, b_grad_value)
            if WANT_KEY:
                b_delta = tl.load(p_delta + o_row, m_row, other=0.0)  # [BLOCK_M]
                b_ds = b_p * (add_product(b_value, tl.trans(b_grad)) - b_delta[None, :])
                if softcap is not None:
                    b_ds = b_ds * slope
                b_grad_key = add_product(b_ds.to(b_query.dtype), b_query, b_grad_key)

    # Padding has gradient 0, and so have packed keys before the first example's and behind the last one's.
    end = keys if key_segments.cu_ptr is not None else key_segments.most
    m_has = (o_key < keys)[:, None]
    if WANT_KEY:
        p_grad_key = row_pointers(grad_key, example, kv_head, first_key + o_key, o_d)
        store_rows(p_grad_key, tl.where(m_has, b_grad_key * scale, 0.0), o_key < end, D, BLOCK_D)
    if WANT_VALUE:
        p_grad_value = row_pointers(grad_value, example, kv_head, first_key + o_key, o_dv)
        store_rows(p_grad_value, tl.where(m_has, b_grad_value, 0.0), o_key < end, DV, BLOCK_DV)
    if key_segments.cu_ptr is not None:
        before = tl.where((example == 0) & (tile == 0), first_key, 0)
        is_last = (example == num_examples - 1) & (tile == num_tiles(keys, BLOCK_N) - 1)
        behind = tl.where(is_last, key_segments.most, 0)
        o_any = tl.arange(0, BLOCK_N)
        if WANT_KEY:
            p_any = row_pointers(grad_key, example, kv_head, o_any, o_d)
            store_zeros(p_any, row_stride(grad_key), 0, before, D, BLOCK_N, BLOCK_D)
            store_zeros(p_any, row_stride(grad_key), first_key + keys, behind, D, BLOCK_N, BLOCK_D)
        if WANT_VALUE:
            p_any = row_pointers(grad_value, example, kv_head, o_any, o_dv)
            store_zeros(p_any, row_stride(grad_value), 0, before, DV, BLOCK_N, BLOCK_DV)
            store_zeros(p_any, row_stride(grad_value), first_key + keys, behind, DV, BLOCK_N, BLOCK_DV)
