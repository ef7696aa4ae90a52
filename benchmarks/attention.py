"""``python -m benchmarks.attention``: the contenders of ``attent.bench.attention`` on the shapes that we report."""

from __future__ import annotations

from typing import Any

import torch

from attent.bench import attention
from attent.bench.contenders import Workload

from . import command

#: name: B, H, Tq, Tk, D, causal, classes (0: "residual" against a target)
SHAPES = {
    "gpu": {
        "causal, T 4096": (4, 16, 4096, 4096, 128, True, 0),
        "ViT, readout": (256, 12, 197, 197, 64, False, 1000),
        "causal, T 16384": (1, 16, 16384, 16384, 128, True, 0),
        "attention pool, Tq 1": (256, 12, 1, 1024, 64, False, 1000),
        "full, T 4096, D 64": (4, 16, 4096, 4096, 64, False, 0),
    },
    "cpu": {
        "causal, T 1024": (4, 8, 1024, 1024, 64, True, 0),
        "ViT, readout": (16, 12, 197, 197, 64, False, 1000),
        "attention pool, Tq 1": (64, 12, 1, 1024, 64, False, 1000),
    },
    "tiny": {
        "causal, T 20": (2, 2, 20, 20, 16, True, 0),
        "readout": (3, 2, 9, 9, 16, False, 5),
        "attention pool, Tq 1": (4, 2, 1, 17, 16, False, 5),
    },
}


def workloads(scale: str) -> list[Workload]:
    dtype, device = (torch.bfloat16, "cuda") if scale == "gpu" else (torch.float32, "cpu")
    names = ("B", "H", "Tq", "Tk", "D", "causal", "classes")
    shapes = {name: dict(zip(names, shape, strict=True)) for name, shape in SHAPES[scale].items()}
    return [attention.workload(name, shape | {"KV": shape["H"]}, dtype, device) for name, shape in shapes.items()]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return command.main("attention", (attention.__doc__ or "").split("\n")[0], workloads, arguments)


if __name__ == "__main__":
    main()
