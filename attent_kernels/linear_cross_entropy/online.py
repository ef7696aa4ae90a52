"""What one pass over the vocabulary keeps of a token's logits, merged in any order, and the token's loss and norm.

Of logits z, z̃ = c tanh(z/c) under a softcap c (else z̃ = z), its slope d = 1 − (z̃/c)² (else 1), and the target's mass
μ_v = w_v q_v on class v (w: class weights), with M = Σ_v μ_v, the token's loss and its gradient in the raw logits are

    ℓ = M logsumexp(z̃) − Σ_v μ_v z̃_v          g_v = d_v (M p_v − μ_v),   p = softmax(z̃)

Kept are, over v ≠ y (y: the class of an index target; with probabilities there is no y, and v is any class):

    m  = max z̃_v               s  = Σ d_v² e_v²,   e_v = exp(z̃_v − m)
    a  = Σ e_v                 and the target's own logit z_y, once

and where the target has mass off y (label smoothing, probabilities: SPREAD)

    b  = Σ d_v² e_v μ_v        t  = Σ μ_v (z̃_v − m)
    c  = Σ d_v² μ_v²           o  = Σ μ_v

A new maximum m' scales a and b by exp(m − m'), s by its square, and adds (m − m') o to t. Vocabulary groups merge by
the same rule. Neither ever subtracts: with r = exp(m − max(m, z_y)) and l = r a + exp(z_y − max(m, z_y)),

    1 − p_y = r a / l          ‖g‖² = μ_y² [ d_y² (1 − p_y)² + (r/l)² s ]                  index targets, no smoothing
                               ‖g‖² = d_y² (o − M (1 − p_y))² + (M r/l)² s − 2 M (r/l) b + c            otherwise

and the loss is log1p(r a) where z_y is the maximum. As m leaves out y, a and s are at least 1 however sure the learner
is.

Errors, with u = 2^-24, of exact logits (those are off by at most (D + 1) u Σ_d |h_d w_d|, as any float32 product; n is
the number of vocabulary tiles of a group, whose sums are added one after the other). exp on a GPU is off by 2 units
and, its argument rounded and multiplied by log2(e), by 2 u |z̃ − m|, which counts little where exp(z̃ − m) is small. So
a, s and the loss are right to (log2(V) + n + 10) u of themselves, and 2 u |z_y − m| where the target is far off the
others. Index targets without smoothing: ‖g‖ is right to twice that, however near to 1 p_y is.

SPREAD: (M p_v − μ_v)² is summed expanded, so that where p = q all of it cancels, and what is left is rounding: ‖g‖² is
off by (log2(V) + n + 10) u (M² Σ p² + Σ μ²), v ≠ y. Smoothing by ε there is Σ p² = Σ μ² = ε²/V, so ‖g‖ is right to some
ε √(40 u / V) < 2e-3 ε/√V. With probabilities y is not left out: ‖g‖ is right to √(40 u) < 2e-3 of ‖q‖, and so for sure
learners worse than by an index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LOG2_E, capped, log1p

#: Kept per token and vocabulary group: m, a, s; and b, c, t, o where the target is spread out.
KEPT, KEPT_SPREAD = 3, 7


@triton.jit
def exp(x):
    """What is below 1e-38 is 0, which spares a GPU the three instructions in six that keep it."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def cap(z, softcap, CAPPED: tl.constexpr):
    """z̃ and its slope."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        z, slope = capped(z, softcap)
    return z, slope


@triton.jit
def finite(maximum):
    """What to count logits from: 0 where all so far are −inf, whose difference would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def not_negative(x):
    """x, and 0 where rounding took it below; NaN stays NaN, which a GPU's maximum would drop."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def nothing_kept(BM: tl.constexpr):
    """m, a, s, b, c, t, o [BM] of no logits."""
    zero = tl.zeros([BM], tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero


@triton.jit
def keep(
    kept,  # m, a, s, b, c, t, o, each [BM]
    z,  # [BM, BN] capped logits, −inf where left out
    d,  # [BM, BN] their slope
    mass,  # [BM, BN] μ, 0 where left out; if UNIFORM, where it counts as 1; not read unless SPREAD
    masses,  # [BM] how many ones, if UNIFORM
    SPREAD: tl.constexpr, UNIFORM: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """What is kept with some more logits."""
    m, a, s, b, c, t, o = kept
    maximum = tl.maximum(m, tl.max(z, 1))
    pivot = finite(maximum)
    shrink = exp(m - pivot)
    e = exp(z - pivot[:, None])  # [BM, BN]
    sloped = d * e
    a = a * shrink + tl.sum(e, 1)
    s = s * (shrink * shrink) + tl.sum(sloped * sloped, 1)
    if SPREAD:
        t += tl.where(o == 0.0, 0.0, (m - pivot) * o)
        if UNIFORM:
            t += tl.sum(tl.where(mass, z - pivot[:, None], 0.0), 1)
            o += masses
            if CAPPED:
                b = b * shrink + tl.sum(d * sloped, 1)
                c += tl.sum(tl.where(mass, d * d, 0.0), 1)
            else:
                b, c = a, o
        else:
            sloped_mass = d * mass
            b = b * shrink + tl.sum(sloped * sloped_mass, 1)
            c += tl.sum(sloped_mass * sloped_mass, 1)
            t += tl.sum(tl.where(mass == 0.0, 0.0, mass * (z - pivot[:, None])), 1)  # 0 times a logit of −inf is 0
            o += tl.sum(mass, 1)
    return maximum, a, s, b, c, t, o


@triton.jit
def loss_and_square(
    m, a, s, b, c, t, o,  # [BM] over all vocabulary groups
    own, own_slope, own_mass,  # [BM] z̃_y, d_y, μ_y; not read if SOFT
    SPREAD: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """ℓ and ‖g‖² [BM]."""
    if SOFT:
        # a is at least 1, and a − 1 exact where it matters.
        loss = tl.where(o == 0.0, 0.0, o * log1p(a - 1.0)) - t
        ratio = o / a
        square = not_negative(ratio * ratio * s - 2.0 * ratio * b + c)
    else:
        pivot = tl.maximum(m, own)
        shrink = exp(m - pivot)
        others = a * shrink
        total = others + exp(own - pivot)
        # Where the target holds the maximum the sum is 1 and something, else the logarithm is not near 0.
        log_total = tl.where(own == pivot, log1p(others), tl.log(total))
        miss = others / total  # 1 − p_y
        ratio = shrink / total  # p_v = ratio e_v
        if SPREAD:
            mass = o + own_mass
            loss = mass * log_total - tl.where(o == 0.0, 0.0, t + (m - pivot) * o)
            loss += tl.where(own_mass == 0.0, 0.0, own_mass * (pivot - own))
            ratio *= mass
            at_own = own_slope * (o - mass * miss)
            square = at_own * at_own + not_negative(ratio * ratio * s - 2.0 * ratio * b + c)
        else:
            loss = tl.where(own_mass == 0.0, 0.0, own_mass * (log_total + (pivot - own)))
            at_own = own_slope * miss
            square = own_mass * own_mass * (at_own * at_own + ratio * ratio * s)
            square = tl.where(own_mass == 0.0, 0.0, square)
    return loss, square
