"""A forward of linear cross-entropy that computes no gradients, in one Triton launch.

It gives losses, the scores that need no second product, and the choice by one of them. ``ATTENT_AUTOTUNE=1`` measures
each kind of call's tile sizes once and prints them. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attent_kernels import pools

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
    loss, scores, counts, _ = _launch(call, call.reduction)
    return loss, scores, counts


def chooses_from(call: Call) -> bool:
    """Whether the launch that scores the pool can choose from it, too."""
    return takes(call) and 0 < call.batch <= pools.MAX_IN_LAUNCH


def score_and_select(call: Call, k: int, temperature: float, floor: float, seed: Tensor | None) -> Selection:
    """The lesson by the one score of a call that it takes."""
    chosen = _launch(call, None, (k, floor_count(k, floor), temperature, seed))[3]
    assert chosen is not None
    return Selection(*chosen)


def arguments_of(call: Call, reduction: str | None) -> dict[str, Any]:
    """What the scorer's launchers take of a call, but ``choose``."""
    return {
        "input": call.input,
        "linear_weight": call.linear_weight,
        "target": call.target,
        "linear_bias": call.linear_bias,
        "weight": call.weight,
        "example_weight": call.example_weight,
        "cu_seqlens": call.cu_seqlens,
        "reduction": reduction,
        "ignore_index": call.ignore_index,
        "label_smoothing": call.label_smoothing,
        "softcap": call.softcap,
        "shift": call.shift,
        "score": call.score,
        "per_example": call.per_example,
    }


def _launch(
    call: Call, reduction: str | None, choose: tuple[int, int, float, Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    # Only here: Triton need not be installed.
    from attent_kernels import autotune
    from attent_kernels.linear_cross_entropy import configurations
    from attent_kernels.linear_cross_entropy.launch_scorer import score_tokens, tiles_for
    from attent_kernels.linear_cross_entropy.scorer_workspace import Choose

    arguments = arguments_of(call, reduction)
    arguments["choose"] = None if choose is None else Choose(*choose)
    if autotune.ENABLED and call.input.dtype != torch.float32 and call.input.numel() > 0:
        arguments["tiles"] = autotune.pick(
            "score_tokens",
            configurations.kind_of(arguments),
            tiles_for(
                call.input,
                call.linear_weight,
                call.target,
                call.label_smoothing,
                call.softcap,
                call.weight,
                call.score,
                arguments["choose"],
            ),
            lambda: configurations.CANDIDATES,
            lambda tiles: score_tokens(**(arguments | {"tiles": tiles})),
        )
    loss, scores, counts, chosen = score_tokens(**arguments)
    return loss, scores, counts, chosen
