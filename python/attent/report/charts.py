"""What the report draws: each chart as its numbers and words, for the page (`svg.py`) and for files (`png.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Table = tuple[list[str], list[list[str]]]  # the header, and rows as long


@dataclass(frozen=True)
class Chart:
    """``name``: of the PNG file. ``note``: what a reader has to know to read it."""

    name: str
    title: str
    note: str
    x_title: str
    y_title: str


@dataclass(frozen=True)
class Lines(Chart):
    """Curves over numbers."""

    series: Sequence[tuple[str, Sequence[tuple[float, float]]]]

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        curves = (
            f"{name}: from {number(points[0][1])} at {number(points[0][0])} to {number(points[-1][1])} at "
            f"{number(points[-1][0])}, lowest {number(min(y for _, y in points))}, "
            f"highest {number(max(y for _, y in points))}"
            for name, points in self.series
        )
        return f"{self.y_title} over {self.x_title}. {'; '.join(curves)}."

    def table(self) -> Table:
        """All numbers of the chart."""
        rows = [[name, number(x), number(y)] for name, points in self.series for x, y in points]
        return ["run", self.x_title, self.y_title], rows


@dataclass(frozen=True)
class Columns(Chart):
    """Columns over labels, side by side or on top of one another."""

    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[float]]]
    stacked: bool = False

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        parts = (f"{name} from {number(min(values))} to {number(max(values))}" for name, values in self.series)
        return f"{self.y_title} by {self.x_title}, {self.labels[0]} to {self.labels[-1]}: {'; '.join(parts)}."

    def table(self) -> Table:
        """All numbers of the chart."""
        rows = zip(self.labels, *(map(number, values) for _, values in self.series), strict=True)
        return [self.x_title, *(f"{name}, {self.y_title}" for name, _ in self.series)], [list(row) for row in rows]


@dataclass(frozen=True)
class Bars(Chart):
    """A bar to the right for each label, beside a value to compare with; ``counts`` are examples behind each."""

    labels: Sequence[str]
    values: Sequence[float]
    counts: Sequence[int]
    line_at: float

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        order = sorted(range(len(self.values)), key=self.values.__getitem__)
        low, high = order[0], order[-1]
        return (
            f"{self.x_title} of {len(self.labels)}: from {number(self.values[low])} for {self.labels[low]} to "
            f"{number(self.values[high])} for {self.labels[high]}; {number(self.line_at)} for all."
        )

    def table(self) -> Table:
        """All numbers of the chart."""
        rows = zip(self.labels, map(str, self.counts), map(number, self.values), strict=True)
        return [self.y_title, "examples", self.x_title], [list(row) for row in rows]


@dataclass(frozen=True)
class Histograms(Chart):
    """A histogram for each label, upright, over logarithmic bins: ``edges`` are one more than a histogram's shares."""

    labels: Sequence[str]
    edges: Sequence[float]
    shares: Sequence[Sequence[float]]
    medians: Sequence[float]

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        return (
            f"Distribution of {self.y_title} by {self.x_title}, {self.labels[0]} to {self.labels[-1]}: the median goes "
            f"from {number(self.medians[0])} to {number(self.medians[-1])}."
        )

    def table(self) -> Table:
        """The medians, and in which bins most examples lie."""
        rows = []
        for label, shares, median in zip(self.labels, self.shares, self.medians, strict=True):
            most = max(range(len(shares)), key=shares.__getitem__)
            bin_ = f"{number(self.edges[most])}–{number(self.edges[most + 1])}"
            rows.append([label, number(median), bin_, number(shares[most])])
        return [self.x_title, f"median {self.y_title}", "fullest bin", "share in it"], rows


Drawn = Lines | Columns | Bars | Histograms


def number(value: float) -> str:
    """Four digits at most, and a real minus."""
    return f"{value:.4g}".replace("-", "−") if value else "0"


def every(labels: int, at_most: int) -> int:
    """Write each how-manieth label, so that no more than ``at_most`` are written."""
    return max(math.ceil(labels / at_most), 1)


class Axis:
    """Numbers to positions from ``start`` to ``end``; an empty range is widened."""

    def __init__(self, low: float, high: float, start: float, end: float, *, logarithmic: bool = False) -> None:
        if high <= low:
            low, high = (
                (low / 2, high * 2) if logarithmic else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
            )
        self.low, self.high, self.start, self.end, self.logarithmic = low, high, start, end, logarithmic

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, three to seven of them; on a logarithmic axis powers of ten where it spans several."""
        if self.logarithmic and self.high / self.low >= 30:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            powers = range(first, last + 1)
            return [10.0**power for power in powers if (power - first) % every(len(powers), 6) == 0]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
