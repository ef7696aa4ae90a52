"""The compiled module, loaded once: the CPU's passes and, where it was built with nvcc, the kernels of backend "cuda".

Whatever is missing is a reason to tell, never an error on import.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# Before the native module: torch loads its OpenMP runtime for everyone (RTLD_GLOBAL), and the native module's calls
# bind to that one. Two runtimes would mean two thread pools, one spinning while the other works.
import torch

#: What setup.py leaves in the package when the native module could not be built.
_BUILD_FAILURE = Path(__file__).with_name("_native_failure.txt")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("attent_kernels._native"), None
    except ImportError as error:
        reason = f"the native module attent_kernels._native cannot be loaded: {error}"
        if _BUILD_FAILURE.exists():
            reason += f"; its build ended with: {_BUILD_FAILURE.read_text(encoding='utf-8').strip()}"
        return None, reason


#: How the module numbers what csrc/cuda/dtype.h and per_example.h list.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PER_EXAMPLE = {"mean": 0, "sum": 1, "rms": 2}

#: A stress test's switch, as in ``tickets.py``: blocks wait for a time of their own before they take a ticket.
DELAYED = os.environ.get("ATTENT_DELAY_TILES") == "1"

#: A test's and a benchmark's switch, :func:`portable_kernels`: no Hopper kernel runs.
portable_alone = False

#: The module, or None and why.
module, reason = _load()


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run on the current device; None if they can."""
    if module is None:
        return reason
    if module.cuda_absent is not None:
        return f"attent was built without CUDA kernels: {module.cuda_absent}"
    # Before each launch: the long way only until something has been done on a GPU.
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return "no CUDA device"
    return _unfit(torch.cuda.current_device())


@functools.cache
def _unfit(device: int) -> str | None:
    return _outdated_driver(*cuda_versions()) or _unsupported(torch.cuda.get_device_capability(device), cuda_archs())


def cuda_archs() -> tuple[str, ...]:
    """The GPUs that this build has machine code for, such as ("80", "90a"); none without CUDA kernels."""
    return () if module is None else tuple(filter(None, module.cuda_archs.split(";")))


def runs_hopper(device: torch.device) -> bool:
    """Whether Hopper kernels run there, those of sm_90a, where a call suits them."""
    return (
        not portable_alone
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and "90a" in cuda_archs()
    )


@contextmanager
def portable_kernels() -> Iterator[None]:
    """For tests and benchmarks: within this context the portable kernels run on a Hopper GPU, too."""
    global portable_alone
    before, portable_alone = portable_alone, True
    try:
        yield
    finally:
        portable_alone = before


def cuda_versions() -> tuple[int, int]:
    """Of the driver (0: there is none) and of the runtime in the module, as CUDA numbers them: 13000 is 13.0."""
    if module is None or module.cuda_absent is not None:
        return 0, 0
    driver, runtime = module.cuda_versions()
    return driver, runtime


def _outdated_driver(driver: int, runtime: int) -> str | None:
    """Within a major version every driver runs every runtime."""
    if driver // 1000 >= runtime // 1000:
        return None
    has = f"CUDA {_dotted(driver)}" if driver else "no CUDA at all"
    return (
        f"the driver supports {has}, attent was built with {_dotted(runtime)}: update the driver, or build with another"
    )


def _unsupported(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Machine code runs on its major version from its minor on, with a letter on just that one; PTX on all later."""
    major, minor = capability
    newest = 0
    for arch in archs:
        number = int(re.sub(r"\D", "", arch))
        newest = max(newest, number)
        if arch == f"{major}{minor}a" or (arch.isdigit() and number // 10 == major and number % 10 <= minor):
            return None
    if major * 10 + minor >= newest:  # compiled from PTX when it is first used
        return None
    return (
        f"attent was built for sm_{', sm_'.join(archs)}, this device is sm_{major}{minor}: build with ATTENT_CUDA_ARCHS"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
