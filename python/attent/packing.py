"""Packing after the choice: chosen examples put together so that a batch holds as many tokens as it may."""

from __future__ import annotations

from bisect import bisect_left, insort

import torch
from torch import Tensor

WINDOW = 4096  # examples packed together: enough lengths to fill gaps with, few enough to keep the shuffle


def pack(order: list[int], lengths: list[int], max_tokens: int, seed: int | None) -> list[list[int]]:
    """Batches of ids whose lengths sum to ``max_tokens`` at most; each id of ``order`` once.

    ``lengths[i]`` belongs to ``order[i]``. Within windows of 4,096 examples, longest first, each example goes to the
    fullest batch that still takes it (best-fit decreasing: at most 11/9 of the fewest batches possible plus a constant;
    Johnson 1973). The batches are then shuffled by ``seed`` (None: kept in order).
    """
    batches: list[list[int]] = []
    for begin in range(0, len(order), WINDOW):
        window = range(begin, min(begin + WINDOW, len(order)))
        room: list[tuple[int, int]] = []  # (tokens left, batch), fullest first
        for i in sorted(window, key=lambda i: -lengths[i]):
            place = bisect_left(room, (lengths[i], 0))
            if place < len(room):
                left, batch = room.pop(place)
                batches[batch].append(order[i])
            else:
                left, batch = max_tokens, len(batches)
                batches.append([order[i]])
            insort(room, (left - lengths[i], batch))
    if seed is None:
        return batches
    generator = torch.Generator().manual_seed(seed)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def check_fits(lengths: Tensor, max_tokens: int) -> str | None:
    """What is wrong with lengths for packing into ``max_tokens``; None if nothing is."""
    wrong = ((lengths < 1) | (lengths > max_tokens)).nonzero().squeeze(1)
    if len(wrong) == 0:
        return None
    first = int(wrong[0])
    return f"{len(wrong)} lengths outside, the first {int(lengths[first])} of example {first}"
