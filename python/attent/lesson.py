"""One lesson of the harvest way: which of all examples the next epochs train on, drawn from what the store knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.select_top_k import select_top_k
from .quotas import quotas, top_per_group
from .seeds import Use, mix_seed

LARGEST_WEIGHT = 4.0  # a rarer example would otherwise make single steps as large as it is rare


@dataclass(frozen=True)
class Lesson:
    """A reduced lesson, from ``epoch`` on: ``index`` int64 ``[k]`` ascending, ``inclusion`` float32 ``[k]``."""

    epoch: int
    index: Tensor
    inclusion: Tensor


def draw(
    score: Tensor,
    unseen: Tensor,
    k: int,
    *,
    temperature: float,
    floor: float,
    groups: Tensor | None,
    seed: int,
    epoch: int,
) -> Lesson:
    """Draw ``k`` of N examples: unseen ones first, in random order, then by score; a pure function of its arguments.

    ``score`` float32 ``[N]`` (NaN: none, counts as 0), ``unseen`` bool ``[N]``, ``groups`` int64 ``[N]`` in [0, G) or
    None. Unseen ones have inclusion ``min(1, k / unseen)``; the rest as in :func:`select_top_k` over those seen.
    """
    score = score.nan_to_num(nan=0.0).clamp(min=0.0)  # nothing finite was ever recorded: only the floor takes it
    seed_unseen, seed_seen = mix_seed(seed, Use.DRAW_UNSEEN, epoch), mix_seed(seed, Use.DRAW_SEEN, epoch)
    if groups is None and not bool(unseen.any()):
        chosen = select_top_k(score, k, temperature=temperature, floor=floor, seed=seed_seen, sorted=False)
        return Lesson(epoch, chosen.index, chosen.inclusion)
    new, old = unseen.nonzero().squeeze(1), (~unseen).nonzero().squeeze(1)
    if groups is None:
        k_new = min(k, len(new))
        first = select_top_k(torch.ones(len(new)), k_new, floor=1.0, seed=seed_unseen, sorted=False)
        rest = select_top_k(score[old], k - k_new, temperature=temperature, floor=floor, seed=seed_seen, sorted=False)
        parts = [(first.index, first.inclusion), (rest.index, rest.inclusion)]
    else:
        sizes, new_sizes = groups.bincount(), groups[new].bincount(minlength=int(groups.max()) + 1)
        quota = quotas(sizes, k)
        quota_new = torch.minimum(quota, new_sizes)
        parts = []
        for of, values, share, noise, temper, uniform in (
            (new, torch.ones(len(new)), quota_new, seed_unseen, 0.0, 1.0),
            (old, score[old], quota - quota_new, seed_seen, temperature, floor),
        ):
            parts.append(
                top_per_group(
                    values,
                    groups[of],
                    share,
                    int(share.sum()),
                    temperature=temper,
                    floor=uniform,
                    valid=torch.ones_like(of, dtype=torch.bool),
                    seed=noise,
                )
            )
    (from_new, inclusion_new), (from_old, inclusion_old) = parts
    taken, inclusion = torch.zeros(len(score), dtype=torch.bool), torch.empty(len(score))
    for ids, value in ((new[from_new], inclusion_new), (old[from_old], inclusion_old)):
        taken[ids] = True
        inclusion[ids] = value
    index = taken.nonzero().squeeze(1)
    return Lesson(epoch, index, inclusion[index])


def lesson_weights(inclusion: Tensor) -> Tensor:
    """Self-normalised inverse inclusion: ``min(1/π, 4)`` divided by its mean over the lesson, ``[k]``."""
    weight = inclusion.reciprocal().clamp(max=LARGEST_WEIGHT)
    return weight / weight.mean()
