"""All runs of a study: costs, the grid for every arm, then budgets and seeds at each arm's best point; resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..provenance import provenance
from . import arms, clock, costs, fit, study, training, variants
from .arms import ARMS
from .costs import StudyCosts, measure
from .record import Results, code_version, key_of
from .study import TUNING_BUDGET, TUNING_SEED, Study
from .training import train
from .tuning import SECOND_BUDGET, best_point, better_half

#: Shares of full training's seconds.
BUDGETS = (0.5, 0.65, 0.8, 1.0)
#: What every run depends on, whatever its study.
FRAMEWORK = (arms, clock, costs, fit, study, training, variants)


@dataclass(frozen=True)
class Point:
    """What distinguishes the runs of a study."""

    arm: str
    batch_size: int
    learning_rate: float
    budget: float
    seed: int


class Sweep:
    """The runs of one study and where they are kept."""

    def __init__(self, of: Study, folder: Path, budgets: Sequence[float] = BUDGETS) -> None:
        self.study, self.budgets = of, budgets
        self.results = Results(folder / f"{of.name}.jsonl")
        self.version = code_version({*FRAMEWORK, *of.code})
        self._base = {"settings": of.settings, "code": self.version}

    def run(self) -> None:
        """Whatever has not landed yet: the grid first, then seed by seed all arms and budgets."""
        found = self._costs()
        for arm in ARMS:
            first = {p: self._tuned(found, arm, p, TUNING_BUDGET) for p in self.study.points}
            for point in better_half(first):
                self._tuned(found, arm, point, SECOND_BUDGET)
        for point in self.sweep():
            self._land(found, point)

    def sweep(self) -> Iterator[Point]:
        """Every arm at its best point."""
        best = {arm: self.best(arm) for arm in ARMS}
        for seed in range(self.study.seeds):
            for budget in self.budgets:
                for arm in ARMS:
                    yield Point(arm, *best[arm], budget, seed)

    def best(self, arm: str) -> tuple[int, float]:
        """Its point of the grid; an error before the grid has landed."""
        runs = self.results.of(key_of(self._base))
        found = best_point(runs, arm, self.study.points, self.study.metric.sign)
        assert found is not None, f"{self.study.name}: {arm} was not tuned"
        return found

    def _tuned(self, found: StudyCosts, arm: str, point: tuple[int, float], budget: float) -> float:
        """The value of a run on the validation part; more is better."""
        record = self._land(found, Point(arm, *point, budget, TUNING_SEED))
        return self.study.metric.sign * float(record["value"])

    def _costs(self) -> StudyCosts:
        """As measured when the study began: runs that resume get the steps that the others got."""
        key = key_of(self._base)
        kept = self.results.find("costs", key)
        if kept is None:
            about = {"title": self.study.title, "seeds": self.study.seeds, "margin": self.study.metric.margin}
            kept = {"kind": "costs", "key": key, **self._base, **about, **measure(self.study).to_json()}
            kept["provenance"] = provenance()
            self.results.append(kept)
        return StudyCosts.from_json(kept)

    def _key(self, point: Point) -> str:
        return key_of({**self._base, **vars(point)})

    def _land(self, found: StudyCosts, point: Point) -> dict[str, Any]:
        key = self._key(point)
        kept = self.results.find("run", key)
        if kept is not None:
            return kept
        outcome: dict[str, Any] = train(self.study, found, **vars(point))
        record = {"kind": "run", "key": key, "of": key_of(self._base), **vars(point), **outcome}
        self.results.append(record)
        said = f"{self.study.name:22} {point.arm:20} b {point.batch_size:>3} lr {point.learning_rate:<7g}"
        value = f"{outcome['value']:.{self.study.metric.digits}f}"
        seconds = f"{outcome['seconds']:.2f} s"
        print(f"{said} {point.budget:4.0%} seed {point.seed:<4} {value} {seconds}", file=sys.stderr, flush=True)
        return record
