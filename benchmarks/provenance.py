"""Where a result comes from, as ``attent.bench`` says it, and the file it is kept in."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from attent.bench.provenance import commit, gpu_provenance, provenance

__all__ = ["RESULTS", "commit", "gpu_provenance", "provenance", "save"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result under ``benchmarks/results/<name>/<date>.json``; a later run of the day replaces it."""
    path = RESULTS / name / f"{date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
