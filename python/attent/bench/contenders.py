"""Contenders on one workload: who can run, who is right, then how fast, interleaved, and how far from the bound.

A workload is made once and given to every contender. First each runs once and is compared with the truth; then those
that are right are timed in turn, round by round. A contender that fails never hides another: its entry says how. Of the
others' results, one outside the error budget is timed and marked; of attent's it is not timed.

The budget of a result: twice the error of plain PyTorch in the problem's dtype, one rounding to that dtype and √K
roundings of float32 for sums of K terms, both of the largest value. Errors are maxima over the tensor, from the truth:
the same inputs in float32, or in float64 where they are float32.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attent_kernels import native

from .._checks import dtype_name
from .devices import Device
from .timing import Timing, interleave, ratio

Results = Mapping[str, Tensor]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[Any], Call]  # of a problem
    available: Callable[[Any], str | None]  # the reason why it cannot run this problem here; None: it can
    compiles: bool  # seconds or minutes, at its first call: with Triton or torch.compile

    @property
    def ours(self) -> bool:
        return self.name.startswith("attent")


class Contenders:
    """All who may run one kind of workload, in the order of the table."""

    def __init__(self) -> None:
        self.all: list[Contender] = []

    def add(
        self, name: str, *available: Callable[[Any], str | None], compiles: bool = False
    ) -> Callable[[Callable[[Any], Call]], Callable[[Any], Call]]:
        """Decorator: this function makes contender ``name`` of a problem; the first reason of ``available`` holds."""

        def note(make: Callable[[Any], Call]) -> Callable[[Any], Call]:
            def first_reason(problem: Any) -> str | None:
                return next((reason for check in available if (reason := check(problem)) is not None), None)

            self.all.append(Contender(name, make, first_reason, compiles))
            return make

        return note


def installed(module: str, distribution: str = "") -> Callable[[Any], str | None]:
    """A check: the module can be imported."""

    def check(problem: Any) -> str | None:
        return None if importlib.util.find_spec(module) else f"{distribution or module} is not installed"

    return check


def on_gpu(problem: Any) -> str | None:
    """A check: the problem lies on a GPU."""
    return None if problem.device.type == "cuda" else "it runs on a GPU only"


#: What attent's contenders and checks run as: a backend, and of "cuda" also the kernels it runs where it has no better.
PORTABLE = "cuda, portable"


def on_hopper(problem: Any) -> str | None:
    """A check: there are Hopper kernels, beside which the portable ones are another contender."""
    return None if native.runs_hopper(problem.device) else "the portable kernels are those that 'cuda' runs here"


@contextmanager
def running(form: str) -> Iterator[str]:
    """The name of the backend that runs ``form`` within this context."""
    with native.portable_kernels() if form == PORTABLE else nullcontext():
        yield form.split(",")[0]


@dataclass(frozen=True)
class Workload:
    """One row of a table: a problem, its truth and what it costs at least."""

    key: str
    shape: dict[str, Any]
    problem: Callable[[torch.device], Any]  # has .device and .dtype
    truth: Callable[[Any], Results]
    peer: Callable[[Any], Results]  # plain PyTorch in the problem's own dtype
    contenders: Contenders
    baseline: str  # whom ratios are to
    flops: float
    bytes: float  # that must be read and written at least
    terms: int  # of the longest sum: K of the error budget
    summary: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}  # further ratios, of the finished row


class Progress:
    """What a watching process knows of a row: the contender that runs for the first time, and who broke it before."""

    def __init__(self, broken: Mapping[str, str] | None = None) -> None:
        self.broken = broken or {}

    def enter(self, contender: str | None) -> None:
        """``contender`` runs now, alone; None: none does."""


def measure(
    workload: Workload,
    device: Device,
    ceilings: dict[str, Any],
    rounds: int,
    names: tuple[str, ...] = (),
    warmup: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The row: every contender's time, error and memory, or why there is none; of those in ``names``, if any."""
    progress = progress or Progress()
    problem = workload.problem(device.torch)
    # Computed anew for each contender they would cost more time than the contenders; kept they take little memory.
    truth = {name: value.detach() for name, value in workload.truth(problem).items()}
    allowed = budgets(truth, workload.peer(problem), problem.dtype, workload.terms)
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for contender in workload.contenders.all:
        if names and contender.name not in names:
            continue
        entry = entries[contender.name] = {}
        if contender.name in progress.broken:
            entry["failed"] = progress.broken[contender.name]
            continue
        progress.enter(contender.name)
        call = _admit(contender, problem, truth, allowed, entry, device)
        if call is not None:
            calls[contender.name] = call
        _clean(device)
    progress.enter(None)
    timings = interleave(calls, rounds, warmup, timed=device.timed)
    bound = max(
        workload.flops / ceilings["matrix product, FLOPs a second"], workload.bytes / ceilings["copy, bytes a second"]
    )
    for name, timed in timings.items():
        entries[name] |= _figures(timed, workload, bound, timings.get(workload.baseline))
    row = {
        "shape": workload.shape,
        "dtype": dtype_name(problem.dtype),
        "flops": workload.flops,
        "bytes": workload.bytes,
        "bound seconds": bound,
        "ceilings": ceilings,
        "clock": device.policy,
        "rounds": rounds,
        "baseline": workload.baseline,
        "contenders": entries,
    }
    summary = workload.summary(row)
    return row | {"ratios": summary} if summary else row


