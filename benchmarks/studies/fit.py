"""Which epochs and keep ratio of a teacher fill a budget of steps: nearest to the ratio that the policy names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import attent

HALVINGS = 14


@dataclass(frozen=True)
class Fit:
    """``make(epochs, stretch)`` is a teacher of ``steps`` steps; its keep ratios are the policy's times ``stretch``."""

    epochs: int
    stretch: float
    steps: int


def fit(make: Callable[[int, float], attent.Teacher], batch_size: int, steps: int, largest: float) -> Fit:
    """The most steps not above ``steps``, at the number of epochs whose ratio is stretched least.

    ``largest`` is the stretch that makes the largest keep ratio 1. Raises ``ValueError`` if not even a sliver of one
    reduced epoch after the warm-up fits.
    """
    found: list[Fit] = []
    for epochs in range(2, 10**6):
        if make(epochs, 1e-3).total_steps(batch_size) > steps:
            break
        low, high = 1e-3, largest
        if make(epochs, high).total_steps(batch_size) <= steps:
            low = high
        for _ in range(HALVINGS if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if make(epochs, middle).total_steps(batch_size) <= steps else (low, middle)
        found.append(Fit(epochs, low, make(epochs, low).total_steps(batch_size)))
        if found[-1].stretch < 0.25:  # more epochs stretch it further from 1
            break
    if not found:
        raise ValueError(f"steps: got {steps} at batch size {batch_size}; takes more than one pass over the data")
    # One that is cut at the largest ratio may leave steps unused: those count as stretch as well.
    return min(found, key=lambda f: abs(math.log(f.stretch)) + 10 * (steps - f.steps) / steps)
