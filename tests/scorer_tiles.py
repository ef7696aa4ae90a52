"""The scorer in tiles so small that a few tokens and classes take several, and its products counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.runtime.interpreter import InterpreterBuilder

from attent_kernels.linear_cross_entropy import launch_scorer
from attent_kernels.linear_cross_entropy.configurations import Configuration, Cut


@contextmanager
def small_tiles(
    rows: int = 4, classes: int = 4, width: int = 4, group_tiles: int = 1, sweep: int = 2
) -> Iterator[None]:
    """Tiles of ``rows`` tokens and ``classes`` classes, groups of ``group_tiles`` vocabulary tiles."""

    def tiles(*_: Any, **__: Any) -> Configuration:
        return Configuration(rows, classes, width, 4, 1, 1, False, max(1, classes // 2))

    def parts(row_tiles: int, vocabulary: int, *_: Any) -> Cut:
        return Cut(triton.cdiv(triton.cdiv(vocabulary, classes), group_tiles), group_tiles, sweep)

    with (
        mock.patch.object(launch_scorer, "configuration", tiles),
        mock.patch.object(launch_scorer, "cut", parts),
    ):
        yield


@contextmanager
def products() -> Iterator[list[int]]:
    """How many products of tiles are computed in this context: the one number in the list."""
    usual, calls = InterpreterBuilder.create_dot, [0]

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return usual(self, *arguments, **keywords)

    with mock.patch.object(InterpreterBuilder, "create_dot", call):
        yield calls
