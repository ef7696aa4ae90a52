"""``attent.score_and_select``: the lesson of a pool from its hidden states: head GEMM, scores, top-k."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import describe, refuse
from ..philox import seed_tensor
from ..selection import Selection
from . import cuda_scorer, triton_scorer
from .dispatch import choose
from .linear_cross_entropy import cast_for_autocast, check_options, check_scores, check_tensors
from .linear_cross_entropy_op import Call, run
from .plain_eager import is_plain_eager
from .select_top_k import _check_numbers, _check_seed, select_top_k


def score_and_select(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    k: int,
    *,
    score: str = "logit",
    temperature: float = 0.0,
    floor: float = 0.0,
    seed: int | Tensor | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    example_weight: Tensor | None = None,
    per_example: str = "rms",
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Selection:
    """Choose ``k`` of the pool's B examples by their scores under a linear head, without gradient.

    The scores are those of :func:`attent.linear_cross_entropy`, the choice is :func:`attent.select_top_k`'s. Examples
    without a valid token, or of weight 0, come after all others.

    Args:
        input, linear_weight, target: as in :func:`attent.linear_cross_entropy`.
        k: how many to choose, at most B.
        score: ``"loss"``, ``"logit"``, ``"hidden"`` or ``"head"``.
        temperature, floor, seed: as in :func:`attent.select_top_k`.
        linear_bias, weight, ignore_index, label_smoothing, softcap, shift: as in :func:`attent.linear_cross_entropy`.
        example_weight, per_example, cu_seqlens, group, backend: likewise.

    Returns:
        :class:`Selection`: index int64 ``[k]``, score ``[k]``, inclusion ``[k]``.

    Raises:
        ValueError: naming the argument, what came and what is taken.

    >>> hidden, head = torch.randn(8, 16), torch.nn.Linear(16, 10)
    >>> lesson = attent.score_and_select(hidden, head.weight, torch.randint(10, (8,)), 3, linear_bias=head.bias)
    >>> lesson.index.shape
    torch.Size([3])
    """
    if not isinstance(score, str):
        refuse("score", describe(score), "one name: a choice is made by one score")
    names = check_scores(score)
    check_options("sum", ignore_index, label_smoothing, softcap, shift, per_example, group)
    with torch.no_grad():
        input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
        check_tensors(
            input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, ignore_index, shift, group
        )
        runs_on = choose("linear_cross_entropy", backend, input.device, input.dtype)
        call = Call(
            input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, "sum", ignore_index,
            label_smoothing, softcap, shift, names, per_example, None if group is None else group.group_name, runs_on,
            False, False, False,
        )  # fmt: skip
        # One launch, where a launch can do it; a compiled call is traced through the two ops instead.
        scorer = {"triton": triton_scorer, "cuda": cuda_scorer}.get(runs_on)
        if scorer is not None and is_plain_eager(call[:7]) and scorer.chooses_from(call):
            _check_numbers(call.batch, k, temperature, floor)
            _check_seed(seed, input.device)
            drawn = seed_tensor(seed, input.device) if temperature > 0 or floor > 0 else None
            lesson: Selection = scorer.score_and_select(call, k, temperature, floor, drawn)
            return lesson
        _, scores, counts, *_ = run(*call)
        valid = counts > 0
        if example_weight is not None:
            valid &= example_weight != 0
        return select_top_k(scores[0], k, temperature=temperature, floor=floor, valid=valid, seed=seed, backend=backend)
