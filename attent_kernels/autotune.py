"""ATTENT_AUTOTUNE=1: time a kernel's candidate configurations at its first call of each kind, and print a table of them.

Off by default: kernels take their configuration from a committed table, so that a first call brings no surprise. With
it, each kind of call is timed once, on the tensors of that call, and the process prints at its end what it found, as
rows for that table. A candidate that does not compile or needs more than the device has is passed over.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import triton

from .runtime import INTERPRETED

T = TypeVar("T")

#: (kernel, case) -> the best candidate and its milliseconds, beside the table's own
_found: dict[tuple[str, Any], tuple[Any, float, Any, float]] = {}


def is_searching() -> bool:
    """Whether it was asked for, and there is a device whose time means something."""
    return os.environ.get("ATTENT_AUTOTUNE") == "1" and not INTERPRETED


def search(kernel: str, case: Any, candidates: Sequence[T], launch: Callable[[T], None]) -> T:
    """The fastest of ``candidates``, of which the first is the table's own, for a ``case``; timed once per process.

    ``launch`` must give the same results however often it is called.
    """
    key = (kernel, case)
    if key not in _found:
        if not _found:
            atexit.register(print_table)
        milliseconds = {}
        for candidate in candidates:
            try:
                milliseconds[candidate] = float(triton.testing.do_bench(lambda c=candidate: launch(c)))
            except (triton.OutOfResources, triton.CompilationError, RuntimeError):
                if candidate == candidates[0]:
                    raise  # what the table says has to work
        winner = min(milliseconds, key=milliseconds.__getitem__)
        _found[key] = winner, milliseconds[winner], candidates[0], milliseconds[candidates[0]]
    winner = _found[key][0]
    return winner


def print_table() -> None:
    """What was found, one kind of call a line."""
    for (kernel, case), (winner, best, default, before) in _found.items():
        print(f"{kernel}: {case}: {winner}  # {best:.3f} ms; the table's {default}: {before:.3f} ms")
