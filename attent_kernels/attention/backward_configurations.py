"""Tiles, warps and stages of attention's backward kernels, per architecture."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """What a configuration is chosen by."""

    dtype: torch.dtype
    width: int  # the larger of the two padded head dims
    few_queries: bool


class Configuration(NamedTuple):
    """How one kernel is cut and compiled."""

    rows: int  # BLOCK_M: queries of a tile
    keys: int  # BLOCK_N: keys of a block
    warps: int
    stages: int


def choose(kernel: str, case: Case) -> Configuration:
    return Configuration(16, 16, 4, 1)


def candidates(kernel: str, case: Case) -> list[Configuration]:
    return [choose(kernel, case)]
