"""Which point of the grid an arm's sweep runs at: all points once, the better half again, the mean of both decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .study import TUNING_BUDGET, TUNING_SEED

#: Of the second look. With one run a point, noise decides between neighbours.
SECOND_BUDGET = 0.5

Point = tuple[int, float]  # batch size, learning rate


def better_half(values: Mapping[Point, float]) -> list[Point]:
    """The points with the highest values, half of them (rounded up), best first; the first of equals."""
    ranked = sorted(values, key=lambda point: -values[point])
    return ranked[: (len(ranked) + 1) // 2]


def best_point(runs: Iterable[Mapping[str, Any]], arm: str, points: Sequence[Point], sign: int) -> Point | None:
    """The point with the best mean of both looks, as far as they have landed; None before all have."""

    def looked(budget: float, among: Sequence[Point]) -> dict[Point, float] | None:
        found = {
            (run["batch_size"], run["learning_rate"]): sign * float(run["value"])
            for run in runs
            if run["arm"] == arm and run["seed"] == TUNING_SEED and run["budget"] == budget
        }
        there = {point: found[point] for point in among if point in found}
        return there if len(there) == len(among) else None

    first = looked(TUNING_BUDGET, points)
    if first is None:
        return None
    half = better_half(first)
    second = looked(SECOND_BUDGET, half)
    return None if second is None else max(half, key=lambda point: first[point] + second[point])
