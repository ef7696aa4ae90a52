"""Every mask of scored attention is one interval of keys per query row: causal, window, lengths and packing alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyRanges(NamedTuple):
    """Row t may look at keys ``first <= j < last``; a row with ``last <= first`` has no key.

    Both are int64 ``[B, T]``; a size of 1 stands for all examples or all rows.
    """

    first: Tensor
    last: Tensor

    def part(self, examples: slice, rows: slice) -> KeyRanges:
        """The ranges of some examples and some rows."""
        examples = examples if self.first.shape[0] > 1 else slice(None)
        rows = rows if self.first.shape[1] > 1 else slice(None)
        return KeyRanges(self.first[examples, rows], self.last[examples, rows])

    def has_key(self) -> Tensor:
        """Which rows have a key at all: bool ``[B, T]``."""
        return self.last > self.first

    def span(self, keys: int) -> tuple[int, int, bool]:
        """Start and end of the keys that any row looks at, and whether all look at all of them. Reads the device."""
        first_low, first_high = torch.aminmax(self.first)
        last_low, last_high = torch.aminmax(self.last)
        start, stop = max(int(first_low), 0), min(int(last_high), keys)
        return start, stop, int(first_high) <= start and int(last_low) >= stop

    def mask(self, start: int, stop: int) -> Tensor:
        """True where a row may look at a key from ``start`` to ``stop``: bool ``[B, 1, T, stop - start]``."""
        key = torch.arange(start, stop, device=self.first.device)
        mask = (key >= self.first[..., None]) & (key < self.last[..., None])
        return mask[:, None]


def key_ranges(
    row: Tensor,
    queries: Tensor | int,
    keys: Tensor | int,
    *,
    is_causal: bool,
    window_left: int,
    window_right: int,
    first_key: Tensor | int = 0,
) -> KeyRanges:
    """The keys of query ``row`` ``[B, T]`` of an example with this many queries and keys, counted from ``first_key``.

    The last query stands beside the last key: row t is at position ``t + keys - queries`` (FlashAttention's rule).
    """
    position = row + (keys - queries)
    end = torch.as_tensor(keys, device=row.device).expand_as(position)
    if is_causal or window_right == 0:
        end = torch.minimum(end, position + 1)
    elif window_right > 0:
        end = torch.minimum(end, position + (window_right + 1))
    start = torch.zeros_like(position) if window_left < 0 else (position - window_left).clamp(min=0)
    end = torch.where((row >= 0) & (row < queries), end, start)
    return KeyRanges(start + first_key, end + first_key)
