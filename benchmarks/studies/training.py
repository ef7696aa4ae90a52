"""One run: an arm at a point of the grid, for a budget, with a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from attent.demo.arms import warmup_cosine

from .arms import ARMS, Run
from .clock import Clock, now
from .costs import StudyCosts
from .study import TUNING_SEED, Study


def budget_of(study: Study, examples: int, share: float) -> float:
    """Reference steps that ``share`` of full training lasts."""
    return share * study.passes * examples / max(study.batch_sizes)


def train(
    study: Study, costs: StudyCosts, arm: str, batch_size: int, learning_rate: float, budget: float, seed: int
) -> dict[str, Any]:
    """Train and evaluate; what comes back is the run's record, in JSON's types.

    ``value``: the metric, on the validation part with the tuning seed, else on the test part.

    ``seconds``: of the training loop, teaching included, evaluation not. ``teaching_seconds``: draws, choices and
    records as measured in this run, and what scores cost by ``costs``. ``unchosen_seconds``: forwards of rows that
    were not trained on, by ``costs``.
    """
    torch.manual_seed(seed)  # the same initial learner in every arm
    learner = study.make(seed)
    own = costs.by_batch[batch_size]
    plan = ARMS[arm].plan(study, learner.num_examples, batch_size, own, budget_of(study, learner.num_examples, budget))
    if plan.steps < 1:
        raise ValueError(f"budget: {budget} of {study.name} pays for no step of {arm!r} at batch size {batch_size}")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=study.weight_decay, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, plan.steps))
    clock = Clock(study.device)
    examples = steps = 0
    began = now(study.device)
    for loss, ids in ARMS[arm].teach(Run(study, learner, batch_size, seed, plan, clock)):
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        examples += len(ids)
        steps += 1
    seconds = now(study.device) - began
    assert steps == plan.steps, f"{arm}: {steps} steps of {plan.steps} planned"
    scoring, unchosen = _calibrated_seconds(arm, plan.steps, plan.details, costs, batch_size)
    return {
        "steps": steps, "examples": examples, "plan": plan.details,
        "seconds": seconds, "teaching_seconds": clock.teaching_seconds + scoring, "unchosen_seconds": unchosen,
        "value": learner.evaluate("validation" if seed == TUNING_SEED else "test"),
    }  # fmt: skip


def _calibrated_seconds(
    arm: str, steps: int, details: dict[str, Any], costs: StudyCosts, batch_size: int
) -> tuple[float, float]:
    """What cannot be timed within a step: seconds of scoring, and of forwards of rows not trained on."""
    own, second = costs.by_batch[batch_size], costs.reference_seconds
    if arm in ("harvest", "paper, simple", "paper, complex"):
        return steps * (own.scored - own.plain) * second, 0.0
    if "pools" in details:
        scoring = own.pool - own.by_loss if arm == "one-pass" else 0.0
        start = own.start * (details["pools"] > 0)
        unchosen = details["pools"] * max(own.by_loss - own.plain, 0.0)
        return (details["pools"] * scoring + start) * second, unchosen * second
    if arm == "selective backprop":
        return 0.0, steps * max(own.two_pass - own.plain, 0.0) * second
    return 0.0, 0.0
