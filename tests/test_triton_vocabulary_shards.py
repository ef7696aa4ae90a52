"""A vocabulary split over ranks, computed by the Triton backend: what the whole one gives, on processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import attent

from .linear_cross_entropy_problems import NAMES, Problem
from .ranks import on_ranks
from .test_triton_linear_cross_entropy import small
from .test_vocabulary_shards import fixed_problem, split

#: Reduction, bytes of a chunk (60: examples are long) and options.
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mean", 64 << 20, {}),
    ("example", 60, {"softcap": 2.0, "shift": True}),
    ("none", 200, {"label_smoothing": 0.1}),
]
# Float32: the same sums of some tens of numbers of order one, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def results(problem: Problem, own: slice, reduction: str, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """What a rank that holds the classes ``own`` gets, its gradients among it."""
    hidden = problem.input.detach().clone().requires_grad_()
    weight, bias = (
        value[own].detach().clone().requires_grad_()
        for value in (problem.linear_weight, problem.options["linear_bias"])
    )
    options = {**problem.options, "linear_bias": bias, "reduction": reduction, "group": group, "backend": "triton"}
    loss, scores = attent.linear_cross_entropy(hidden, weight, problem.target, **options, score=NAMES)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(loss, (hidden, weight, bias), upstream)
    with torch.no_grad():
        alone = attent.linear_cross_entropy(hidden, weight, problem.target, **options, score=("logit", "head"))[1]
    named = dict(zip(("input", "linear_weight", "linear_bias"), gradients, strict=True))
    return {"loss": loss.detach(), **scores, **named, **{f"{name} alone": score for name, score in alone.items()}}


def on_rank(rank: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The results in numpy: a tensor is sent as a handle, which is gone when this process is."""
    world = dist.group.WORLD
    outcomes = []
    for reduction, max_bytes, options in CASES:
        with small(max_bytes, tile=4):
            problem = fixed_problem(**options).to(torch.float32)
            outcome = results(problem, split(sizes)[rank], reduction, world)
            outcomes.append({name: value.numpy() for name, value in outcome.items()})
    return outcomes


@pytest.mark.slow
def test_ranks_that_share_a_vocabulary_agree_with_one_that_has_it_all(tmp_path: Path) -> None:
    sizes = (3, 4)
    expected = []
    for reduction, _, options in CASES:
        with small(64 << 20, tile=4):
            expected.append(results(fixed_problem(**options).to(torch.float32), slice(None), reduction))
    for own, outcomes in zip(split(sizes), on_ranks(2, on_rank, tmp_path / "meet", sizes), strict=True):
        for case, right in zip(outcomes, expected, strict=True):
            for name, value in right.items():
                whole = value[own] if name in ("linear_weight", "linear_bias") else value
                torch.testing.assert_close(
                    torch.from_numpy(case[name]), whole, **CLOSE, msg=lambda text, n=name: f"{n}: {text}"
                )
