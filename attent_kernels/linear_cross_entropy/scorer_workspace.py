"""What the scorer's launchers, Triton's and CUDA's, share: records, the workspace's layout, blocks of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Numbers of one kind that Triton's fold of examples holds at a time.
_FOLDED_AT_A_TIME = 1024
#: Examples of a block at most where their lengths differ: a block takes as long as its longest one.
_PACKED_BLOCK = 32


class ToScore(NamedTuple):
    """What is scored: arguments of ``attent.linear_cross_entropy``, in its order, checked there."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    example_weight: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reduction: str | None = "mean"  # None: no loss
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    shift: bool = False
    score: Sequence[str] = ()  # of "loss", "logit" and, where each example is one token, "head"
    per_example: str = "rms"


class Choose(NamedTuple):
    """What to choose by the one score that is asked for, as ``attent.select_top_k`` does; B <= MAX_IN_LAUNCH."""

    k: int
    k_floor: int  # how many of the k are drawn uniformly
    temperature: float
    seed: Tensor | None  # int64 [1], where k_floor or temperature is above 0


class Scored(NamedTuple):
    loss: Tensor  # float32, shaped by reduction
    scores: Tensor  # float32 [S, B]
    counts: Tensor  # float32 [B], valid tokens
    chosen: tuple[Tensor, Tensor, Tensor] | None  # index int64, score, inclusion, each [k]


class Scratch(NamedTuple):
    """Float32 unless said otherwise, None where not needed. ⌈N⌉: N rounded up to whole tiles."""

    slots: Any  # [kept, groups, ⌈N⌉]
    own: Any  # [⌈N⌉] the target's raw logit
    hidden_square: Any  # [⌈N⌉] ‖h‖²
    token_loss: Any  # [⌈N⌉]
    token_square: Any
    token_count: Any  # 1 where it has a target
    token_share: Any  # class weight, for the mean's denominator; None: its count
    token_head: Any
    block_loss: Any  # [blocks]
    block_share: Any
    valid: Any  # int8 [B]
    selection: Any  # int64


def scratch_memory(
    slots: int, capacity: int, blocks: int, batch: int, *, head: bool, share: bool, choice: int | None
) -> list[tuple[int, torch.dtype]]:
    """Length and dtype of each field of :class:`Scratch`, 0 where it is not needed.

    ``slots``: kept numbers times groups. ``choice``: the selection's own scratch length; None where none is made.
    """
    lengths = Scratch(
        slots=slots * capacity,
        own=capacity,
        hidden_square=capacity * head,
        token_loss=capacity,
        token_square=capacity,
        token_count=capacity,
        token_share=capacity * share,
        token_head=capacity * head,
        block_loss=blocks,
        block_share=blocks,
        valid=batch * (choice is not None),
        selection=choice or 0,
    )
    dtypes = {"valid": torch.int8, "selection": torch.int64}
    return [(length, dtypes.get(name, torch.float32)) for name, length in lengths._asdict().items()]


def lent_scratch(memory: Sequence[tuple[int, torch.dtype]], lent: Sequence[Tensor]) -> Scratch:
    """What :func:`attent_kernels.runtime.workspace` lends for :func:`scratch_memory`."""
    return Scratch(*(part if length else None for (length, _), part in zip(memory, lent, strict=True)))


def block_of_examples(tokens: int, tokens_each: int, batch: int, packed: bool, rows: int) -> tuple[int, int]:
    """BE examples of about a tile's tokens, and BT tokens of each folded at a time: powers of two."""
    each = max(1, tokens // batch) if packed else tokens_each
    examples = _power_of_two(max(1, rows // each))
    at_a_time = _power_of_two(2 * each - 1)  # the least that holds them all
    if packed:
        examples, at_a_time = min(examples, _PACKED_BLOCK), max(32, at_a_time)
    return examples, min(at_a_time, max(1, _FOLDED_AT_A_TIME // examples))


def _power_of_two(number: int) -> int:
    """The largest one up to ``number``."""
    return 1 << (number.bit_length() - 1)
