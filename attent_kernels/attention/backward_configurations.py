"""Tiles, warps and stages of attention's backward kernels, per architecture."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """What a configuration is chosen by."""

    capability: int  # 80, 90, 100; 0 in the interpreter
    itemsize: int  # bytes of an entry of query, key and value
    width: int  # the larger of the two padded head dims
    few_queries: bool  # 16 at most


class Configuration(NamedTuple):
    """How one kernel is cut and compiled."""

    rows: int  # BLOCK_M: queries of a tile
    keys: int  # BLOCK_N: keys of a block
    warps: int
    stages: int


CANDIDATES = {"key_value": [], "query": []}


def configuration(kernel: str, case: Case) -> Configuration:
    return Configuration(16, 16, 4, 2)
