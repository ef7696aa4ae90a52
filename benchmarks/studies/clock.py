"""Seconds of a run: processor time of this process on a CPU, wall clock around a synchronised device on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def now(device: str) -> float:
    """Seconds since some moment."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Counts the seconds of teaching within those of training."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.teaching_seconds = 0.0

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """What is inside chooses, records or draws."""
        began = now(self.device)
        yield
        self.teaching_seconds += now(self.device) - began
