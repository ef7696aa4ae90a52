"""What CPU paths cost: processor time over that of plain PyTorch of its kind, for gates that a busy machine passes.

Ours and theirs alternate in one thread of one process; each is taken at its fastest round, which others disturbed
least. What runs beside us slows all rounds of both, or some of either, and cancels; what makes a path slower does not.

``python -m tests.cpu_gates`` measures the ratios here, each also with a path that takes half as much again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

import attent
from attent.bench.provenance import provenance
from attent.demo.learner import VisionTransformer
from benchmarks.cpu import without_native

Call = Callable[[], object]

#: Halfway, as a factor, between a path as it was measured and one that takes 1.5 times as long.
MARGIN = 1.5**0.5
#: Elsewhere than where the ratios were measured: matrix products and exponentials differ by less between processors.
MARGIN_ELSEWHERE = 2.0
#: The ratios below are medians of four processes, which lay within 4 % of them.
MEASURED_ON = ("AMD EPYC", "2.13")
FEWEST_ROUNDS, MOST_ROUNDS = 12, 60


class Gate(NamedTuple):
    """A path of ours, what it is measured against, and the ratio of the two where ``MEASURED_ON`` says."""

    measured: float
    make: Callable[[], tuple[Call, Call]]  # ours and theirs

    @property
    def limit(self) -> float:
        return self.measured * (MARGIN if measured_here() else MARGIN_ELSEWHERE)


def measured_here() -> bool:
    """Whether this is a processor and a PyTorch of the kind that the ratios come from."""
    here = provenance()
    return here["processor"].startswith(MEASURED_ON[0]) and here["torch"].startswith(MEASURED_ON[1])


def cost(ours: Call, theirs: Call, limit: float = 0.0, rounds: int = MOST_ROUNDS) -> float:
    """The ratio of the fastest rounds; measuring ends when it is within ``limit``, or after all rounds."""
    best = [float("inf")] * 2
    for i in range(-2, rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            began = time.process_time()
            (ours, theirs)[which]()
            seconds = time.process_time() - began
            if i >= 0:  # two rounds to warm up
                best[which] = min(best[which], seconds)
        if i >= FEWEST_ROUNDS and best[0] <= limit * best[1]:
            break
    return best[0] / best[1]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads waiting for each other burn processor time; a collection would hit one with the other's garbage."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed (glibc).

    Else the heap's state decides whether a buffer of megabytes is mapped, and each of its pages faulted in, anew in
    each round: that moved ratios by 40 % between processes.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def half_as_slow_again(call: Call) -> Call:
    """A mutant of ``call``: after its work it keeps the processor busy for half as long."""

    def run() -> None:
        began = time.process_time()
        call()
        end = began + 1.5 * (time.process_time() - began)
        while time.process_time() < end:
            pass

    return run


# ------------------------------------------------------------------------------------------------------------ the paths

N, D, V = 128, 256, 8192


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=draw) * (3 / D**0.5)
    return torch.randn(N, D, generator=draw), weight, torch.randint(V, (N,), generator=draw)


def scorer(score: str, native: bool) -> tuple[Call, Call]:
    hidden, weight, target = _problem()

    @torch.no_grad()
    def ours() -> None:
        attent.linear_cross_entropy(hidden, weight, target, score=score, backend="torch")

    @torch.no_grad()
    def theirs() -> None:
        F.linear(hidden, weight)

    return (ours if native else lambda: without_native(ours)), theirs


def training_loss(score: str | None) -> tuple[Call, Call]:
    """Over PyTorch's, which holds all logits."""
    hidden, weight, target = _problem()
    hidden.requires_grad_(), weight.requires_grad_()

    def ours() -> None:
        hidden.grad = weight.grad = None
        result = attent.linear_cross_entropy(hidden, weight, target, score=score, backend="torch")
        (result if score is None else result[0]).backward()

    def theirs() -> None:
        hidden.grad = weight.grad = None
        F.cross_entropy(F.linear(hidden, weight), target).backward()

    return ours, theirs


POOL = 100_000


def selection(k: int, temperature: float) -> tuple[Call, Call]:
    scores = torch.rand(POOL, generator=torch.Generator().manual_seed(0)) + 1e-3

    def ours() -> None:
        attent.select_top_k(scores, k, temperature=temperature, floor=0.2 if temperature else 0.0, seed=3)

    return ours, lambda: torch.topk(scores, k) if temperature == 0 else torch.sort(scores, stable=True)


def record() -> tuple[Call, Call]:
    """64 calls with a batch of 64 each, over as many of the three operations that they cannot do without."""
    teacher = attent.Teacher(POOL, total_epochs=8)
    sampler = teacher.sampler(batch_size=64)
    sampler.set_epoch(0)
    iter(sampler)
    ids, scores = torch.arange(64), torch.rand(64)

    def ours() -> None:
        for _ in range(64):
            teacher.record(ids, scores)

    def theirs() -> None:
        for _ in range(64):
            ids.aminmax(), ids.to(torch.int64, copy=True), scores.to(torch.float32, copy=True)

    return ours, theirs


def lesson() -> tuple[Call, Call]:
    """100,000 scores recorded at once, merged, and the next lesson drawn, over a sort of them."""
    teacher = attent.Teacher(POOL, total_epochs=10_000, anneal=0.0)
    sampler = teacher.sampler(batch_size=1000)
    ids, scores = torch.randperm(POOL), torch.rand(POOL) + 1e-3
    epoch = iter(range(10_000))

    def ours() -> None:
        sampler.set_epoch(next(epoch))
        next(iter(sampler))
        teacher.record(ids, scores)

    return ours, lambda: torch.sort(scores, stable=True)


def training_step() -> tuple[Call, Call]:
    """The demo's vision transformer: a step that scores and records, over the same step without."""
    torch.manual_seed(0)
    learner = VisionTransformer()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)
    images, labels, ids = torch.randn(16, 28, 28), torch.randint(10, (16,)), torch.arange(16)
    teacher = attent.Teacher(1000, total_epochs=4)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours() -> None:
        result = learner(images, labels, "logit")
        update(result.losses.mean())
        teacher.record(ids, result.scores)

    return ours, lambda: update(learner(images, labels, None).losses.mean())


GATES = {
    "scorer, logit": Gate(1.22, lambda: scorer("logit", True)),
    "scorer, head": Gate(1.24, lambda: scorer("head", True)),
    "scorer, logit, without the native module": Gate(1.37, lambda: scorer("logit", False)),
    "training loss": Gate(1.03, lambda: training_loss(None)),
    "training loss, logit": Gate(1.03, lambda: training_loss("logit")),
    "select_top_k, hard, k 1,000": Gate(1.62, lambda: selection(1000, 0.0)),
    "select_top_k, drawn, k n/2": Gate(1.30, lambda: selection(POOL // 2, 1.0)),
    "Teacher.record": Gate(2.05, record),
    "Teacher: merge and draw": Gate(1.82, lesson),
    "training step with a teacher": Gate(1.01, training_step),
}


def main() -> int:
    print(f"{provenance()['processor']}, torch {torch.__version__}")
    with one_thread():
        for name, gate in GATES.items():
            ours, theirs = gate.make()
            began = time.process_time()
            found = cost(ours, theirs)
            seconds = time.process_time() - began
            print(
                f"{name:45} {found:7.3f}  slowed {cost(half_as_slow_again(ours), theirs):7.3f}"
                f"  limit {gate.limit:7.3f}  {seconds:.1f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
