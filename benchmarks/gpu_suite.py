"""``python -m benchmarks.gpu_suite``: everything that needs a GPU, in the order in which it decides.

correct    the public API, option by option, on the device, against the specification in float64
attention  scored_attention beside attention alone and with eager scoring
select     top-k beside torch's
host       microseconds of a call on tiny inputs, where the host is what takes time
lce        linear_cross_entropy beside its rivals and the bare matrix product
steps      training steps with and without a teacher
stress     poisoned workspaces, delayed tiles, two streams, graph replay; launches counted

Rows run in child processes (``gpu_children.py``). Those of "correct" and "stress" are not timed: ``--workers`` children
share them, since most of their time is compiling. So do, beside "correct", those of "warm": each contender that Triton
or torch.compile has to compile runs once, which leaves what it compiled in their caches for the timed parts. These run
alone, one row after the other.

Each row's result is in the file as soon as it is there; a run that is cut off goes on where it stopped, and rows that
failed are tried again. A row that crashes or hangs costs itself, of several contenders only the one that did it, and
another child goes on. Results are kept by commit, so that runs from several machines and days merge.

``--build`` first compiles the CUDA kernels in place, where there are nvcc and pybind11; ``--wheel FILE`` takes the
compiled module of a wheel that was built elsewhere (``benchmarks/native_in_place.py``). Both say what they put there,
also where there is no GPU to go on with. Without either, rows of backend "cuda" say what is missing.

Needs PyTorch 2.9 and Triton 3.5 at least, no network; rivals are measured where they can be imported. From a checkout:
``PYTHONPATH=python python -m benchmarks.gpu_suite --budget 1500``; where the checkout's history is missing,
``ATTENT_COMMIT`` names the commit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from attent.bench.command import RIVALS
from attent.bench.contenders import PORTABLE, Contender, Progress, Workload, measure, table
from attent.bench.devices import Device, DeviceLost
from attent_kernels import native

from . import (
    attention,
    gpu_correct,
    gpu_host,
    gpu_library,
    gpu_stress,
    linear_cross_entropy,
    native_in_place,
    select,
    steps,
)
from .command import ROUNDS, slug
from .gpu_children import Row, run_rows, supervise
from .gpu_report import report
from .provenance import RESULTS, gpu_provenance
from .suite_file import SuiteFile, merge

PARTS = ("correct", "attention", "select", "host", "lce", "steps", "stress")
WORKLOADS = {
    "attention": attention.workloads,
    "lce": linear_cross_entropy.workloads,
    "select": select.workloads,
    "steps": steps.workloads,
}
#: Not timed: several children at once.
SHARED = ("warm", "correct", "stress")
#: Seconds for a row, or for one contender of it until its first result: a training step compiles for a minute or more.
ROW_LIMIT = 120
DRY_LIMIT = 600  # Triton's interpreter takes a minute for some


# ----------------------------------------------------------------------------------------------------------------- rows


def rows(part: str, device: Device, dry: bool, warmed: Sequence[str] = ()) -> Iterator[Row]:
    """(part, key, what to run), the most decisive first. ``warmed``: the parts that "warm" is for."""
    sizes = gpu_correct.TINY if dry else gpu_correct.Sizes()
    if part == "correct":
        for (name, make), form in correct_cases(device.torch, dry, sizes):
            yield part, f"{name}, {form}", lambda _, make=make, form=form: gpu_correct.check(make(), form)
    elif part == "stress":
        for form in forms(dry):
            for key, run in gpu_stress.rows(device.torch, form, sizes):
                yield part, f"{key}, {form}", lambda _, run=run: run()
    elif part == "host":
        for key, run in gpu_host.rows(device.torch):
            yield part, key, lambda _, run=run: run()
    elif part == "warm":
        yield from warm_rows(device, dry, warmed)
    else:
        yield from timed_rows(part, device, dry)


def forms(dry: bool) -> tuple[str, ...]:
    """What is checked: backends, and where there are Hopper kernels the portable ones, too."""
    if dry:
        return ("torch", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch",)
    return ("triton", "cuda", PORTABLE) if native.runs_hopper(torch.device("cuda", 0)) else ("triton", "cuda")


def correct_cases(device: torch.device, dry: bool, sizes: gpu_correct.Sizes) -> Iterator[tuple[gpu_correct.Named, str]]:
    """For each dtype forward, then backward; selection last, which the others rest on."""
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32):
        for train in (False, True):
            for form in forms(dry):
                for case in gpu_correct.cases(device, dtype, train, sizes):
                    yield case, form
    for form in forms(dry):
        for case in gpu_correct.selections(device):
            yield case, form
    for case in gpu_library.cases(device):
        yield case, "torch" if dry else "triton"


def timed_rows(part: str, device: Device, dry: bool) -> Iterator[Row]:
    scale = "tiny" if dry else "gpu"
    ceilings = device.ceilings(tiny=dry)
    for workload in WORKLOADS[part](scale):

        def run(progress: Progress, workload: Workload = workload) -> dict[str, Any]:
            row = measure(workload, device, ceilings, ROUNDS[scale], (), 0 if dry else 2, progress)
            print(table(workload.key, row), flush=True)
            return row

        yield part, workload.key, run


def warm_rows(device: Device, dry: bool, parts: Iterable[str]) -> Iterator[Row]:
    """Each contender that is compiled, once; those that take longest first."""
    for part in sorted(set(parts) & set(WORKLOADS), key=("steps", "lce", "attention", "select").index):
        for workload in WORKLOADS[part]("tiny" if dry else "gpu"):
            for contender in workload.contenders.all:
                if contender.compiles:
                    key = f"{part}, {workload.key}, {contender.name}"
                    yield "warm", key, lambda _, of=(workload, contender): run_once(*of, device)


def run_once(workload: Workload, contender: Contender, device: Device) -> dict[str, Any]:
    problem = workload.problem(device.torch)
    reason = contender.available(problem)
    if reason is not None:
        return {"unavailable": reason}
    contender.make(problem)()
    if device.kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other children's rows need it
    return {}


# ------------------------------------------------------------------------------------------------------------- the run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", metavar="TEXT", help="only rows whose key holds this text, also those that are there")
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all; what runs then is stopped (1500)")
    parser.add_argument("--row-limit", type=float, help=f"seconds for a row ({ROW_LIMIT})")
    parser.add_argument("--workers", type=int, help="children for rows that are not timed (the cores, 16 at most)")
    parser.add_argument("--out", type=Path, help="a folder (default: benchmarks/results/<gpu>)")
    parser.add_argument("--again", action="store_true", help="measure anew what the file has of this commit")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: to see that the suite itself runs")
    parser.add_argument("--merge", type=Path, nargs="+", help="only merge these files into --out, by commit")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--build", action="store_true", help="first compile the native module with CUDA, in place")
    made.add_argument("--wheel", type=Path, help="first take the compiled module of this wheel")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--phase", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.merge:
        print(merge(asked.merge, asked.out))
        return 0
    deadline = time.time() + asked.budget
    if asked.build or asked.wheel:
        print(f"in place: {native_in_place.install(asked.wheel)}", flush=True)  # children load it
    if not asked.dry and not torch.cuda.is_available():
        print("benchmarks.gpu_suite: there is no CUDA device; --dry runs it on a CPU, tiny", file=sys.stderr)
        return 2
    if asked.child:
        return child(asked)
    if asked.dry and asked.out is None:
        parser.error("--dry: its results are nobody's; --out says where they go")
    folder = asked.out or RESULTS / slug(torch.cuda.get_device_name())
    file = SuiteFile.create(folder / f"{date.today().isoformat()}.json", gpu_provenance(RIVALS), asked.again)
    for part in ("children", "warm", *(asked.part if asked.only else ())):
        file.forget(part, asked.only if part in PARTS else "")
    workers = asked.workers or (1 if asked.dry else min(16, os.cpu_count() or 1))
    for phase in phases(asked.part):
        shared = phase[0] in SHARED
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--child", str(file.path), "--deadline", str(deadline)]
        command += ["--phase", *phase, "--part", *asked.part] + ["--dry"] * asked.dry
        command += ["--only", asked.only] if asked.only else []
        limit = asked.row_limit or (DRY_LIMIT if asked.dry else ROW_LIMIT)
        supervise(file, command, deadline, limit, workers if shared else 1)
    if time.time() > deadline:
        print("the budget ended: the same command goes on from here")
    wrong = report(file, asked.part)
    file.close()
    return 1 if wrong else 0


def phases(parts: Sequence[str]) -> Iterator[list[str]]:
    """Parts whose rows follow one another in the same children."""
    timed = [part for part in PARTS if part in parts and part not in SHARED]
    compiled = ["warm"] if set(timed) & set(WORKLOADS) else []
    for phase in (compiled + ["correct"] * ("correct" in parts), timed, ["stress"] * ("stress" in parts)):
        if phase:
            yield phase


def child(asked: argparse.Namespace) -> int:
    """The rows of a phase that no other child has."""
    file, device = SuiteFile(asked.child, asked.worker), Device("cpu" if asked.dry else "cuda")
    every = (row for part in asked.phase for row in rows(part, device, asked.dry, asked.part))
    try:
        run_rows(file, asked.deadline, (row for row in every if (asked.only or "") in row[1]), device)
    except DeviceLost as lost:
        print(f"the GPU is lost to this process, another goes on: {lost}", flush=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
