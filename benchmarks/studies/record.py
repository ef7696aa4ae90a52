"""Results as JSON lines, one file a study: each run appended as it lands, found again by what it depends on."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def code_version(modules: Iterable[ModuleType]) -> str:
    """A hash of what modules do: their syntax trees without docstrings, so that words and layout do not count."""
    digest = hashlib.sha256()
    for module in sorted(modules, key=lambda m: m.__name__):
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def key_of(settings: dict[str, Any]) -> str:
    """A hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The records of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = list(read(path))

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        return next((r for r in self._records if r["kind"] == kind and r["key"] == key), None)

    def of(self, key: str) -> list[dict[str, Any]]:
        """All runs of a study's settings and code."""
        return [record for record in self._records if record["kind"] == "run" and record["of"] == key]

    def clear(self) -> None:
        """Start anew."""
        self.path.unlink(missing_ok=True)
        self._records = []

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records.append(record)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All whole records; a last line that was cut off is no record."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
