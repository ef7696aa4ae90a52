"""Where a result comes from: machine, versions, and the commit where attent runs from a checkout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import attent
from attent_kernels import row_statistics

#: The checkout, if this is one: the folder that python/attent/bench lies in.
CHECKOUT = Path(__file__).resolve().parents[3]


def provenance() -> dict[str, Any]:
    """What a reader needs to judge or repeat a result. No host or user names."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "uncommitted_changes": {"": False, "unknown": "unknown"}.get(status, True),
        "attent": attent.__version__,
        "native_module": row_statistics.unavailable() or "available",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }


def gpu_provenance(rivals: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same with what a result on a GPU depends on, and the versions of ``rivals`` that are installed."""
    interpreted = " (in its interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    found = {
        "triton": _version("triton") + interpreted,
        "CUDA": torch.version.cuda or "none: torch is built without it",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown",
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return provenance() | found | {name: _version(name) for name in rivals}


def commit() -> str:
    """Of the checkout; in a copy without its history, what ``ATTENT_COMMIT`` says."""
    found = _git("rev-parse", "HEAD")
    return os.environ.get("ATTENT_COMMIT", found) if found == "unknown" else found


def _git(*arguments: str) -> str:
    """What git says of the checkout; "unknown" of an installation, whose folder may lie in another project's."""
    if _run("git", "rev-parse", "--show-toplevel") != str(CHECKOUT):
        return "unknown"
    said = _run("git", *arguments)
    return "unknown" if said is None else said


def _run(*command: str) -> str | None:
    """What a program says; None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
