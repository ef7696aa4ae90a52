"""Child processes of the GPU suite: rows run in them, and what hangs or crashes takes no more than itself along."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attent.bench.contenders import Progress, outside, said
from attent.bench.devices import Device, DeviceLost

from .suite_file import SuiteFile

Row = tuple[str, str, Callable[[Progress], dict[str, Any]]]  # part, key, what to run

HUNG = "no result after"
#: When so many rows of one kind have hung, the others of that kind are not tried: they would take the budget.
MOST_HUNG = 3


class Refused(Exception):
    """No failure: this cannot be done here."""


class Noted(Progress):
    """Progress that the watching process reads."""

    def __init__(self, file: SuiteFile) -> None:
        super().__init__(file.broken())
        self._file = file

    def enter(self, contender: str | None) -> None:
        self._file.enter(contender)


# -------------------------------------------------------------------------------------------------------- in the child


def run_rows(file: SuiteFile, deadline: float, rows: Iterable[Row], device: Device) -> None:
    """Run what nobody has or does yet, until the deadline; each result goes into the file at once."""
    done: dict[str, dict[str, Any]] = {}
    for part, key, run in rows:
        if key in done.setdefault(part, file.results(part)):
            continue
        if time.time() > deadline:
            return
        if not file.claim(part, key):
            continue
        if hung(file.results(part), key) >= MOST_HUNG:
            file.finish(part, key, {"failed": f"not tried: {MOST_HUNG} rows like it hung"})
            continue
        result = one_result(run, file)
        file.finish(part, key, result)
        print(f"{part} | {key}: {verdict(result)}", flush=True)
        if "failed" in result:
            device.must_be_well()


def one_result(run: Callable[[Progress], dict[str, Any]], file: SuiteFile) -> dict[str, Any]:
    started = time.time()
    try:
        result = run(Noted(file))
    except Refused as refused:
        result = {"unavailable": str(refused)}
    except DeviceLost:
        raise  # the row stays open, with the contender that did it
    except Exception as error:  # a failing kernel must not hide the next one
        result = dict(said(error))
    return result | {"took": round(time.time() - started, 2)}


def hung(results: dict[str, dict[str, Any]], key: str) -> int:
    """How many rows of the key's kind had no result in time."""
    return sum(kind(row) == kind(key) and result.get("failed", "").startswith(HUNG) for row, result in results.items())


def kind(key: str) -> tuple[str, str]:
    """What a row is of, and what runs it: the first and the last of its key's words."""
    words = key.split(", ")
    return words[0], words[-1]


def verdict(result: dict[str, Any]) -> str:
    """A row, or a contender in it, in a few words."""
    for name in ("failed", "unavailable"):
        if name in result:
            return f"{name}: {result[name]}"
    if "outside budget" in result:
        return f"outside budget: {outside(result)}"
    return "measured" if "contenders" in result else "ok"


# ---------------------------------------------------------------------------------------------------------- outside it


def supervise(file: SuiteFile, command: Sequence[str], deadline: float, row_limit: float, workers: int = 1) -> None:
    """Run rows in ``workers`` children at a time, each going on behind what ended the last one, until the deadline."""
    if workers == 1:
        return _watch(file, command, deadline, row_limit, None)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    views = [SuiteFile(file.path, worker) for worker in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(_watch, view, command, deadline, row_limit, environment) for view in views]:
            future.result()
    return None


def _watch(
    file: SuiteFile, command: Sequence[str], deadline: float, row_limit: float, environment: dict[str, str] | None
) -> None:
    while time.time() < deadline:
        before = file.finished()
        child = subprocess.Popen([*command, "--worker", file.worker], env=environment)
        why = None
        while why is None and child.poll() is None:
            time.sleep(0.1)
            row = file.open_row()
            if time.time() > deadline:
                why = "the budget ended"
            elif row is not None and time.time() - row["since"] > row_limit:
                why = f"{HUNG} {row_limit:.0f} s"
        if why is not None:
            _end(child)
            if time.time() > deadline:
                return  # what was open is for the next run
        elif child.returncode == 0:
            return
        why = why or f"the process ended with {_name(child.returncode)}"
        row = file.open_row()
        if row is not None:
            print(f"{row['part']} | {row['row']}: {why} (in {row['contender'] or 'the row'})", flush=True)
        if not file.blame(why) and file.finished() == before:
            file.finish("children", f"worker {file.worker}", {"failed": f"{why} before any row"})
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:  # its driver still waits for the GPU; nothing of it is written any more
        print(f"process {child.pid} was killed and has not ended", flush=True)


def _name(code: int) -> str:
    """Of how a process ended."""
    return f"signal {-code}" if code < 0 else str(code)
