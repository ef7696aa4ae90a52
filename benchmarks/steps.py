"""``python -m benchmarks.steps``: ``attent.bench.steps`` with the learners that we report."""

from __future__ import annotations

from typing import Any

import torch

from attent.bench import steps
from attent.bench.contenders import Workload

from . import command

#: B, T, D, heads, depth; V or classes
SHAPES = {
    "gpu": ((16, 512, 1024, 16, 8, 50257), (256, 197, 768, 12, 6, 1000)),
    "cpu": ((4, 128, 128, 4, 2, 8192), (32, 65, 192, 3, 4, 10)),
    "tiny": ((2, 8, 16, 2, 1, 50), (4, 5, 16, 2, 1, 3)),
}


def workloads(scale: str) -> list[Workload]:
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    gpt, vit = SHAPES[scale]
    names = ("B", "T", "D", "heads", "depth")
    return [
        steps.harvest(dict(zip((*names, "V"), gpt, strict=True)), dtype),
        steps.one_pass(dict(zip((*names, "classes"), vit, strict=True)), dtype),
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return command.main("steps", (steps.__doc__ or "").split("\n")[0], workloads, arguments)


if __name__ == "__main__":
    main()
