"""The device that is measured on: its clock, its cold cache, its memory, and the two ceilings of every kernel on it.

On a GPU each run starts cold: a buffer of twice the L2 cache is written before it. The clock is a pair of CUDA events,
and the host gets a head start (the GPU first spins), so that what is timed is the GPU's work and not how fast Python
enqueues it; that is kind to contenders of many small kernels. On a CPU nothing is flushed, since the matrices exceed
the caches at the shapes that are reported, and the clocks are the wall's and the process's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import timing

#: What the GPU spins before each timed call: some 2 ms at its 1 to 2 GHz, more than Python needs to enqueue the call.
HEAD_START_CYCLES = 3_000_000


class DeviceLost(Exception):
    """After an illegal access every later call of the process fails."""


class Device:
    """Where tensors live and how a call on them is timed."""

    def __init__(self, kind: str) -> None:
        if kind == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self.kind = kind
        self.torch = torch.device(kind)
        if kind == "cuda":
            self._flushed = torch.empty(
                2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=kind
            )

    @property
    def policy(self) -> str:
        """How times are taken, for the result file."""
        if self.kind == "cuda":
            return (
                f"CUDA events, host ahead by {HEAD_START_CYCLES} cycles; L2 flushed before each run by writing"
                f" {self._flushed.numel() >> 20} MiB"
            )
        return "wall clock; caches left as they are"

    def timed(self, call: Callable[[], object]) -> tuple[float, float]:
        """(device, processor) seconds of a call; on a CPU (wall, processor)."""
        if self.kind == "cpu":
            return timing.on_host(call)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        cpu = time.process_time()
        start.record()
        call()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end) / 1e3, cpu

    def peak_extra_mib(self, call: Callable[[], object]) -> float | None:
        """MiB that a call allocates at its peak, attent's workspaces included; None on a CPU (see memory.py)."""
        if self.kind == "cpu":
            return None
        _release_workspaces()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def must_be_well(self) -> None:
        """Raise :class:`DeviceLost` if nothing can run in this process any more."""
        if self.kind == "cpu":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").item()
        except RuntimeError as error:
            raise DeviceLost(str(error).split("\n")[0]) from error

    def ceilings(self, tiny: bool = False, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Measured here and now: bytes a second of a large copy, FLOPs a second of a large matrix product.

        ``dtype``: of the product; None: the usual one of the device. ``tiny``: of small ones, to see that all runs.
        """
        if tiny:
            length, size, usual, rounds = 1 << 18, 128, torch.float32, 1
        elif self.kind == "cuda":
            length, size, usual, rounds = 1 << 28, 8192, torch.bfloat16, 10
        else:
            length, size, usual, rounds = 1 << 24, 1024, torch.float32, 3
        dtype = dtype or usual
        source = torch.empty(length, dtype=torch.float32, device=self.torch).zero_()
        target = torch.empty_like(source)
        a = torch.randn(size, size, device=self.torch).to(dtype)
        product = torch.empty_like(a)
        calls: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.mm(a, a, out=product),
        }
        seconds = {name: min(of.wall) for name, of in timing.interleave(calls, rounds, 2, self.timed).items()}
        return {
            "copy, bytes a second": 2 * source.nbytes / seconds["copy"],
            "matrix product, FLOPs a second": 2 * size**3 / seconds["product"],
            "measured by": f"best of {rounds}: copying {source.nbytes >> 20} MiB; {size}³ in {str(dtype)[6:]}",
        }


def _release_workspaces() -> None:
    """Let attent's cached workspaces go, so that the next call allocates them where that is counted."""
    from attent_kernels import runtime

    runtime._workspaces.clear()
