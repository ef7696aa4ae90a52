"""Tile sizes of the forward kernel: a table for each architecture, from a model of its resources.

None of these has been timed: they are not yet run on a GPU. ``ATTENT_AUTOTUNE=1`` measures the candidates for each
shape class it meets and prints the lines to put here. What the table has to satisfy is compiled ahead of time and
tested: no spills, shared memory within the architecture's limit.

The model, for a tile of M rows, N keys, widths D and DV, element size e, S stages and 32 W threads:

* shared memory: M D e for the query + S N (D + DV) e for keys and values in flight;
* registers a thread: (M DV + M N) / (32 W) accumulators in float32 + M N / (64 W) for the probabilities in half
  precision + 40 or so for the rest, of 255 at most;
* arithmetic intensity: every K and V tile read from the L2 cache serves M rows: M = 128 makes that 128 FLOPs a byte
  in bf16, enough to stay below L2's rate (some 5.5 TB/s on an H100) at 600 TFLOP/s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import triton_target

#: Up to so many queries an example, a tile of 16 rows is used and keys are split across programs.
FEW_QUERIES = 16


class Configuration(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None  # a thread, at most; None: as the compiler likes


# By widest of D and DV, rounded up to a power of two; half precision. sm_80: 164 KB of shared memory an SM of which two
# blocks want a share at D <= 64; mma.sync. sm_90 and sm_100: 228 KB; a warpgroup's product takes 64 rows, so 8 warps
# take 128.
_HALF = {
    80: {
        16: Configuration(128, 64, 4, 3, 255),
        32: Configuration(128, 64, 4, 3, 255),
        64: Configuration(128, 64, 8, 3, 168),
        128: Configuration(64, 64, 8, 2),
        256: Configuration(64, 32, 8, 2),
    },
    90: {
        16: Configuration(128, 128, 8, 3),
        32: Configuration(128, 128, 8, 3),
        64: Configuration(128, 128, 8, 3),
        128: Configuration(128, 128, 8, 2),
        256: Configuration(64, 64, 8, 2),  # 128 rows spill on sm_100
    },
}
# float32 products are IEEE: fused multiply-adds, whose operands and results are all in registers.
_FLOAT32 = {
    16: Configuration(64, 32, 8, 2, 255),
    32: Configuration(64, 32, 8, 2, 255),
    64: Configuration(64, 32, 8, 2, 255),
    128: Configuration(32, 16, 8, 1),
    256: Configuration(16, 32, 8, 1),
}
# Few queries: keys and values are read once, at the rate of memory. What counts is bytes in flight: many small blocks.
# Left alone, the compiler would rather spill a few registers than have one block less on a processor.
_FEW = {
    16: Configuration(16, 128, 8, 3, 168),
    32: Configuration(16, 128, 8, 3, 168),
    64: Configuration(16, 64, 8, 3, 168),
    128: Configuration(16, 64, 8, 3, 168),
    256: Configuration(16, 32, 8, 2, 255),
}
# Packed examples: which one a tile is of, and where that one starts, is searched for, and what is found stays in
# registers of each thread. Where the table's line then spills with any option: fewer keys a tile, and a limit where the
# compiler would rather spill than have one block less on a processor.
_PACKED_HALF = {
    (80, 64): Configuration(128, 32, 8, 3, 255),
    (90, 128): Configuration(128, 64, 8, 3),
}
_PACKED_FLOAT32 = {
    32: Configuration(64, 16, 8, 2, 255),
    64: Configuration(64, 16, 8, 1, 255),
    128: Configuration(32, 16, 8, 1, 255),
    256: Configuration(16, 16, 8, 1, 255),
}
#: In the interpreter: small, so that small tests have several tiles.
_INTERPRETED = Configuration(16, 16, 4, 1)


def padded(width: int) -> int:
    """The width of a tile that holds so many columns: a power of two, 16 at least, as products take them."""
    return max(16, 1 << (width - 1).bit_length())


def choose(width: int, dtype: torch.dtype, few_queries: bool, packed: bool) -> Configuration:
    """The table's line for the wider of D and DV."""
    capability, column = triton_target.compute_capability(), padded(width)
    if capability == 0:
        return _INTERPRETED
    if few_queries:
        found = _FEW[column]
        if dtype == torch.float32:
            keys = 16 if packed and column == 256 else 32
            return found._replace(block_n=min(found.block_n, keys), stages=2, registers=255)
        return found._replace(registers=255) if packed else found  # one block a processor either way
    if dtype == torch.float32:
        found = _FLOAT32[column]
        return _PACKED_FLOAT32.get(column, found) if packed else found
    generation = 90 if capability >= 90 else 80
    found = _HALF[generation][column]
    return _PACKED_HALF.get((generation, column), found) if packed else found


def candidates(width: int, dtype: torch.dtype, few_queries: bool, packed: bool) -> list[Configuration]:
    """What ``ATTENT_AUTOTUNE=1`` tries: the table's line and its neighbours."""
    here = choose(width, dtype, few_queries, packed)
    rows = (16,) if few_queries else (64, 128)
    if dtype == torch.float32:
        return [here]
    return [
        here,
        *(
            Configuration(m, n, w, s)
            for m in rows
            for n in (32, 64, 128)
            for w in (4, 8)
            for s in (1, 2, 3)
            if (m, n, w, s) != here[:4] and n * padded(width) <= 128 * 128 and m * padded(width) <= 128 * 32 * w
        ),
    ]


def splits(programs: int, keys: int, block_n: int, processors: int) -> int:
    """Into how many parts the keys of a few queries are cut: until there are two programs for each processor.

    Each part has four tiles of keys at least: below that its fixed costs (a query's load, a slot's store, a ticket)
    are as large as its work.
    """
    wanted = -(-2 * processors // max(programs, 1))
    return max(1, min(wanted, keys // (4 * block_n)))
