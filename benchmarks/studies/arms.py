"""The arms: full data, attent's ways, the paper's two presets, and rivals. Each is a plan and a generator of losses.

``plan`` says how many steps of an arm a budget pays for. ``teach`` yields ``(loss, ids)`` once a step: the scalar to
train on and the examples in it; the training loop steps the optimizer and asks for the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attent

from .clock import Clock
from .costs import POOL_RATIO, Costs, one_pass_of, pool_size
from .fit import fit
from .study import Learner, Study

Losses = Iterator[tuple[Tensor, Tensor]]
#: Where a pass over the data is what matters: share of a run at its end that is full, as Teacher's default.
ANNEAL = 0.125


@dataclass(frozen=True)
class Plan:
    """Steps that the learning rate decays over; what else an arm needs to know of them, in JSON's types."""

    steps: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What an arm's generator works with."""

    study: Study
    learner: Learner
    batch_size: int
    seed: int
    plan: Plan
    clock: Clock

    def losses(self, ids: Tensor, score: str | None = None) -> tuple[Tensor, Tensor | None]:
        return self.learner.losses(*self.learner.batch(ids), score=score)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Arm:
    name: str
    about: str
    plan: Callable[
        [Study, int, int, Costs, float], Plan
    ]  # study, examples, batch size, costs, reference steps to spend
    teach: Callable[[Run], Losses]


ARMS: dict[str, Arm] = {}
FULL = "full data"


def _arm(name: str, about: str, plan: Callable[[Study, int, int, Costs, float], Plan]) -> Callable[..., Any]:
    def add(teach: Callable[[Run], Losses]) -> Callable[[Run], Losses]:
        ARMS[name] = Arm(name, about, plan, teach)
        return teach

    return add


class Stream:
    """The data over and over, reshuffled at each pass, cut into pieces of any size."""

    def __init__(self, num_examples: int, generator: torch.Generator, device: str) -> None:
        self._num_examples, self._generator, self._device = num_examples, generator, device
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        while len(self._left) < count:
            again = torch.randperm(self._num_examples, generator=self._generator)
            self._left = torch.cat([self._left, again])
        taken, self._left = self._left[:count], self._left[count:]
        return taken.to(self._device)


def stream_of(run: Run) -> Stream:
    return Stream(run.learner.num_examples, run.generator(), run.study.device)


# ------------------------------------------------------------------------------------------------------------ full data


def _plain_steps(study: Study, examples: int, batch_size: int, costs: Costs, budget: float) -> Plan:
    return Plan(math.floor(budget / costs.plain))


@_arm(FULL, "passes over all data, reshuffled", _plain_steps)
def _full(run: Run) -> Losses:
    stream = stream_of(run)
    for _ in range(run.plan.steps):
        ids = stream.take(run.batch_size)
        yield run.losses(ids)[0].mean(), ids


# ----------------------------------------------------------------------------------- teachers over epochs (the harvest)

#: (num_examples, epochs, stretch, seed) -> teacher; and the largest stretch, which makes its largest keep ratio 1.
MakeTeacher = Callable[[int, int, float, int], attent.Teacher]


