"""Where a result comes from: machine, versions, commit; and the file it is kept in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import attent
from attent.ops.logits_passes import native

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """What a reader needs to judge or repeat a result. No host or user names."""
    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no") != "",
        "attent": attent.__version__,
        "native_module": native.unavailable() or "available",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result under ``benchmarks/results/<name>/<date>.json``; a later run of the day replaces it."""
    path = RESULTS / name / f"{date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