def budgets(truth: Results, peer: Results, dtype: torch.dtype, terms: int) -> dict[str, float]:
    """The error that is allowed of each result. Results that are not floating (indices) have none."""
    roundoff = torch.finfo(dtype).eps / 2 + terms**0.5 * torch.finfo(torch.float32).eps / 2
    return {
        name: 2 * difference(peer[name], value) + roundoff * (float(value.abs().max()) if value.numel() else 0.0)
        for name, value in truth.items()
        if value.is_floating_point()
    }


def difference(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where one is NaN, or in shape."""
    if value.shape != truth.shape:
        return float("inf")
    largest = float((value.to(truth.dtype) - truth).abs().max()) if value.numel() else 0.0
    return float("inf") if largest != largest else largest


def _admit(
    contender: Contender, problem: Any, truth: Results, allowed: dict[str, float], entry: dict[str, Any], device: Device
) -> Call | None:
    """Run a contender once; its call if it is to be timed, else None with the reason in ``entry``."""
    reason = contender.available(problem)
    if reason is not None:
        entry["unavailable"] = reason
        return None
    try:
        call = contender.make(problem)
        results = call()
        wrong = _wrong(results, truth, allowed, entry)
        del results
        memory = device.peak_extra_mib(call)
    except Exception as error:  # whatever a library may raise
        entry |= said(error)
        if "failed" in entry:
            device.must_be_well()
        return None
    if memory is not None:
        entry["peak extra MiB"] = memory
    if wrong:
        entry["outside budget"] = wrong
        if contender.ours:
            return None
    return call


def said(error: Exception) -> dict[str, str]:
    """An error as a result: {"unavailable": why} if a backend refuses, else {"failed": what, "trace": where}."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Compilers show the source first and say last what is wrong with it.
    text = f"{type(error).__name__}: " + " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    if text.startswith("ValueError: backend: "):  # attent's own refusal is no failure: it names the reason
        return {"unavailable": text.split(" cannot: ")[-1]}
    frames = [
        f"{frame.name}, {Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return {"failed": text[:500], "trace": "\n".join([*frames[-6:], str(error)[-1500:]])}


def _wrong(results: Results, truth: Results, allowed: dict[str, float], entry: dict[str, Any]) -> list[str]:
    """The results that are not as near to the truth as they must be; notes the errors, and of those where they are."""
    known = {name: value.detach() for name, value in results.items() if name in truth}
    entry["error / budget"], wrong = compare(known, truth, allowed)
    if wrong:
        entry["wrong"] = wrong
    return list(wrong)


def compare(results: Results, truth: Results, allowed: dict[str, float]) -> tuple[dict[str, float], dict[str, Any]]:
    """Of each floating result its error over its budget; of each that is wrong how, and where."""
    shares, wrong = {}, {}
    for name, value in results.items():
        if name not in allowed:
            if not torch.equal(value, truth[name]):
                wrong[name] = where(value, truth[name])
            continue
        error = difference(value, truth[name])
        shares[name] = error / allowed[name] if allowed[name] else error
        if not error <= allowed[name]:
            wrong[name] = {"budget": allowed[name]} | where(value, truth[name])
    return shares, wrong


def where(value: Tensor, truth: Tensor) -> dict[str, Any]:
    """How two tensors differ: in shape, or in how many places, most of all where."""
    if value.shape != truth.shape:
        return {"shape": list(value.shape), "should be": list(truth.shape)}
    error = (value.double() - truth.double()).abs().nan_to_num(nan=torch.inf)
    at = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), value.shape)]
    counts = {"not finite": int((~value.isfinite()).sum())} if value.is_floating_point() else {}
    return {
        "different": int((error > 0).sum()), "of": value.numel(), **counts, "most at": place,
        "is": float(value.flatten()[at]), "should be": float(truth.flatten()[at]),
    }  # fmt: skip


