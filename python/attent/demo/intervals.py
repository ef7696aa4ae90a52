"""Means, paired differences and their 95 % intervals over a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95 % interval (both bounds infinite with a single pair)."""

    mean: float
    low: float
    high: float
    pairs: int

    def sentence(self, first: str, second: str) -> str:
        """What the interval allows to say: which of the two is ahead, or that no difference is shown."""
        if self.low > 0:
            return f"{first} is ahead of {second}"
        if self.high < 0:
            return f"{first} is behind {second}"
        return "no difference shown"


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1); NaN for a single value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, pair by pair: mean ± t·sd/√n, t the Student quantile with n - 1 degrees of freedom.

    >>> from attent.demo.intervals import paired_difference
    >>> d = paired_difference([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])
    >>> round(d.mean, 3), round(d.low, 3), round(d.high, 3)
    (2.0, -0.484, 4.484)
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, centre = len(differences), mean(differences)
    if n < 2:
        return Difference(centre, -math.inf, math.inf, n)
    half = t_quantile(n - 1) * standard_deviation(differences) / math.sqrt(n)
    return Difference(centre, centre - half, centre + half, n)


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = ``level`` for Student's distribution with ``degrees`` >= 1 degrees of freedom.

    For whole degrees that probability is a finite sum in the angle θ = atan(t/√degrees) (Abramowitz and Stegun,
    26.7.3 and 26.7.4); it rises with θ, so halving the interval [0, π/2] finds the quantile to machine precision.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(angle: float, degrees: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for j in range(1 + odd, degrees, 2):  # the terms cos^(j-1) with the factors (j-1)!!/j!!, whichever parity they have
        total += term
        term *= j / (j + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
