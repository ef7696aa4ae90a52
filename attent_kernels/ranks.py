"""The keys that a choice is made by, as pieces of Triton kernels: scores, noise and indices as unique 64-bit integers.

A rank is an int64 that is smaller for who comes first: from the top, 1 bit for invalid, 32 for the code of a value
(smaller for a larger value), 31 for the index. No two are equal, so that nothing ever ties and every way to select and
to sort gives the same result.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INDEX_BITS = tl.constexpr(31)
_INDEX_MASK = tl.constexpr(2**31 - 1)
_INT32_MIN = tl.constexpr(-(2**31))
_NAN = tl.constexpr(0x7FC00000)
_INFINITY = tl.constexpr(0x7F800000)

#: No rank: before and after all of them. (Codes start above -2^31 but for floor_code, whose ranks are not compared with
#: the first; the last would have index 2^31 - 1.)
FIRST_RANK = tl.constexpr(-(2**63))
LAST_RANK = tl.constexpr(2**63 - 1)

_TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
_LARGEST = tl.constexpr((2 - 2.0**-23) * 2.0**127)
_LARGEST_BELOW_1 = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def as_float32(score):
    """Exactly, subnormal bfloat16 numbers included, which Triton's interpreter converts wrongly."""
    if score.dtype == tl.bfloat16:
        return (score.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return score.to(tl.float32)


@triton.jit
def descending_code(value):
    """int32 that rises where the float32 ``value`` falls: NaN lowest, then +inf; equal for all NaNs, and for -0 and +0.

    On bits alone: a compiler may think that it knows what ``x + 0.0`` or ``x != x`` is.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where((bits & _INDEX_MASK) > _INFINITY, _NAN, bits)
    bits = tl.where(bits == _INT32_MIN, 0, bits)
    return tl.where(bits < 0, bits ^ _INT32_MIN, ~bits)


@triton.jit
def value_of_code(code):
    """The float32 that :func:`descending_code` made ``code`` of."""
    return tl.where(code < 0, ~code, code ^ _INT32_MIN).to(tl.float32, bitcast=True)


@triton.jit
def floor_code(bits):
    """int32 that rises with the uint32 ``bits``: the floor draws who has the smallest."""
    return bits.to(tl.int32, bitcast=True) ^ _INT32_MIN


@triton.jit
def rank_of(code, valid, index):
    """The rank of who has this code, validity (bool) and index (below 2^31 - 1)."""
    class_and_code = code.to(tl.int64) + ((valid == 0).to(tl.int64) << 32) + _INT32_MIN
    return (class_and_code << _INDEX_BITS) | index.to(tl.int64)


@triton.jit
def index_of_rank(rank):
    return rank & _INDEX_MASK


@triton.jit
def code_of_rank(rank):
    return ((rank >> _INDEX_BITS) - _INT32_MIN).to(tl.int32)  # the invalid's 2^32 more fall off


@triton.jit
def log_weight(score, temperature):
    """φ = log(score) / temperature, finite: NaN and +inf count as the largest number, what is below normal as the
    smallest normal one, temperatures below 1e-30 as that."""
    bits = score.to(tl.int32, bitcast=True)
    is_nan = (bits & _INDEX_MASK) > _INFINITY
    positive = tl.minimum(tl.maximum(tl.where(is_nan, _LARGEST, score), _TINY), _LARGEST)
    # A number below 2^-126 comes as float64 in the interpreter.
    return tl.div_rn(tl.log(positive), tl.maximum(tl.cast(temperature, tl.float32), 1e-30))


@triton.jit
def random_bits(seed, index):
    """Lanes 0 and 1 of Philox4x32-10 of (seed, index): for the key's noise and for the floor's. uint32."""
    key_bits, floor_bits, _, _ = tl.randint4x(seed, index)
    return key_bits.to(tl.uint32, bitcast=True), floor_bits.to(tl.uint32, bitcast=True)


@triton.jit
def gumbel(bits):
    """A standard Gumbel number for the uint32 ``bits``: -log E, E = -log(1 - u) exponential, u = (bits + ½) 2^-32.

    The largest Gumbel numbers decide. They come from the smallest E, and those from u near 0, where 1 - u would round
    u away. So E is 2 artanh(s) there, s = u / (2 - u), a series of positive terms. For u < ½ s² < 1/9, and what comes
    after the eight terms is below 9^-8 / 17 / (1 - 1/9) < 2^-29 of the first. s carries two roundings, its product
    with the series and the sum less than two more: 4 units of 2^-24 in E, 4 · 2^-24 in log E. From u = ½ on, 1 - u is
    exact.
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), _LARGEST_BELOW_1)
    s = tl.div_rn(u, 2.0 - u)
    s2 = s * s
    series = 1 / 13 + s2 * (1 / 15)
    series = 1 / 11 + s2 * series
    series = 1 / 9 + s2 * series
    series = 1 / 7 + s2 * series
    series = 1 / 5 + s2 * series
    series = 1 / 3 + s2 * series
    small = 2.0 * s + 2.0 * s * (s2 * series)
    exponential = tl.where(u < 0.5, small, -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def probability_above(phi, threshold):
    """q = P(φ + G > κ) = 1 - exp(-y), y = exp(φ - κ), accurate for small y as well.

    For y < ½ by Taylor's series: what comes after its nine terms is below 2^-9 / 10! < 2^-30 of the first. From there
    on the difference is above 0.39, and the rounding of exp(-y) at most 0.61 / 0.39 of a unit in it.
    """
    y = tl.exp(tl.minimum(phi - threshold, 8.0))  # q is 1 from y = 104 on, where exp(-y) is 0 next to it
    z = tl.minimum(y, 0.5)
    series = 1 / 40320 - z * (1 / 362880)
    series = 1 / 5040 - z * series
    series = 1 / 720 - z * series
    series = 1 / 120 - z * series
    series = 1 / 24 - z * series
    series = 1 / 6 - z * series
    series = 1 / 2 - z * series
    return tl.where(y < 0.5, z - z * (z * series), 1.0 - tl.exp(-y))
