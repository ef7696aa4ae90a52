"""The command line that all kernel benchmarks share: measure workloads, print, save."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attent.bench.command import RIVALS
from attent.bench.contenders import Workload, measure, table
from attent.bench.devices import Device

from .provenance import RESULTS, gpu_provenance

SCALES = ("gpu", "cpu", "tiny")
#: Counted rounds of each contender. A GPU's are cheap beside what warms them up.
ROUNDS = {"gpu": 20, "cpu": 5, "tiny": 2}


def device_for(scale: str) -> Device:
    """The device that a scale is measured on; an error where that is a GPU and there is none."""
    return Device("cuda" if scale == "gpu" else "cpu")


def slug(name: str) -> str:
    """A device's name as a folder's: ``NVIDIA H100 80GB HBM3`` is nvidia-h100-80gb-hbm3."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main(
    program: str,
    summary: str,
    workloads: Callable[[str], list[Workload]],
    arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Parse, measure each workload, print its table as it lands; the result."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=summary)
    parser.add_argument("--scale", choices=SCALES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", metavar="TEXT", help="only workloads whose key holds this text")
    parser.add_argument("--contenders", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 20 on a GPU, 5 on a CPU, 2 if tiny)")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--plot", type=Path, help="draw it there (matplotlib)")
    parser.add_argument("--save", action="store_true", help=f"keep the result under benchmarks/results/{program}/")
    asked = parser.parse_args(arguments)
    if asked.scale == "gpu" and not torch.cuda.is_available():
        parser.error("--scale gpu: there is no CUDA device; takes cpu or tiny here")
    device = device_for(asked.scale)
    result: dict[str, Any] = {"benchmark": program, "provenance": gpu_provenance(RIVALS), "rows": {}}
    ceilings = device.ceilings(tiny=asked.scale == "tiny")
    for workload in workloads(asked.scale):
        if asked.rows and asked.rows not in workload.key:
            continue
        rounds = asked.rounds or ROUNDS[asked.scale]
        warmup = 0 if asked.scale == "tiny" else 2
        row = measure(workload, device, ceilings, rounds, tuple(asked.contenders), warmup)
        result["rows"][workload.key] = row
        print(table(workload.key, row) + "\n", flush=True)
    if asked.save:
        where = slug(torch.cuda.get_device_name()) if device.kind == "cuda" else "cpu"
        asked.json = RESULTS / program / f"{where}-{result['provenance']['date']}.json"
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
        print(asked.json)
    if asked.plot:
        from .plot import draw

        draw(result, asked.plot)
        print(asked.plot)
    return result
