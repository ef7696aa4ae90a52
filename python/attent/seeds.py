"""Private randomness: one seed per use, mixed from the teacher's seed, so that no global generator is read or moved."""

from __future__ import annotations

from enum import IntEnum

_LOW_64_BITS = 0xFFFFFFFFFFFFFFFF
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd: SplitMix64's step


class Use(IntEnum):
    """What a seed is for; two uses never share noise."""

    DRAW_SEEN = 1
    DRAW_UNSEEN = 2
    SHUFFLE = 3
    CHOOSE = 4
    PACK = 5


def mix_seed(seed: int, use: Use, *path: int) -> int:
    """An int in [0, 2^63) that depends on every bit of ``seed``, ``use`` and each number of ``path``, in their order.

    SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), once per number:
    neighbouring seeds, epochs and ranks give unrelated values, where a plain sum of them would repeat (seed 1, epoch 0
    = seed 0, epoch 1).
    """
    state = _scramble(seed & _LOW_64_BITS)
    for number in (int(use), *path):
        state = _scramble(state ^ _scramble(number & _LOW_64_BITS))
    return state >> 1


def _scramble(value: int) -> int:
    """SplitMix64's next value from a state."""
    value = (value + _GOLDEN_GAMMA) & _LOW_64_BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _LOW_64_BITS
    return value ^ (value >> 31)
