"""The squared loss of attention's output against a target: the example's loss, and the norm of its gradient.

Loss 1/n Σ_t ½‖f_t - y_t‖² over the example's n rows and all heads; score s √Σ_t ‖f_t - y_t‖², s = 1/n, 1 or 1/√n. f is
the output before it is rounded to its dtype. Each tile adds up its own rows; the example's tiles are added in the
order of heads and rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Slots that are read together.
SLOTS = tl.constexpr(256)


@triton.jit
def square_residual(b_output, b_target, b_inside):
    """Σ ‖f - y‖² over a tile's rows of one head; [M, DV], [M, DV], [M, DV] which entries are the example's."""
    b_residual = tl.where(b_inside, b_output - b_target.to(tl.float32), 0.0)
    return tl.sum(tl.sum(b_residual * b_residual, 1))


@triton.jit
def add_slots(slot_ptr, first_tile, tiles, all_tiles, HEADS: tl.constexpr):
    """The sum of an example's slots: [HEADS, all_tiles], of which ``tiles`` from ``first_tile`` on are its own."""
    b_sum = tl.zeros([SLOTS], tl.float32)
    count = HEADS * tiles
    for start in range(0, count, SLOTS):
        i = start + tl.arange(0, SLOTS)
        head = i // tiles
        at = head.to(tl.int64) * all_tiles + first_tile + (i - head * tiles)
        b_sum += tl.load(slot_ptr + at, i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)


@triton.jit
def store_loss_and_score(square, rows, example, loss_ptr, score_ptr, PER_EXAMPLE: tl.constexpr, SCORE: tl.constexpr):
    """From Σ ‖f - y‖² of an example with ``rows`` rows; both 0 where there are none."""
    n = tl.maximum(rows, 1).to(tl.float32)
    loss = square / (2.0 * n)
    tl.store(loss_ptr + example, loss)
    if SCORE == "loss":
        tl.store(score_ptr + example, loss)
    elif SCORE == "residual":
        norm = tl.sqrt_rn(square)
        if PER_EXAMPLE == "mean":
            norm = norm / n
        elif PER_EXAMPLE == "rms":
            norm = tl.sqrt_rn(square / n)
        tl.store(score_ptr + example, norm)
