"""``ATTENT_AUTOTUNE=1``: try a kernel's candidate configurations at first use of a shape class, and print what won.

Off by default: first calls then compile one configuration, the table's. What is printed is to be committed to the
table; nothing is kept beyond the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

from . import triton_target

Configuration = TypeVar("Configuration", bound=tuple[Any, ...])

ENABLED = os.environ.get("ATTENT_AUTOTUNE") == "1"
_best: dict[Hashable, Any] = {}


def pick(
    kernel: str,
    shape_class: Hashable,
    table: Configuration,
    candidates: Callable[[], Iterable[Configuration]],
    launch: Callable[[Configuration], object],
) -> Configuration:
    """The table's configuration; under ATTENT_AUTOTUNE=1 on a GPU, the candidate with which ``launch`` takes least.

    Nothing is measured while a CUDA graph is captured: launches would go into the graph.
    """
    if (
        not ENABLED
        or triton_target.INTERPRETED
        or not torch.cuda.is_available()
        or torch.cuda.is_current_stream_capturing()
    ):
        return table
    key = (kernel, triton_target.compute_capability(), shape_class)
    if key not in _best:
        _best[key] = _search(key, dict.fromkeys((table, *candidates())), launch)
    best: Configuration = _best[key]
    return best


def _search(key: Hashable, candidates: Iterable[Configuration], launch: Callable[[Configuration], object]) -> Any:
    from triton.testing import do_bench

    found = []
    for candidate in candidates:
        try:
            milliseconds = do_bench(lambda candidate=candidate: launch(candidate), return_mode="median")
        except Exception as error:  # one that does not fit the device is not a candidate there
            print(f"attent autotune {key}: {candidate}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        found.append((milliseconds, candidate))
    if not found:
        raise RuntimeError(f"attent autotune {key}: no candidate runs on this device")
    found.sort(key=lambda pair: pair[0])
    for milliseconds, candidate in found:
        print(f"attent autotune {key}: {milliseconds * 1e3:9.1f} us  {candidate}", file=sys.stderr)
    return found[0][1]
