"""How a scorer's launch, Triton's or CUDA C++'s, is cut into vocabulary groups and sweeps, of a kernel's tile sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Configuration(NamedTuple):
    rows: int  # BM, tokens of a tile
    classes: int  # BN
    width: int  # BK, of D at a time
    warps: int
    stages: int  # of the pipeline that loads tiles
    resident: int  # programs that a multiprocessor holds at a time
    flatten: bool  # load the next vocabulary tile's first operands while this one's logits are summed up
    columns: int = 32  # of logits summed up at a time; with more, registers spill
    registers: int | None = None  # a thread, at most; None: as the compiler likes


class Cut(NamedTuple):
    groups: int
    group_tiles: int  # vocabulary tiles of a group
    sweep: int  # row tiles that go through the vocabulary together


#: Of L2 (50 MB on H100 and H200, in two halves that may hold the same line twice), for the hidden states of a sweep:
#: the rest holds the vocabulary tiles that its programs share.
SWEEP_BYTES = 16 << 20
#: What a launch's slots may take.
SLOT_BYTES = 32 << 20
#: What starting and ending a program costs beside its products, in seconds (estimate: launch, labels, first loads not
#: overlapped, slots, ticket), and the products' rate of one multiprocessor in FLOP/s (718 TFLOP/s over 132).
_PROGRAM_SECONDS, _RATE = 5e-6, 5.4e12


@lru_cache(maxsize=256)
def cut(
    row_tiles: int, classes: int, width: int, itemsize: int, kept: int, processors: int, chosen: Configuration
) -> Cut:
    """Groups that leave the fewest idle: of all group sizes the one whose waves of programs take the least time."""
    tiles = -(-classes // chosen.classes)
    tile_flops = 2 * chosen.rows * chosen.classes * width
    start = _PROGRAM_SECONDS * _RATE / tile_flops  # in tiles

    def cost(size: int) -> float:
        groups = -(-tiles // size)
        waves = -(-row_tiles * groups // (processors * chosen.resident))
        return waves * (size + start)

    most = max(1, SLOT_BYTES // (4 * kept * row_tiles * chosen.rows))
    sizes = [size for size in range(1, tiles + 1) if -(-tiles // size) <= most]
    best = min(sizes, key=lambda size: (cost(size), -size))
    sweep = max(1, min(row_tiles, SWEEP_BYTES // (chosen.rows * width * itemsize)))
    return Cut(-(-tiles // best), best, sweep)
