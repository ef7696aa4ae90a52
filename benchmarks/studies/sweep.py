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
        for point in self.tuning():
            self._land(found, point)
        for point in self.sweep():
            self._land(found, point)

    def tuning(self) -> Iterator[Point]:
        for arm in ARMS:
            for batch_size, rate in self.study.points:
                yield Point(arm, batch_size, rate, TUNING_BUDGET, TUNING_SEED)

    def sweep(self) -> Iterator[Point]:
        best = {arm: self.best(arm) for arm in ARMS}
        for seed in range(self.study.seeds):
            for budget in self.budgets:
                for arm in ARMS:
                    yield Point(arm, *best[arm], budget, seed)

    def best(self, arm: str) -> tuple[int, float]:
        """The point of the grid with the best validation; the first of equals."""
        sign = self.study.metric.sign

        def value(point: tuple[int, float]) -> float:
            landed = self.results.find("run", self._key(Point(arm, *point, TUNING_BUDGET, TUNING_SEED)))
            assert landed is not None, f"{self.study.name}: {arm} was not tuned at {point}"
            return sign * float(landed["value"])

        return max(self.study.points, key=value)

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

    def _land(self, found: StudyCosts, point: Point) -> None:
        key = self._key(point)
        if self.results.find("run", key) is not None:
            return
        outcome: dict[str, Any] = train(self.study, found, **vars(point))
        self.results.append({"kind": "run", "key": key, "of": key_of(self._base), **vars(point), **outcome})
        said = f"{self.study.name:22} {point.arm:20} b {point.batch_size:>3} lr {point.learning_rate:<7g}"
        value = f"{outcome['value']:.{self.study.metric.digits}f}"
        print(
            f"{said} {point.budget:4.0%} seed {point.seed:<4} {value} {outcome['seconds']:.2f} s",
            file=sys.stderr,
            flush=True,
        )
