"""Choosing by quota: each group of examples (a class, a source) gets its proportional share of the k.

All shapes depend on n and k alone and nothing is read back to the host, so a pool on a GPU is chosen from without a
synchronisation, and a thousand groups cost as much as ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.select_top_k import log_weight
from .philox import gumbel, random_bits
from .selection import Selection


def quotas(counts: Tensor, k: int) -> Tensor:
    """``k`` shared out in proportion to ``counts`` int64 ``[G]``, by largest remainder; equal remainders: lower group
    first.

    Groups get ``k·count // total`` each, and what is left goes one by one to the largest remainders of that division.

    >>> quotas(torch.tensor([5, 3, 2]), 5)
    tensor([3, 1, 1])
    """
    total = counts.sum().clamp(min=1)
    base = counts * k // total
    remainder = counts * k - base * total
    place = _places(remainder.argsort(descending=True, stable=True))
    return base + (place < k - base.sum())


def group_labels(groups: Tensor) -> Tensor:
    """``groups`` int64 ``[n]`` renumbered 0, 1, … in their order: labels are below n, though no value was read."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    label = torch.zeros_like(groups)
    label[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(groups).scatter_(0, order, label)


def select_by_quota(
    scores: Tensor, k: int, groups: Tensor, *, temperature: float, floor: float, valid: Tensor, seed: int
) -> Selection:
    """:func:`select_top_k` within each group of a pool, by quotas of ``k`` in all; ordered by score, highest first."""
    labels = group_labels(groups)
    counts = _count(labels, max(len(scores), 1))
    index, inclusion = top_per_group(
        scores, labels, quotas(counts, k), k, temperature=temperature, floor=floor, valid=valid, seed=seed
    )
    order = torch.where(valid, scores, -torch.inf)[index].argsort(descending=True, stable=True)
    index = index[order]
    return Selection(index, scores[index], inclusion[order])


def top_per_group(
    scores: Tensor,
    labels: Tensor,
    quota: Tensor,
    k: int,
    *,
    temperature: float,
    floor: float,
    valid: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``quota[g]`` of each group g, ``k`` in all: indices int64 ``[k]``, ascending, and inclusions ``[k]``.

    The rule of :func:`select_top_k` with its thresholds, floor counts and pool sizes taken per group. ``labels`` int64
    ``[n]`` in [0, G), ``quota`` int64 ``[G]``, no quota above its group's size.
    """
    values = scores if scores.dtype == torch.float64 else scores.float()
    key_bits, floor_bits = random_bits(seed, torch.arange(len(values), device=values.device))
    weight = log_weight(values, temperature) if temperature > 0 else values
    key = weight + gumbel(key_bits, values.dtype) if temperature > 0 else values
    key = key.masked_fill(~valid, -torch.inf)

    counts = _count(labels, len(quota))
    start = counts.cumsum(0) - counts
    k_floor = (quota.double() * floor + 0.5).floor().long()
    k_first = quota - k_floor

    by_key = _order_within_groups(labels, key)
    first = _places(by_key) - start[labels] < k_first[labels]
    lottery = torch.where(valid, -floor_bits, -(2**32)).masked_fill(first, 1)  # the smallest draw wins
    chosen = _places(_order_within_groups(labels, lottery)) - start[labels] < quota[labels]
    index = (~chosen).to(torch.int8).argsort(stable=True)[:k]

    group, in_first = labels[index], first[index]
    if temperature > 0:
        # κ: the (k_first + 1)-th largest key of the group for its first ones, the k_first-th largest for the others.
        rank = torch.where(in_first, k_first[group], k_first[group] - 1)
        exists = (rank >= 0) & (rank < counts[group])
        threshold = key[by_key[(start[group] + rank).clamp(0, max(len(key) - 1, 0))]]
        threshold = threshold.where(exists, torch.where(in_first, -torch.inf, torch.inf))
        q = (weight[index] - threshold).exp().neg().expm1().neg()
    else:
        q = in_first.to(values.dtype)
    num_valid = torch.zeros_like(counts).scatter_add_(0, labels, valid.long())
    share = k_floor / (num_valid - k_first).clamp(min=1)
    inclusion = q + (1 - q) * share[group].to(values.dtype)
    return index, torch.where((num_valid <= quota)[group], 1.0, inclusion)


def _order_within_groups(labels: Tensor, key: Tensor) -> Tensor:
    """The permutation to groups in their order and, within a group, larger keys first; equal keys: lower index."""
    by_key = key.argsort(descending=True, stable=True)
    return by_key[labels[by_key].argsort(stable=True)]


def _places(order: Tensor) -> Tensor:
    """Where each element stands in a permutation: its inverse."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _count(labels: Tensor, groups: int) -> Tensor:
    """How many of each label there are, int64 ``[groups]``."""
    return torch.zeros(groups, dtype=torch.int64, device=labels.device).scatter_add_(0, labels, torch.ones_like(labels))
