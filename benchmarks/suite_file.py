"""The file of the GPU suite's results: by commit, part and row; written anew, whole, after every row.

{"runs": {commit: {"provenance": …, "parts": {part: {row: result}}}}}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class SuiteFile:
    """One run's view of its file. What runs just now is noted beside it, for the process that watches and the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state_path = path.with_suffix(".running")

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
        _write(self._state_path, {"run": key, "open": None, "broken": {}})
        return self

    def close(self) -> None:
        self._state_path.unlink()

    # -------------------------------------------------------------------------------------------------------- results

    def results(self, part: str) -> dict[str, Any]:
        """Row: result."""
        found: dict[str, Any] = json.loads(self.path.read_text())["runs"][self._state()["run"]]["parts"].get(part, {})
        return found

    def start(self, part: str, row: str) -> None:
        self._set(open={"part": part, "row": row, "contender": None, "since": time.time()})

    def enter(self, contender: str | None) -> None:
        """A contender of the open row runs alone now; or none does."""
        self._set(open=self._state()["open"] | {"contender": contender, "since": time.time()})

    def finish(self, part: str, row: str, result: dict[str, Any]) -> None:
        content = json.loads(self.path.read_text())
        content["runs"][self._state()["run"]]["parts"].setdefault(part, {})[row] = result
        _write(self.path, content)
        self._set(open=None, broken={})

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

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._state_path.read_text())
        return state

    def _set(self, **changes: Any) -> None:
        _write(self._state_path, self._state() | changes)


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
