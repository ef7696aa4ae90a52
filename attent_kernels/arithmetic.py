"""Arithmetic that kernels share: products in float32, and functions that keep their digits where textbook forms cancel.

On a GPU ``tl.exp2`` is one instruction, ex2.approx, off by 2 units of 2⁻²⁴, and ``tl.exp`` that after one
multiplication, off by |x| + 2 units; ``tl.log`` and ``tl.log2`` are the CUDA library's (1 unit).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_target

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton_target.INTERPRETED)


@triton.jit
def add_product(a, b, total=None):
    """total + a b, added up in float32; operands in float32 are not rounded to TF32.

    Triton's interpreter holds a bfloat16 as its 16 bits, and up to 3.7 multiplies those: it gets them as float32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to the nearest of ``dtype``. (The interpreter cuts bfloat16's surplus digits off.)"""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to 3 units: what 1 + x is rounded by is divided out again (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def capped(z, softcap):
    """z̃ = c tanh(z/c) and its slope d = 1 − (z̃/c)².

    With e = exp(−2|z|/c), tanh = (1 − e)/(1 + e) is right to 5 units where 1 − e does not cancel, from |z|/c = 1/4 on;
    below, the series' next term is 9e-3 (1/4)¹⁰ < 1e-8 of it. d = 4e/(1 + e)² cancels nowhere.
    """
    x = z * (1.0 / softcap)
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    half = 1.0 / (1.0 + e)  # one division, the costliest operation here, for both
    far = (1.0 - e) * half
    small = tl.where(tl.abs(x) < 0.25, x, 0.0)
    q = small * small
    near = small * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    tanh = tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
    return softcap * tanh, 4.0 * e * (half * half)
