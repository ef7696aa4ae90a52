"""The scorer's folds: vocabulary groups into tokens, tokens into examples, blocks of examples into one number.

What other programs stored is read past this processor's L1 cache, and summed in an order that is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online import exp, finite, nothing_kept
from .tokens import first_token

#: Blocks of examples summed at a time.
_BLOCKS = tl.constexpr(1024)


@triton.jit
def fold_groups(
    p_slots,  # [BM], each row's slot of the first kept number and group
    groups, capacity, SPREAD: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """What is kept of the whole vocabulary: m, a, s, b, c, t, o [BM]."""
    m, a, s, b, c, t, o = nothing_kept(BM)
    kept = groups * capacity
    for start in range(0, groups, BG):
        group = start + tl.arange(0, BG)
        p_slot = p_slots[None, :] + group[:, None] * capacity  # [BG, BM]
        of_group = tl.load(p_slot, group[:, None] < groups, other=float("-inf"), cache_modifier=".cg")
        m = tl.maximum(m, tl.max(of_group, 0))
    pivot = finite(m)
    for start in range(0, groups, BG):
        group = start + tl.arange(0, BG)
        is_group = group[:, None] < groups
        p_slot = p_slots[None, :] + group[:, None] * capacity
        ahead = tl.load(p_slot, is_group, other=float("-inf"), cache_modifier=".cg") - pivot[None, :]
        shrink = exp(ahead)
        a += tl.sum(shrink * tl.load(p_slot + kept, is_group, other=0.0, cache_modifier=".cg"), 0)
        s += tl.sum(shrink * shrink * tl.load(p_slot + 2 * kept, is_group, other=0.0, cache_modifier=".cg"), 0)
        if SPREAD:
            b += tl.sum(shrink * tl.load(p_slot + 3 * kept, is_group, other=0.0, cache_modifier=".cg"), 0)
            c += tl.sum(tl.load(p_slot + 4 * kept, is_group, other=0.0, cache_modifier=".cg"), 0)
            of_group = tl.load(p_slot + 5 * kept, is_group, other=0.0, cache_modifier=".cg")
            mass = tl.load(p_slot + 6 * kept, is_group, other=0.0, cache_modifier=".cg")
            t += tl.sum(of_group + tl.where(mass == 0.0, 0.0, ahead * mass), 0)
            o += tl.sum(mass, 0)
    return m, a, s, b, c, t, o


@triton.jit
def fold_examples(
    block, scratch, out, example_weight, cu_seqlens, tokens, tokens_each, batch, per_example: tl.constexpr,
    reduction: tl.constexpr, PACKED: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Counts, scores, losses and validity of a block of BE examples, and what the block adds to the batch's loss."""
    example = block * BE + tl.arange(0, BE)
    is_example = example < batch
    begin = first_token(tl.minimum(example, batch), cu_seqlens, tokens, tokens_each, batch, PACKED)
    end = first_token(tl.minimum(example + 1, batch), cu_seqlens, tokens, tokens_each, batch, PACKED)
    count = tl.zeros([BE, BT], tl.float32)
    loss = tl.zeros([BE, BT], tl.float32)
    square = tl.zeros([BE, BT], tl.float32)
    head = tl.zeros([BE, BT], tl.float32)
    share = tl.zeros([BE, BT], tl.float32)
    longest = tl.max(end - begin, 0)
    for start in range(0, longest, BT):
        row = begin[:, None] + start + tl.arange(0, BT)[None, :]  # [BE, BT]
        is_token = row < end[:, None]
        count += tl.load(scratch.token_count + row, is_token, other=0.0, cache_modifier=".cg")
        loss += tl.load(scratch.token_loss + row, is_token, other=0.0, cache_modifier=".cg")
        if out.logit is not None:
            square += tl.load(scratch.token_square + row, is_token, other=0.0, cache_modifier=".cg")
        if out.head is not None:
            head += tl.load(scratch.token_head + row, is_token, other=0.0, cache_modifier=".cg")
        if scratch.token_share is not None:
            share += tl.load(scratch.token_share + row, is_token, other=0.0, cache_modifier=".cg")

    n_valid = tl.sum(count, 1)  # [BE]
    n = tl.maximum(n_valid, 1.0)
    loss_sum = tl.sum(loss, 1)
    tl.store(out.counts + example, n_valid, is_example)
    scale = tl.full([BE], 1.0, tl.float32)
    if per_example == "mean":
        scale = 1.0 / n
    elif per_example == "rms":
        scale = 1.0 / tl.sqrt_rn(n)
    if out.mean_loss is not None:
        tl.store(out.mean_loss + example, loss_sum / n, is_example)
    if out.logit is not None:
        tl.store(out.logit + example, tl.sqrt_rn(tl.sum(square, 1)) * scale, is_example)
    if out.head is not None:
        tl.store(out.head + example, tl.sqrt_rn(tl.sum(head, 1)) * scale, is_example)

    if example_weight is not None:
        factor = tl.load(example_weight.ptr + example * example_weight.stride, is_example, other=0.0).to(tl.float32)
        # Where the weight is 0 no token is computed, and its losses are 0.
        loss_sum *= factor
        if scratch.valid is not None:
            n_valid = tl.where(factor == 0.0, 0.0, n_valid)
    if scratch.valid is not None:
        tl.store(scratch.valid + example, (n_valid > 0.0).to(tl.int8), is_example)
    if reduction == "example":
        tl.store(out.loss + example, loss_sum / n, is_example)
    if (reduction == "sum") | (reduction == "mean"):
        tl.store(scratch.block_loss + block, tl.sum(loss_sum, 0))
    if reduction == "mean":
        shares = tl.sum(count, 1)
        if scratch.token_share is not None:
            shares = tl.sum(share, 1)
        tl.store(scratch.block_share + block, tl.sum(shares, 0))


@triton.jit
def fold_blocks(scratch, out, blocks, reduction: tl.constexpr):
    """The batch's loss: a sum, or a mean, which is 0 where nothing is counted."""
    if (reduction == "sum") | (reduction == "mean"):
        loss = tl.zeros([_BLOCKS], tl.float32)
        share = tl.zeros([_BLOCKS], tl.float32)
        for start in range(0, blocks, _BLOCKS):
            block = start + tl.arange(0, _BLOCKS)
            loss += tl.load(scratch.block_loss + block, block < blocks, other=0.0, cache_modifier=".cg")
            if reduction == "mean":
                share += tl.load(scratch.block_share + block, block < blocks, other=0.0, cache_modifier=".cg")
        total = tl.sum(loss, 0)
        if reduction == "mean":
            shares = tl.sum(share, 0)
            total = total / tl.where(shares == 0.0, float("inf"), shares)
        tl.store(out.loss, total)
