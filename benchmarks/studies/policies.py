"""``python -m benchmarks.studies.policies``: which of a teacher's settings are best across the studies.

One setting of :class:`attent.Teacher` is changed at a time, then a few together. Each policy runs in the harvest arm's
place, at the point of the grid that the study's sweep found for it, beside full data at the same compute. Chosen by
are the validation part and seeds that no table of the studies uses: what is chosen here is tested there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attent
from attent.demo.intervals import Difference, mean, paired_difference

from ..provenance import RESULTS, provenance
from .arms import ARMS, FULL, Losses, Run, _over_epochs
from .catalogue import SCALES, Missing, Sources, load, names
from .costs import StudyCosts, measure
from .record import Results, key_of, read
from .study import Learner, Study
from .sweep import Sweep
from .training import train

#: The two ends between which teaching is said to pay, and seeds of these runs alone.
BUDGETS = (0.5, 0.8)
SEEDS = (1001, 1002, 1003, 1004)
FOLDER = "policies"


@dataclass(frozen=True)
class Policy:
    """Settings of a teacher that differ from the harvest arm's; the keep ratio is stretched to fill a budget."""

    settings: dict[str, Any] = field(default_factory=dict)
    ratio: tuple[float, float] = (0.5, 0.5)  # of the first and the last reduced epoch, linear between
    score: str | None = None  # another than the study's
    by_mean: bool = False  # scores of the examples' mean losses, where lengths differ

    def teacher(self, num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
        ratio = attent.schedules.Linear(*(min(share * stretch, 1.0) for share in self.ratio))
        return attent.Teacher(num_examples, total_epochs=epochs, ratio=ratio, seed=seed, **self.settings)


POLICIES: dict[str, Policy] = {
    "harvest's defaults": Policy(),
    "ratio 0.3": Policy(ratio=(0.3, 0.3)),
    "ratio 0.7": Policy(ratio=(0.7, 0.7)),
    "ratio 0.3 to 0.8": Policy(ratio=(0.3, 0.8)),
    "temperature 0.5": Policy({"temperature": 0.5}),
    "temperature 2": Policy({"temperature": 2.0}),
    "floor 0": Policy({"floor": 0.0}),
    "floor 0.5": Policy({"floor": 0.5}),
    "no anneal": Policy({"anneal": 0.0}),
    "anneal 0.25": Policy({"anneal": 0.25}),
    "reweight inverse": Policy({"reweight": "inverse"}),
    "demote after 3": Policy({"demote_after": 3}),
    "ratio 0.7, reweight inverse": Policy({"reweight": "inverse"}, (0.7, 0.7)),
    "ratio 0.7, floor 0.5": Policy({"floor": 0.5}, (0.7, 0.7)),
    "score logit": Policy(score="logit"),
    "score loss": Policy(score="loss"),
    "per_example mean": Policy(by_mean=True),
    # InfoBatch's two levels, of fixed sizes: the upper half, and at ratio 0.75 every other of the lower half, twice.
    "prune": Policy({"temperature": 0.0, "floor": 1 / 3, "reweight": "inverse"}, (0.75, 0.75)),
    "prune, score loss": Policy({"temperature": 0.0, "floor": 1 / 3, "reweight": "inverse"}, (0.75, 0.75), "loss"),
}


def takes(policy: Policy, study: Study) -> bool:
    """Whether the policy differs from the defaults in this study."""
    if policy.by_mean:
        return study.name == "gpt-lora"  # the one with mixed lengths
    if policy.score is not None:
        return policy.score != study.score and study.score != "residual"  # which orders as the loss does
    return True


class Taught:
    """A learner whose losses are weighted by the teacher, and which is judged on the validation part."""

    def __init__(self, learner: Learner, policy: Policy) -> None:
        self._learner, self._policy = learner, policy
        self.num_examples = learner.num_examples
        self.teacher: attent.Teacher | None = None
        self._ids = torch.empty(0, dtype=torch.int64)

    def parameters(self) -> Any:
        return self._learner.parameters()

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        self._ids = ids
        return self._learner.batch(ids)

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        losses, scores = self._learner.losses(*batch, score=score)
        if self._policy.by_mean and scores is not None:
            scores = scores / (batch[1] >= 0).sum(1).sqrt()
        if self.teacher is not None:
            losses = losses * self.teacher.weights(self._ids)
        return losses, scores

    def evaluate(self, part: str) -> float:
        return self._learner.evaluate("validation")


def register(name: str, policy: Policy) -> None:
    """Make an arm of a policy. Only in processes that run policies: they are none of the studies' arms."""
    made: list[attent.Teacher] = []

    def make(num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
        made.append(policy.teacher(num_examples, epochs, stretch, seed))
        return made[-1]

    _over_epochs(name, "", make, 1 / max(policy.ratio), True)
    plain = ARMS[name].teach

    def teach(run: Run) -> Losses:
        learner = run.learner
        assert isinstance(learner, Taught)
        weighted = policy.settings.get("reweight") == "inverse"
        for step, loss in enumerate(plain(run)):
            if step == 0 and weighted:  # the first step is in the warm-up, where weights are 1
                learner.teacher = made[-1]
            yield loss

    ARMS[name] = replace(ARMS[name], teach=teach)


class Search:
    """The policies' runs in one study; resumable."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.sweep = Sweep(study, folder)
        self.results = Results(folder / FOLDER / f"{study.name}.jsonl")
        self._of = key_of({"settings": study.settings, "code": self.sweep.version})

    def _costs(self, score: str) -> StudyCosts:
        """What steps cost with another score than the study's; measured once."""
        if score == self.study.score:
            return self.sweep._costs()
        key = key_of({"of": self._of, "score": score})
        kept = self.results.find("costs", key)
        if kept is None:
            measured = measure(replace(self.study, score=score)).to_json()
            kept = {"kind": "costs", "key": key, "score": score, **measured}
            self.results.append(kept)
        return StudyCosts.from_json(kept)

    def run(self) -> None:
        points = {name: self.sweep.best("harvest") for name, p in POLICIES.items() if takes(p, self.study)}
        points[FULL] = self.sweep.best(FULL)
        if self.results.find("about", self._of) is None:
            about = {"title": self.study.title, "margin": self.study.metric.margin, "sign": self.study.metric.sign}
            record = {"kind": "about", "key": self._of, "study": self.study.name, **about}
            self.results.append({**record, "provenance": provenance()})
        for seed in SEEDS:
            for budget in BUDGETS:
                for name, (batch_size, rate) in points.items():
                    policy = POLICIES.get(name, Policy())
                    settings = {"policy": name, **asdict(policy), "point": [batch_size, rate]}
                    key = key_of({"of": self._of, **settings, "seed": seed, "budget": budget})
                    if self.results.find("run", key) is not None:
                        continue
                    score = policy.score or self.study.score
                    taught = replace(self.study, score=score, make=self._maker(policy))
                    outcome = train(taught, self._costs(score), name, batch_size, rate, budget, seed)
                    record = {"kind": "run", "key": key, "of": self._of, "policy": name, "seed": seed}
                    self.results.append({**record, "budget": budget, **outcome})
                    value = f"{outcome['value']:.{self.study.metric.digits}f}"
                    print(f"{self.study.name:22} {name:20} {budget:4.0%} seed {seed} {value}", file=sys.stderr)

    def _maker(self, policy: Policy) -> Callable[[int], Learner]:
        return lambda seed: Taught(self.study.make(seed), policy)


@dataclass(frozen=True)
class Found:
    """What the policies' runs in one study say."""

    study: str
    margin: float
    gains: dict[str, Difference]  # policy minus full data at the same compute, in margins, over budgets and seeds


def found(path: Path) -> Found | None:
    """The newest runs of a file; policies without a run for every seed and budget are left out."""
    records = list(read(path))
    abouts = [record for record in records if record["kind"] == "about"]
    if not abouts:
        return None
    about = abouts[-1]
    values: dict[str, dict[tuple[int, float], float]] = {}
    for run in records:
        if run["kind"] == "run" and run["of"] == about["key"]:
            values.setdefault(run["policy"], {})[run["seed"], run["budget"]] = about["sign"] * run["value"]
    whole = {name: of for name, of in values.items() if len(of) == len(SEEDS) * len(BUDGETS)}
    if FULL not in whole:
        return None

    def by_seed(name: str) -> list[float]:
        return [mean([whole[name][seed, budget] for budget in BUDGETS]) / about["margin"] for seed in SEEDS]

    gains = {name: paired_difference(by_seed(name), by_seed(FULL)) for name in whole if name != FULL}
    return Found(about["study"], about["margin"], gains)


def table(folder: Path, known: Sequence[str]) -> list[str]:
    """Policies by studies, in markdown; the last column is the mean over the studies that all of them ran in."""
    studies = [one for name in known if (one := found(folder / FOLDER / f"{name}.jsonl")) is not None]
    if not studies:
        return []
    lines = ["| policy | " + " | ".join(f"`{one.study}`" for one in studies) + " | mean | worst |"]
    lines.append("|---|" + "---|" * (len(studies) + 2))
    for name in POLICIES:
        gains = [one.gains.get(name) for one in studies]
        there = [gain.mean for gain in gains if gain is not None]
        if not there:
            continue
        cells = ["" if gain is None else _signed(gain) for gain in gains]
        cells += [f"{mean(there):+.2f}", f"{min(there):+.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells).replace("-", "−") + " |")
    return lines


def _signed(gain: Difference) -> str:
    return f"{gain.mean:+.2f} ± {(gain.high - gain.low) / 2:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.policies", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--study", action="append", help="one or more (default: all whose sweep has landed)")
    parser.add_argument("--images", default="subset")
    parser.add_argument("--texts")
    parser.add_argument("--encoder")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies")
    parser.add_argument("--print", action="store_true", dest="only_print", help="only the table of what has landed")
    asked = parser.parse_args(arguments)
    folder = asked.out / asked.scale
    known = names(asked.scale)
    if not asked.only_print:
        torch.set_num_threads(1)
        for name, policy in POLICIES.items():
            register(name, policy)
        for name in asked.study or known:
            try:
                study = load(asked.scale, name, Sources(asked.images, asked.texts, asked.encoder))
            except Missing as reason:
                print(f"{name}: left out: {reason}", file=sys.stderr)
                continue
            Search(study, folder).run()
    print("\n".join(table(folder, known)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
