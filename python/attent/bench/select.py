"""Top-k of many scores, beside torch.topk and a stable torch.sort.

Hard choices must be those of ``torch.sort(stable=True, descending=True)``, index for index; ``torch.topk`` leaves open
which of equal scores it takes, so only its scores are compared. Draws (Gumbel noise, a floor) are timed beside the same
noise and ``torch.topk`` in eager PyTorch, which gives neither inclusion probabilities nor a floor; that they follow
their distribution is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attent

from .contenders import Call, Contenders, Results, Workload


class Problem(NamedTuple):
    scores: Tensor  # [n] float32
    k: int
    draws: bool  # at temperature 1 with a floor of 0.2, not hard

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scores.dtype


def make_problem(shape: dict[str, Any], device: torch.device) -> Problem:
    """Log-normal scores, as gradient norms are; or many equal ones, a tenth of n different values at most."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(shape["n"], generator=generator, device=device).exp()
    if shape["ties"]:
        scores = scores.mul(8).round().div(8)
    return Problem(scores, shape["k"], shape["draws"])


def truth(problem: Problem) -> Results:
    if problem.draws:
        return {}
    values, index = problem.scores.sort(stable=True, descending=True)
    return {"score": values[: problem.k], "index": index[: problem.k]}


# ----------------------------------------------------------------------------------------------------------- contenders

CONTENDERS = Contenders()


def hard_only(problem: Problem) -> str | None:
    return "it does not draw" if problem.draws else None


def draws_only(problem: Problem) -> str | None:
    return None if problem.draws else "it draws"


@CONTENDERS.add("torch.topk", hard_only)
def topk(problem: Problem) -> Call:
    return lambda: {"score": problem.scores.topk(problem.k).values}


@CONTENDERS.add("torch.sort, stable", hard_only)
def sort(problem: Problem) -> Call:
    def run() -> Results:
        values, index = problem.scores.sort(stable=True, descending=True)
        return {"score": values[: problem.k], "index": index[: problem.k]}

    return run


@CONTENDERS.add("eager Gumbel noise and torch.topk", draws_only)
def eager_draw(problem: Problem) -> Call:
    def run() -> Results:
        noise = torch.empty_like(problem.scores).exponential_().log_().neg_()
        return {"drawn": (problem.scores.log() + noise).topk(problem.k).indices}

    return run


def ours(backend: str) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        options: dict[str, Any] = {"temperature": 1.0, "floor": 0.2, "seed": 0} if problem.draws else {}

        def run() -> Results:
            selection = attent.select_top_k(problem.scores, problem.k, backend=backend, **options)
            return {"score": selection.score, "index": selection.index}

        return run

    return make


for backend in ("triton", "cuda", "torch"):
    CONTENDERS.add(f"attent {backend}", compiles=backend == "triton")(ours(backend))


# ------------------------------------------------------------------------------------------------------------- workload


def workload(n: int, k: int, draws: bool, ties: bool) -> Workload:
    shape = {"n": n, "k": k, "draws": draws, "ties": ties}
    return Workload(
        key=f"n {n:,}, k {k:,}" + (", drawn" if draws else ", hard") + (", many ties" if ties else ""),
        shape=shape,
        problem=lambda device: make_problem(shape, device),
        truth=truth,
        peer=truth,
        contenders=CONTENDERS,
        baseline="eager Gumbel noise and torch.topk" if draws else "torch.sort, stable" if k > n // 4 else "torch.topk",
        flops=0.0,
        bytes=4 * n + 16 * k,  # scores read; index, score and inclusion written
        terms=1,
    )
