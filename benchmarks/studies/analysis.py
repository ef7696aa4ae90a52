"""What the runs of a study say: smallest budgets, paired differences at equal seconds, and what could be detected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attent.demo.intervals import Difference, mean, paired_difference, standard_deviation, t_quantile

from .arms import FULL
from .record import read
from .study import TUNING_SEED
from .sweep import BUDGETS
from .tuning import best_point

#: P(an existing difference's interval leaves 0 out) that the smallest detectable difference is stated for.
POWER = 0.8
#: With fewer a study is not shown.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """An arm at a budget, over the seeds."""

    values: list[float]  # by seed
    seconds: float
    teaching_seconds: float
    unchosen_seconds: float
    examples: float


@dataclass(frozen=True)
class Landed:
    """The runs of one study, of its latest settings and code; only seeds for which every arm and budget landed."""

    name: str
    about: dict[str, Any]  # the record of the costs
    runs: list[dict[str, Any]]
    arms: list[str]
    budgets: list[float]
    seeds: list[int]
    all_runs: int  # that landed, the grid's included
    all_seconds: float  # of their training

    @property
    def sign(self) -> int:
        return 1 if self.about["settings"]["metric"][1] else -1

    def cell(self, arm: str, budget: float) -> Cell:
        found = sorted(
            (r for r in self.runs if r["arm"] == arm and r["budget"] == budget and r["seed"] in self.seeds),
            key=lambda r: r["seed"],
        )

        def average(what: str) -> float:
            return mean([float(r[what]) for r in found])

        return Cell(
            [float(r["value"]) for r in found],
            average("seconds"),
            average("teaching_seconds"),
            average("unchosen_seconds"),
            average("examples"),
        )

    def point(self, arm: str) -> tuple[int, float]:
        """Batch size and learning rate that the arm's sweep ran at."""
        of_arm = next(r for r in self.runs if r["arm"] == arm and r["seed"] in self.seeds)
        return of_arm["batch_size"], of_arm["learning_rate"]

    def gain(self, arm: str, budget: float) -> Difference:
        """The arm minus full data at the same budget, paired by seed; above 0 the arm is better."""
        return self._gain([budget], arm)

    def gain_over_budgets(self, arm: str) -> Difference:
        """The same of each seed's mean over the budgets: one number an arm."""
        return self._gain(self.budgets, arm)

    def _gain(self, budgets: Sequence[float], arm: str) -> Difference:
        def by_seed(of: str) -> list[float]:
            cells = [self.cell(of, budget).values for budget in budgets]
            return [self.sign * mean(list(values)) for values in zip(*cells, strict=True)]

        return paired_difference(by_seed(arm), by_seed(FULL))

    def smallest_budget(self, arm: str) -> float | None:
        """The smallest budget whose mean is within the margin of full training's mean, or better; None if none is."""
        full = self.sign * mean(self.cell(FULL, max(self.budgets)).values)
        for budget in sorted(self.budgets):
            if self.sign * mean(self.cell(arm, budget).values) >= full - self.about["margin"]:
                return budget
        return None

    def detectable(self, budgets: Sequence[float] | None = None) -> float:
        """The difference to full data that is found four times out of five: (t_0.975 + t_0.8) · sd / √n, n seeds.

        ``sd`` of the paired differences is pooled over the arms (and, for single budgets, over the budgets).
        """
        others = [arm for arm in self.arms if arm != FULL]
        n = len(self.seeds)
        if n < 2:
            return math.inf
        spans = [list(budgets)] if budgets else [[budget] for budget in self.budgets]
        halves = [self._gain(span, arm) for arm in others for span in spans]
        t = t_quantile(n - 1)
        variance = mean([((d.high - d.low) / 2 / t) ** 2 for d in halves])  # of the mean over n seeds
        return (t + t_quantile(n - 1, 2 * POWER - 1)) * math.sqrt(variance)

    def spread(self, arm: str, budget: float) -> float:
        return standard_deviation(self.cell(arm, budget).values)


def landed(path: Path, budgets: Sequence[float] = BUDGETS) -> Landed | None:
    """The newest settings' runs in a file; None before there are enough whole seeds."""
    records = list(read(path))
    costs = [record for record in records if record["kind"] == "costs"]
    if not costs:
        return None
    about = costs[-1]
    every = [r for r in records if r["kind"] == "run" and r["of"] == about["key"]]
    batches, rates = about["settings"]["grid"]
    points = [(batch, rate) for batch in batches for rate in rates]
    sign = 1 if about["settings"]["metric"][1] else -1
    arms = list(dict.fromkeys(r["arm"] for r in every))
    best = {arm: best_point(every, arm, points, sign) for arm in arms}
    if None in best.values():
        return None
    runs = [r for r in every if r["seed"] != TUNING_SEED and (r["batch_size"], r["learning_rate"]) == best[r["arm"]]]

    def is_whole(seed: int) -> bool:
        there = {(r["arm"], r["budget"]) for r in runs if r["seed"] == seed}
        return there >= {(arm, budget) for arm in arms for budget in budgets}

    whole = [seed for seed in sorted({r["seed"] for r in runs}) if is_whole(seed)]
    if len(whole) < FEWEST_SEEDS or FULL not in arms:
        return None
    seconds = math.fsum(r["seconds"] for r in every)
    return Landed(path.stem, about, runs, arms, sorted(budgets), whole, len(every), seconds)


def begun(path: Path) -> int:
    """Runs of a file's newest settings that have landed, the grid's included."""
    records = list(read(path))
    keys = [record["key"] for record in records if record["kind"] == "costs"]
    return sum(record["kind"] == "run" and record["of"] == keys[-1] for record in records)
