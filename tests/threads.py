"""The same work in many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_threads_agree(work: Callable[[], Sequence[Tensor]], times: int = 1) -> None:
    """``work`` gives in each of 8 threads, ``times`` over, what it gives alone; none hangs for a minute."""
    expected, right = work(), []

    def compare() -> None:
        for _ in range(times):
            right.append(all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True)))

    threads = [threading.Thread(target=compare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert right == [True] * (8 * times)  # a thread that raised has given less
