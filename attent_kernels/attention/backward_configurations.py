"""Tiles, warps and stages of attention's backward kernels: a table for each architecture, from a model of resources.

None of these has been timed: they are not yet run on a GPU. ``ATTENT_AUTOTUNE=1`` measures the candidates of each case
that it meets and prints the lines to put here. What the table has to satisfy is compiled ahead of time and tested:
shared memory within the architecture's limit, no spills with any option at head dims that are multiples of 16 (others
are loaded by parts of a row, whose addresses can spill), wgmma on sm_90 at D = 64 and 128.

The model, for M queries, N keys, the wider W of D and DV, element size e, S stages and T threads:

* keys' and values' kernel: registers a thread (2 N W + 2 M N) / T for the gradients, scores and their gradients in
  float32, M N / T more for p and ds in half precision, M / 2 for each query's logsumexp and delta, some 50 for
  addresses; shared memory 2 N W e for the key block, S 2 M W e for queries in flight. At W = 128 two gradients of
  128 rows take 128 of the 255 registers of 256 threads, which leaves M = 32: M = 64 spills when compiled.
* queries' kernel: registers (M W + 2 M N) / T, M N / T more; shared memory 2 M W e + S 2 N W e.
* a warpgroup's product, wgmma on sm_90, takes 64 rows of its left operand: N of the first kernel, M of the second are
  multiples of 64 there, of 64 for each 4 warps where registers allow, so that p need not move between warps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import triton_target


class Case(NamedTuple):
    """What a configuration is chosen by."""

    dtype: torch.dtype
    width: int  # of a tile that holds the wider of D and DV
    few_queries: bool  # no more than one tile of 16 rows an example
    is_plain: bool  # no softcap, and D and DV fill their tiles: else slopes and masks take some more registers


class Configuration(NamedTuple):
    """How one kernel is cut and compiled."""

    rows: int  # M
    keys: int  # N
    warps: int
    stages: int


KERNELS = ("key_value", "query")

# By kernel and width; half precision.
_HALF: dict[int, dict[str, dict[int, Configuration]]] = {
    80: {  # mma.sync keeps its operands in registers too, so tiles are smaller than registers of results allow
        "key_value": {
            64: Configuration(32, 64, 4, 2),
            128: Configuration(32, 64, 8, 2),
            256: Configuration(16, 32, 8, 2),
        },
        "query": {
            64: Configuration(128, 64, 8, 2),
            128: Configuration(128, 32, 8, 2),
            256: Configuration(64, 32, 8, 2),
        },
    },
    90: {
        "key_value": {
            64: Configuration(64, 128, 8, 2),
            128: Configuration(32, 128, 8, 2),
            256: Configuration(16, 32, 8, 2),  # mma.sync: 64 keys spill
        },
        "query": {
            64: Configuration(128, 64, 8, 3),
            128: Configuration(128, 64, 8, 2),
            256: Configuration(64, 32, 8, 2),
        },
    },
    100: {  # results are in tensor memory, but come to registers for every elementwise step
        "key_value": {
            64: Configuration(64, 64, 8, 2),
            128: Configuration(32, 64, 8, 2),
            256: Configuration(16, 32, 8, 2),
        },
        "query": {
            64: Configuration(128, 64, 8, 2),
            128: Configuration(128, 64, 8, 2),
            256: Configuration(64, 32, 8, 2),
        },
    },
}
# Where what is not plain does not fit into the table's.
_NOT_PLAIN = {
    (80, "key_value", 64): Configuration(16, 64, 4, 2),
    (80, "query", 128): Configuration(64, 32, 8, 2),
    (90, "key_value", 64): Configuration(32, 64, 4, 2),
    (90, "key_value", 128): Configuration(32, 64, 8, 2),
}
# float32 products are IEEE: fused multiply-adds, whose operands and results are all in registers.
_FLOAT32: dict[str, dict[int, Configuration]] = {
    "key_value": {
        64: Configuration(16, 32, 4, 1),
        128: Configuration(16, 16, 8, 1),
        256: Configuration(16, 16, 8, 1),
    },
    "query": {
        64: Configuration(32, 32, 4, 1),
        128: Configuration(16, 32, 4, 1),
        256: Configuration(16, 16, 8, 1),
    },
}
# One tile of queries for each block of keys: what counts is how fast keys and values are read.
_FEW: dict[str, dict[int, Configuration]] = {
    "key_value": {
        64: Configuration(16, 64, 4, 1),
        128: Configuration(16, 64, 8, 1),
        256: Configuration(16, 32, 8, 1),
    },
    "query": {
        64: Configuration(16, 64, 4, 2),
        128: Configuration(16, 64, 4, 2),
        256: Configuration(16, 32, 4, 2),
    },
}
#: In the interpreter: small, so that small tests have several tiles.
_INTERPRETED = Configuration(16, 16, 4, 1)


def choose(kernel: str, case: Case) -> Configuration:
    """The table's line for one of KERNELS."""
    capability = triton_target.compute_capability()
    if capability == 0:
        return _INTERPRETED
    column = max(64, case.width)
    if case.dtype == torch.float32:
        return _FLOAT32[kernel][column]
    if case.few_queries:
        return _FEW[kernel][column]
    generation = 100 if capability >= 100 else 90 if capability >= 90 else 80
    found = _HALF[generation][kernel][column]
    return found if case.is_plain else _NOT_PLAIN.get((generation, kernel, column), found)


def candidates(kernel: str, case: Case) -> list[Configuration]:
    """What ``ATTENT_AUTOTUNE=1`` tries: the table's line and others around it. Some spill, which the clock shows."""
    here = choose(kernel, case)
    rows = (16,) if case.few_queries else (16, 32, 64) if kernel == "key_value" else (64, 128)
    most = 128 * 128 if case.dtype != torch.float32 else 64 * 64  # of a tile's entries
    others = [
        Configuration(m, n, w, s)
        for m in rows
        for n in (16, 32, 64, 128)
        for w in (4, 8)
        for s in (1, 2, 3)
        if max(m, n) * case.width <= most and (m, n, w, s) != here
    ]
    return [here, *others]
