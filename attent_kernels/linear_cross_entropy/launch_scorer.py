"""Launcher of the scorer (:mod:`.scorer`): outputs, workspace, grid. Not yet run on a GPU.

N tokens of width D against V classes, tiles of BM × BN, G vocabulary groups, R row tiles to a sweep.

**Workspace**, lent by :mod:`attent_kernels.runtime`: slots of 4 κ G ⌈N⌉ bytes, κ = 3 numbers kept for each token and
group, 7 where the target is spread out, ⌈N⌉ = N rounded up to BM; 4 to 7 numbers a token; 2 a block of examples; for a
choice 1 byte and 16 to 24 more an example. N = 8192, V = 131072, on 132 multiprocessors: 4.8 MB (G = 47; 21 MB spread
out, in smaller tiles), against 2.1 GB of logits in bfloat16. Nothing else is allocated but the results.

**Arithmetic**: 2 N V D FLOP, 8.80 TFLOP at D = 4096: 8.9 ms at H100's and H200's 989 TFLOP/s (dense bfloat16, data
sheet), 12.25 ms at the 718 TFLOP/s that Liger's CuTe kernel is reported at (H100, same shape). What is kept of a logit
takes 16 instructions, one an exponential, on four schedulers (counted in sm_90 code): 6 % of the products' time at
D = 4096, 34 % at D = 768. One program to a multiprocessor, so that nothing hides it but the next tile's loads.

**Traffic**: from L2 each tile of products takes (BM + BN) D itemsize, in all N V D itemsize (1/BM + 1/BN): 103 GB, at
12.25 ms 8.4 TB/s, which is why tiles are as large as registers let them be. From HBM a sweep reads its R BM tokens once
(16 MB, so that they stay in L2) and the whole weight once: N D itemsize + ⌈N/(R BM)⌉ V D itemsize = 67 MB + 4 times
1.07 GB, 1.3 ms at 3.35 TB/s, beneath the arithmetic. Were all row tiles swept together, 132 programs would hold 67 MB
of tokens and stream them anew for every 2 vocabulary tiles: 17 GB. Slots are written and read once: 10 MB.

**Waves**: 64 × 47 programs of 11 tiles each on 132 multiprocessors are 23 waves, 253 tiles deep, where 248.2 would be
even: 2 % idle. A persistent grid would be cut the same way, so the grid is not persistent; within a program the
pipeline goes on from one vocabulary tile to the next.

**Predicted**, not measured: 1.15 to 1.25 times a bare GEMM of cuBLAS at this shape, 1.4 to 1.6 at D = 768, V = 1000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import on_device_of, workspace
from ..selection import scratch_length
from .configurations import Configuration, Cut, configuration, cut, processors
from .online import KEPT, KEPT_SPREAD
from .scorer import score_kernel
from .scorer_workspace import Choose, Scored, ToScore, block_of_examples, lent_scratch, scratch_memory
from .views import Matrix, is_aligned, token_rows, vector

#: Vocabulary groups folded at a time: 16 × 128 numbers of each kind, 8 or 16 a thread.
_GROUPS_AT_A_TIME = 16


class _Outputs(NamedTuple):
    """Of :class:`Scored`; None where not asked for."""

    loss: Any
    counts: Any
    mean_loss: Any  # the scores [B] by name
    logit: Any
    head: Any


class _Choice(NamedTuple):
    score: Any  # [B]
    temperature: float
    seed: Any
    index: Any  # [k]
    chosen_score: Any
    inclusion: Any


def score_tokens(
    what: ToScore, choose: Choose | None = None, *, tiles: Configuration | None = None, parts: Cut | None = None
) -> Scored:
    """Losses and scores in one launch, and the choice.

    Args:
        choose: chooses by the first score: valid examples (with a valid token, and a weight) before invalid ones.
        tiles, parts: instead of the table's and the plan's, for tests and searches.
    """
    (
        input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, reduction, ignore_index,
        label_smoothing, softcap, shift, score, per_example,
    ) = what  # fmt: skip
    packed, soft = cu_seqlens is not None, target.is_floating_point()
    spread = soft or label_smoothing > 0
    uniform = spread and not soft and weight is None
    batch = input.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, width, classes = input.shape[:-1].numel(), input.shape[-1], linear_weight.shape[0]
    tokens_each = max(1, input.shape[1]) if input.dim() == 3 else 1
    device = input.device

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    counts, scores = floats(batch), floats(len(score), batch)
    loss = floats(*{"none": input.shape[:-1], "example": (batch,), None: (0,)}.get(reduction, ()))
    chosen = None
    if choose is not None:
        chosen = torch.empty(choose.k, dtype=torch.int64, device=device), floats(choose.k), floats(choose.k)
    if batch == 0:
        return Scored(loss.zero_(), scores, counts, chosen)

    if tiles is None:
        tiles = tiles_for(what, choose)
    kept = KEPT_SPREAD if spread else KEPT
    row_tiles = max(1, -(-tokens // tiles.rows))
    if parts is None:
        parts = cut(row_tiles, classes, width, input.element_size(), kept, processors(device), tiles)
    block_examples, block_tokens = block_of_examples(tokens, tokens_each, batch, packed, tiles.rows)
    blocks = -(-batch // block_examples)

    memory = scratch_memory(
        kept * parts.groups,
        row_tiles * tiles.rows,
        blocks,
        batch,
        head="head" in score,
        share=weight is not None and reduction == "mean" and not soft,
        choice=None if choose is None else scratch_length(batch),
    )
    with on_device_of(input), workspace(device, row_tiles + blocks + 1, memory) as (tickets, *lent):
        scratch = lent_scratch(memory, lent)
        by_name = dict(zip(score, scores.unbind(0), strict=True))
        out = _Outputs(loss, counts, by_name.get("loss"), by_name.get("logit"), by_name.get("head"))
        choice = None
        if choose is not None and chosen is not None:
            choice = _Choice(scores[0], choose.temperature, choose.seed, *chosen)
        targets = token_rows(target if soft else target[..., None])
        score_kernel[(row_tiles * parts.groups,)](
            token_rows(input),
            Matrix(linear_weight, *linear_weight.stride()),
            target,
            targets.example,
            targets.token,
            targets.column,
            vector(linear_bias),
            vector(weight),
            vector(example_weight),
            vector(cu_seqlens),
            tokens,
            tokens_each,
            batch,
            width,
            classes,
            ignore_index,
            label_smoothing,
            1.0 if softcap is None else softcap,
            out,
            choice,
            0 if choose is None else choose.k,
            0 if choose is None else choose.k_floor,
            scratch,
            tickets,
            row_tiles,
            parts.groups,
            parts.group_tiles,
            parts.sweep,
            blocks,
            per_example=per_example,
            reduction=reduction or "",
            PACKED=packed,
            SHIFT=shift,
            SOFT=soft,
            SPREAD=spread,
            UNIFORM=uniform,
            CAPPED=softcap is not None,
            GUMBEL=choose is not None and choose.temperature > 0,
            FLOOR=choose is not None and choose.k_floor > 0,
            EVEN_WIDTH=width % tiles.width == 0,
            EVEN_CLASSES=classes % tiles.classes == 0,
            FLATTEN=tiles.flatten,
            BM=tiles.rows,
            BN=tiles.classes,
            BK=tiles.width,
            BS=min(tiles.columns, tiles.classes),
            BG=_GROUPS_AT_A_TIME,
            BE=block_examples,
            BT=block_tokens,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )
    return Scored(loss, scores, counts, chosen)


def tiles_for(what: ToScore, choose: Choose | None) -> Configuration:
    """What the table says."""
    return configuration(
        what.input.dtype,
        what.input.shape[:-1].numel(),
        what.linear_weight.shape[0],
        aligned=is_aligned(what.input) and is_aligned(what.linear_weight),
        capped=what.softcap is not None,
        smoothed=what.label_smoothing > 0,
        weighted=what.label_smoothing > 0 and what.weight is not None,
        soft=what.target.is_floating_point(),
        extra=choose is not None or "head" in what.score,
    )
