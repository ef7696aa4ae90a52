"""Sorting int64 keys within one program: a bitonic network whose loops run at run time, so any length compiles fast.

``tl.sort`` unrolls its 55 steps for 1,024 keys; here one step is compiled, its partner a ``tl.gather`` through shared
memory. n keys, padded to a power of two P, take log2(P) (log2(P) + 1) / 2 steps. A step moves 16 bytes a key through
shared memory, at 128 bytes a cycle, plus about as many instructions: some 225 cycles for 1,024 keys on 4 warps. Longer
lists are sorted by chunks, then merged: steps from chunk to chunk go through global memory, the others as before. So
1,024 keys take 12,000 cycles, 8,192 take 8 (55 + 3 · 10) 225 = 153,000.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranks import LAST_RANK


@triton.jit
def sort_in_registers(key, position, first, last):
    """The stages ``first``, 2 ``first``, …, ``last`` of a bitonic network over ``key``, int64 [a power of two].

    Stage s sorts runs of s keys, upwards where the bit s of ``position`` is 0. In a stage wider than the tensor the
    steps across tensors have been done. ``first = 2`` and ``last`` = the length, from position 0, sorts.
    """
    lane = tl.arange(0, key.shape[0])
    size = first
    while size <= last:
        distance = tl.minimum(size, key.shape[0]) >> 1
        while distance > 0:
            partner = tl.gather(key, lane ^ distance, 0)
            takes_smaller = ((position & size) == 0) == ((lane & distance) == 0)
            key = tl.where(takes_smaller, tl.minimum(key, partner), tl.maximum(key, partner))
            distance = distance >> 1
        size = size * 2
    return key


@triton.jit
def sort_in_memory(key_ptr, count, WIDTH: tl.constexpr):
    """Sort int64 ``[count]`` in place, a power of two of memory at ``key_ptr``: to the one at or above ``count``."""
    lane = tl.arange(0, WIDTH)
    padded = power_of_two(count)
    first = 2
    size = tl.minimum(padded, WIDTH)
    while size <= padded:
        distance = size >> 1
        while distance >= WIDTH:
            for pair in range(0, padded >> 1, WIDTH):
                start = pair + (pair & -distance)  # those whose bit `distance` is 0
                low_ptrs = key_ptr + start + lane
                low = tl.load(low_ptrs, cache_modifier=".cg")
                high = tl.load(low_ptrs + distance, cache_modifier=".cg")
                upwards = (start & size) == 0
                smaller, larger = tl.minimum(low, high), tl.maximum(low, high)
                tl.store(low_ptrs, tl.where(upwards, smaller, larger))
                tl.store(low_ptrs + distance, tl.where(upwards, larger, smaller))
            tl.debug_barrier()
            distance = distance >> 1
        stored = tl.where(first == 2, count, padded)
        for start in range(0, padded, WIDTH):
            position = start + lane
            key = tl.load(key_ptr + position, mask=position < stored, other=LAST_RANK, cache_modifier=".cg")
            key = sort_in_registers(key, position, first, size)
            tl.store(key_ptr + position, key, mask=position < padded)
        tl.debug_barrier()
        size = size * 2
        first = size


@triton.jit
def power_of_two(count):
    """The smallest that is ``count`` or more; count at least 1."""
    power = 1
    while power < count:
        power = power * 2
    return power
