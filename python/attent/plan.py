"""How much of the data each epoch (or step) trains on, fixed in advance so that learning rates can be planned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ._checks import check_int, check_number, refuse
from .schedules import Schedule, as_schedule

MINIMUM_TO_ANNEAL = 4  # with fewer epochs, an annealed one would be a quarter of the run or more


def round_half_up(value: float) -> int:
    """``floor(value + ½)``: the rule for every k."""
    return math.floor(value + 0.5)


@dataclass(frozen=True)
class Plan:
    """Full in warm-up and anneal, reduced by the ratio schedule between them.

    ``total``, ``warmup``, ``anneal_start`` count epochs, or steps of a stream. ``full_from`` is where training turns
    full for good: ``anneal_start``, or earlier after :meth:`annealing_from`. ``interval`` epochs share one lesson.
    """

    unit: str
    total: int
    warmup: int
    anneal_start: int
    full_from: int
    ratio: Schedule
    interval: Schedule

    def annealing_from(self, time: int) -> Plan:
        """The same plan, full from ``time`` on."""
        return replace(self, full_from=min(self.full_from, max(time, 0)))

    def is_full(self, time: int) -> bool:
        """Whether everything is trained on at ``time``."""
        return time < self.warmup or time >= self.full_from

    def keep_ratio(self, time: int) -> float:
        """The share trained on at ``time``: 1 when full, else the schedule where this time's lesson begins."""
        return 1.0 if self.is_full(time) else self._scheduled_ratio(self.lesson_start(time))

    def size(self, time: int, pool: int) -> int:
        """How many of ``pool`` examples are trained on at ``time``: k = floor(r·n + ½)."""
        return pool if self.is_full(time) else round_half_up(self.keep_ratio(time) * pool)

    def lesson_start(self, time: int) -> int:
        """The first epoch of the lesson that a reduced epoch trains on: itself, unless lessons are held."""
        return self._lesson_starts[time - self.warmup] if self._lessons_are_held else time

    def progress(self, time: int) -> float:
        """How far ``time`` lies in the reduced part: 0 at its first epoch, 1 at its last (0 if it is the only one)."""
        span = self.anneal_start - self.warmup - 1
        return min(max((time - self.warmup) / span, 0.0), 1.0) if span > 0 else 0.0

    def _scheduled_ratio(self, time: int) -> float:
        ratio = self.ratio(self.progress(time))
        if not 0 < ratio <= 1:  # also NaN
            refuse("ratio", f"{ratio} in {self.unit} {time}", "keep ratios in (0, 1] throughout the run")
        return ratio

    @property
    def _lessons_are_held(self) -> bool:
        return self.interval != as_schedule("interval", 1)

    @cached_property
    def _lesson_starts(self) -> list[int]:
        """For each scheduled epoch from the warm-up on, where its lesson begins."""
        starts: list[int] = []
        while len(starts) < self.anneal_start - self.warmup:
            first = self.warmup + len(starts)
            held = round_half_up(self.interval(self.progress(first)))
            if held < 1:
                refuse("interval", f"{held} in {self.unit} {first}", "at least 1 epoch throughout the run")
            starts += [first] * held
        return starts[: max(self.anneal_start - self.warmup, 0)]


def make_plan(
    unit: str, total: int, ratio: float | Schedule, warmup: float, anneal: float, interval: float | Schedule
) -> Plan:
    """The checked plan of a run of ``total`` epochs or steps; a float ``warmup`` is a share of them."""
    check_int(f"total_{unit}s", total, low=1)
    if isinstance(warmup, float):
        check_number("warmup", warmup, low=0, high=1)
        warmup = round_half_up(warmup * total)
    check_int("warmup", warmup, low=0, high=total, why=f"{unit}s, or a float in [0, 1] that is a share of them")
    check_number("anneal", anneal, low=0, high=1)
    # The subtracted crumb keeps a product such as 0.07·100 = 7.000000000000001 from being rounded up to 8.
    annealed = math.ceil(anneal * total - 1e-9) if total >= MINIMUM_TO_ANNEAL else 0
    anneal_start = max(total - annealed, int(warmup))
    plan = Plan(
        unit,
        total,
        int(warmup),
        anneal_start,
        anneal_start,
        as_schedule("ratio", ratio),
        as_schedule("interval", interval),
    )
    if unit == "step" and plan._lessons_are_held:
        refuse("interval", plan.interval, "1 with total_steps: a lesson can only be held over epochs of the same data")
    if plan.anneal_start > plan.warmup:  # now, not in the middle of a run
        for time in range(plan.warmup, plan.anneal_start) if unit == "epoch" else (plan.warmup, plan.anneal_start - 1):
            plan.keep_ratio(time)
    return plan
