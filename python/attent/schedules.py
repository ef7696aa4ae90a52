"""How the keep ratio moves over a run: constant, linear, cosine, in steps, and the paper's incremental rise.

A schedule is a small frozen dataclass, called with the progress of the reduced part of the run: 0 at the first reduced
epoch (or step), 1 at the last. Warm-up and anneal are not part of it. For a schedule of your own, subclass
:class:`Schedule` as a frozen dataclass whose fields are plain numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ._checks import check_int, check_number, describe, refuse


@dataclass(frozen=True)
class Schedule:
    """A value for each progress in [0, 1]; subclass it and define ``__call__``.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Half(attent.schedules.Schedule):
    ...     start: float
    ...     def __call__(self, progress):
    ...         return self.start * 0.5**progress
    >>> attent.Teacher(100, total_epochs=5, ratio=Half(0.8), anneal=0).epoch_sizes()
    [100, 80, 63, 50, 40]
    """

    def __call__(self, progress: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(progress)")

    def describe(self) -> dict[str, Any]:
        """The schedule by name and parameters, as ``state_dict`` stores it.

        >>> attent.schedules.Linear(0.2, 0.8).describe()
        {'name': 'Linear', 'start': 0.2, 'end': 0.8}
        """
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout.

    >>> attent.schedules.Constant(0.7)(0.5)
    0.7
    """

    value: float

    def __post_init__(self) -> None:
        check_number("value", self.value)

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """``start + (end − start)·progress``.

    >>> attent.schedules.Linear(0.25, 0.75)(0.5)
    0.5
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``start`` to ``end``, flat at both: ``start + (end − start)·(1 − cos(π·progress))/2``.

    >>> attent.schedules.Cosine(0.25, 0.75)(0.5)
    0.5
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step(Schedule):
    """``values[i]`` from ``milestones[i−1]`` on: one more value than milestones, which rise within (0, 1).

    >>> schedule = attent.schedules.Step(values=(0.3, 0.6), milestones=(0.5,))
    >>> schedule(0.49), schedule(0.5)
    (0.3, 0.6)
    """

    values: tuple[float, ...]
    milestones: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1:
            refuse("values", describe(self.values), f"one value more than milestones, {len(self.milestones) + 1} here")
        for value in self.values:
            check_number("values", value)
        for value in self.milestones:
            check_number("milestones", value, low=0, high=1)
        if list(self.milestones) != sorted(set(self.milestones)):
            refuse("milestones", describe(self.milestones), "numbers that rise within (0, 1)")
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "milestones", tuple(self.milestones))

    def __call__(self, progress: float) -> float:
        return self.values[sum(progress >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class Incremental(Schedule):
    """The paper's rise in ``cycles`` equal stages: ``start + (end − start)·c/(cycles − 1)`` in stage c = 0..cycles−1.

    Source: AtteNT (arXiv 2602.20461), whose best vision schedule raises ratio and interval this way.

    >>> schedule = attent.schedules.Incremental(0.25, 0.75, cycles=3)
    >>> schedule(0.0), schedule(0.5), schedule(1.0)
    (0.25, 0.5, 0.75)
    """

    start: float
    end: float
    cycles: int = 10

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        check_int("cycles", self.cycles, low=2)

    def __call__(self, progress: float) -> float:
        cycle = min(int(progress * self.cycles), self.cycles - 1)
        return self.start + (self.end - self.start) * cycle / (self.cycles - 1)


def as_schedule(argument: str, value: object) -> Schedule:
    """``value`` as a schedule: a number is constant. ``argument``: what an error calls it.

    Raises:
        ValueError: it is neither a number nor a schedule.

    >>> attent.schedules.as_schedule("ratio", 0.5)
    Constant(value=0.5)
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(argument, describe(value), "a number or a schedule of attent.schedules, such as Linear(0.3, 0.7)")
    return Constant(float(value))
