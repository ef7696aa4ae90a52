"""Launches the forward kernel: tensors in, tensors out, one launch.

Python's part is to describe tensors and to lend memory. Slots in floats, with T tiles of all heads, S splits:
T for a target, T × BLOCK_DV for a mean, T × S × BLOCK_M (BLOCK_DV + 2) with splits.
"""

from __future__ import annotations

import torch

from .. import autotune, runtime, selection
from . import configurations
from .configurations import FEW_QUERIES, Configuration, padded
from .forward import Choice, Results, Workspace, scored_attention_kernel
from .layout import Segments, packed_tiles, rows_of
from .masks import window_of
from .readout import GROUP, Classifier
from .records import Attention, Into, Loss, TopK


def scored_attention(
    attention: Attention,
    loss: Loss,
    top_k: TopK | None,
    into: Into,
    *,
    only_pooled_row: bool,
    store: bool,
    configuration: Configuration | None = None,
) -> None:
    """Compute ``into``; one launch. ``only_pooled_row``: no other row of an example is computed."""
    query, value, cu = attention.query, attention.value, attention.cu_seqlens_q
    batch = query.shape[0] if cu is None else cu.shape[0] - 1
    if batch == 0:
        return
    packed = cu is not None
    rows = query.shape[0 if packed else 2]
    few = only_pooled_row or rows <= FEW_QUERIES
    width = max(query.shape[-1], value.shape[-1])
    dtype = query.dtype

    def launch(chosen: Configuration) -> None:
        _launch(attention, loss, top_k, into, batch, rows, only_pooled_row, store, chosen)

    with runtime.on_device_of(query):
        if configuration is None:
            configuration = autotune.pick(
                "scored_attention",
                (padded(width), dtype, few, attention.is_causal, packed),
                configurations.choose(width, dtype, few, packed),
                lambda: configurations.candidates(width, dtype, few, packed),
                launch,
            )
        launch(configuration)


def _launch(
    attention: Attention,
    loss: Loss,
    top_k: TopK | None,
    into: Into,
    batch: int,
    rows: int,
    only_pooled_row: bool,
    store: bool,
    configuration: Configuration,
) -> None:
    query, key, value, cu = attention.query, attention.key, attention.value, attention.cu_seqlens_q
    packed, device = cu is not None, query.device
    heads, width, value_width = query.shape[1], query.shape[-1], value.shape[-1]
    block_m, block_n, warps, stages, registers = configuration
    if only_pooled_row:
        tiles = batch if packed else 1
    else:
        tiles = packed_tiles(rows, batch, block_m) if packed else max(1, -(-rows // block_m))
    all_tiles = heads * (tiles if packed else batch * tiles)
    num_splits = 1
    if block_m <= FEW_QUERIES and (only_pooled_row or rows <= FEW_QUERIES):
        keys = key.shape[0] // batch if packed else key.shape[2]
        num_splits = configurations.splits(all_tiles, keys, block_n, runtime.processors(device))

    block_dv = padded(value_width)
    slots = all_tiles if loss.target is not None else all_tiles * block_dv if loss.pool == "mean" else 0
    tickets = 1 + -(-batch // GROUP.value) + batch + (all_tiles if num_splits > 1 else 0)
    split_slots = all_tiles * num_splits * block_m * (block_dv + 2) if num_splits > 1 else 0
    scratch = [
        (slots, torch.float32),
        (split_slots, torch.float32),
        (batch, torch.int8),
        (0 if top_k is None else selection.scratch_length(batch), torch.int64),
    ]
    classifier = Classifier(None, 0, 0, None, 0, None, 0, 0, None, None, None)
    if loss.weight is not None:
        assert loss.labels is not None
        classifier = Classifier(
            loss.weight, *loss.weight.stride(), loss.bias, 0 if loss.bias is None else loss.bias.stride(0), loss.labels,
            loss.labels.stride(0), loss.weight.shape[0], into.pooled, into.logits, into.logit_gradient,
        )  # fmt: skip
    with runtime.workspace(device, tickets, scratch) as (counters, slot, split_slot, valid, ranks):
        of_examples = 1 + -(-batch // GROUP.value)
        workspace = Workspace(counters, counters[1:], counters[of_examples:], None, slot, None)
        if num_splits > 1:
            workspace = workspace._replace(tile_ticket_ptr=counters[of_examples + batch :], split_ptr=split_slot)
        logsumexp = into.logsumexp if store else None
        results = Results(
            logsumexp,
            0 if logsumexp is None or packed else logsumexp.stride(0),
            0 if logsumexp is None else logsumexp.stride(0 if packed else 1),
            into.losses,
            None if loss.score is None else into.scores,
            valid,
        )
        choice = Choice(None, None, None, None, None)
        if top_k is not None:
            choice = Choice(into.chosen, into.chosen_score, into.inclusion, top_k.seed, ranks)
        k, k_floor, temperature, _ = (0, 0, 0.0, None) if top_k is None else top_k
        scored_attention_kernel[(all_tiles * num_splits,)](
            rows_of(query), rows_of(key), rows_of(value), rows_of(loss.target), rows_of(into.output if store else None),
            Segments(cu, attention.query_lengths, rows),
            Segments(attention.cu_seqlens_k, attention.key_lengths, key.shape[0 if packed else 2]),
            window_of(attention.is_causal, attention.window_left, attention.window_right),
            classifier, results, choice, workspace, batch, tiles, rows,
            None if num_splits == 1 else num_splits, k, k_floor, temperature,
            abs(attention.scale), attention.softcap,
            HEADS=heads, HEADS_PER_KEY=heads // key.shape[1], D=width, DV=value_width, PACKED=packed,
            ONLY_ROW=loss.pool if only_pooled_row else "", POOL=loss.pool, SCORE=loss.score or "",
            PER_EXAMPLE=loss.per_example, NEGATE=attention.scale < 0,
            GUMBEL=temperature > 0, FLOOR=k_floor > 0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=padded(width), BLOCK_DV=block_dv,
            num_warps=warps, num_stages=stages, maxnreg=registers,
        )  # fmt: skip
