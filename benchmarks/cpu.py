"""``python -m benchmarks.cpu``: what teaching costs on a CPU, as ratios within one run, beside plain PyTorch.

Rows and what each is measured against:

scorer            linear cross-entropy with "logit" scores / the chunked ``F.linear`` that any such loss must do
training loss     forward and backward of the loss: attent with and without scores, PyTorch's full-logits form, and
                  PyTorch's own chunked ``F.linear_cross_entropy`` where this PyTorch has it
harvest step      a training step that returns and records scores / the same step without, and / plain PyTorch's
teacher           recording and drawing for 1,000,000 ids, in seconds

Contenders run in turn, round by round. Ratios are medians over rounds of processor seconds for the steps (they do not
see what else the machine does) and of wall seconds elsewhere. Nothing is kept cold: the matrices exceed every cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.bench.timing import interleave, ratio
from attent.demo.learner import VisionTransformer

from .memory import peak_extra_mib
from .provenance import provenance, save

#: The scorer's shape: tokens, width, vocabulary.
N, D, V = 4096, 512, 32768
CHUNK_ROWS = 512  # 64 MB of float32 logits, for the rival too

Problem = tuple[Tensor, Tensor, Tensor]


def scorer_problem(tokens: int = N) -> Problem:
    """Hidden states, weight and targets whose logits spread as a trained model's do (standard deviation 3)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * (3 / D**0.5)
    return hidden, weight, torch.randint(V, (tokens,), generator=generator)


def small(problem: Problem) -> Problem:
    """The same with few tokens, to warm up with."""
    return problem[0][:4], problem[1], problem[2][:4]


@torch.no_grad()
def linear_alone(problem: Problem) -> None:
    """Every logit computed once, chunk by chunk, into one buffer, and thrown away."""
    hidden, weight, _ = problem
    buffer = torch.empty(min(CHUNK_ROWS, len(hidden)), len(weight))
    for rows in hidden.split(CHUNK_ROWS):
        torch.mm(rows, weight.t(), out=buffer[: len(rows)])


@torch.no_grad()
def scorer(problem: Problem, score: str = "logit") -> None:
    attent.linear_cross_entropy(*problem, score=score)


@torch.no_grad()
def scorer_on_small(problem: Problem) -> None:
    scorer(small(problem))


def measure_scorer(rounds: int) -> dict[str, Any]:
    problem = scorer_problem()
    contenders: dict[str, Callable[[], object]] = {
        "F.linear alone": lambda: linear_alone(problem),
        "logit": lambda: scorer(problem, "logit"),
        "head": lambda: scorer(problem, "head"),
    }
    reason = attent.ops.logits_passes.native.unavailable()
    if reason is None:
        contenders[PYTORCH_PASSES] = lambda: without_native(lambda: scorer(problem, "logit"))
    timings = interleave(contenders, rounds)
    base = timings["F.linear alone"]
    return {
        "shape": {"tokens": N, "width": D, "vocabulary": V, "dtype": "float32"},
        "seconds": {name: timing.spread() for name, timing in timings.items()},
        "ratio to F.linear alone": {
            name: ratio(timing, base) for name, timing in timings.items() if timing is not base
        },
        "peak extra MiB": peak_extra_mib(scorer_problem, scorer_on_small, scorer),
        "logits MiB": N * V * 4 / 2**20,
    }


def without_native(call: Callable[[], object]) -> None:
    """Run ``call`` as on an installation without the native module."""
    native = attent.ops.logits_passes.native
    available, native.unavailable = native.unavailable, lambda: "switched off by the benchmark"
    try:
        call()
    finally:
        native.unavailable = available


