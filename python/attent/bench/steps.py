"""Whole training steps, with and without a teacher.

Harvest: forward, backward and AdamW of a GPT whose loss returns scores that a teacher records, against the same step
without scores, and against the usual loss on full logits. One-pass: forward of a pool, backward through the chosen
half, against the step on all of it; the optimizer, the same for all, is left out there. Mixed precision on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent

from .contenders import Call, Contenders, Results, Workload, on_gpu
from .small_gpt import Block, SmallGPT

#: The teacher's data set: large, so that recording into it is not into a cache.
EXAMPLES = 1_000_000


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # that autocast computes in
    shape: dict[str, Any]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", self.dtype) if self.device.type == "cuda" else nullcontext()


def nothing(problem: Problem) -> Results:
    """Steps have no truth of their own: their losses and gradients are tested elsewhere."""
    return {}


# -------------------------------------------------------------------------------------------------------------- harvest

HARVEST = Contenders()


def gpt_step(problem: Problem, backend: str | None, score: str | None, compiled: bool = False) -> Call:
    """backend None: the usual loss on full logits. ``compiled``: the model, by torch.compile."""
    shape = problem.shape
    torch.manual_seed(0)
    with problem.device:
        model = SmallGPT(shape["T"], shape["D"], shape["heads"], shape["depth"], shape["V"])
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=problem.device.type == "cuda")
    tokens = torch.randint(shape["V"], (shape["B"], shape["T"]), device=problem.device)
    ids = torch.randperm(EXAMPLES)[: shape["B"]]
    teacher = attent.Teacher(EXAMPLES, total_epochs=4)
    next(iter(teacher.sampler(batch_size=shape["B"])))

    def run() -> Results:
        with problem.autocast():
            hidden = forward(tokens)
            if backend is None:
                loss = F.cross_entropy(model.head(hidden[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
            else:
                loss = attent.linear_cross_entropy(
                    hidden, model.head.weight, tokens, shift=True, score=score, backend=backend
                )
        if score is not None:
            loss, scores = loss
            teacher.record(ids, scores)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {}

    return run


HARVEST.add("full logits")(lambda problem: gpt_step(problem, None, None))
for backend in ("triton", "torch"):
    for score in (None, "logit", "head"):

        def make(problem: Problem, backend: str = backend, score: str | None = score) -> Call:
            return gpt_step(problem, backend, score)

        teaches = f", {score} and teacher" if score else ""
        HARVEST.add(f"attent {backend}" + teaches, compiles=backend == "triton")(make)
HARVEST.add("full logits of a compiled model", on_gpu, compiles=True)(lambda of: gpt_step(of, None, None, True))
for score in (None, "logit"):

    def make_compiled(problem: Problem, score: str | None = score) -> Call:
        return gpt_step(problem, "triton", score, True)

    teaches = f", {score} and teacher" if score else ""
    HARVEST.add("attent triton on a compiled model" + teaches, on_gpu, compiles=True)(make_compiled)


def over_the_same_without(row: dict[str, Any]) -> dict[str, Any]:
    """attent's steps with a teacher over those without, of the same backend."""
    medians = {name: entry["seconds"]["median"] for name, entry in row["contenders"].items() if "seconds" in entry}
    found: dict[str, Any] = {}
    for name, median in medians.items():
        plain = name.split(",")[0]
        if plain != name and plain in medians:
            found.setdefault(f"{plain} without", {"which": plain})[name] = median / medians[plain]
    return found


# ------------------------------------------------------------------------------------------------------------- one-pass

ONE_PASS = Contenders()


class Classifier(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x)[:, -1])
        return logits


def classifier_step(problem: Problem, engine: str | None, compiled: bool = False) -> Call:
    """engine None: the full step, by torch.compile if ``compiled``."""
    shape = problem.shape
    torch.manual_seed(0)
    with problem.device:
        model = Classifier(shape["D"], shape["heads"], shape["depth"], shape["classes"])
    x = torch.randn(shape["B"], shape["T"], shape["D"], device=problem.device)
    labels = torch.randint(shape["classes"], (shape["B"],), device=problem.device)

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        with problem.autocast():
            return F.cross_entropy(model(x).float(), labels, reduction="none")

    step = None if engine is None else attent.OnePass(losses, engine=engine)
    full = torch.compile(losses, dynamic=False) if compiled else losses

    def run() -> Results:
        model.zero_grad()
        if step is None:
            full(x, labels).mean().backward()
        else:
            of_all = step(x, labels)
            step.backward(of_all, of_all.detach().topk(shape["B"] // 2).indices)
        return {}

    return run


ONE_PASS.add("full step")(lambda problem: classifier_step(problem, None))
ONE_PASS.add("attent one-pass, eager")(lambda problem: classifier_step(problem, "eager"))
ONE_PASS.add("attent two-pass")(lambda problem: classifier_step(problem, "two_pass"))
ONE_PASS.add("full step, compiled", on_gpu, compiles=True)(lambda problem: classifier_step(problem, None, True))
ONE_PASS.add("attent one-pass, compiled", on_gpu, compiles=True)(lambda problem: classifier_step(problem, "compile"))

# ------------------------------------------------------------------------------------------------------------ workloads


def harvest(shape: dict[str, Any], dtype: torch.dtype) -> Workload:
    """``shape``: B, T, D, heads, depth, V of a GPT."""
    B, T, D, V = (shape[part] for part in ("B", "T", "D", "V"))
    return workload(
        f"harvest: GPT, B {B}, T {T}, D {D}, V {V}",
        shape,
        HARVEST,
        "full logits",
        6.0 * B * T * (shape["depth"] * 12 * D * D + D * V),
        over_the_same_without,
        dtype,
    )


def one_pass(shape: dict[str, Any], dtype: torch.dtype) -> Workload:
    """``shape``: B (the pool), T, D, heads, depth, classes of a classifier."""
    B, T, D = (shape[part] for part in ("B", "T", "D"))
    return workload(
        f"one-pass, half chosen: B {B}, T {T}, D {D}",
        shape,
        ONE_PASS,
        "full step",
        6.0 * B * T * shape["depth"] * 12 * D * D,
        lambda row: {},
        dtype,
    )


def workload(
    key: str,
    shape: dict[str, Any],
    contenders: Contenders,
    baseline: str,
    flops: float,
    summary: Callable[[dict[str, Any]], dict[str, Any]],
    dtype: torch.dtype,
) -> Workload:
    return Workload(
        key=key,
        shape=shape,
        problem=lambda device: Problem(device, dtype, shape),
        truth=nothing,
        peer=nothing,
        contenders=contenders,
        baseline=baseline,
        flops=flops,  # of the matrix products of the full step
        bytes=0.0,
        terms=1,
        summary=summary,
    )
