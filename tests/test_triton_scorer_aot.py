"""What the scorer compiles to on GPUs that need not be there, and what a launch of full size would be lent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attent_kernels import runtime
from attent_kernels.linear_cross_entropy import launch_scorer
from attent_kernels.linear_cross_entropy.configurations import CANDIDATES, HALF, cut, kind_of
from attent_kernels.linear_cross_entropy.launch_scorer import score_tokens
from attent_kernels.linear_cross_entropy.scorer_workspace import Choose, ToScore
from benchmarks.ahead_of_time import SHARED_LIMIT, Compiled, compiled_for, unordered_tickets
from benchmarks.resources import COMPILE_SECONDS

TOKENS, CLASSES, WIDTH = 8192, 131072, 4096


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch(dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    """8192 tokens of 16 examples."""
    target = meta(16, TOKENS // 16, dtype=torch.int64)
    how = {name: options.pop(name) for name in ("choose", "tiles", "parts") if name in options}
    what = ToScore(meta(16, TOKENS // 16, WIDTH, dtype=dtype), meta(CLASSES, WIDTH, dtype=dtype), target)
    score_tokens(what._replace(**{"score": ("logit",), **options}), **how)


CHOOSE = Choose(4, 1, 1.0, meta(1, dtype=torch.int64))
#: Beside the options of benchmarks/resource_cases.py: full size, where the loads are looked at.
CASES: list[tuple[int, dict[str, Any]]] = [
    (80, {"choose": CHOOSE, "reduction": None}),
    (90, {"choose": CHOOSE, "reduction": None}),
    (90, {"linear_bias": meta(CLASSES)}),
    (90, {"softcap": 30.0, "label_smoothing": 0.1, "reduction": "none"}),
    (90, {"dtype": torch.float32}),
    (100, {}),
]


@pytest.mark.aot
@pytest.mark.parametrize(("capability", "options"), CASES)
def test_it_fits_its_tiles_run_on_tensor_cores_and_its_tickets_are_ordered(
    capability: int, options: dict[str, Any]
) -> None:
    with compiled_for(capability) as found:
        launch(**options)
    kernel: Compiled = found[0]
    assert len(found) == 1 and kernel.seconds < COMPILE_SECONDS
    assert kernel.stack == 0 and kernel.shared <= SHARED_LIMIT[capability]
    assert kernel.ptx.count("atom.global.gpu.acq_rel") == 3  # a tile's groups, a block's tiles, all blocks
    assert unordered_tickets(kernel.ptx) == []
    if options.get("dtype") == torch.float32:
        assert not kernel.has_mma  # in full precision
        return
    assert kernel.has_mma and kernel.has_wgmma == (capability == 90)
    # Operands are loaded 16 bytes at a time and ahead of their use.
    assert "cp.async.cg.shared.global" in kernel.ptx and "cp.async.ca.shared.global" not in kernel.ptx
    if (
        capability == 90
    ):  # one loop over vocabulary tiles and D: a stage's loads stand in it once, besides the first two
        a_stage = (128 + 256) * 64 * 2 // (16 * 32 * kernel.warps)
        if not options.get("softcap"):
            assert kernel.ptx.count("cp.async.cg") == a_stage


# ------------------------------------------------------------------------------------------------------------ the plan


@contextmanager
def planned() -> Iterator[list[tuple[tuple[int, ...], int, dict[str, Any]]]]:
    """Launches in this context are not compiled; yields their grids, the bytes that each is lent and its constants."""
    found: list[tuple[tuple[int, ...], int, dict[str, Any]]] = []
    lent = [0]
    usual = runtime.workspace

    def workspace(device: torch.device, tickets: int, scratch: Any) -> Any:
        lent[0] = 4 * tickets + sum(length * dtype.itemsize for length, dtype in scratch)
        return usual(device, tickets, scratch)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **constants: found.append((grid, lent[0], constants))

    with (
        mock.patch.object(launch_scorer, "score_kernel", Kernel()),
        mock.patch.object(launch_scorer, "workspace", workspace),
        mock.patch.object(launch_scorer, "configuration", lambda *_, **__: HALF[90]),
    ):
        yield found


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"choose": Choose(4, 0, 0.0, None), "reduction": None}],
    ids=["plain", "smoothed", "choice"],
)
def test_a_launch_of_full_size_is_lent_less_than_64_megabytes(options: dict[str, Any]) -> None:
    with planned() as launches:
        launch(**options)
    assert len(launches) == 1 and launches[0][1] < 64 << 20
    if not options:
        assert launches[0][1] < 6 << 20  # what the launcher's header says


@pytest.mark.parametrize(
    ("tokens", "classes", "width", "idle"),
    [(8192, 131072, 4096, 0.03), (8192, 256000, 2304, 0.03), (4096, 50257, 768, 0.06), (65536, 1000, 768, 0.06)],
)
def test_few_processors_are_idle(tokens: int, classes: int, width: int, idle: float) -> None:
    tiles, processors = HALF[90], 132
    row_tiles, vocabulary_tiles = -(-tokens // tiles.rows), -(-classes // tiles.classes)
    parts = cut(row_tiles, classes, width, 2, 3, processors, tiles)
    assert (parts.groups - 1) * parts.group_tiles < vocabulary_tiles <= parts.groups * parts.group_tiles
    depth = -(-row_tiles * parts.groups // processors) * parts.group_tiles
    assert depth * processors <= (1 + idle) * row_tiles * vocabulary_tiles
    assert parts.sweep * tiles.rows * width * 2 <= 16 << 20


def test_every_candidate_of_the_search_can_be_launched() -> None:
    for tiles in CANDIDATES:
        with planned() as launches:
            launch(tiles=tiles)
        constants = launches[0][2]
        assert [constants[name] for name in ("BM", "BN", "BK", "FLATTEN")] == [*tiles[:3], tiles.flatten]


def test_calls_of_one_kind_are_searched_once() -> None:
    what = ToScore(meta(256, 64), meta(1000, 64), meta(256, dtype=torch.int64))
    kind = kind_of(what, None)
    assert kind_of(what._replace(input=meta(300, 64)), None) == kind  # as many within a factor of 2
    assert kind_of(what, CHOOSE) != kind
    for other in ({"softcap": 3.0}, {"input": meta(600, 64)}, {"linear_bias": meta(1000)}, {"target": meta(256, 1000)}):
        assert kind_of(what._replace(**other), None) != kind


def test_many_tokens_or_classes_keep_slots_small() -> None:
    tiles = HALF[90]
    for tokens, classes in ((1 << 20, 131072), (128, 1 << 20)):
        parts = cut(tokens // tiles.rows, classes, 4096, 2, 7, 132, tiles)
        assert parts.groups == 1 or 4 * 7 * parts.groups * tokens <= 32 << 20
