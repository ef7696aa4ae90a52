"""The end of the GPU suite's output: what was measured in a line a row, what went wrong, and what to run again.

It is written for somebody who has minutes left on the GPU and sees the last hundred lines: what decides stands last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .gpu_children import verdict
from .suite_file import SuiteFile

BAD = ("failed", "outside budget")
MOST_LINES = 25
WIDTH = 220


def report(file: SuiteFile, parts: Sequence[str]) -> int:
    """Print it; in how many rows something of attent's is wrong."""
    results = {part: file.results(part) for part in (*parts, "children")}
    for part, rows in results.items():
        for key, result in rows.items():
            for line in measured(key, result):
                print(f"{part} | {line}"[:WIDTH])
    wrong = [(part, key, text) for part, rows in results.items() for key, row in rows.items() for text in bad(row)]
    for line in grouped(wrong):
        print(line)
    rows_wrong = {(part, key) for part, key, _ in wrong}
    for part, rows in results.items():
        if rows or part in parts:
            print(counts(part, rows, sum(of == part for of, _ in rows_wrong)))
    if wrong:
        part, key, _ = wrong[0]
        print(f"again, the first that is wrong: python -m benchmarks.gpu_suite --part {part} --only '{key}'")
    print(f"{file.path}: {len(rows_wrong)} rows with something wrong")
    return len(rows_wrong)


def measured(key: str, result: dict[str, Any]) -> Iterator[str]:
    """A row's times: the baseline's, and attent's over it."""
    if "microseconds a call" in result:
        times = ", ".join(f"{name} {of['median']:.1f}" for name, of in result["microseconds a call"].items())
        yield f"{key}: µs a call: {times}"
    entries = {name: entry for name, entry in result.get("contenders", {}).items() if "seconds" in entry}
    base = entries.get(result.get("baseline", ""))
    if not entries:
        return
    if base is None:
        yield f"{key}: no time of {result['baseline']}; ms: " + ", ".join(
            f"{name} {entry['seconds']['median'] * 1e3:.3f}" for name, entry in entries.items() if is_ours(name)
        )
        return
    median = base["seconds"]["median"]
    best = min(entries, key=lambda name: entries[name]["seconds"]["median"])
    ratios = ", ".join(
        f"{name.removeprefix('attent ')} {entry['seconds']['median'] / median:.2f}"
        for name, entry in entries.items()
        if is_ours(name) or (name == best and entry is not base)
    )
    yield f"{key}: {result['baseline']} {median * 1e3:.3f} ms; over it: {ratios}"


def is_ours(name: str) -> bool:
    return name.startswith("attent")


def bad(row: dict[str, Any]) -> list[str]:
    """What of attent's is wrong in a row."""
    ours = {name: entry for name, entry in row.get("contenders", {}).items() if is_ours(name)}
    found = [f"{name}: {verdict(entry)}" for name, entry in ours.items() if verdict(entry).startswith(BAD)]
    return [verdict(row), *found] if verdict(row).startswith(BAD) else found


def grouped(wrong: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """What went wrong, the same thing once, in the order in which it first came."""
    same: dict[tuple[str, str], list[str]] = {}
    for part, key, text in wrong:
        # Of errors outside their budget, numbers differ from row to row.
        same.setdefault((part, text if "budget" not in text else f"{text.split('(')[0]}"), []).append(f"{key} | {text}")
    groups = list(same.items())
    for (part, _), rows in groups[:MOST_LINES]:
        more = f" (and {len(rows) - 1} rows more)" if len(rows) > 1 else ""
        yield f"WRONG {part} | {rows[0]}"[: WIDTH - len(more)] + more
    if len(groups) > MOST_LINES:
        yield f"WRONG {len(groups) - MOST_LINES} things more: in the file"


def counts(part: str, rows: dict[str, Any], wrong: int) -> str:
    """Of a part: how many rows there are, of which kind."""
    unavailable = sum("unavailable" in row for row in rows.values())
    took = sum(row.get("took", 0.0) for row in rows.values())
    return f"{part}: {len(rows)} rows in {took:.0f} s, {wrong} wrong, {unavailable} unavailable"
