"""Contenders timed in turn, so that a machine's drift meets all of them alike, and compared run by run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Timing:
    """Seconds of one contender, one entry a round: wall, and processor time of the whole process (all threads)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def spread(self, clock: str = "wall") -> dict[str, float]:
        seconds = getattr(self, clock)
        return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def on_host(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall, cpu


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    timed: Callable[[Callable[[], object]], tuple[float, float]] = on_host,
) -> dict[str, Timing]:
    """Run every contender once per round, in turn, in alternating order; ``warmup`` rounds are not counted.

    ``timed`` runs a call and says how long it took: (wall, processor) seconds.
    """
    timings = {name: Timing() for name in contenders}
    gc.collect()
    gc.disable()  # a collection would hit one contender with another's garbage
    try:
        for i in range(warmup + rounds):
            for name in contenders if i % 2 == 0 else reversed(contenders):
                wall, cpu = timed(contenders[name])
                if i >= warmup:
                    timings[name].wall.append(wall)
                    timings[name].cpu.append(cpu)
    finally:
        gc.enable()
    return timings


def ratio(ours: Timing, theirs: Timing, clock: str = "wall") -> dict[str, float]:
    """Ours over theirs, round by round: the median and the middle half of the pairs' ratios."""
    pairs = [a / b for a, b in zip(getattr(ours, clock), getattr(theirs, clock), strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return {"median": median, "low": low, "high": high, "rounds": len(pairs)}