def measure_training_loss(rounds: int) -> dict[str, Any]:
    hidden, weight, target = scorer_problem(1024)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    contenders = {
        "F.cross_entropy(F.linear)": step(lambda: F.cross_entropy(F.linear(hidden, weight), target)),
        "attent": step(lambda: attent.linear_cross_entropy(hidden, weight, target)),
        "attent with logit": step(lambda: attent.linear_cross_entropy(hidden, weight, target, score="logit")[0]),
        "attent with head": step(lambda: attent.linear_cross_entropy(hidden, weight, target, score="head")[0]),
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions()
        contenders["F.linear_cross_entropy, chunked"] = step(
            lambda: F.linear_cross_entropy(hidden, weight, target, options=options)
        )
    timings = interleave(contenders, rounds)
    base = timings["F.cross_entropy(F.linear)"]
    plain = timings["attent"]
    return {
        "shape": {"tokens": 1024, "width": D, "vocabulary": V, "dtype": "float32"},
        "seconds": {name: timing.spread() for name, timing in timings.items()},
        "ratio to full logits": {name: ratio(timing, base) for name, timing in timings.items() if timing is not base},
        "ratio of scoring to not": {name: ratio(timings[f"attent with {name}"], plain) for name in ("logit", "head")},
    }


class Plain(nn.Module):
    """The demo's vision transformer as anyone would write it without attent: the same layers, PyTorch's attention."""

    def __init__(self, learner: VisionTransformer) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        classifier = self.learner.classifier
        tokens = self.learner.tokens(images)
        B, T, D = tokens.shape
        H, P = classifier.num_heads, classifier.query.shape[0]
        key = classifier.key_proj(tokens).view(B, T, H, D // H).transpose(1, 2)
        value = classifier.value_proj(tokens).view(B, T, H, D // H).transpose(1, 2)
        query = classifier.query.transpose(0, 1).expand(B, H, P, D // H)
        pooled = F.scaled_dot_product_attention(query, key, value).mean(2).reshape(B, D)
        return classifier.readout(pooled)


def measure_harvest(rounds: int, batch: int) -> dict[str, Any]:
    """A step of the demo's learner (the smallest we know, so the largest overhead), one thread.

    With the teacher: scores asked for and recorded. Without: the same learner, neither. Beside them the same layers
    written in plain PyTorch, which shows what attent's attention pool itself adds to a step this small.
    """
    torch.manual_seed(0)
    learner = VisionTransformer()
    plain = Plain(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)
    images, labels = torch.randn(batch, 28, 28), torch.randint(10, (batch,))
    ids = torch.randperm(60_000)[:batch]
    teacher = attent.Teacher(60_000, total_epochs=4)
    next(iter(teacher.sampler(batch_size=batch)))

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_teacher() -> None:
        result = learner(images, labels, "logit")
        update(result.losses.mean())
        teacher.record(ids, result.scores)

    def without() -> None:
        update(learner(images, labels, None).losses.mean())

    def in_plain_pytorch() -> None:
        update(F.cross_entropy(plain(images), labels))

    with torch.no_grad():
        difference = float((plain(images) - learner.predict(images)).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"the steps do not train the same model: logits differ by {difference}")

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                step()

        return run

    steps = {"with the teacher": with_teacher, "without": without, "plain PyTorch": in_plain_pytorch}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleave({name: repeated(step) for name, step in steps.items()}, rounds, warmup=4)
    finally:
        torch.set_num_threads(threads)
    return {
        "learner": f"the demo's vision transformer, batch {batch}, AdamW, float32, one thread",
        "seconds of 3 steps": {name: timing.spread("cpu") for name, timing in timings.items()},
        "ratio with the teacher / without": ratio(timings["with the teacher"], timings["without"], "cpu"),
        "ratio with the teacher / plain PyTorch": ratio(timings["with the teacher"], timings["plain PyTorch"], "cpu"),
    }


def measure_teacher(rounds: int, num_examples: int = 1_000_000, batch: int = 1024) -> dict[str, Any]:
    """Scores recorded for every id, batch by batch, then the next epoch's lesson drawn and its first batch taken."""
    order = torch.randperm(num_examples)
    scores = torch.rand(num_examples) + 1e-3
    batches = list(zip(order.split(batch), scores.split(batch), strict=True))

    def record_and_draw() -> None:
        teacher = attent.Teacher(num_examples, total_epochs=8)
        sampler = teacher.sampler(batch_size=batch)
        for ids, values in batches:
            teacher.record(ids, values)
        sampler.set_epoch(1)
        next(iter(sampler))

    timings = interleave({"record and draw": record_and_draw}, rounds)
    return {"ids": num_examples, "batch": batch, "seconds": timings["record and draw"].spread()}


MEASURED: dict[str, Callable[[int], dict[str, Any]]] = {
    "scorer": lambda rounds: measure_scorer(rounds),
    "training loss": lambda rounds: measure_training_loss(rounds),
    "harvest step": lambda rounds: measure_harvest(40 * rounds, 128),
    "teacher": lambda rounds: measure_teacher(rounds),
}

#: The scorer's cost over ``F.linear`` alone, at most: with the native module, and by PyTorch's operations.
NATIVE_TARGET, PYTORCH_TARGET = 1.3, 1.8
PYTORCH_PASSES = "logit, PyTorch passes"  # measured beside "logit" where that is the native module's


def scorer_ratio(row: dict[str, Any], native: bool) -> float | None:
    """Of "logit" over ``F.linear`` alone; None: not measured."""
    ratios = row["ratio to F.linear alone"]
    if native:
        return float(ratios["logit"]["median"]) if PYTORCH_PASSES in ratios else None
    return float(ratios.get(PYTORCH_PASSES, ratios["logit"])["median"])


#: row -> (figure in it, None: not measured; target): what is asked of a CPU.
TARGETS: dict[str, list[tuple[str, Callable[[dict[str, Any]], float | None], float]]] = {
    "scorer": [
        ("logit / F.linear alone", lambda row: scorer_ratio(row, True), NATIVE_TARGET),
        ("the same, PyTorch passes", lambda row: scorer_ratio(row, False), PYTORCH_TARGET),
        ("peak extra MiB", lambda row: row["peak extra MiB"], 100.0),
    ],
    "harvest step": [
        ("with the teacher / without", lambda row: row["ratio with the teacher / without"]["median"], 1.02)
    ],
    "teacher": [("seconds for 1,000,000 ids", lambda row: row["seconds"]["median"], 0.5)],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="What teaching costs on this CPU.")
    parser.add_argument("--rows", nargs="+", choices=list(MEASURED), default=list(MEASURED), help="rows to measure")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each contender (default 5)")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/cpu/")
    parser.add_argument("--json", type=Path, help="write the result there")
    asked = parser.parse_args(arguments)
    result: dict[str, Any] = {"provenance": provenance(), "rows": {}}
    for name in asked.rows:
        row = MEASURED[name](asked.rounds)
        result["rows"][name] = row
        print(f"\n{name}\n{json.dumps(row, indent=1)}", flush=True)
    print("\nagainst the targets")
    for name in asked.rows:
        for label, figure, target in TARGETS.get(name, []):
            value = figure(result["rows"][name])
            if value is None:
                continue
            print(f"  {label:<28} {value:8.3f}   target <= {target:g}   {'met' if value <= target else 'MISSED'}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    if asked.save:
        print(f"\nsaved to {save('cpu', result)}")


if __name__ == "__main__":
    main()
