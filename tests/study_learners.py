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
from benchmarks.studies.study import TUNING_SEED, Metric, Study
from benchmarks.studies.sweep import BUDGETS

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


def write_results(folder: Path, name: str, gains: dict[str, float], higher: bool = True, seeds: int = 3) -> Path:
    """Runs whose value is 80 + 10·budget + seed/10, better by ``gains[arm]``, ± 0.05 by seed for all arms but full."""
    about: dict[str, Any] = {
        "kind": "costs", "key": "k", "title": f"Title of {name}", "margin": 0.5, "seeds": seeds, "code": "c",
        "settings": {
            "study": name, "score": "logit", "metric": ["accuracy, %" if higher else "bits per byte", higher],
            "grid": [[16, 32], [0.001, 0.01]], "passes": 8.0, "sizes": {"train": 3000}, "weight_decay": 0.05,
        },
        "provenance": {"torch": "2", "processor": "some", "date": "2026-01-01", "commit": "0123456789"},
    }  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(json.dumps(about) + "\n")
        for seed in (*range(seeds), TUNING_SEED):
            for budget in BUDGETS:
                for arm in (FULL, *gains):
                    jitter = 0.05 * (seed % 3 - 1) * (arm != FULL)
                    value = 80 + (1 if higher else -1) * (10 * budget + gains.get(arm, 0.0) + jitter) + seed / 10
                    run = {"kind": "run", "of": "k", "arm": arm, "budget": budget, "seed": seed, "value": value}
                    run |= {"batch_size": 32, "learning_rate": 0.01, "seconds": 3 * budget, "teaching_seconds": 0.1}
                    run |= {"unchosen_seconds": 0.0, "examples": 1000 * budget}
                    file.write(json.dumps(run) + "\n")
    return path
