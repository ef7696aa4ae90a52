"""A learner whose losses a test sets, and results that it writes by hand, for tests of the studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import study as study_module
from benchmarks.studies.arms import ARMS, FULL, Plan, Run
from benchmarks.studies.clock import Clock
from benchmarks.studies.costs import Costs, StudyCosts
from benchmarks.studies.study import TUNING_BUDGET, TUNING_SEED, Metric, Study
from benchmarks.studies.sweep import BUDGETS
from benchmarks.studies.tuning import SECOND_BUDGET

COSTS = Costs(plain=1.0, scored=1.05, pool=1.4, by_loss=1.35, two_pass=1.7, engine="two_pass", start=0.0)
BATCH = 8


class Known:
    """Example i's loss is ``levels[i]`` times a parameter that starts at 1; its score the same."""

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.num_examples = levels, len(levels)
        self.parameter = nn.Parameter(torch.ones(()))
        self.asked: list[Tensor] = []  # ids of each batch that was looked up

    def parameters(self) -> list[nn.Parameter]:
        return [self.parameter]

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        self.asked.append(ids)
        return (self.levels[ids],)

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        return batch[0] * self.parameter, None if score is None else batch[0]

    def evaluate(self, part: str) -> float:
        return float(self.parameter.detach()) + (100.0 if part == "validation" else 0.0)


def known_study(levels: Tensor, passes: float = 8.0, name: str = "known") -> Study:
    return Study(
        name=name,
        title="Known losses",
        score="logit",
        metric=Metric("accuracy, %", True, 0.5),
        batch_sizes=(BATCH // 2, BATCH),
        learning_rates=(1e-3, 1e-2),
        passes=passes,
        make=lambda seed: Known(levels),
        code=(study_module,),
        seeds=3,
    )


def known_costs() -> StudyCosts:
    return StudyCosts(0.01, {BATCH // 2: COSTS, BATCH: COSTS})


def taught(arm: str, levels: Tensor, budget: float) -> tuple[Plan, Known, list[tuple[float, Tensor]]]:
    """The plan of an arm for ``budget`` plain steps, its learner, and the loss and ids of each step."""
    study, learner = known_study(levels), Known(levels)
    plan = ARMS[arm].plan(study, len(levels), BATCH, COSTS, budget)
    run = Run(study, learner, BATCH, 0, plan, Clock("cpu"))
    return plan, learner, [(float(loss.detach()), ids) for loss, ids in ARMS[arm].teach(run)]


#: Values of the grid's points (batch size, learning rate): the first of each is the sweep's, the second not far below.
GRID = {(32, 0.01): 3.0, (16, 0.01): 2.0, (32, 0.001): 1.0, (16, 0.001): 0.0}


def write_results(folder: Path, name: str, gains: dict[str, float], higher: bool = True, seeds: int = 3) -> Path:
    """Runs whose value is 80 + 10·budget + seed/10, better by ``gains[arm]``, ± 0.05 by seed for all arms but full.

    Lines: the costs, the grid's runs (four points an arm, then two), then seed by seed.
    """
    about: dict[str, Any] = {
        "kind": "costs", "key": "k", "title": f"Title of {name}", "margin": 0.5, "seeds": seeds, "code": "c",
        "settings": {
            "study": name, "score": "logit", "metric": ["accuracy, %" if higher else "bits per byte", higher],
            "grid": [[16, 32], [0.001, 0.01]], "passes": 8.0, "sizes": {"train": 3000}, "weight_decay": 0.05,
        },
        "provenance": {"torch": "2", "processor": "some", "date": "2026-01-01", "commit": "0123456789"},
    }  # fmt: skip
    sign = 1 if higher else -1
    records = [about]

    def add(arm: str, point: tuple[int, float], budget: float, seed: int, value: float) -> None:
        run = {"kind": "run", "of": "k", "arm": arm, "budget": budget, "seed": seed, "value": value}
        run |= {"batch_size": point[0], "learning_rate": point[1], "seconds": 3 * budget, "teaching_seconds": 0.1}
        records.append(run | {"unchosen_seconds": 0.0, "examples": 1000 * budget})

    for arm in (FULL, *gains):
        for point in GRID:
            add(arm, point, TUNING_BUDGET, TUNING_SEED, sign * GRID[point])
        for point in list(GRID)[:2]:
            add(arm, point, SECOND_BUDGET, TUNING_SEED, sign * GRID[point])
    for seed in range(seeds):
        for budget in BUDGETS:
            for arm in (FULL, *gains):
                jitter = 0.05 * (seed % 3 - 1) * (arm != FULL)
                add(arm, (32, 0.01), budget, seed, 80 + sign * (10 * budget + gains.get(arm, 0.0) + jitter) + seed / 10)
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
