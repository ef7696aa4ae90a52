"""What a step of each kind costs, measured before any arm runs: steps are allotted from it, so that seconds are equal.

Kinds, at each batch size B of the grid:

plain      forward, backward and optimizer of B examples
scored     the same with scores out of the loss, recorded by a teacher
pool       losses and scores of a pool of 2B, a choice, backward of the chosen B (:class:`attent.OnePass`)
by loss    the same without scores: the losses choose
two-pass   forward of 2B without gradient, a choice, then a plain step of B, with nothing of attent in it

Pools are measured with OnePass's engines ``"eager"`` and ``"two_pass"``, and taught with the cheaper one: where a step
takes a few milliseconds, what the eager engine does per operation outweighs what it saves.

All kinds take turns within a round; each is put as a ratio to the plain step at the largest batch size of its round,
and the median over the rounds counts: a machine that slows down for a while slows all of a round. The unit of cost is
thus that *reference step*.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import attent

from .clock import now
from .study import Learner, Study

#: As many rounds as take this long, within bounds.
SECONDS, FEWEST, MOST = 6.0, 9, 61
POOL_RATIO = 0.5  # a batch of a pool
ENGINES = ("eager", "two_pass")


@dataclass(frozen=True)
class Costs:
    """In reference steps, for one batch size."""

    plain: float
    scored: float
    pool: float
    by_loss: float
    two_pass: float
    engine: str  # that pools are taught with
    start: float  # of the first pool with that engine: eager probes the learner and compares its first gradient


@dataclass(frozen=True)
class StudyCosts:
    """Costs by batch size, and the seconds of a reference step where they were measured."""

    reference_seconds: float
    by_batch: dict[int, Costs]

    def to_json(self) -> dict[str, Any]:
        by_batch = {str(batch): asdict(costs) for batch, costs in self.by_batch.items()}
        return {"reference_seconds": self.reference_seconds, "by_batch": by_batch}

    @staticmethod
    def from_json(kept: dict[str, Any]) -> StudyCosts:
        by_batch = {int(batch): Costs(**costs) for batch, costs in kept["by_batch"].items()}
        return StudyCosts(kept["reference_seconds"], by_batch)


def pool_size(batch_size: int) -> int:
    return round(batch_size / POOL_RATIO)


def measure(study: Study, seconds_to_spend: float = SECONDS) -> StudyCosts:
    """Costs of all kinds of steps at all batch sizes."""
    steps = {size: _Steps(study, size) for size in study.batch_sizes}
    kinds = {(size, name): step for size in steps for name, step in steps[size].kinds().items()}
    first = {kind: _seconds(study, step) for kind, step in kinds.items()}
    # Once more: the optimizer's state and the allocator's are made by now.
    round_seconds = sum(_seconds(study, step) for step in kinds.values())
    rounds = min(max(round(seconds_to_spend / round_seconds), FEWEST), MOST)
    seconds = [{kind: _seconds(study, step) for kind, step in kinds.items()} for _ in range(rounds)]
    reference = (max(study.batch_sizes), "plain")
    reference_seconds = statistics.median(of_round[reference] for of_round in seconds)
    ratio = {k: statistics.median(of_round[k] / of_round[reference] for of_round in seconds) for k in kinds}
    by_batch = {}
    for size in study.batch_sizes:
        engine = min(ENGINES, key=lambda e: ratio[size, f"pool, {e}"])
        pool, by_loss = ratio[size, f"pool, {engine}"], ratio[size, f"by loss, {engine}"]
        extra = statistics.median((r[size, "scored"] - r[size, "plain"]) / r[reference] for r in seconds)
        start = first[size, f"pool, {engine}"] / reference_seconds - pool if engine == "eager" else 0.0
        by_batch[size] = Costs(
            plain=ratio[size, "plain"],
            # Scores cost less than rounds differ: never less than nothing.
            scored=ratio[size, "plain"] + max(extra, 0.0),
            pool=max(pool, by_loss),
            by_loss=by_loss,
            two_pass=ratio[size, "two-pass"],
            engine=engine,
            start=max(start, 0.0),
        )
    return StudyCosts(reference_seconds, by_batch)


def _seconds(study: Study, step: Callable[[], object]) -> float:
    began = now(study.device)
    step()
    return now(study.device) - began


class _Steps:
    """One step of each kind on random examples."""

    def __init__(self, study: Study, batch_size: int) -> None:
        self._study, self._batch_size = study, batch_size
        self._learner = study.make(0)
        self._optimizer = torch.optim.AdamW(self._learner.parameters(), lr=1e-5, fused=True)
        self._generator = torch.Generator().manual_seed(0)
        self._teacher = attent.Teacher(self._learner.num_examples, total_epochs=2)
        self._pools = attent.Teacher(total_steps=10**6, ratio=POOL_RATIO, warmup=0, anneal=0)

    def kinds(self) -> dict[str, Callable[[], None]]:
        by_name = {"plain": self._plain, "scored": self._scored, "two-pass": self._two_pass}
        for engine in ENGINES:
            for name, score in (("pool", self._study.score), ("by loss", None)):
                by_name[f"{name}, {engine}"] = self._pool(one_pass_of(self._learner, score, engine), score)
        return by_name

    def _plain(self) -> None:
        self._train(self._ids(self._batch_size))

    def _scored(self) -> None:
        ids = self._ids(self._batch_size)
        losses, scores = self._learner.losses(*self._learner.batch(ids), score=self._study.score)
        self._step(losses.mean())
        assert scores is not None
        self._teacher.record(ids, scores)

    def _pool(self, one_pass: attent.OnePass, score: str | None) -> Callable[[], None]:
        def step() -> None:
            result = one_pass(*self._learner.batch(self._ids(pool_size(self._batch_size))))
            losses, scores = (result, result) if score is None else result
            self._step(one_pass.loss(losses, self._pools.choose(scores.detach(), self._batch_size).index))

        return step

    def _two_pass(self) -> None:
        ids = self._ids(pool_size(self._batch_size))
        with torch.no_grad():
            losses, _ = self._learner.losses(*self._learner.batch(ids), score=None)
        self._train(ids[self._pools.choose(losses, self._batch_size).index])

    def _train(self, ids: Tensor) -> None:
        self._step(self._learner.losses(*self._learner.batch(ids), score=None)[0].mean())

    def _ids(self, count: int) -> Tensor:
        ids = torch.randint(self._learner.num_examples, (count,), generator=self._generator)
        return ids.to(self._study.device)

    def _step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()


def one_pass_of(learner: Learner, score: str | None, engine: str) -> attent.OnePass:
    """Losses, and scores if one is named, of pools."""

    def per_example_loss(*batch: Tensor) -> Any:
        losses, scores = learner.losses(*batch, score=score)
        return losses if scores is None else (losses, scores)

    return attent.OnePass(per_example_loss, engine=engine)