def _harvest(num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
    return attent.Teacher(num_examples, total_epochs=epochs, ratio=min(0.5 * stretch, 1.0), seed=seed)


def _uniform(num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
    ratio = min(0.5 * stretch, 1.0)
    return attent.Teacher(num_examples, total_epochs=epochs, ratio=ratio, floor=1.0, seed=seed)


def _simple(num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
    return attent.presets.attent_simple(num_examples, epochs, ratio=min(0.7 * stretch, 1.0), seed=seed)


def _complex(num_examples: int, epochs: int, stretch: float, seed: int) -> attent.Teacher:
    """Its 5 to 10 epochs a lesson are of 800; here lessons are held for 1, then 2."""
    return attent.presets.attent_complex(
        num_examples,
        epochs,
        initial_ratio=min(0.2 * stretch, 1.0),
        final_ratio=min(0.8 * stretch, 1.0),
        cycles=max(2, min(10, epochs - 1)),
        initial_interval=1,
        final_interval=2,
        seed=seed,
    )


def _over_epochs(name: str, about: str, make: MakeTeacher, largest: float, scored: bool) -> None:
    def plan(study: Study, examples: int, batch_size: int, costs: Costs, budget: float) -> Plan:
        steps = math.floor(budget / (costs.scored if scored else costs.plain))
        fitted = fit(lambda epochs, stretch: make(examples, epochs, stretch, 0), batch_size, steps, largest)
        return Plan(fitted.steps, {"epochs": fitted.epochs, "stretch": fitted.stretch})

    def teach(run: Run) -> Losses:
        details, device = run.plan.details, run.study.device
        teacher = make(run.learner.num_examples, details["epochs"], details["stretch"], run.seed)
        sampler = teacher.sampler(batch_size=run.batch_size)
        for _ in range(details["epochs"]):
            with run.clock.teaching():
                batches = iter(sampler)
            while True:
                with run.clock.teaching():  # the first of an epoch draws the lesson
                    batch = next(batches, None)
                if batch is None:
                    break
                ids = torch.tensor(batch, device=device)
                losses, scores = run.losses(ids, run.study.score if scored else None)
                yield losses.mean(), ids
                with run.clock.teaching():
                    teacher.record(ids, scores if scores is not None else torch.ones_like(losses))

    _arm(name, about, plan)(teach)


_over_epochs(
    "random subset",
    "harvest's epochs and keep ratio, each lesson drawn uniformly: what the schedule does without the scores",
    _uniform,
    2.0,
    scored=False,
)
_over_epochs(
    "harvest", "attent.Teacher's defaults at keep ratio 0.5, scores out of the training forward", _harvest, 2.0, True
)
_over_epochs(
    "paper, simple",
    "attent.presets.attent_simple: a full epoch, then the highest 70 % of it; harvested scores",
    _simple,
    1 / 0.7,
    True,
)
_over_epochs(
    "paper, complex",
    "attent.presets.attent_complex: keep ratio 0.2 to 0.8, Gumbel draws, a lesson for 1 to 2 epochs; harvested scores",
    _complex,
    1 / 0.8,
    True,
)

# --------------------------------------------------------------------------------------------- pools of twice the batch


def _in_pools(name: str, about: str, by_loss: bool) -> None:
    """A pass over the data and the last eighth of the steps in full, pools between."""

    def plan(study: Study, examples: int, batch_size: int, costs: Costs, budget: float) -> Plan:
        warmup, pool = examples // batch_size, costs.by_loss if by_loss else costs.pool
        # n steps, of them ANNEAL n at the end: what a pool and its share of those cost
        left = budget - costs.start - costs.plain * warmup / (1 - ANNEAL)
        pools = max(0, math.floor(left / (pool + costs.plain * ANNEAL / (1 - ANNEAL))))
        spent = costs.start * (pools > 0) + pool * pools
        in_full = max(0, math.floor((budget - spent) / costs.plain))
        return Plan(in_full + pools, {"warmup": min(warmup, in_full), "pools": pools, "engine": costs.engine})

    def teach(run: Run) -> Losses:
        stream, warmup, pools = stream_of(run), run.plan.details["warmup"], run.plan.details["pools"]
        one_pass = one_pass_of(run.learner, None if by_loss else run.study.score, run.plan.details["engine"])
        draw = {"temperature": 0.0, "floor": 0.0} if by_loss else {}
        teacher = attent.Teacher(total_steps=max(pools, 1), ratio=POOL_RATIO, warmup=0, anneal=0, seed=run.seed, **draw)
        for step in range(run.plan.steps):
            if not warmup <= step < warmup + pools:
                ids = stream.take(run.batch_size)
                yield run.losses(ids)[0].mean(), ids
                continue
            ids = stream.take(pool_size(run.batch_size))
            result = one_pass(*run.learner.batch(ids))
            losses, scores = (result, result) if by_loss else result
            with run.clock.teaching():
                chosen = teacher.choose(scores.detach(), run.batch_size).index
            yield one_pass.loss(losses, chosen), ids[chosen]

    _arm(name, about, plan)(teach)


_in_pools("one-pass", "attent.OnePass on pools of two batches, of which Teacher's defaults choose one", by_loss=False)
_in_pools("largest loss", "the same pools and engine; the batch with the largest losses", by_loss=True)


def _two_pass_steps(study: Study, examples: int, batch_size: int, costs: Costs, budget: float) -> Plan:
    return Plan(math.floor(budget / costs.two_pass))


@_arm(
    "selective backprop",
    "pools of two batches, forwarded without gradient; a batch is drawn by the percentile of its loss among the latest"
    " N (after Jiang et al. 2019, β = 1)",
    _two_pass_steps,
)
def _selective_backprop(run: Run) -> Losses:
    stream, generator = stream_of(run), run.generator()
    history = torch.empty(0)
    for _ in range(run.plan.steps):
        ids = stream.take(pool_size(run.batch_size))
        with torch.no_grad():
            losses, _ = run.losses(ids)
        with run.clock.teaching():
            losses = losses.cpu()
            history = torch.cat([history, losses])[-run.learner.num_examples :]
            percentile = torch.searchsorted(history.sort().values, losses, right=True) / len(history)
            ids = ids[torch.multinomial(percentile, run.batch_size, generator=generator).to(ids.device)]
        yield run.losses(ids)[0].mean(), ids


# ------------------------------------------------------------------------------------------------------------ InfoBatch

PRUNED = 0.5


@_arm(
    "InfoBatch",
    "each pass leaves out half of the examples whose last loss was below the mean and doubles the loss of the other"
    " half; the last eighth of the steps is full (Qin et al. 2024)",
    _plain_steps,
)
def _info_batch(run: Run) -> Losses:
    generator, device = run.generator(), run.study.device
    n = run.learner.num_examples
    last = torch.full((n,), torch.inf, device=device)
    annealed = run.plan.steps - math.ceil(ANNEAL * run.plan.steps)
    order, weight, begin = torch.empty(0, dtype=torch.int64), torch.ones(n, device=device), 0
    pruning = True
    for step in range(run.plan.steps):
        if begin + run.batch_size > len(order) or (pruning and step == annealed):
            with run.clock.teaching():
                order, weight, begin = torch.randperm(n, generator=generator), torch.ones(n, device=device), 0
                pruning = step < annealed
                if pruning:
                    low = last < last[last.isfinite()].mean() if bool(last.isfinite().any()) else last < 0
                    dropped = low & (torch.rand(n, generator=generator) < PRUNED).to(device)
                    weight[low] = 1 / (1 - PRUNED)
                    order = order[~dropped.cpu()[order]]
                order = order.to(device)
        ids = order[begin : begin + run.batch_size]
        begin += run.batch_size
        losses, _ = run.losses(ids)
        yield (losses * weight[ids]).mean(), ids
        with run.clock.teaching():
            last[ids] = losses.detach()
