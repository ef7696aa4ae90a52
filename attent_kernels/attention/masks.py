"""Which keys a query looks at: those of a range that moves on with the query.

Query t of an example with R queries and K keys stands at position ``t + K - R``: the last query beside the last key.
It looks at keys ``position - left … position + right``, cut to the keys there are; causal attention is right = 0. A
side without a limit is None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Window(NamedTuple):
    """Keys before and behind a query's own position; None: no limit."""

    left: Any
    right: Any


def window_of(is_causal: bool, left: int, right: int) -> Window:
    """From a call's options, where -1 is no limit."""
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    return Window(None if left < 0 else left, None if right < 0 else right)


@triton.jit
def keys_of(row, rows, keys, window):
    """First key that query ``row`` looks at, and one past the last; both rise with the row. Empty: the second is not
    above the first."""
    position = row + keys - rows
    first = row * 0
    last = row * 0 + keys
    if window.left is not None:
        first = tl.maximum(position - window.left, 0)
    if window.right is not None:
        last = tl.minimum(position + window.right + 1, keys)
    return first, last


@triton.jit
def queries_of(key, rows, keys, window):
    """First query that looks at ``key``, and one past the last; both rise with the key."""
    position = key + rows - keys
    first = key * 0
    last = key * 0 + rows
    if window.right is not None:
        first = tl.maximum(position - window.right, 0)
    if window.left is not None:
        last = tl.minimum(position + window.left + 1, rows)
    return first, last
