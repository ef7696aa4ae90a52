"""What the committed teaching studies say, in short: README's table, and the rows of ``gpu_targets`` that they fill.

Nothing is written by hand: a study that has not landed says so, and the next run of ``benchmarks.table`` shows one that
has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .provenance import RESULTS
from .studies.analysis import Landed, landed
from .studies.arms import FULL
from .studies.catalogue import names

SCALE = "small"
NOT_RUN = "not yet run"
HARVEST = "harvest"
#: Studies of images; the others are of language.
VISION = ("vit", "mae")


class Row(NamedTuple):
    """A study by name, its file, and what landed of it."""

    name: str
    path: Path
    study: Landed | None


def rows(results: Path = RESULTS, scale: str = SCALE) -> list[Row]:
    """All studies of a scale, in the order in which they run."""
    paths = {name: results / "studies" / scale / f"{name}.jsonl" for name in names(scale)}
    return [Row(name, path, landed(path)) for name, path in paths.items()]


def is_vision(name: str) -> bool:
    return name.startswith(VISION)


def link(row: Row, root: str) -> str:
    """To the file of a study's runs, from a page whose path to the checkout's folder is ``root``."""
    return f"[{row.name}]({root}benchmarks/results/studies/{row.path.parent.name}/{row.path.name})"


# --------------------------------------------------------------------------------------------------------------- README


def lines(results: Path = RESULTS) -> Iterator[str]:
    """One row a study: harvest against full data at the same compute, and the smallest budgets that are enough."""
    yield (
        "**The same in every study** (CPU scale: learners and data are tiny; GPU scale not yet run): a *budget* is a"
        " share of full training's seconds, teaching included."
    )
    yield ""
    yield (
        "| study | metric | harvest − full data at the same compute (> 0: better; 95 %) | smallest budget within the"
        " margin of full training: full data | harvest |"
    )
    yield "|---|---|---|---|---|"
    for row in rows(results):
        if row.study is None or HARVEST not in row.study.arms:
            yield f"| {row.name} |  | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} |"
            continue
        metric, higher = row.study.about["settings"]["metric"]
        better = "higher" if higher else "lower"
        yield (
            f"| {link(row, '')} | {metric} ({better} is better), margin {row.study.about['margin']:g} |"
            f" {_gain(row.study)} | {_budget(row.study, FULL)} | {_budget(row.study, HARVEST)} |"
        )
    yield ""
    yield (
        "Means over budgets of 50 % to 100 %, paired by seed; **bold**: the interval leaves 0 out. All arms, intervals"
        " and what could be detected: [docs/studies.md](docs/studies.md)."
    )


def _gain(study: Landed) -> str:
    gain = study.gain_over_budgets(HARVEST)
    digits = 2 if study.about["settings"]["metric"][0] == "accuracy, %" else 4
    text = f"{gain.mean:+.{digits}f} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]".replace("-", "−")
    text = f"**{text}**" if gain.low > 0 or gain.high < 0 else text
    return f"{text}, {gain.pairs} seeds"


def _budget(study: Landed, arm: str) -> str:
    found = study.smallest_budget(arm)
    return "none" if found is None else f"{found:.0%}"


# -------------------------------------------------------------------------------------------------------------- targets


def teaching_seconds_over_saved(study: Landed) -> float | None:
    """Harvest's teaching seconds over the seconds that it saves at its smallest budget; None if it saves none."""
    budget = study.smallest_budget(HARVEST)
    if budget is None or budget == max(study.budgets):
        return None  # at full training's budget what remains is the noise of the clock
    taught, full = study.cell(HARVEST, budget), study.cell(FULL, max(study.budgets))
    saved = full.seconds - taught.seconds
    return taught.teaching_seconds / saved if saved > 0 else None


def change_in_seconds(study: Landed, arm: str) -> float | None:
    """Measured seconds at the arm's smallest budget over full training's, minus 1; None if no budget is enough."""
    budget = study.smallest_budget(arm)
    if budget is None:
        return None
    return study.cell(arm, budget).seconds / study.cell(FULL, max(study.budgets)).seconds - 1


def targets(results: Path = RESULTS) -> Iterator[str]:
    """The targets that training itself has to meet; one line each, of all studies at once, with their links."""
    shown = [row for row in rows(results) if row.study is not None and HARVEST in row.study.arms]
    ratios = [(row, _share(teaching_seconds_over_saved(row.study))) for row in shown if row.study is not None]
    yield _target("harvest's teaching seconds / seconds saved, at its smallest budget", ratios, "≤ 0.01")
    for what, target, of in (
        ("measured seconds to full training's final metric, vision, harvest", "−20.6 %", True),
        ("the same, language", "−13.0 %", False),
    ):
        changes = [
            (row, f"{_change(row.study, HARVEST)} (full data: {_change(row.study, FULL)})")
            for row in shown
            if row.study is not None and is_vision(row.name) == of
        ]
        yield _target(what, changes, target)


def _target(what: str, found: list[tuple[Row, str]], target: str) -> str:
    if not found:
        return f"| {what} | not yet measured | {target} |  |"
    measured = "; ".join(f"{row.name}: {value}" for row, value in found)
    where = ", ".join(link(row, "../") for row, _ in found)
    return f"| {what} | {measured} | {target} | **CPU scale**, tiny learners; GPU: not yet measured: {where} |"


def _share(value: float | None) -> str:
    return "saves none" if value is None else f"{value:.2f}"


def _change(study: Landed, arm: str) -> str:
    value = change_in_seconds(study, arm)
    if value is None:
        return "not within the margin"
    return f"{100 * value:+.0f} % at a budget of {_budget(study, arm)}".replace("-", "−")
