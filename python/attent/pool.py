"""Choosing from a pool in hand: the batch or window of candidates that one-pass and stream training work on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._checks import check_int
from .distributed import gather_rows, rank_and_world
from .ops.select_top_k import select_top_k
from .plan import Plan
from .policy import Policy
from .quotas import select_by_quota
from .seeds import Use, mix_seed
from .selection import Selection


def choose_from_pool(
    policy: Policy, plan: Plan, scores: Tensor, k: int | None, groups: Tensor | None, step: int
) -> Selection:
    """This rank's k (None: the plan's) of its own pool, with noise of its own; nothing is read back to the host."""
    rank, _ = rank_and_world()
    k = _checked(k, plan, step, len(scores))
    return _select(policy, scores, k, groups, mix_seed(policy.seed, Use.CHOOSE, step, rank))


def choose_across_ranks(
    policy: Policy,
    plan: Plan,
    scores: Tensor,
    k: int | None,
    groups: Tensor | None,
    step: int,
    process_group: ProcessGroup,
) -> Selection:
    """This rank's part of the k that are chosen from all pools of ``process_group``, with noise that they share."""
    rank, _ = rank_and_world(process_group)
    pools = gather_rows(scores, process_group)  # of any sizes
    begin, pool = sum(len(part) for part in pools[:rank]), torch.cat(pools).to(scores.device)
    if groups is not None:
        groups = torch.cat(gather_rows(groups, process_group)).to(scores.device)
    k = _checked(k, plan, step, len(pool))
    everywhere = _select(policy, pool, k, groups, mix_seed(policy.seed, Use.CHOOSE, step))
    own = (everywhere.index >= begin) & (everywhere.index < begin + len(scores))
    return Selection(everywhere.index[own] - begin, everywhere.score[own], everywhere.inclusion[own])


def _checked(k: int | None, plan: Plan, step: int, size: int) -> int:
    if k is None:
        return plan.size(step, size)
    check_int("k", k, low=0, high=size, why="the pool's examples")
    return k


def _select(policy: Policy, pool: Tensor, k: int, groups: Tensor | None, seed: int) -> Selection:
    """``k`` of ``pool`` by its scores; non-finite ones rank below all others."""
    temperature, floor = policy.temperature, policy.floor
    valid = pool.isfinite()
    # Above temperature 0 the weight of a score is its power: a negative one has none.
    scores = torch.where(valid, pool, 0.0).clamp(min=0.0) if temperature > 0 else pool
    if groups is None:
        chosen = select_top_k(scores, k, temperature=temperature, floor=floor, valid=valid, seed=seed)
    else:
        chosen = select_by_quota(scores, k, groups, temperature=temperature, floor=floor, valid=valid, seed=seed)
    return chosen._replace(score=pool[chosen.index])
