"""Linear cross-entropy and its scores in CUDA C++: the backend ``"cuda"``, of forwards that compute no gradient.

One launch gives losses, the scores that need no second product, and the choice by one of them, as Triton's scorer does
(:mod:`.triton_scorer`). What it does not do it refuses by name. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attent_kernels import pools
from attent_kernels.linear_cross_entropy import launch_scorer_cuda
from attent_kernels.linear_cross_entropy.scorer_workspace import Choose

from .._checks import dtype_name, refuse
from ..selection import Selection
from .dispatch import register
from .linear_cross_entropy_op import Call, SixTensors
from .select_top_k import floor_count
from .triton_scorer import selection_of, to_score


def _refuses(dtype: torch.dtype) -> str | None:
    if dtype in (torch.float16, torch.bfloat16):
        return None
    return f"it takes float16 and bfloat16, input is {dtype_name(dtype)}"


def refusal(call: Call) -> str | None:
    """Why the launch cannot do a call of a dtype that it takes; None if it can."""
    if call.group is not None:
        return "it takes the whole vocabulary, linear_weight is one shard of it (group)"
    if call.target.is_floating_point():
        return "it takes class indices, target holds probabilities"
    single = call.cu_seqlens is None and call.input.shape[1:-1].numel() == 1
    for name in call.score:
        if name == "hidden" or (name == "head" and not single):
            what = "'head' of examples of several tokens" if name == "head" else "'hidden'"
            return f"it gives the scores 'loss', 'logit' and, of examples of one token, 'head'; score asks for {what}"
    if call.input_gradient or call.weight_gradient or call.bias_gradient:
        return "it computes no gradients: call it under torch.no_grad(), or with detached tensors"
    return None


@register("linear_cross_entropy", "cuda", refuses=_refuses)
def linear_cross_entropy_forward(call: Call) -> SixTensors:
    """Loss, scores and counts in one launch."""
    _check(call)
    scored = launch_scorer_cuda.score_tokens(to_score(call, call.reduction))
    nothing = call.input.new_empty
    return scored.loss, scored.scores, scored.counts, nothing(0), nothing(0), nothing(0)


def chooses_from(call: Call) -> bool:
    """Whether the launch that scores the pool also chooses from it."""
    _check(call)
    return 0 < call.batch <= pools.MAX_IN_LAUNCH


def score_and_select(call: Call, k: int, temperature: float, floor: float, seed: Tensor | None) -> Selection:
    """The lesson by the one score of a call that it takes."""
    choose = Choose(k, floor_count(k, floor), temperature, seed)
    return selection_of(launch_scorer_cuda.score_tokens(to_score(call, None), choose))


def _check(call: Call) -> None:
    reason = refusal(call)
    if reason is not None:
        refuse("backend", "'cuda'", f"a backend that can do this call; 'cuda' cannot: {reason}")
