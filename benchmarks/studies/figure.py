"""The figure of the studies: metric against measured seconds, a panel a study, a line an arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attent.demo.intervals import mean, standard_deviation

from .analysis import Landed
from .arms import ARMS, FULL

#: Okabe and Ito's colours for those that matter most, grey for the rest; the markers differ as well.
STYLES = {
    FULL: ("#000000", "s"),
    "harvest": ("#0072B2", "o"),
    "one-pass": ("#009E73", "D"),
    "random subset": ("#D55E00", "^"),
}
OTHERS = ("v", "<", ">", "P", "X")
COLUMNS = 3


def draw(path: Path, studies: Sequence[Landed]) -> None:
    """Write a PNG file."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(studies))
    rows = -(-len(studies) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.4 * rows + 0.9), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(studies) :]:
        axes.set_axis_off()
    for axes, study in zip(panels.flat, studies, strict=False):
        _panel(axes, study)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, study: Landed) -> None:
    """Means over the seeds; the bars of full data are one standard deviation."""
    others = iter(OTHERS)
    for arm in ARMS:
        if arm not in study.arms:
            continue
        colour, marker = STYLES[arm] if arm in STYLES else ("#999999", next(others))
        cells = [study.cell(arm, budget) for budget in study.budgets]
        seconds = [cell.seconds for cell in cells]
        centre = [mean(cell.values) for cell in cells]
        axes.plot(seconds, centre, color=colour, marker=marker, label=arm, zorder=3 if arm in STYLES else 2)
        if arm == FULL:
            spread = [standard_deviation(cell.values) for cell in cells]
            axes.errorbar(seconds, centre, yerr=spread, color=colour, fmt="none", capsize=3)
            within = centre[-1] - study.sign * study.about["margin"]
            axes.axhline(within, color=colour, linewidth=0.8, linestyle=":")
    axes.set_title(f"{study.name} ({len(study.seeds)} seeds)", fontsize="medium")
    axes.set_xlabel("CPU seconds of training, teaching included")
    metric = study.about["settings"]["metric"][0]
    axes.set_ylabel(f"{metric} ({'higher' if study.sign > 0 else 'lower'} is better)")
    axes.grid(alpha=0.25)