def outside(entry: dict[str, Any]) -> str:
    """What is outside the budget, and how far."""
    shares = entry.get("error / budget", {})
    return ", ".join(
        name + (f" ({shares[name]:.3g} of its budget)" if name in shares else "") for name in entry["outside budget"]
    )


def _figures(timed: Timing, workload: Workload, bound: float, baseline: Timing | None) -> dict[str, Any]:
    seconds = statistics.median(timed.wall)
    quartiles = statistics.quantiles(timed.wall, n=4, method="inclusive") if len(timed.wall) > 1 else [seconds] * 3
    figures: dict[str, Any] = {
        "seconds": {"median": seconds, "low": quartiles[0], "high": quartiles[2], "min": min(timed.wall)},
        "TFLOP/s": workload.flops / seconds / 1e12,
        "GB/s": workload.bytes / seconds / 1e9,
        "share of the bound": bound / seconds,
    }
    if baseline is not None and baseline is not timed:
        figures["ratio to the baseline"] = ratio(timed, baseline)
    return figures


def _clean(device: Device) -> None:
    """Give back what the last contender used, before the next one's memory is counted."""
    if device.kind == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- reports


def table(key: str, row: dict[str, Any]) -> str:
    """A row as text: one line per contender, fastest first, those without a time last."""
    lines = [f"{key}  (bound {row['bound seconds'] * 1e3:.3f} ms; ratios to {row['baseline']})"]
    lines.append(
        f"  {'contender':44} {'ms':>10} {'±':>8} {'TFLOP/s':>8} {'GB/s':>8} {'of bound':>8} {'ratio':>7} {'MiB':>9}"
    )
    entries = row["contenders"].items()
    for name, entry in sorted(entries, key=lambda item: item[1].get("seconds", {}).get("median", float("inf"))):
        if "seconds" not in entry:
            lines.append(f"  {name:44} {reason(entry)}")
            continue
        seconds, to = entry["seconds"], entry.get("ratio to the baseline")
        spread = (seconds["high"] - seconds["low"]) / 2
        memory = entry.get("peak extra MiB")
        lines.append(
            f"  {name:44} {seconds['median'] * 1e3:10.3f} {spread * 1e3:8.3f} {entry['TFLOP/s']:8.2f}"
            f" {entry['GB/s']:8.1f} {entry['share of the bound']:8.1%} {to['median'] if to else 1:7.2f}"
            f" {'' if memory is None else format(memory, '.0f'):>9}{_mark(entry)}"
        )
    for of, figures in row.get("ratios", {}).items():
        shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items() if isinstance(value, float))
        lines.append(f"  over {of} ({figures['which']}): {shown}")
    return "\n".join(lines)


def reason(entry: dict[str, Any]) -> str:
    """Why a contender has no time."""
    for kind in ("unavailable", "failed"):
        if kind in entry:
            return f"{kind}: {entry[kind]}"
    return f"not timed: outside the error budget in {outside(entry)}"


def failures(row: dict[str, Any]) -> list[str]:
    """What of attent's failed or is outside its budget, one line each."""
    entries = {name: entry for name, entry in row["contenders"].items() if name.startswith("attent")}
    wrong = {name: entry for name, entry in entries.items() if "failed" in entry or "outside budget" in entry}
    return [f"{name}: {reason(entry)}" for name, entry in wrong.items()]


def _mark(entry: dict[str, Any]) -> str:
    return f"  outside the error budget: {outside(entry)}" if "outside budget" in entry else ""
