"""A chart as SVG text for the page: no library, no script, nothing fetched; colours are the page's own.

400 units wide with letters of 13: where charts are about 400 pixels wide, in one column on a telephone and in three on
a screen, letters are as large as the small print around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from .charts import Axis, Bars, Columns, Drawn, Histograms, Lines, every, number
from .palette import DASHES, SERIES

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 40
MARKERS = 40  # a curve of more points has no markers
ROW = 22  # height of a bar and its gap
LETTER = 7.8  # mean width of a letter of 13 units, in a wide font


def svg(chart: Drawn) -> str:
    """The chart, with a legend below it where there is more than one series."""
    if isinstance(chart, Lines):
        body, height = _lines(chart), HEIGHT
    elif isinstance(chart, Columns):
        body, height = _columns(chart), HEIGHT
    elif isinstance(chart, Histograms):
        body, height = _histograms(chart), HEIGHT
    else:
        body, height = _bars(chart), TOP + ROW * len(chart.labels) + BOTTOM
    names = [name for name, _ in chart.series] if isinstance(chart, (Lines, Columns)) else []
    marks = _legend(names, lines=isinstance(chart, Lines)) if len(names) > 1 else ""
    about = escape(f"{chart.title}. {chart.description()}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{about}">{"".join(body)}</svg>{marks}'


# --------------------------------------------------------------------------------------------------------------- charts


def _lines(chart: Lines) -> list[str]:
    points = [point for _, curve in chart.series for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    air = 0.06 * (max(ys) - min(ys))
    x_axis = Axis(min([0.0, *xs]), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = Axis(min(ys) - air, max(ys) + air, HEIGHT - BOTTOM, TOP)
    body = _frame(y_axis, chart.x_title, chart.y_title)
    body += [_below(x_axis(x), HEIGHT - BOTTOM + 15, number(x)) for x in x_axis.ticks()]
    for place, (name, curve) in enumerate(chart.series):
        colour, dash = place % SERIES, DASHES[place % len(DASHES)]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in curve)
        body.append(f'<polyline class="l{colour}" points="{path}"{_dashed(dash)}/>')
        if len(curve) <= MARKERS:
            body += [_marker(place, x_axis(x), y_axis(y), f"{name}: {number(y)} at {number(x)}") for x, y in curve]
    return body


def _columns(chart: Columns) -> list[str]:
    heights = [
        sum(values) if chart.stacked else max(values) for values in zip(*(v for _, v in chart.series), strict=True)
    ]
    y_axis = Axis(0.0, max(heights) * 1.04 or 1.0, HEIGHT - BOTTOM, TOP)
    body = _frame(y_axis, chart.x_title, chart.y_title)
    slot = (WIDTH - LEFT - RIGHT) / len(chart.labels)
    width = 0.78 * slot / (1 if chart.stacked else len(chart.series))
    for place, label in enumerate(chart.labels):
        start, below = LEFT + (place + 0.11) * slot, 0.0
        for series, (name, values) in enumerate(chart.series):
            x = start if chart.stacked else start + series * width
            y, bottom = y_axis(below + values[place]), y_axis(below)
            below += values[place] if chart.stacked else 0.0
            body.append(
                f'<rect class="f{series % SERIES}" x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.8, 0.6):.1f}" '
                f'height="{bottom - y:.1f}">{_tip(f"{label}, {name}: {number(values[place])}")}</rect>'
            )
        if place % every(len(chart.labels), 10) == 0:
            body.append(_below(LEFT + (place + 0.5) * slot, HEIGHT - BOTTOM + 15, label))
    return body


def _bars(chart: Bars) -> list[str]:
    longest = max(map(len, chart.labels))
    left = min(max(longest * LETTER + 10, 40), 150)
    fits = int((left - 8) / LETTER)
    bottom = TOP + ROW * len(chart.labels)
    axis = Axis(0.0, max(*chart.values, chart.line_at) * 1.04 or 1.0, left, WIDTH - RIGHT - 8)
    body = []
    for tick in axis.ticks():
        body.append(f'<line class="grid" x1="{axis(tick):.1f}" x2="{axis(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(_below(axis(tick), bottom + 15, number(tick)))
    for place, (label, value, count) in enumerate(zip(chart.labels, chart.values, chart.counts, strict=True)):
        y = TOP + place * ROW
        short = label if len(label) <= fits else label[: fits - 1] + "…"
        body.append(_text(left - 6, y + ROW / 2 + 4, short, "end"))
        body.append(
            f'<rect class="f0" x="{left:.1f}" y="{y + 3}" width="{axis(value) - left:.1f}" height="{ROW - 6}">'
            f"{_tip(f'{label}: {number(value)} of {count} examples')}</rect>"
        )
    x = axis(chart.line_at)
    body.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{bottom}"/>')
    body.append(f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{bottom}"/>')
    body.append(_text((left + WIDTH - RIGHT) / 2, bottom + 33, chart.x_title, "middle", soft=True))
    return body


def _histograms(chart: Histograms) -> list[str]:
    y_axis = Axis(chart.edges[0], chart.edges[-1], HEIGHT - BOTTOM, TOP, logarithmic=True)
    most = max((share for shares in chart.shares for share in shares), default=0.0) or 1.0
    slot = (WIDTH - LEFT - RIGHT) / len(chart.labels)
    body = _frame(y_axis, chart.x_title, chart.y_title)
    for place, (label, shares, median) in enumerate(zip(chart.labels, chart.shares, chart.medians, strict=True)):
        x = LEFT + place * slot
        for (below, above), share in zip(pairwise(chart.edges), shares, strict=True):
            if share > 0:
                y, bottom = y_axis(above), y_axis(below)
                # The root, so that thin tails show too.
                body.append(
                    f'<rect class="f0" x="{x:.1f}" y="{y:.1f}" width="{slot + 0.2:.1f}" '
                    f'height="{bottom - y + 0.2:.1f}" fill-opacity="{math.sqrt(share / most):.3f}">'
                    f"{_tip(f'{label}: {100 * share:.1f} % in {number(below)}–{number(above)}')}</rect>"
                )
        if chart.edges[0] <= median <= chart.edges[-1]:
            y = y_axis(median)
            body.append(f'<line class="l1" x1="{x:.1f}" x2="{x + slot:.1f}" y1="{y:.1f}" y2="{y:.1f}">'
                        f"{_tip(f'{label}: median {number(median)}')}</line>")  # fmt: skip
        if place % every(len(chart.labels), 10) == 0:
            body.append(_below(x + slot / 2, HEIGHT - BOTTOM + 15, label))
    return body


# ---------------------------------------------------------------------------------------------------------------- parts


def _frame(y_axis: Axis, x_title: str, y_title: str) -> list[str]:
    body = []
    for value in y_axis.ticks():
        y = y_axis(value)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(LEFT - 6, y + 4, number(value), "end"))
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, "middle", soft=True))
    body.append(f'<text class="soft" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
                f"{escape(y_title)}</text>")  # fmt: skip
    return body


def _marker(series: int, x: float, y: float, tip: str) -> str:
    """A disc, a square, a triangle or a diamond."""
    colour, r = f"f{series % SERIES}", 3.2
    if series % 4 == 0:
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{r}">{_tip(tip)}</circle>'
    corners = (
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -r - 1), (r + 0.6, r), (-r - 0.6, r)],
        [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)],
    )[series % 4 - 1]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon class="{colour}" points="{points}">{_tip(tip)}</polygon>'


def _legend(names: Sequence[str], *, lines: bool) -> str:
    keys = []
    for place, name in enumerate(names):
        colour = place % SERIES
        width = 30 if lines else 14
        if lines:
            sample = f'<line class="l{colour}" x1="0" x2="30" y1="7" y2="7"{_dashed(DASHES[place % len(DASHES)])}/>'
            sample += _marker(place, 15, 7, name)
        else:
            sample = f'<rect class="f{colour}" x="1" y="1" width="12" height="12"/>'
        size = f'viewBox="0 0 {width} 14" style="width:{width}px"'
        keys.append(f'<li><svg {size} aria-hidden="true">{sample}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _dashed(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _below(x: float, y: float, text: str) -> str:
    """A label centred on ``x`` below an axis, or as near as stays within the chart."""
    half = len(text) * LETTER / 2
    return _text(min(max(x, half), WIDTH - half), y, text, "middle")


def _text(x: float, y: float, text: str, anchor: str, *, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
