"""A chart as a PNG file, drawn by matplotlib (the ``demo`` extra): for slides, papers and issues."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._checks import refuse
from .charts import Bars, Columns, Drawn, Histograms, Lines, every
from .palette import LIGHT, SERIES

DOTS_PER_INCH = 160
MARKERS, STYLES = "os^D", ("-", "--", ":", "-.")


def write_pngs(charts: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write ``<name>.png`` of each chart into ``folder``, which is made; returns the files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        refuse("png", "an installation without matplotlib", "one with it: pip install matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        files.append(folder / f"{chart.name}.png")
        _figure(chart).savefig(files[-1], dpi=DOTS_PER_INCH, metadata={"Description": chart.description()})
    return files


def _figure(chart: Drawn) -> Any:
    from matplotlib.figure import Figure

    height = 1.4 + 0.26 * len(chart.labels) if isinstance(chart, Bars) else 3.8
    figure = Figure(figsize=(6.4, height), layout="constrained", facecolor=LIGHT["card"])
    axes: Any = figure.subplots()
    if isinstance(chart, Lines):
        _lines(axes, chart)
    elif isinstance(chart, Columns):
        _columns(axes, chart)
    elif isinstance(chart, Bars):
        _bars(axes, chart)
    else:
        _histograms(axes, chart)
    axes.set_title(chart.title, loc="left", color=LIGHT["ink"], fontweight="bold")
    axes.set_xlabel(chart.x_title, color=LIGHT["soft"])
    axes.set_ylabel("" if isinstance(chart, Bars) else chart.y_title, color=LIGHT["soft"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if isinstance(chart, Bars) else "y", color=LIGHT["line"], linewidth=0.8)
    if isinstance(chart, (Lines, Columns)) and len(chart.series) > 1:
        figure.legend(loc="outside lower left", ncols=min(len(chart.series), 4), frameon=False)
    return figure


def _colour(series: int) -> str:
    return LIGHT[f"s{series % SERIES}"]


def _lines(axes: Any, chart: Lines) -> None:
    for place, (name, points) in enumerate(chart.series):
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=name, color=_colour(place),
            linestyle=STYLES[place % len(STYLES)], marker=MARKERS[place % len(MARKERS)] if len(points) <= 40 else "",
            markersize=4.5,
        )  # fmt: skip
    axes.set_xlim(left=min(0.0, *(x for _, points in chart.series for x, _ in points)))


def _columns(axes: Any, chart: Columns) -> None:
    places = range(len(chart.labels))
    width, bottom = (0.78 if chart.stacked else 0.78 / len(chart.series)), [0.0] * len(chart.labels)
    for series, (name, values) in enumerate(chart.series):
        shift = 0.0 if chart.stacked else (series - (len(chart.series) - 1) / 2) * width
        axes.bar([p + shift for p in places], values, width, bottom=bottom, label=name, color=_colour(series))
        bottom = [b + v for b, v in zip(bottom, values, strict=True)] if chart.stacked else bottom
    _name_columns(axes, chart.labels)


def _bars(axes: Any, chart: Bars) -> None:
    axes.barh(range(len(chart.labels)), chart.values, 0.72, color=_colour(0))
    axes.set_yticks(range(len(chart.labels)), chart.labels)
    axes.set_ylim(len(chart.labels) - 0.4, -0.6)
    axes.axvline(chart.line_at, color=LIGHT["ink"], linestyle="--", linewidth=1.2)


def _histograms(axes: Any, chart: Histograms) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    n = len(chart.labels)
    shades = LinearSegmentedColormap.from_list("shares", [LIGHT["card"], _colour(0)])
    cells = [list(row) for row in zip(*chart.shares, strict=True)]  # [bins, labels]
    axes.pcolormesh([i - 0.5 for i in range(n + 1)], chart.edges, cells, cmap=shades, norm=PowerNorm(0.5, vmin=0))
    axes.set_yscale("log")
    if chart.edges[-1] / chart.edges[0] < 30:  # within a decade or so, powers of ten say nothing
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.hlines(chart.medians, [i - 0.5 for i in range(n)], [i + 0.5 for i in range(n)], color=_colour(1), linewidth=2)
    _name_columns(axes, chart.labels)


def _name_columns(axes: Any, labels: Sequence[str]) -> None:
    step = every(len(labels), 16)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
