"""The one launch: attention's output, every example's loss and score, and the choice.

Maths, of one example (B of them) with R queries and K keys, per head: O = softmax(scale Q Kᵀ) V over the keys that a
query looks at (:mod:`.masks`); its loss and score against a target (:mod:`.residual`) or through a classifier of the
pooled output (:mod:`.readout`); then the top k of the scores (:mod:`..selection`).

Work: one program per tile of BLOCK_M rows of one head; with ``num_splits``, per part of the keys of such a tile.
FLOPs 4 R K D per head (half of that when causal) + 2 F C per example for the readout; bytes: Q, K, V, O and target
once, plus K and V again for every BLOCK_M rows, mostly from the L2 cache, as the tiles of a head run side by side.

Who comes last goes on (:mod:`..tickets`)::

    a split of a tile's keys   -> the last one folds the tile's splits, in order
    a tile of an example       -> the last one folds the example's tiles, in order: loss and score, or the pooled output
    an example of its group    -> the last one reads the group out: logits, losses, scores (readout only)
    an example, or a group     -> the last one chooses

Nobody waits. Every part has its own slot and is added in a fixed order, so results are the same to the bit whatever
order programs finish in. Each last one resets its counter: the launch can be repeated, and replayed in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..selection import select_in_block
from ..tickets import take_ticket
from . import online_softmax as softmax
from . import readout
from .layout import find_packed_tile, find_segment, num_tiles, row_pointers
from .readout import GROUP
from .residual import add_slots, square_residual, store_loss_and_score


class Results(NamedTuple):
    """Where what is found of the examples goes."""

    logsumexp_ptr: Any  # float32 [B, H, R] or [H, total], contiguous; None: not stored, nor is the output
    logsumexp_example: int  # strides
    logsumexp_head: int
    loss_ptr: Any  # float32 [B]
    score_ptr: Any  # float32 [B]; None: no score
    valid_ptr: Any  # int8 [B]: has the example a query


class Choice(NamedTuple):
    """The top k that is asked for; ``index_ptr`` None: none is."""

    index_ptr: Any  # int64 [k]
    score_ptr: Any  # float32 [k]
    inclusion_ptr: Any  # float32 [k]
    seed_ptr: Any  # int64 [1]
    scratch_ptr: Any  # int64


class Workspace(NamedTuple):
    """Tickets, all 0 before and after, and the slots of parts."""

    all_ticket_ptr: Any  # [1]
    group_ticket_ptr: Any  # [ceil(B / GROUP)]
    example_ticket_ptr: Any  # [B]
    tile_ticket_ptr: Any  # [heads × tiles], with splits
    slot_ptr: Any  # float32 [heads × tiles] residuals, or [heads × tiles, BLOCK_DV] column sums
    split_ptr: Any  # float32 [heads × tiles, splits, BLOCK_M (BLOCK_DV + 2)]


# A launch is compiled again where an integer becomes 1, or a multiple of 16, or stops being one. These change from
# batch to batch, and nothing is gained from knowing that of them.
@triton.jit(do_not_specialize=["num_examples", "tiles", "rows_stored", "k", "k_floor", "num_splits"])
def scored_attention_kernel(
    query, key, value, target, output,  # layout.Rows
    queries, keys,  # layout.Segments
    window,  # masks.Window
    classifier,  # readout.Classifier
    results, choice, workspace,
    num_examples,
    tiles,  # of BLOCK_M rows: of each example, or of all packed ones
    rows_stored,  # R of the output, where it is padded
    num_splits,  # None: one
    k, k_floor, temperature,
    scale, softcap,
    HEADS: tl.constexpr, HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PACKED: tl.constexpr,
    ONLY_ROW: tl.constexpr,  # "first" or "last": that row of each example is computed and no other; "": all are
    POOL: tl.constexpr, SCORE: tl.constexpr, PER_EXAMPLE: tl.constexpr,
    NEGATE: tl.constexpr,  # the query, since scale is above 0
    GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    split = 0
    if num_splits is not None:
        split = unit % num_splits
        unit = unit // num_splits

    # Whose tile: [heads, tiles] of packed examples, [examples, heads, tiles] of padded ones.
    tile = unit % tiles
    if PACKED and ONLY_ROW == "":
        head = unit // tiles
        example, first_query, rows, own_tile, first_tile = find_packed_tile(
            queries.cu_ptr, num_examples, queries.most, tile, BLOCK_M
        )
        all_tiles = tiles
    elif PACKED:  # a tile for each example
        head = unit // tiles
        example = tile
        first_query, rows = find_segment(queries, example)
        own_tile = 0
        first_tile = example
        all_tiles = tiles
    else:
        head = (unit // tiles) % HEADS
        example = unit // (tiles * HEADS)
        if window.right is not None:  # later rows look at more keys: they start first
            tile = tiles - 1 - tile
        first_query, rows = find_segment(queries, example)
        own_tile = tile
        first_tile = example * tiles
        all_tiles = num_examples * tiles
    first_key, num_keys = find_segment(keys, example)
    if ONLY_ROW == "":
        first_row = own_tile * BLOCK_M
        end_row = rows
        own_tiles = num_tiles(rows, BLOCK_M)
    else:
        first_row = tl.maximum(rows - 1, 0) if ONLY_ROW == "last" else 0
        end_row = tl.minimum(first_row + 1, rows)
        own_tiles = 1

    o_row = first_row + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    p_query = row_pointers(query, example, head, first_query + o_row, o_d)
    b_query = tl.load(p_query, (o_row < end_row)[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if NEGATE:
        b_query = -b_query
    b_max, b_sum, b_acc = softmax.attend(
        b_query, key, value, example, head // HEADS_PER_KEY, first_key, first_row, end_row, rows, num_keys, split,
        num_splits, window, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    slot = tl.cast(head, tl.int64) * all_tiles + first_tile + own_tile
    if num_splits is None:
        _end_of_tile(
            b_max, b_sum, b_acc, target, output, classifier, results, choice, workspace, example, head, first_query,
            o_row, end_row, rows, rows_stored, own_tile, own_tiles, first_tile, all_tiles, slot, num_examples,
            k, k_floor, temperature, HEADS, DV, PACKED, ONLY_ROW, POOL, SCORE, PER_EXAMPLE, GUMBEL, FLOOR, BLOCK_DV,
        )  # fmt: skip
    else:
        _store_split(workspace.split_ptr, slot * num_splits + split, b_max, b_sum, b_acc, BLOCK_M, BLOCK_DV)
        if take_ticket(workspace.tile_ticket_ptr + unit, num_splits):
            b_max, b_sum, b_acc = _fold_splits(workspace.split_ptr, slot * num_splits, num_splits, BLOCK_M, BLOCK_DV)
            _end_of_tile(
                b_max, b_sum, b_acc, target, output, classifier, results, choice, workspace, example, head,
                first_query, o_row, end_row, rows, rows_stored, own_tile, own_tiles, first_tile, all_tiles, slot,
                num_examples, k, k_floor, temperature, HEADS, DV, PACKED, ONLY_ROW, POOL, SCORE, PER_EXAMPLE,
                GUMBEL, FLOOR, BLOCK_DV,
            )  # fmt: skip


@triton.jit
def _end_of_tile(
    b_max, b_sum, b_acc, target, output, classifier, results, choice, workspace, example, head, first_query,
    o_row, end_row, rows, rows_stored, own_tile, own_tiles, first_tile, all_tiles, slot, num_examples,
    k, k_floor, temperature,
    HEADS: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr, ONLY_ROW: tl.constexpr, POOL: tl.constexpr,
    SCORE: tl.constexpr, PER_EXAMPLE: tl.constexpr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Store a tile's output, leave its part of the example's score, and go on if it is the example's last."""
    o_dv = tl.arange(0, BLOCK_DV)
    inside = o_row < end_row
    in_tile = inside[:, None] & (o_dv < DV)[None, :]
    b_output, b_logsumexp = softmax.finish(b_max, b_sum, b_acc)
    b_output = tl.where(in_tile, b_output, 0.0)  # rows that are padding: 0 and -inf
    b_logsumexp = tl.where(inside, b_logsumexp, float("-inf"))
    if results.logsumexp_ptr is not None:
        if ONLY_ROW != "":  # the one row is all that is stored of an example
            stored_row = o_row * 0
            stored = tl.arange(0, o_row.shape[0]) == 0
            if PACKED:
                stored_row += example
        else:
            stored_row = first_query + o_row
            stored = inside if PACKED else o_row < rows_stored
        p_output = row_pointers(output, example, head, stored_row, o_dv)
        tl.store(p_output, b_output.to(output.ptr.dtype.element_ty), stored[:, None] & (o_dv < DV)[None, :])
        p_logsumexp = results.logsumexp_ptr + tl.cast(example, tl.int64) * results.logsumexp_example
        tl.store(p_logsumexp + tl.cast(head, tl.int64) * results.logsumexp_head + stored_row, b_logsumexp, stored)

    if own_tile < own_tiles:  # else the tile is padding, or nobody's
        if target.ptr is not None:
            p_target = row_pointers(target, example, head, first_query + o_row, o_dv)
            b_target = tl.load(p_target, in_tile, other=0.0)
            tl.store(workspace.slot_ptr + slot, square_residual(b_output, b_target, in_tile))
        elif POOL == "mean":
            tl.store(workspace.slot_ptr + slot * BLOCK_DV + o_dv, tl.sum(b_output, 0))
        else:
            pooled_row = 0
            if POOL == "last":
                pooled_row = tl.maximum(rows - 1, 0)
            is_pooled = o_row == pooled_row
            if tl.max(is_pooled.to(tl.int32)) == 1:
                b_column = tl.sum(tl.where(is_pooled[:, None], b_output, 0.0), 0)
                readout.store_columns(classifier.pooled_ptr, b_column, example, head, HEADS, DV, BLOCK_DV)
        if take_ticket(workspace.example_ticket_ptr + example, HEADS * own_tiles):
            _end_of_example(
                target, classifier, results, choice, workspace, example, rows, own_tiles, first_tile, all_tiles,
                num_examples, k, k_floor, temperature, HEADS, DV, POOL, SCORE, PER_EXAMPLE, GUMBEL, FLOOR, BLOCK_DV,
            )  # fmt: skip


