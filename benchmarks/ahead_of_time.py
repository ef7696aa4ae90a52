"""Compile Triton kernels as a launch on a GPU would, without a GPU: for its architecture, with its specialisation.

Within :func:`compiled_for` launchers are called as usual, with tensors on the meta device: what they launch is compiled
and noted, and nothing runs. So what is looked at is what is launched, configuration table included.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

#: Shared memory that a block may have on each architecture, in bytes (CUDA C++ Programming Guide, table of technical
#: specifications per compute capability: 163, 227 and 227 KB).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CAPABILITIES = tuple(SHARED_LIMIT)


class Compiled(NamedTuple):
    """One kernel as launched once."""

    kernel: str
    capability: int
    warps: int
    stages: int
    ptx: str
    registers: int  # a thread
    stack: int  # bytes a thread: spills and arrays indexed at run time
    shared: int  # bytes a block, static and dynamic
    seconds: float = 0.0  # of processor time that compiling took; next to none from Triton's cache

    @property
    def has_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    @property
    def has_mma(self) -> bool:
        return self.has_wgmma or "mma.sync" in self.ptx or "tcgen05.mma" in self.ptx


class _NoDevice:
    """Triton's view of a GPU that is not there: enough of one to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by it

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Compiled]]:
    """Launches in this context compile for ``capability`` instead of running; yields the list that they end up in."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are Python functions then, and nothing is compiled")
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = _processor_seconds()
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        seconds = _processor_seconds() - before
        found.append(_look_at(compiled, capability)._replace(seconds=seconds))
        return compiled

    # Not by driver.set_active, whose undoing looks for a real device.
    no_device = mock.patch.object(driver, "_active", _NoDevice(capability))
    with no_device, mock.patch.object(JITFunction, "run", compile_only):
        yield found


def _processor_seconds() -> float:
    """Of this process and of those it has waited for: ptxas is one."""
    return sum(os.times()[:4])


def _look_at(compiled: Any, capability: int) -> Compiled:
    metadata = compiled.metadata
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        metadata.name,
        capability,
        metadata.num_warps,
        metadata.num_stages,
        compiled.asm["ptx"],
        usage["REG"],
        max(usage["STACK"], usage["LOCAL"]),
        max(metadata.shared, usage["SHARED"]),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What ``cuobjdump``, which Triton brings along, says: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, check=True, text=True)
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said.stdout)}


def unordered_tickets(ptx: str) -> list[str]:
    """Atomics that take a ticket with no block barrier since the last store to global memory before them.

    ``ptx`` is read in the order of its text, as the compiler laid out its blocks: a store in a loop above counts.
    """
    wrong, stored = [], False
    for line in ptx.splitlines():
        if re.search(r"\bst\.global", line):
            stored = True
        elif re.search(r"\bbar(rier)?\.(cta\.)?sync", line):
            stored = False
        elif re.search(r"\batom\.", line) and stored:
            wrong.append(line.strip())
    return wrong
