"""The targets of a GPU, and what committed results of the GPU suite say about each: ``docs/performance.md``.

A result is a file ``benchmarks/results/<gpu>/<date>.json`` of ``benchmarks.gpu_suite``. Of several, the newest that
holds a row counts, and in it the run of the last commit that has the row. The last rows are of the teaching studies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import studies_table
from .provenance import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
NOT_YET = "not yet measured"

Found = tuple[Path, dict[str, Any]]  # the file, and the row


class Target(NamedTuple):
    what: str
    limit: str
    part: str  # of the suite
    row: str  # the beginning of its key
    figure: Callable[[dict[str, Any]], float | None]  # None: the contenders have no time in this row


def over(ours: str, theirs: str) -> Callable[[dict[str, Any]], float | None]:
    """Medians of one contender over another's."""

    def figure(row: dict[str, Any]) -> float | None:
        first, second = median(row, ours), median(row, theirs)
        return None if first is None or second is None else first / second

    return figure


def over_fastest(ours: str, rivals: str) -> Callable[[dict[str, Any]], float | None]:
    """The ratio that the row itself holds, to the fastest of a kind."""

    def figure(row: dict[str, Any]) -> float | None:
        value = row.get("ratios", {}).get(rivals, {}).get(ours)
        return float(value) if isinstance(value, (int, float)) else None

    return figure


def peak(contender: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: row["contenders"].get(contender, {}).get("peak extra MiB")


def median(row: dict[str, Any], contender: str) -> float | None:
    seconds = row["contenders"].get(contender, {}).get("seconds")
    return None if seconds is None else float(seconds["median"])


OURS, CUDA, ALONE = "attent triton + top-k", "attent cuda + top-k", "the fastest attention alone"
SCORED = "the fastest attention + eager scoring + topk"
HEAD, LONG = "8192×4096×131072, T 512, forward", "8192×4096×131072, T 2048, forward"

TARGETS = (
    Target("`scored_attention`, causal, T 4096, D 128 / the fastest attention alone", "≤ 1.35", "attention",
           "causal, T 4096", over_fastest(OURS, ALONE)),
    Target("the same, T 16384", "≤ 1.35", "attention", "causal, T 16384", over_fastest(OURS, ALONE)),
    Target('the same, T 4096, backend `"cuda"` (sm_90a)', "≤ 1.10", "attention", "causal, T 4096",
           over_fastest(CUDA, ALONE)),
    Target("the same, T 16384", "≤ 1.10", "attention", "causal, T 16384", over_fastest(CUDA, ALONE)),
    Target("`scored_attention`, readout of a ViT, T 197, D 64 / the fastest attention alone", "≤ 1.15", "attention",
           "ViT, readout", over_fastest(OURS, ALONE)),
    Target("the same, attention pool, one query, 1,024 keys", "≤ 1.15", "attention", "attention pool, Tq 1",
           over_fastest(OURS, ALONE)),
    Target("`scored_attention`, T 4096 / the fastest attention, eager scoring and `torch.topk`", "≤ 0.8", "attention",
           "causal, T 4096", over_fastest(OURS, SCORED)),
    Target('scorer, `"logit"`, 8192×4096×131072 / the matrix product alone', "≤ 1.25", "lce", HEAD,
           over("attent triton, logit", "matrix products alone")),
    Target('the same, backend `"cuda"` (sm_90a)', "≤ 1.25", "lce", HEAD,
           over("attent cuda, logit", "matrix products alone")),
    Target("its extra memory with Triton, MiB", "< 64", "lce", HEAD, peak("attent triton, logit")),
    Target('scorer, `"head"` / `"logit"`, 512 tokens an example', "≤ 1.35", "lce", HEAD,
           over("attent triton, head", "attent triton, logit")),
    Target("the same, 2,048 tokens an example", "≤ 1.8", "lce", LONG,
           over("attent triton, head", "attent triton, logit")),
    Target('training loss, forward and backward, `"logit"` / no scores', "≤ 1.02", "lce", HEAD + " + backward",
           over("attent triton, logit", "attent triton")),
    Target('the same, `"head"` / no scores', "≤ 1.12", "lce", HEAD + " + backward",
           over("attent triton, head", "attent triton")),
    Target("training step of a GPT with the teacher / without", "≤ 1.01", "steps", "harvest",
           over("attent triton, logit and teacher", "attent triton")),
    Target("one-pass step, half chosen / full step", "≤ 0.70", "steps", "one-pass",
           over("attent one-pass, eager", "full step")),
    Target("`select_top_k`, n 1,000,000, k 1,024 / `torch.topk`", "≤ 0.5", "select", "n 1,000,000, k 1,024, hard",
           over("attent triton", "torch.topk")),
    Target("the same, k n/2 / `torch.sort(stable=True)`", "≤ 1.0", "select", "n 1,000,000, k 500,000, hard",
           over("attent triton", "torch.sort, stable")),
)  # fmt: skip


def suite_files(results: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files of the GPU suite, the newest date first."""
    for path in sorted(results.glob("*/*.json"), key=lambda file: file.name, reverse=True):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content.get("runs"), dict):
            yield path, content


def find(target: Target, results: Path = RESULTS) -> tuple[Path, dict[str, Any], float] | None:
    """The file, its run's provenance and the figure; None if no committed result has it."""
    for path, content in suite_files(results):
        for run in reversed(list(content["runs"].values())):
            for key, row in run["parts"].get(target.part, {}).items():
                # "forward" is not "forward + backward", nor one with other targets.
                exact = key == target.row if target.part == "lce" else key.startswith(target.row)
                if exact and "contenders" in row and (value := target.figure(row)) is not None:
                    return path, run["provenance"], value
    return None


def lines(results: Path = RESULTS) -> Iterator[str]:
    yield "| what | measured | target | where |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        found = find(target, results)
        if found is None:
            yield f"| {target.what} | {NOT_YET} | {target.limit} |  |"
            continue
        path, provenance, value = found
        where = f"[{path.parent.name}/{path.stem}](../benchmarks/results/{path.parent.name}/{path.name})"
        machine = f"{provenance.get('gpu', 'unknown GPU')}, commit {provenance['commit'][:7]}"
        yield f"| {target.what} | {value:.3g} | {target.limit} | {machine}: {where} |"
    yield from studies_table.targets(results)
