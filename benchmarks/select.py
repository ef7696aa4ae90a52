"""``python -m benchmarks.select``: the contenders of ``attent.bench.select`` on the sizes that we report."""

from __future__ import annotations

from typing import Any

from attent.bench import select
from attent.bench.contenders import Workload

from . import command

#: n, k, draws, ties
SHAPES = {
    "gpu": [
        (1_000_000, 1024, False, False),
        (1_000_000, 500_000, False, False),
        (1_000_000, 500_000, True, False),
        (1_000_000, 500_000, False, True),
        (16_384, 8_192, False, False),
        (256, 128, True, False),
        (100_000_000, 50_000_000, False, False),
    ],
    "cpu": [(1_000_000, 1024, False, False), (1_000_000, 500_000, False, False), (1_000_000, 500_000, True, False)],
    "tiny": [(300, 40, False, False), (300, 150, False, True), (300, 150, True, False)],
}


def workloads(scale: str) -> list[Workload]:
    return [select.workload(*shape) for shape in SHAPES[scale]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return command.main("select", (select.__doc__ or "").split("\n")[0], workloads, arguments)


if __name__ == "__main__":
    main()
