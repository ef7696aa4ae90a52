"""Gradients in queries: a program for each tile of query rows and head, over the keys that they look at.

    dQ_i = scale Σ_j ds_ij k_j        ds_ij = p_ij (dO_i · v_j - delta_i) slope_ij

in the notation of backward_key_value. FLOPs: 2 (2 D + DV) for each pair of query and key.
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
from .masks import keys_of


@triton.jit
def query_gradient(
    query,  # Rows of [B, H, Tq, D]
    key,  # Rows of [B, KV, Tk, D]
    value,  # Rows of [B, KV, Tk, DV]
    grad_output,  # Rows of [B, H, Tq, DV], all of the output's gradient
    logsumexp,  # Numbers: of a query's scores, in base 2; +inf without a key
    delta,  # Numbers: of a query
    grad_query,  # Rows like query; with ONLY zeros, of which the rows that are not 0 are written
    query_segments,
    key_segments,
    num_examples,
    tiles,
    heads,
    group,  # query heads that read one key head
    window,
    scale,
    softcap,
    ONLY: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # The last rows look at the most keys where attention is causal: they start first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    example, head, first_query, rows, tile = find_tile(
        query_segments, num_examples, program, tiles, heads, ONLY is not None, BLOCK_M
    )
    first_key, keys = find_segment(key_segments, example)
    start, stop, shift = live_rows(first_query, rows, ONLY)
    kv_head = head // group

    first_row = start + tile * BLOCK_M
    o_row = first_row + tl.arange(0, BLOCK_M)
    m_row = o_row < stop
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_query = load_rows(row_pointers(query, example, head, first_query + o_row, o_d), m_row, D, BLOCK_D)
    b_grad = load_rows(row_pointers(grad_output, example, head, shift + o_row, o_dv), m_row, DV, BLOCK_DV)
    p_logsumexp = number_pointer(logsumexp, example, head) + shift + o_row
    b_logsumexp = tl.load(p_logsumexp, m_row, other=float("inf"))  # [BLOCK_M]; +inf: p = 0
    b_delta = tl.load(number_pointer(delta, example, head) + shift + o_row, m_row, other=0.0)  # [BLOCK_M]
    b_grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Keys rise with rows: those that any of these rows looks at are [low, high).
    last_row = tl.minimum(first_row + BLOCK_M, stop) - 1
    low, _ = keys_of(first_row, rows, keys, window)
    _, high = keys_of(last_row, rows, keys, window)
    low = low // BLOCK_N * BLOCK_N
    high = tl.where(last_row < first_row, low, high)

    o_key = tl.arange(0, BLOCK_N)
    p_key = row_pointers(key, example, kv_head, first_key + o_key, o_d)
    p_value = row_pointers(value, example, kv_head, first_key + o_key, o_dv)
    for i_key in range(low, high, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        step = tl.cast(i_key, tl.int64)
        b_key = load_rows(p_key + step * row_stride(key), o_key < keys, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_value = load_rows(p_value + step * row_stride(value), o_key < keys, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

        b_dot = add_product(b_query, tl.trans(b_key))  # [BLOCK_M, BLOCK_N], as all below
        b_p, slope = probabilities(b_dot, b_logsumexp[:, None], scale, softcap)
        b_p = tl.where(looks_at(o_row[:, None], o_key[None, :], rows, keys, window), b_p, 0.0)
        b_ds = b_p * (add_product(b_grad, tl.trans(b_value)) - b_delta[:, None])
        if softcap is not None:
            b_ds = b_ds * slope
        b_grad_query = add_product(b_ds.to(b_key.dtype), b_key, b_grad_query)

    # Padding has gradient 0, and so have packed queries before the first example's and behind the last one's.
    p_grad_query = row_pointers(grad_query, example, head, first_query + o_row, o_d)
    if ONLY is None and query_segments.cu_ptr is None:
        b_grad_query = tl.where(m_row[:, None], b_grad_query, 0.0)
        store_rows(p_grad_query, b_grad_query * scale, o_row < query_segments.most, D, BLOCK_D)
    else:
        store_rows(p_grad_query, b_grad_query * scale, m_row, D, BLOCK_D)
    if ONLY is None and query_segments.cu_ptr is not None:
        p_any = row_pointers(grad_query, example, head, tl.arange(0, BLOCK_M), o_d)
        before = tl.where((example == 0) & (tile == 0), first_query, 0)
        is_last = (example == num_examples - 1) & (tile == num_tiles(rows, BLOCK_M) - 1)
        behind = tl.where(is_last, query_segments.most, 0)
        store_zeros(p_any, row_stride(grad_query), 0, before, D, BLOCK_M, BLOCK_D)
        store_zeros(p_any, row_stride(grad_query), first_query + rows, behind, D, BLOCK_M, BLOCK_D)