@triton.jit
def _end_of_example(
    target, classifier, results, choice, workspace, example, rows, own_tiles, first_tile, all_tiles, num_examples,
    k, k_floor, temperature,
    HEADS: tl.constexpr, DV: tl.constexpr, POOL: tl.constexpr, SCORE: tl.constexpr, PER_EXAMPLE: tl.constexpr,
    GUMBEL: tl.constexpr, FLOOR: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Fold an example's tiles; the last of a group reads it out, and the last of all chooses."""
    tl.store(results.valid_ptr + example, (rows > 0).to(tl.int8))
    if target.ptr is not None:
        square = add_slots(workspace.slot_ptr, first_tile, own_tiles, all_tiles, HEADS)
        store_loss_and_score(square, rows, example, results.loss_ptr, results.score_ptr, PER_EXAMPLE, SCORE)
        if choice.index_ptr is not None:
            if take_ticket(workspace.all_ticket_ptr, num_examples):
                _choose(results, choice, num_examples, k, k_floor, temperature, GUMBEL, FLOOR)
    else:
        if POOL == "mean":
            readout.pool_mean(
                classifier.pooled_ptr, workspace.slot_ptr, example, first_tile, own_tiles, all_tiles, rows,
                HEADS, DV, BLOCK_DV,
            )  # fmt: skip
        group = example // GROUP
        if take_ticket(workspace.group_ticket_ptr + group, tl.minimum(GROUP, num_examples - group * GROUP)):
            readout.read_out(
                classifier, group, num_examples, HEADS * DV, results.valid_ptr, results.loss_ptr, results.score_ptr,
                SCORE,
            )  # fmt: skip
            if choice.index_ptr is not None:
                if take_ticket(workspace.all_ticket_ptr, tl.cdiv(num_examples, GROUP)):
                    _choose(results, choice, num_examples, k, k_floor, temperature, GUMBEL, FLOOR)


@triton.jit
def _choose(results, choice, num_examples, k, k_floor, temperature, GUMBEL: tl.constexpr, FLOOR: tl.constexpr):
    select_in_block(
        results.score_ptr, results.valid_ptr, num_examples, k, k_floor, temperature,
        choice.seed_ptr, choice.index_ptr, choice.score_ptr, choice.inclusion_ptr, choice.scratch_ptr,
        True, GUMBEL, FLOOR,
    )  # fmt: skip


@triton.jit
def _store_split(split_ptr, slot, b_max, b_sum, b_acc, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    p_slot = split_ptr + slot * (BLOCK_M * (BLOCK_DV + 2))
    o_m = tl.arange(0, BLOCK_M)
    tl.store(p_slot + o_m, b_max)
    tl.store(p_slot + BLOCK_M + o_m, b_sum)
    tl.store(p_slot + 2 * BLOCK_M + o_m[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :], b_acc)


@triton.jit
def _fold_splits(split_ptr, first_slot, num_splits, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The splits of one tile, in the order of their keys."""
    o_m = tl.arange(0, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(num_splits):
        p_slot = split_ptr + (first_slot + i) * (BLOCK_M * (BLOCK_DV + 2))
        o_acc = 2 * BLOCK_M + o_m[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
        b_max, b_sum, b_acc = softmax.fold(
            b_max, b_sum, b_acc,
            tl.load(p_slot + o_m, cache_modifier=".cg"),
            tl.load(p_slot + BLOCK_M + o_m, cache_modifier=".cg"),
            tl.load(p_slot + o_acc, cache_modifier=".cg"),
        )  # fmt: skip
    return b_max, b_sum, b_acc
