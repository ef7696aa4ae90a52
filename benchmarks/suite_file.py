"""The file of the GPU suite's results: by commit, part and row; written anew, whole, after every row.

{"runs": {commit: {"provenance": …, "parts": {part: {row: result}}}}}

Beside it, while a run goes on, lies a folder of notes: which worker has taken which row, what each has open, and the
lock under which results are written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOTHING_OPEN: dict[str, Any] = {"open": None, "broken": {}, "finished": 0}


class SuiteFile:
    """One worker's view of the file: what it runs just now is noted, for the process that watches and the next."""

    def __init__(self, path: Path, worker: int = 0) -> None:
        self.path = path
        self._notes = path.with_suffix(".running")
        self.worker = str(worker)

    @classmethod
    def create(cls, path: Path, provenance: dict[str, Any], again: bool = False) -> SuiteFile:
        """Begin a run, or go on with one of the same commit: what failed in it is forgotten; with ``again``, all."""
        self = cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads(path.read_text()) if path.exists() else {"runs": {}}
        key = provenance["commit"] + ("+uncommitted" if provenance["uncommitted_changes"] is True else "")
        old = content["runs"].get(key, {"parts": {}})["parts"]
        kept = {
            part: {row: result for row, result in results.items() if "failed" not in result and not again}
            for part, results in old.items()
        }
        content["runs"][key] = {"provenance": provenance, "parts": kept}
        _write(path, content)
        shutil.rmtree(self._notes, ignore_errors=True)
        (self._notes / "claims").mkdir(parents=True)
        (self._notes / "run").write_text(key)
        return self

    def close(self) -> None:
        shutil.rmtree(self._notes)

    # -------------------------------------------------------------------------------------------------------- results

    def results(self, part: str) -> dict[str, Any]:
        """Row: result."""
        found: dict[str, Any] = self._run(json.loads(self.path.read_text()))["parts"].get(part, {})
        return found

    def forget(self, part: str, text: str = "") -> None:
        """The results of rows whose key holds ``text``: they run anew."""
        with self._locked():
            content = json.loads(self.path.read_text())
            parts = self._run(content)["parts"]
            if part in parts:
                parts[part] = {row: result for row, result in parts[part].items() if text not in row}
            _write(self.path, content)

    def claim(self, part: str, row: str) -> bool:
        """Take a row, unless it is another worker's; one that this worker had and did not finish is its own still."""
        claimed = self._notes / "claims" / hashlib.sha256(f"{part} {row}".encode()).hexdigest()
        try:
            with claimed.open("x") as file:
                file.write(self.worker)
        except FileExistsError:
            if claimed.read_text() != self.worker:
                return False
        self._set(open={"part": part, "row": row, "contender": None, "since": time.time()})
        return True

    def enter(self, contender: str | None) -> None:
        """A contender of the open row runs alone now; or none does."""
        self._set(open=self._state()["open"] | {"contender": contender, "since": time.time()})

    def finish(self, part: str, row: str, result: dict[str, Any]) -> None:
        with self._locked():
            content = json.loads(self.path.read_text())
            self._run(content)["parts"].setdefault(part, {})[row] = result
            _write(self.path, content)
        self._set(open=None, broken={}, finished=self.finished() + 1)

    def finished(self) -> int:
        """How many rows this worker has a result of."""
        count: int = self._state()["finished"]
        return count

    # ------------------------------------------------------------------------------------------- what became of a child

    def broken(self) -> dict[str, str]:
        """Contender: how it ended the process that ran the row before; of the row that is to be tried again."""
        found: dict[str, str] = self._state()["broken"]
        return found

    def open_row(self) -> dict[str, Any] | None:
        """Of a row that has been started and not finished: part, row, contender, since."""
        found: dict[str, Any] | None = self._state()["open"]
        return found

    def blame(self, why: str) -> bool:
        """The process of the open row is no more: its contender is left out of the next try, or the row has failed.

        False if no row was open.
        """
        row = self.open_row()
        if row is None:
            return False
        if row["contender"] is None:
            self.finish(row["part"], row["row"], {"failed": why})
        else:
            self._set(open=None, broken=self.broken() | {row["contender"]: why})
        return True

    def _run(self, content: dict[str, Any]) -> dict[str, Any]:
        run: dict[str, Any] = content["runs"][(self._notes / "run").read_text()]
        return run

    def _state(self) -> dict[str, Any]:
        path = self._notes / f"{self.worker}.json"
        state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else NOTHING_OPEN
        return state

    def _set(self, **changes: Any) -> None:
        _write(self._notes / f"{self.worker}.json", self._state() | changes)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._notes / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a process that ends lets go of it
            yield


def merge(files: Iterable[Path], folder: Path) -> Path:
    """Put runs of several files into ``folder``/<newest date>.json, row by row; a later file's row wins."""
    files = sorted(files, key=lambda file: file.name)
    path = folder / files[-1].name
    content = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for file in files:
        for key, run in json.loads(file.read_text())["runs"].items():
            into = content["runs"].setdefault(key, {"provenance": run["provenance"], "parts": {}})
            for part, results in run["parts"].items():
                into["parts"].setdefault(part, {}).update(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content)
    return path


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a process that is killed while it writes leaves the old file."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
