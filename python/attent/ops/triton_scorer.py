"""A forward of linear cross-entropy that computes no gradients, in one Triton launch.

It gives losses, the scores that need no second product, and the choice by one of them. ``ATTENT_AUTOTUNE=1`` measures
each kind of call's tile sizes once and prints them. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attent_kernels import pools
from attent_kernels.linear_cross_entropy.scorer_workspace import Choose, Scored, ToScore

from ..selection import Selection
from .linear_cross_entropy_op import Call
from .select_top_k import floor_count


def takes(call: Call) -> bool:
    """Whether the launch can do it: no gradient computed along, no vocabulary shards, no score that needs more.

    Where the backward computes the logits again (an unreduced loss, float16), the forward has no gradient to compute.
    """
    wants_gradient = call.input_gradient or call.weight_gradient or call.bias_gradient
    if call.group is not None or (wants_gradient and call.gradients_in_forward):
        return False
    single = call.cu_seqlens is None and call.input.shape[1:-1].numel() == 1
    given = {"loss", "logit", "head"} if single else {"loss", "logit"}
    return given.issuperset(call.score)


def score(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """loss, scores ``[S, B]``, counts ``[B]`` of a call that it takes."""
    scored = _launch(call, call.reduction)
    return scored.loss, scored.scores, scored.counts


def chooses_from(call: Call) -> bool:
    """Whether the launch that scores the pool can choose from it, too."""
    return takes(call) and 0 < call.batch <= pools.MAX_IN_LAUNCH


def score_and_select(call: Call, k: int, temperature: float, floor: float, seed: Tensor | None) -> Selection:
    """The lesson by the one score of a call that it takes."""
    return selection_of(_launch(call, None, Choose(k, floor_count(k, floor), temperature, seed)))


def selection_of(scored: Scored) -> Selection:
    """What a launch that was to choose has chosen."""
    assert scored.chosen is not None
    return Selection(*scored.chosen)


def to_score(call: Call, reduction: str | None) -> ToScore:
    """A call as the scorer's launchers take it."""
    return ToScore(*call[:7], reduction, *call[8:14])


def _launch(call: Call, reduction: str | None, choose: Choose | None = None) -> Scored:
    # Only here: Triton need not be installed.
    from attent_kernels import autotune
    from attent_kernels.linear_cross_entropy import configurations
    from attent_kernels.linear_cross_entropy.launch_scorer import score_tokens, tiles_for

    what, tiles = to_score(call, reduction), None
    if autotune.ENABLED and call.input.dtype != torch.float32 and call.input.numel() > 0:
        tiles = autotune.pick(
            "score_tokens",
            configurations.kind_of(what, choose),
            tiles_for(what, choose),
            lambda: configurations.CANDIDATES,
            lambda tiles: score_tokens(what, choose, tiles=tiles),
        )
    scored: Scored = score_tokens(what, choose, tiles=tiles)
    return scored
