"""``python -m benchmarks.gpu_suite``: everything that needs a GPU, in the order in which it decides.

correct    the public API, option by option, on the device, against the specification in float64
attention  scored_attention beside attention alone and with eager scoring
lce        linear_cross_entropy beside its rivals and the bare matrix product
select     top-k beside torch's
steps      training steps with and without a teacher
stress     poisoned workspaces, delayed tiles, two streams, graph replay; launches counted

Each row's result is in the file as soon as it is there; a run that is cut off goes on where it stopped, and rows that
failed are tried again. Rows run in a child process: one that crashes or hangs costs its own row, of several contenders
only the one that did it, and another child goes on. Results are kept by commit, so that runs from several machines and
days merge.

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
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from attent.bench.command import RIVALS
from attent.bench.contenders import Progress, Workload, measure, table
from attent.bench.devices import Device, DeviceLost

from . import attention, gpu_correct, gpu_stress, linear_cross_entropy, native_in_place, select, steps
from .command import ROUNDS, slug
from .provenance import RESULTS, commit, gpu_provenance
from .suite_file import SuiteFile, merge

Row = tuple[str, Callable[[Progress], dict[str, Any]]]

PARTS = ("correct", "attention", "lce", "select", "steps", "stress")
WORKLOADS = {
    "attention": attention.workloads,
    "lce": linear_cross_entropy.workloads,
    "select": select.workloads,
    "steps": steps.workloads,
}
#: Seconds for a row: a large shape's contenders, each compiled and some autotuned.
ROW_LIMIT = 240


# ----------------------------------------------------------------------------------------------------------------- rows


def rows(part: str, dry: bool) -> Iterable[Row]:
    """(key, what to run), the most decisive first."""
    device = Device("cpu" if dry else "cuda")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backends = ("triton", "cuda") if not dry else ("torch", "triton") if interpreted else ("torch",)
    sizes = gpu_correct.TINY if dry else gpu_correct.Sizes()
    if part == "correct":
        dtypes = (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32)
        for backend in backends:
            for case in gpu_correct.cases(device.torch, dtypes, sizes):
                yield f"{case.name}, {backend}", lambda _, case=case, backend=backend: gpu_correct.check(case, backend)
    elif part == "stress":
        for backend in backends:
            for key, run in gpu_stress.rows(device.torch, backend, sizes):
                yield f"{key}, {backend}", lambda _, run=run: run()
    else:
        scale = "tiny" if dry else "gpu"
        ceilings = device.ceilings(tiny=dry)
        for workload in WORKLOADS[part](scale):

            def run_row(progress: Progress, workload: Workload = workload) -> dict[str, Any]:
                row = measure(workload, device, ceilings, ROUNDS[scale], (), 0 if dry else 2, progress)
                print(table(workload.key, row), flush=True)
                return row

            yield workload.key, run_row


class Noted(Progress):
    """Progress that the watching process reads."""

    def __init__(self, file: SuiteFile) -> None:
        super().__init__(file.broken())
        self._file = file

    def enter(self, contender: str | None) -> None:
        self._file.enter(contender)


def run_rows(part: str, file: SuiteFile, deadline: float, all_rows: Iterable[Row], device: Device) -> None:
    """Run what the file does not have yet, until the deadline; each result goes into the file at once."""
    for key, run in all_rows:
        if key in file.results(part):
            continue
        if time.time() > deadline:
            return
        file.start(part, key)
        try:
            result = run(Noted(file))
        except gpu_stress.Refused as refused:
            result = {"unavailable": str(refused)}
        except DeviceLost:
            raise  # the row stays open, with the contender that did it
        except Exception as error:  # a failing kernel must not hide the next one
            result = {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:500]}
        file.finish(part, key, result)
        print(f"{part} | {key}: {verdict(result)}", flush=True)
        if "failed" in result:
            device.must_be_well()


def verdict(result: dict[str, Any]) -> str:
    """A row in a word or two."""
    for kind in ("failed", "unavailable", "outside budget"):
        if kind in result:
            return f"{kind}: {result[kind]}"
    return "measured" if "contenders" in result else "ok"


# ------------------------------------------------------------------------------------------------------------- children


def supervise(part: str, file: SuiteFile, command: Sequence[str], deadline: float, row_limit: float) -> None:
    """Run a part's rows in children, each going on behind what ended the last one."""
    while True:
        before = len(file.results(part))
        child = subprocess.Popen(command)
        why = None
        while child.poll() is None:
            time.sleep(0.2)
            row = file.open_row()
            if row is not None and time.time() - row["since"] > row_limit:
                why = f"no result after {row_limit:.0f} s"
            elif time.time() > deadline + row_limit:
                why = "the budget ended"
            if why is not None:
                child.kill()
                child.wait()
        if child.returncode == 0:
            return
        why = why or f"the process ended with {child.returncode}"
        if not file.blame(why) and len(file.results(part)) == before:
            file.finish(part, "(all)", {"failed": f"{why} before any row"})
            return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all (default 1500); no row starts later")
    parser.add_argument("--row-limit", type=float, default=ROW_LIMIT, help=f"seconds for a row (default {ROW_LIMIT})")
    parser.add_argument("--out", type=Path, help="a folder (default: benchmarks/results/<gpu>)")
    parser.add_argument("--again", action="store_true", help="measure anew what the file has of this commit")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: to see that the suite itself runs")
    parser.add_argument("--merge", type=Path, nargs="+", help="only merge these files into --out, by commit")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--build", action="store_true", help="first compile the native module with CUDA, in place")
    made.add_argument("--wheel", type=Path, help="first take the compiled module of this wheel")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.merge:
        print(merge(asked.merge, asked.out))
        return 0
    if asked.build or asked.wheel:
        print(f"in place: {native_in_place.install(asked.wheel)}", flush=True)  # children load it
    if not asked.dry and not torch.cuda.is_available():
        print("benchmarks.gpu_suite: there is no CUDA device; --dry runs it on a CPU, tiny", file=sys.stderr)
        return 2
    if asked.child:
        part, device = asked.part[0], Device("cpu" if asked.dry else "cuda")
        run_rows(part, SuiteFile(asked.child), asked.deadline, rows(part, asked.dry), device)
        return 0
    provenance = gpu_provenance(RIVALS)
    if asked.dry and asked.out is None:
        parser.error("--dry: its results are nobody's; --out says where they go")
    folder = asked.out or RESULTS / slug(torch.cuda.get_device_name())
    file = SuiteFile.create(folder / f"{date.today().isoformat()}.json", provenance, asked.again)
    deadline = time.time() + asked.budget
    for part in asked.part:
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--part", part, "--child", str(file.path)]
        command += ["--deadline", str(deadline)] + ["--dry"] * asked.dry
        supervise(part, file, command, deadline, asked.row_limit)
    wrong = report(file, asked.part)
    file.close()
    return 1 if wrong else 0


def report(file: SuiteFile, parts: Sequence[str]) -> int:
    """Print what is wrong; in how many rows."""
    wrong = 0
    for part in parts:
        results = file.results(part)
        for key, result in results.items():
            entries = result.get("contenders", {})
            ours = {name: entry for name, entry in entries.items() if name.startswith("attent")}
            bad = [f"{name}: {verdict(entry)}" for name, entry in ours.items() if verdict(entry).startswith(BAD)]
            if verdict(result).startswith(BAD):
                bad.append(verdict(result))
            for line in bad:
                print(f"{part} | {key} | {line}")
            wrong += bool(bad)
        print(f"{part}: {len(results)} rows")
    print(f"{file.path} (commit {commit()[:7]}): {wrong} rows with something wrong")
    return wrong


BAD = ("failed", "outside budget")

if __name__ == "__main__":
    sys.exit(main())
