"""Arithmetic that kernels share, with its errors on a GPU.

``tl.exp2`` and ``tl.log2`` are one instruction each there: ex2.approx errs by 2^-22 of its result; lg2.approx by 2^-22
of its result above 2 and below 1/2, and by 2^-22 absolutely in between (PTX ISA), which near 1 is all of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import runtime

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, sum):
    """a b + sum, added up in float32; products of float32 in float32, not TF32."""
    if _INTERPRETED:  # whose product takes the bits of bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, off by at most 2^-21 of itself however small x is.

    Up to 1 by log(1 + x) = 2 artanh(t), t = x / (2 + x) <= 1/3, whose series is cut after t^15 / 15: what is left out
    is below t^16 / 17 < 2^-29 of the sum. Above 1 by the logarithm of a number of at least 2.
    """
    t = x / (2.0 + x)
    u = t * t
    tail = 1.0 / 11 + u * (1.0 / 13 + u * (1.0 / 15))
    series = 1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u * (1.0 / 9 + u * tail))))
    return tl.where(x <= 1.0, 2.0 * t * series, tl.log2(1.0 + x) * LN_2)
