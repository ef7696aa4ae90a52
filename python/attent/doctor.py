"""``attent doctor``: what runs on this machine and why, and the arithmetic of what each way of teaching costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import attent
from attent_kernels import native, row_statistics

from ._checks import check_int, check_number

#: Examples of the imaginary data set that the schedule is asked about: enough that rounding k shows in no digit.
EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Way:
    """One way to teach, and its cost per candidate where a forward costs 1 and a backward ``backward``."""

    name: str
    note: str
    forwards: float  # forwards of every candidate
    chosen_forwards: float  # forwards of the chosen share alone
    # every way runs the backward of the chosen share alone

    def share(self, ratio: float, backward: float) -> float:
        """Its cost as a share of a full step's, 1 + ``backward``."""
        return (self.forwards + ratio * (self.chosen_forwards + backward)) / (1 + backward)

    def break_even(self, backward: float) -> float:
        """The keep ratio below which it costs less than a full step."""
        return min(1.0, (1 + backward - self.forwards) / (self.chosen_forwards + backward))


WAYS = (
    Way("harvest", "scores from the training forward; data visited more than once", 0, 1),
    Way("one-pass", "backward of the chosen rows only; also on streams", 1, 0),
    Way(
        "two-pass",
        "no-grad forward of the pool first (the paper's scoring of all data before each epoch costs the same)",
        1,
        1,
    ),
)
#: The backward's cost in forwards: training all weights, and LoRA, whose frozen weights need no gradient of their own.
BACKWARD = {"full training": 2.0, "LoRA": 1.0}


@dataclass(frozen=True)
class Cost:
    """What a way costs at a keep ratio, and what it saves over a whole training; savings below 0 are losses."""

    way: str
    step_share: float  # of a full step's cost, in an epoch that attent reduces
    saving: float  # share of the whole training's cost, warm-up and anneal counted in full
    break_even: float  # the keep ratio below which it saves


@dataclass(frozen=True)
class Schedule:
    """How the teacher lays out the epochs."""

    epochs: int
    full: int
    reduced: int
    reduced_share: float  # candidates of the reduced epochs, as a share of all candidates


def doctor(ratio: float, epochs: int, warmup: int, anneal: float, *, as_json: bool = False) -> None:
    """Print the report, as text or as JSON.

    Raises ``ValueError`` for a ratio, epochs, warm-up or anneal that :class:`attent.Teacher` refuses.
    """
    found = report(ratio, epochs, warmup, anneal)
    print(json.dumps(found, indent=1) if as_json else text(found))


def report(ratio: float, epochs: int, warmup: int, anneal: float) -> dict[str, Any]:
    """Everything the doctor says, as plain values."""
    schedule = lay_out(ratio, epochs, warmup, anneal)
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": attent.backends(),
        "native_module": native_module(),
        "cuda_kernels": cuda_kernels(),
        "costs": {
            "ratio": ratio,
            "warmup": warmup,
            "anneal": anneal,
            "schedule": asdict(schedule),
            **{
                training: [asdict(cost) for cost in costs(ratio, schedule, backward)]
                for training, backward in BACKWARD.items()
            },
        },
    }


def lay_out(ratio: float, epochs: int, warmup: int, anneal: float) -> Schedule:
    """The epochs as :class:`attent.Teacher` schedules them."""
    check_number("ratio", ratio, low=0, high=1, open_low=True)
    check_int("epochs", epochs, low=1)
    teacher = attent.Teacher(EXAMPLES, total_epochs=epochs, ratio=ratio, warmup=warmup, anneal=anneal)
    reduced = sum(size < EXAMPLES for size in teacher.epoch_sizes())
    return Schedule(epochs, epochs - reduced, reduced, reduced / epochs)


def costs(ratio: float, schedule: Schedule, backward: float) -> list[Cost]:
    """The arithmetic of each way, where a forward costs 1 and a backward ``backward``."""
    return [
        Cost(
            way.name,
            way.share(ratio, backward),
            schedule.reduced_share * (1 - way.share(ratio, backward)),
            way.break_even(backward),
        )
        for way in WAYS
    ]


def versions() -> dict[str, str]:
    """attent and what it runs on."""
    return {
        "attent": attent.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "CUDA": torch.version.cuda or "none: torch is built without it",
        "platform": platform.platform(),
    }


def devices() -> list[str]:
    """The CPU, then each GPU that torch sees."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [
        f"cpu: {platform.machine()}, {capability}, {usable_cores()} cores, {torch.get_num_threads()} torch threads"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return found


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def native_module() -> str:
    """Whether the compiled CPU passes are there, with the instruction sets they can use; or why not."""
    reason = row_statistics.unavailable()
    if reason is None:
        return f"available ({', '.join(row_statistics.instruction_sets())})"
    return f"not available, attent computes the same in plain torch: {reason}"


def cuda_kernels() -> str:
    """For which GPUs the native module has kernels, with which CUDA, beside the driver's; or why it has none."""
    if native.module is None:
        return "none: there is no native module"
    if native.module.cuda_absent is not None:
        return f"none: {native.module.cuda_absent}"
    driver, runtime = (f"{version // 1000}.{version % 1000 // 10}" for version in native.cuda_versions())
    archs = ", ".join(f"sm_{arch}" for arch in native.cuda_archs())
    return f"{archs}, built with CUDA {runtime}; " + (
        "no driver" if driver == "0.0" else f"the driver supports {driver}"
    )


def text(found: dict[str, Any]) -> str:
    """The report as people read it."""
    lines = ["Versions", *_pairs(found["versions"])]
    lines += ["", "Devices", *(f"  {device}" for device in found["devices"])]
    lines += ["", "Backends", *_pairs(found["backends"])]
    lines += ["", "Compiled", *_pairs({"native module": found["native_module"], "CUDA kernels": found["cuda_kernels"]})]
    arithmetic = found["costs"]
    schedule = Schedule(**arithmetic["schedule"])
    ratio = arithmetic["ratio"]
    lines += [
        "",
        f"What teaching costs at keep ratio {ratio:g} (arithmetic, not a measurement)",
        f"  {schedule.epochs} epochs, as Teacher(warmup={arithmetic['warmup']}, anneal={arithmetic['anneal']:g}) "
        f"schedules them: {schedule.full} full, {schedule.reduced} reduced to {ratio:.0%} of the examples",
    ]
    for training, backward in BACKWARD.items():
        lines += ["", f"  {training}: forward 1, backward {backward:g}, full step {1 + backward:g}"]
        lines += [f"    {line}" for line in _cost_table(arithmetic[training])]
    lines += ["", *(f"  {way.name}: {way.note}" for way in WAYS)]
    lines += ["  scores, recording and drawing are not in this arithmetic; teacher.summary() measures them"]
    return "\n".join(lines)


def _cost_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'way':<10}  {'reduced epoch / full epoch':>26}  {'saved of the training':>21}  pays when"]
    for row in rows:
        pays = "ratio < 1" if row["break_even"] >= 1 else f"ratio < {row['break_even']:.2f}"
        lines.append(f"{row['way']:<10}  {row['step_share']:>26.1%}  {row['saving']:>21.1%}  {pays}")
    return lines


def _pairs(values: dict[str, str]) -> list[str]:
    width = max(map(len, values))
    return [f"  {name:<{width}}  {value}" for name, value in values.items()]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
