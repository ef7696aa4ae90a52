"""Peak memory of one call, as the operating system counts it: each measured in a fresh process (Linux)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_extra_mib(prepare: Callable[[], Any], warm: Callable[[Any], object], call: Callable[[Any], object]) -> float:
    """MiB that ``call(prepare())`` adds at its peak to the resident set that ``warm(prepare())`` has left behind.

    ``warm`` runs the same code on a small problem first, so that libraries, threads and their buffers are in place. The
    functions must be importable by name: a fresh interpreter runs them.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (prepare, warm, call))


def _measure(prepare: Callable[[], Any], warm: Callable[[Any], object], call: Callable[[Any], object]) -> float:
    problem = prepare()
    warm(problem)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status("VmRSS")
    call(problem)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
