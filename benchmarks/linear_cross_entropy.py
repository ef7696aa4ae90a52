"""``python -m benchmarks.linear_cross_entropy``: ``attent.bench.linear_cross_entropy`` on the shapes that we report."""

from __future__ import annotations

from typing import Any

import torch

from attent.bench import linear_cross_entropy
from attent.bench.contenders import Workload

from . import command

#: tokens, width, vocabulary, tokens of an example: the shapes of a 7B model's head, Gemma 2 2B's, GPT-2's, a ViT's.
SHAPES = {
    "gpu": [(8192, 4096, 131072, 512), (65536, 768, 1000, 1), (4096, 768, 50257, 512), (8192, 2304, 256000, 512)],
    "cpu": [(1024, 768, 50257, 256), (8192, 768, 1000, 1)],
    "tiny": [(48, 16, 257, 12), (64, 16, 10, 1)],
}


def workloads(scale: str) -> list[Workload]:
    """The most decisive first: the scorer at the large shape, then training at it, then the others."""
    kinds = [(shape, train, "random") for shape in SHAPES[scale] for train in (False, True)]
    if scale == "gpu":
        N, D, V, _ = SHAPES[scale][0]
        kinds.insert(2, ((N, D, V, 2048), False, "random"))  # "head" where examples are long
        kinds.append(((N, D, V, 512), True, "half confident"))
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    names = ("tokens", "width", "vocabulary", "tokens each")
    return [
        linear_cross_entropy.workload(dict(zip(names, shape, strict=True)) | {"targets": targets}, dtype, train)
        for shape, train, targets in kinds
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return command.main(
        "linear_cross_entropy", (linear_cross_entropy.__doc__ or "").split("\n")[0], workloads, arguments
    )


if __name__ == "__main__":
    main()
