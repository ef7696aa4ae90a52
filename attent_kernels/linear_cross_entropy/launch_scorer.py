"""Launcher of the scorer (:mod:`.scorer`): outputs, workspace, grid. Not yet run on a GPU.

N tokens of width D against V classes, tiles of BM × BN, G vocabulary groups, R row tiles to a sweep.

**Workspace**, lent by :mod:`attent_kernels.runtime`: slots of 4 κ G ⌈N⌉ bytes, κ = 3 numbers kept for each token and
group, 7 where the target is spread out, ⌈N⌉ = N rounded up to BM; 4 to 7 numbers a token; 2 a block of examples; for a
choice 1 byte and 16 to 24 more an example. N = 8192, V = 131072, on 132 multiprocessors: G = 47, 4.8 MB (11 MB spread
out), against 2.1 GB of logits in bfloat16. No other memory than the results.

**Arithmetic**: 2 N V D FLOP, 8.80 TFLOP at D = 4096: 8.9 ms at H100's and H200's 989 TFLOP/s (dense bfloat16, data
sheet), 12.25 ms at the 718 TFLOP/s that Liger's CuTe kernel is reported at (H100, same shape). The logits cost some 9
instructions and one exponential each, 5 % of the products' time at D = 4096, 25 % at D = 768; only loads overlap it.

**Traffic**: from L2 each tile of products takes (BM + BN) D itemsize, in all N V D itemsize (1/BM + 1/BN): 103 GB, at
12.25 ms 8.4 TB/s, which is why tiles are as large as registers let them be. From HBM a sweep reads its R BM tokens once
(16 MB, so that they stay in L2) and the whole weight once: N D itemsize + ⌈N/(R BM)⌉ V D itemsize = 67 MB + 4 × 1.07 GB,
1.3 ms at 3.35 TB/s, beneath the arithmetic. Were all row tiles swept together, 132 programs would hold 67 MB of tokens
and stream them anew for every 2 vocabulary tiles: 17 GB. Slots are written and read once: 10 MB.

**Waves**: 64 × 47 programs of 11 tiles each on 132 multiprocessors are 23 waves, 253 tiles deep, where 248.2 would be
even: 2 % idle. A persistent grid would be cut the same way, so the grid is not persistent; within a program the pipeline
goes on from one vocabulary tile to the next.

**Predicted**, not measured: 1.15 to 1.25 times a bare GEMM of cuBLAS at this shape, 1.3 to 1.5 at D = 768, V = 1000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import on_device_of, workspace
from .configurations import Configuration, Cut, configuration, cut
from .online import KEPT, KEPT_SPREAD
from .scorer import score_kernel
from .views import Matrix, token_rows, vector

#: Columns of logits summed up at a time: 16 of each thread's. More spill.
_COLUMNS_AT_A_TIME = 32
#: Vocabulary groups folded at a time: 16 × 128 numbers of each kind, 8 or 16 a thread.
_GROUPS_AT_A_TIME = 16
#: Numbers of one kind that a fold of examples holds at a time.
_FOLDED_AT_A_TIME = 1024
#: Examples of a block at most where their lengths differ: a block takes as long as its longest one.
_PACKED_BLOCK = 32

#: Scores that the launch can give; "head" of examples of one token.
NAMES = ("loss", "logit", "head")


class Scored(NamedTuple):
    loss: Tensor | None  # float32, shaped by reduction
    scores: Tensor  # float32 [S, B]
    counts: Tensor  # float32 [B], valid tokens


class _Outputs(NamedTuple):
    loss: Any
    counts: Any
    mean_loss: Any
    logit: Any
    head: Any


class _Scratch(NamedTuple):
    slots: Any  # [kept, groups, ⌈N⌉]
    own: Any  # [⌈N⌉]
    hidden_square: Any  # [⌈N⌉] ‖h‖², or None
    token_loss: Any  # [N]
    token_square: Any
    token_count: Any
    token_share: Any  # [N] class weight, for the mean's denominator, or None
    token_head: Any  # [N] or None
    block_loss: Any  # [blocks]
    block_share: Any
    valid: Any  # int8 [B], or None


def score_tokens(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str | None = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    score: Sequence[str] = (),
    per_example: str = "rms",
    tiles: Configuration | None = None,
    groups: Cut | None = None,
) -> Scored:
    """Losses and scores of ``attent.linear_cross_entropy``, whose arguments these are; trusted, not checked.

    ``reduction`` None: no loss. ``score``: of :data:`NAMES`. ``tiles`` and ``groups`` are for tests and searches.
    """
    packed, soft = cu_seqlens is not None, target.is_floating_point()
    batch = input.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, width, classes = input.shape[:-1].numel(), input.shape[-1], linear_weight.shape[0]
    tokens_each = max(1, input.shape[1]) if input.dim() == 3 else 1
    device = input.device

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    counts, scores = floats(batch), floats(len(score), batch)
    loss_shape = {"none": input.shape[:-1], "example": (batch,), None: (0,)}.get(reduction, ())
    loss = floats(*loss_shape)
    if batch == 0:
        return Scored(loss.zero_(), scores, counts)

    spread = soft or label_smoothing > 0
    uniform = spread and not soft and weight is None
    chosen = tiles or configuration(input.dtype, tokens, classes, many_sums=spread and not uniform)
    kept = KEPT_SPREAD if spread else KEPT
    row_tiles = max(1, -(-tokens // chosen.rows))
    parts = groups or cut(
        row_tiles, classes, width, input.element_size(), kept, _processors(device), chosen
    )
    block_examples, block_tokens = _block(tokens, tokens_each, batch, packed, chosen.rows)
    blocks = -(-batch // block_examples)
    capacity = row_tiles * chosen.rows

    with_head, with_share = "head" in score, weight is not None and reduction == "mean" and not soft
    lengths = {
        "slots": kept * parts.groups * capacity,
        "own": capacity,
        "hidden_square": capacity if with_head else 0,
        "token_loss": tokens,
        "token_square": tokens,
        "token_count": tokens,
        "token_share": tokens if with_share else 0,
        "token_head": tokens if with_head else 0,
        "block_loss": blocks,
        "block_share": blocks,
        "valid": 0,
    }  # fmt: skip
    floats_or_bytes = [(n, torch.int8 if name == "valid" else torch.float32) for name, n in lengths.items()]
    with (
        on_device_of(input),
        workspace(device, row_tiles + blocks + 1, floats_or_bytes) as (tickets, *memory),
    ):
        optional = {"hidden_square": with_head, "token_head": with_head, "token_share": with_share, "valid": False}
        scratch = _Scratch(*(m if optional.get(name, True) else None for name, m in zip(lengths, memory, strict=True)))
        row = {name: scores[i] for i, name in enumerate(score)}
        out = _Outputs(loss, counts, row.get("loss"), row.get("logit"), row.get("head"))
        at = token_rows(target if soft else target[..., None])
        score_kernel[(row_tiles * parts.groups,)](
            token_rows(input), Matrix(linear_weight, *linear_weight.stride()), target, at.example, at.token, at.column,
            vector(linear_bias), vector(weight), vector(example_weight), vector(cu_seqlens),
            tokens, tokens_each, batch, width, classes, ignore_index, label_smoothing, softcap or 1.0,
            out, scratch, tickets, row_tiles, parts.groups, parts.group_tiles, parts.sweep, blocks,
            per_example=per_example, reduction=reduction or "", PACKED=packed, SHIFT=shift, SOFT=soft, SPREAD=spread,
            UNIFORM=uniform,            CAPPED=softcap is not None, EVEN_WIDTH=width % chosen.width == 0, EVEN_CLASSES=classes % chosen.classes == 0, FLATTEN=chosen.flatten,
            BM=chosen.rows, BN=chosen.classes, BK=chosen.width, BS=min(_COLUMNS_AT_A_TIME, chosen.classes), BG=_GROUPS_AT_A_TIME,
            BE=block_examples, BT=block_tokens, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return Scored(loss, scores, counts)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # H100's and H200's, where nothing runs
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(tokens: int, tokens_each: int, batch: int, packed: bool, rows: int) -> tuple[int, int]:
    """BE examples of about a tile's tokens, and BT tokens of each to be folded at a time: powers of two."""
    each = max(1, tokens // batch) if packed else tokens_each
    examples = _power_of_two_below(max(1, rows // each))
    if packed:
        examples = min(examples, _PACKED_BLOCK)
    at_a_time = _power_of_two_below(max(1, 2 * each - 1))  # the least one that holds them
    if packed:
        at_a_time = max(32, at_a_time)
    return examples, min(at_a_time, max(1, _FOLDED_AT_A_TIME // examples))


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
