"""The few charts of the report, as SVG text: no library, no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
COLOURS = ("#1769aa", "#c4511b", "#2e7d32", "#6a4c93", "#8a6d00", "#00798c")


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_title: str,
    y_title: str,
) -> str:
    """Curves over numbers, ``(name, [(x, y), …])``, with a legend where there are several."""
    points = [point for _, curve in series for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = _Axis(min([0.0, *xs]), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    body = _frame(x_axis, y_axis, x_title, y_title)
    for number, (name, curve) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in curve)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(curve) <= 60:
            body += [
                f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}">'
                f"<title>{escape(name)}: {y:.4g} at {x:.4g}</title></circle>"
                for x, y in curve
            ]
    return _svg(body, _legend([name for name, _ in series]) if len(series) > 1 else "")


def bars(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    y_title: str,
    x_title: str = "epoch",
    *,
    line_at: float | None = None,
) -> str:
    """Groups of bars side by side, one group for each label; a dashed line at a value to compare with."""
    top = max([line_at or 0.0, *(value for _, values in series for value in values)])
    y_axis = _Axis(0.0, top or 1.0, HEIGHT - BOTTOM, TOP)
    body = _frame(None, y_axis, x_title, y_title)
    slot = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    width = 0.8 * slot / len(series)
    for place, label in enumerate(labels):
        start = LEFT + (place + 0.1) * slot
        for number, (name, values) in enumerate(series):
            y = y_axis(values[place])
            body.append(
                f'<rect x="{start + number * width:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{COLOURS[number % len(COLOURS)]}">'
                f"<title>{escape(label)}, {escape(name)}: {values[place]:.4g}</title></rect>"
            )
        if place % math.ceil(len(labels) / 12) == 0:
            most = max(int(slot * math.ceil(len(labels) / 12) / 6.2), 2)
            short = label if len(label) <= most else label[: most - 1] + "…"
            body.append(_text(LEFT + (place + 0.5) * slot, HEIGHT - BOTTOM + 16, short, "middle"))
    if line_at is not None:
        y = y_axis(line_at)
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#333" '
                    'stroke-dasharray="5 4"/>')  # fmt: skip
    return _svg(body, _legend([name for name, _ in series]) if len(series) > 1 else "")


def heatmap(columns: Sequence[str], rows: Sequence[float], cells: Sequence[Sequence[float]], x_title: str, y_title: str,
            medians: Sequence[float]) -> str:  # fmt: skip
    """A column of shares for each label over a logarithmic axis: ``rows`` are the edges, one more than cells."""
    y_axis = _Axis(math.log10(rows[0]), math.log10(rows[-1]), HEIGHT - BOTTOM, TOP)
    most = max((share for column in cells for share in column), default=0.0) or 1.0
    slot = (WIDTH - LEFT - RIGHT) / max(len(columns), 1)
    body = []
    for place, (label, column) in enumerate(zip(columns, cells, strict=True)):
        for (below, above), share in zip(pairwise(rows), column, strict=True):
            if share > 0:
                y, bottom = y_axis(math.log10(above)), y_axis(math.log10(below))
                # The root, so that thin tails show too.
                body.append(
                    f'<rect x="{LEFT + place * slot:.1f}" y="{y:.1f}" width="{slot:.1f}" '
                    f'height="{bottom - y + 0.3:.1f}" '
                    f'fill="{COLOURS[0]}" fill-opacity="{math.sqrt(share / most):.3f}">'
                    f"<title>{escape(label)}: {100 * share:.1f} % in {below:.3g}–{above:.3g}</title></rect>"
                )
        if place % math.ceil(len(columns) / 16) == 0:
            body.append(_text(LEFT + (place + 0.5) * slot, HEIGHT - BOTTOM + 16, label, "middle"))
        if place < len(medians) and rows[0] <= medians[place] <= rows[-1]:
            y = y_axis(math.log10(medians[place]))
            body.append(f'<line x1="{LEFT + place * slot:.1f}" x2="{LEFT + (place + 1) * slot:.1f}" y1="{y:.1f}" '
                        f'y2="{y:.1f}" stroke="{COLOURS[1]}" stroke-width="2"/>')  # fmt: skip
    return _svg(_frame(None, y_axis, x_title, y_title, power=True) + body, "")


class _Axis:
    """Numbers to pixels, over a range widened where it is empty."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high <= low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _frame(x_axis: _Axis | None, y_axis: _Axis, x_title: str, y_title: str, power: bool = False) -> list[str]:
    body = []
    for value in y_axis.ticks():
        y = y_axis(value)
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(_text(LEFT - 6, y + 4, f"{10**value:.2g}" if power else f"{value:.4g}", "end"))
    for value in x_axis.ticks() if x_axis is not None else []:
        x = x_axis(value) if x_axis is not None else 0.0
        body.append(_text(x, HEIGHT - BOTTOM + 16, f"{value:.4g}", "middle"))
    body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="#333"/>')
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
                f"{escape(y_title)}</text>")  # fmt: skip
    return body


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> str:
    keys = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def _svg(body: Sequence[str], legend: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(body)}</svg>{legend}'
