"""Before attention's backward: each output row's total gradient dO, delta = Σ dO · O, and logsumexp in base 2.

    dO_t = grad_output_t + grad_pooled / Lq          (mean; first, last: + grad_pooled in that row)
                         + grad_loss (O_t - y_t) / Lq  (with a target)

of rows t < Lq. dO is written, rounded to the output's dtype as autograd's would be, where it is more than grad_output
alone; delta is float32 and of the rounded dO, since it stands for Σ_j p_j dO · v_j. The logsumexp of a row without a
key, -inf, becomes +inf: exp(s - inf) is the 0 that its p is, were the mask not to say so. Reads O, writes dO: bound by
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LOG2_E
from .backward_tiles import find_tile, live_rows, load_rows, number_pointer, store_rows
from .layout import row_pointers


@triton.jit
def prepare(
    output,  # Rows of [B, H, T, DV]
    logsumexp,  # Rows of [B, H, T, 1], natural
    grad_output,  # Rows like output, or of None
    grad_pooled,  # Rows of [B, H, 1, DV], or of None
    target,  # Rows like output, or of None
    grad_loss_ptr,  # [B]; not read without a target
    grad_loss_step,
    total,  # Rows like output: dO, or of None where it is grad_output
    base2,  # Numbers: the logsumexp again
    delta,  # Numbers
    segments,
    num_examples,
    tiles,
    heads,
    ONLY: tl.constexpr,
    POOL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    example, head, first, rows, tile = find_tile(
        segments, num_examples, tl.program_id(0), tiles, heads, ONLY is not None, BLOCK_M
    )
    start, stop, shift = live_rows(first, rows, ONLY)
    o_row = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < stop
    o_dv = tl.arange(0, BLOCK_DV)
    n = tl.maximum(rows, 1).to(tl.float32)

    # [BLOCK_M, BLOCK_DV] all
    b_output = load_rows(row_pointers(output, example, head, shift + o_row, o_dv), m_row, DV, BLOCK_DV)
    b_output = b_output.to(tl.float32)
    b_total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if grad_output.ptr is not None:
        b_grad = load_rows(row_pointers(grad_output, example, head, shift + o_row, o_dv), m_row, DV, BLOCK_DV)
        b_total += b_grad.to(tl.float32)
    if grad_pooled.ptr is not None:
        p_pooled = row_pointers(grad_pooled, example, head, tl.zeros([1], tl.int32), o_dv)
        b_pooled = tl.load(p_pooled, (o_dv < DV)[None, :], other=0.0).to(tl.float32)  # [1, BLOCK_DV]
        if POOL == "mean":
            b_total += b_pooled / n
        else:
            pooled_row = rows * 0 if POOL == "first" else rows - 1
            b_total += tl.where((o_row == pooled_row)[:, None], b_pooled, 0.0)
    if target.ptr is not None:
        b_target = load_rows(row_pointers(target, example, head, shift + o_row, o_dv), m_row, DV, BLOCK_DV)
        grad_loss = tl.load(grad_loss_ptr + example.to(tl.int64) * grad_loss_step).to(tl.float32)
        b_total += (b_output - b_target.to(tl.float32)) * (grad_loss / n)
    if total.ptr is not None:
        b_rounded = b_total.to(total.ptr.dtype.element_ty)
        store_rows(row_pointers(total, example, head, shift + o_row, o_dv), b_rounded, m_row, DV, BLOCK_DV)
        b_total = b_rounded.to(tl.float32)
    tl.store(number_pointer(delta, example, head) + shift + o_row, tl.sum(b_total * b_output, 1), m_row)

    p_logsumexp = row_pointers(logsumexp, example, head, shift + o_row, tl.zeros([1], tl.int32))  # [BLOCK_M, 1]
    b_logsumexp = tl.sum(tl.load(p_logsumexp, m_row[:, None], other=0.0), 1)
    b_logsumexp = tl.where(b_logsumexp == float("-inf"), float("inf"), b_logsumexp)
    tl.store(number_pointer(base2, example, head) + shift + o_row, b_logsumexp * LOG2_E, m_row)
