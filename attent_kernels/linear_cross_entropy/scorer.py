"""The scorer: head GEMM, token losses, example losses and scores, their mean and the choice by them, in one launch.

A program multiplies a tile of BM tokens with a group of vocabulary tiles, BN classes each, one after the other, and
keeps of the logits what :mod:`.online` says. Then, by tickets (:mod:`attent_kernels.tickets`), each time the last to
come goes on and the others leave:

1. of a tile's vocabulary groups: folds the groups' slots in their order into token losses and squared norms;
2. of the tiles that hold tokens of a block of BE examples: folds tokens into examples, in the tokens' order;
3. of all blocks of examples: sums the blocks, and chooses.

Nothing is summed by atomics, so results are the same to the bit whatever the order of arrival.

A tile none of whose tokens is computed (ignored, or its example has weight 0) skips its products. A token that is not
computed in a tile that is costs what any token costs, and counts for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import add_product
from ..selection import select_in_block
from ..tickets import take_ticket
from .columns import keep_columns
from .folds import fold_blocks, fold_examples, fold_groups
from .online import cap, loss_and_square, nothing_kept
from .tokens import blocks_of_tile, read_tokens, rows_at, tiles_of_block

# Numbers that change from batch to batch: a kernel compiled for each kind (1, divisible by 16, …) would be compiled in
# the middle of training.
_SIZES = [
    "target_example_stride", "target_token_stride", "tokens", "tokens_each", "batch", "ignore_index", "row_tiles",
    "groups", "group_tiles", "sweep", "blocks", "k_chosen", "k_floor",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def score_kernel(
    hidden,  # TokenRows [N, D]
    weight,  # Matrix [V, D]
    target,  # class indices [N] or probabilities [N, V]
    target_example_stride,
    target_token_stride,
    target_column_stride,
    bias,  # Vector [V] or None, like the next ones
    class_weight,  # [V]
    example_weight,  # [B]
    cu_seqlens,  # [B + 1]
    tokens,  # N
    tokens_each,  # T, of examples in TokenRows
    batch,  # B
    width,  # D
    classes,  # V
    ignore_index,
    label_smoothing,
    softcap,
    out,  # Outputs
    choice,  # Choice or None
    k_chosen,
    k_floor,
    scratch,  # Scratch
    tickets,  # int32 [row_tiles + blocks + 1]
    row_tiles,
    groups,  # of vocabulary tiles
    group_tiles,  # in a group
    sweep,  # row tiles that go through the vocabulary together
    blocks,  # of examples
    per_example: tl.constexpr,  # "mean" | "sum" | "rms"
    reduction: tl.constexpr,  # "mean" | "sum" | "none" | "example" | "" for no loss
    PACKED: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFT: tl.constexpr,  # the target is probabilities
    SPREAD: tl.constexpr,  # the target has mass on more than one class
    UNIFORM: tl.constexpr,  # the same mass on each but the target's own
    CAPPED: tl.constexpr,
    GUMBEL: tl.constexpr,
    FLOOR: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,  # BK divides D
    EVEN_CLASSES: tl.constexpr,  # BN divides V
    FLATTEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,  # columns of logits summed up at a time
    BG: tl.constexpr,  # groups folded at a time
    BE: tl.constexpr,
    BT: tl.constexpr,  # tokens of each of BE examples folded at a time
):
    """One tile of tokens, one group of vocabulary tiles."""
    # A sweep takes `sweep` row tiles through the whole vocabulary, group after group, so that they stay in L2.
    pid = tl.program_id(0)
    first_tile = pid // (sweep * groups) * sweep
    in_sweep = pid % (sweep * groups)
    tiles_of_sweep = tl.minimum(row_tiles - first_tile, sweep)
    tile = first_tile + in_sweep % tiles_of_sweep
    group = in_sweep // tiles_of_sweep
    capacity = row_tiles * BM

    rows = tile * BM + tl.arange(0, BM)
    label, counted, computed, factor, source = read_tokens(
        rows, target, target_example_stride, target_token_stride, cu_seqlens, example_weight, tokens, tokens_each,
        batch, classes, ignore_index, PACKED, SHIFT, SOFT,
    )  # fmt: skip
    inside = tl.minimum(
        rows, tl.maximum(tokens - 1, 0)
    )  # what stands beyond is computed as the last token, for nothing
    i_example, i_token = rows_at(inside, tokens_each)
    p_rows = hidden.ptr + i_example * hidden.example + i_token * hidden.token  # [BM]
    k = tl.arange(0, BK)
    i_example, i_token = rows_at(source, tokens_each)
    p_target = target + i_example * target_example_stride + i_token * target_token_stride  # [BM]

    own = tl.zeros([BM], tl.float32)
    kept = nothing_kept(BM)
    begin = group * group_tiles
    end = tl.minimum(begin + group_tiles, tl.cdiv(classes, BN))
    is_needed = tl.max(computed.to(tl.int32), 0)  # 0 or 1
    end = begin + (end - begin) * is_needed
    for i_tile in tl.range(begin, end, flatten=FLATTEN):
        # logits [BM, BN]
        column = i_tile * BN + tl.arange(0, BN)
        p_hidden = p_rows[:, None] + (k * hidden.column)[None, :]  # [BM, BK]
        p_weight = weight.ptr + tl.minimum(column, classes - 1).to(tl.int64)[None, :] * weight.row
        p_weight += (k * weight.column)[:, None]  # [BK, BN]
        z = tl.zeros([BM, BN], tl.float32)
        for i in tl.range(0, tl.cdiv(width, BK)):
            if EVEN_WIDTH:
                h = tl.load(p_hidden)
                w = tl.load(p_weight)
            else:
                rest = width - i * BK
                h = tl.load(p_hidden, k[None, :] < rest, other=0.0)
                w = tl.load(p_weight, k[:, None] < rest, other=0.0)
            z = add_product(h, w, z)
            p_hidden += BK * hidden.column
            p_weight += BK * weight.column

        own, kept = keep_columns(
            own, kept, z, i_tile * BN, label, bias, class_weight, p_target, target_column_stride, computed, classes,
            label_smoothing, softcap, SOFT, SPREAD, UNIFORM, CAPPED, EVEN_CLASSES,
            BN, BS,
        )  # fmt: skip

    m, a, s, b, c, t, o = kept
    p_slot = scratch.slots + group * capacity + rows  # [kept, groups, capacity]
    tl.store(p_slot, m)
    tl.store(p_slot + groups * capacity, a)
    tl.store(p_slot + 2 * groups * capacity, s)
    if SPREAD:
        tl.store(p_slot + 3 * groups * capacity, b)
        tl.store(p_slot + 4 * groups * capacity, c)
        tl.store(p_slot + 5 * groups * capacity, t)
        tl.store(p_slot + 6 * groups * capacity, o)
    tl.store(scratch.own + rows, own, (label >= begin * BN) & (label < end * BN))
    if out.head is not None:
        if (group == 0) & (is_needed == 1):
            square = tl.zeros([BM], tl.float32)
            for start in range(0, width, BK):
                p_hidden = p_rows[:, None] + (start + k).to(tl.int64)[None, :] * hidden.column
                h = tl.load(p_hidden, (start + k)[None, :] < width, other=0.0).to(tl.float32)
                square += tl.sum(h * h, 1)
            tl.store(scratch.hidden_square + rows, square)

    if take_ticket(tickets + tile, groups):
        # --- 1: the tile's tokens
        m, a, s, b, c, t, o = fold_groups(scratch.slots + rows, groups, capacity, SPREAD, BM, BG)
        if UNIFORM:
            of_class = label_smoothing / classes
            b, c, t, o = b * of_class, c * (of_class * of_class), t * of_class, o * of_class
        own = tl.load(scratch.own + rows, computed, other=0.0, cache_modifier=".cg")
        own, own_slope = cap(own, softcap, CAPPED)
        label_weight = tl.full([BM], 1.0, tl.float32)
        if class_weight is not None and not SOFT:
            # A label that is no class counts in the denominator as the class nearest to it would.
            nearest = tl.where(label == -2, classes - 1, tl.maximum(label, 0))
            label_weight = tl.load(class_weight.ptr + nearest * class_weight.stride, counted, other=0.0)
            label_weight = label_weight.to(tl.float32)
        own_mass = label_weight
        if SPREAD:
            own_mass *= (1.0 - label_smoothing) + label_smoothing / classes
        loss, square = loss_and_square(m, a, s, b, c, t, o, own, own_slope, own_mass, SPREAD, SOFT)
        if not SOFT:
            loss = tl.where(label < 0, float("nan"), loss)
            square = tl.where(label < 0, float("nan"), square)
        loss = tl.where(computed, loss, 0.0)
        square = tl.where(computed, square, 0.0)
        is_token = rows < tokens
        tl.store(scratch.token_loss + rows, loss, is_token)
        tl.store(scratch.token_square + rows, square, is_token)
        tl.store(scratch.token_count + rows, counted.to(tl.float32), is_token)
        if scratch.token_share is not None:
            tl.store(scratch.token_share + rows, tl.where(counted, label_weight, 0.0), is_token)
        if out.head is not None:
            length = tl.load(scratch.hidden_square + rows, computed, other=0.0, cache_modifier=".cg")
            if bias is not None:
                length += 1.0
            tl.store(scratch.token_head + rows, tl.where(computed, square * length, 0.0), is_token)
        if reduction == "none":
            tl.store(out.loss + rows, tl.where(computed, loss * factor, 0.0), is_token)

        first, last = blocks_of_tile(tile, row_tiles, blocks, cu_seqlens, tokens_each, batch, PACKED, BM, BE)
        for block in range(first, last + 1):
            spans = tiles_of_block(block, row_tiles, cu_seqlens, tokens, tokens_each, batch, PACKED, BM, BE)
            if take_ticket(tickets + row_tiles + block, spans):
                # --- 2: a block of examples
                fold_examples(
                    block, scratch, out, example_weight, cu_seqlens, tokens, tokens_each, batch, per_example,
                    reduction, PACKED, BE, BT,
                )  # fmt: skip
                if take_ticket(tickets + row_tiles + blocks, blocks):
                    # --- 3: all of them
                    fold_blocks(scratch, out, blocks, reduction)
                    if choice is not None:
                        select_in_block(
                            choice.score, scratch.valid, batch, k_chosen, k_floor, choice.temperature, choice.seed,
                            choice.index, choice.chosen_score, choice.inclusion, scratch.selection, True, GUMBEL, FLOOR,
                        )  # fmt: skip
