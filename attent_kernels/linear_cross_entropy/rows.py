"""Rows of raw logits: what they sum to, the loss, its gradient's norm, and that gradient, written out for a GEMM.

A chunk of logits z [C, V] has been written by a GEMM in float32, without the bias. One program takes one row and reads
it once for the sums and, where the gradient is wanted or no sum gives its norm, once more. Ten bytes of memory traffic
a logit (4 + 4, and 2 written for half-precision GEMMs) where a dozen PyTorch operations move 60 and more. Rows whose
factor is 0 are not read.

With z̃ = z + b, capped to c·tanh(·/c) and of slope d (1 without softcap), m = max z̃, y the target, the first read gives

    others = Σ_{v≠y} exp(z̃_v − m)      squares = Σ_{v≠y} d_v² exp(2 (z̃_v − m))      own = z_y
    expected = Σ_v w_v (z̃_v − m)       mass = Σ_v w_v              (smoothing: w the class weights; soft targets: m_v)

by an online maximum; expected's terms are all ≤ 0, so nothing in it cancels. Then, with l = others + exp(z̃_y − m) and
the target's masses m_v = w_v ((1 − ε) q_v + ε/V), M = Σ_v m_v:

    loss  = M log l − Σ_v m_v (z̃_v − m)       two non-negative terms; log l is log1p(others) where the target leads
    g_v   = d_v (M exp(z̃_v − m)/l − m_v),     g_y = d_y ((M − m_y) − M others/l) where p_y > 1/2: no difference p_y − 1
    ‖g‖²  = (d_y others/l)² + squares/l² for plain indices; Σ g_v² of the second read for smoothed and soft targets

Errors, in units u = 2⁻²⁴, X = max |z̃_v − m| over what counts: each exponential is off by (X + 3) u of itself, so the
loss, others/l and squares/l² by (X + log₂V + 8) u of themselves. With smoothed or soft targets g_v is off by
(X + log₂V + 8) u M p_v: at the optimum, where p = q, that is what remains of it, and the norm is off by as much times
M ‖p‖, however small it is itself.

A slab of the vocabulary, or a rank's shard of it, is columns [first, first + V) of ``classes``: its sums are kept,
merged with the others' by :func:`merged`, and a second launch concludes from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import capped, log1p, rounded
from ..runtime import on_device_of

#: Columns read at a time: 16 elements for each of 256 threads; more would leave registers for fewer rows a processor.
MAX_BLOCK = 4096

#: What a row sums to, in the order they are kept in [6, C].
SUMS = ("maximum", "others", "squares", "own", "expected", "mass")


class Rows(NamedTuple):
    """What :func:`row_pass` gives; each None unless it was asked for."""

    losses: Tensor | None  # [C] float32, times the row's scale
    squares: Tensor | None  # [C] float32, ‖g‖² of these columns, times the scale's square
    sums: Tensor | None  # [6, C] float32


def row_pass(
    logits: Tensor,
    target: Tensor,
    *,
    target_rows: Tensor | None = None,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    classes: int | None = None,
    first: int = 0,
    scale: Tensor | None = None,
    upstream: Tensor | None = None,
    sums: Tensor | None = None,
    want_sums: bool = False,
    conclude: bool = True,
    want_squares: bool = False,
    gradient: Tensor | None = None,
) -> Rows:
    """Sum up rows of logits [C, V] and conclude losses [C], squared norms [C] and gradients from the sums.

    Args:
        logits: float32 ``[C, V]``, a row's elements adjacent, without the bias.
        target: int64 ``[C]`` in [0, classes); or masses before smoothing and class weights, floating ``[·, V]``.
        target_rows: int64 ``[C]``, which row of such a target is a row's; None: its own.
        bias: ``[V]``, added to the logits.
        class_weight: float32 ``[classes]``, multiplies the target's masses; a factor of a whole row is in ``scale``.
        label_smoothing: ε, over ``classes``.
        softcap: c.
        classes: of the whole vocabulary; None: these columns are all of it.
        first: the class of the first column.
        scale: float32 ``[C]``, multiplies a row's loss and gradient; a row of scale 0 is not read, and its loss,
            square and gradient are 0; NaN makes them NaN.
        upstream: float32 ``[C]``, multiplies the gradient that is written, not the loss nor the square.
        sums: float32 ``[6, C]`` of these rows over all columns; None: they are computed, from these columns.
        want_sums: return them.
        conclude: False: sums only.
        want_squares: return ‖g‖².
        gradient: ``[C, V]`` of any dtype, overwritten with upstream · scale · g; may be ``logits``.
    """
    count, columns = logits.shape
    soft = target.is_floating_point()
    kept = sums
    if want_sums and sums is None:
        kept = logits.new_empty(len(SUMS), count)
    losses = logits.new_empty(count) if conclude else None
    squares = logits.new_empty(count) if want_squares and conclude else None
    result = Rows(losses, squares, kept if want_sums else None)
    if count == 0:
        return result
    spread_weight = class_weight if soft or label_smoothing > 0 else None
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(columns)))
    stride, step = (target.stride(0), target.stride(1)) if soft else (0, 0)
    with on_device_of(logits):
        row_kernel[(count,)](
            logits,
            logits.stride(0),
            bias,
            target,
            stride,
            step,
            target_rows,
            spread_weight,
            None if spread_weight is None else spread_weight.sum(),
            scale,
            upstream,
            kept,
            losses,
            squares,
            gradient,
            0 if gradient is None else gradient.stride(0),
            count,
            columns,
            first,
            columns if classes is None else classes,
            float(label_smoothing),
            1.0 if softcap is None else float(softcap),
            SOFT=soft,
            SMOOTHED=label_smoothing > 0,
            CAPPED=softcap is not None,
            SUM=sums is None,
            KEEP=want_sums and sums is None,
            CONCLUDE=conclude,
            SQUARE=squares is not None,
            BLOCK=block,
            # As many threads as elements at least: no element then has two threads, one of which could read it after
            # the other has written the gradient over it.
            num_warps=max(1, min(8, block // 256)),
            maxnreg=128,  # left alone, the compiler would rather spill with all options than hold fewer rows at a time
        )
    return result


def merged(sums: Tensor, maximum: Tensor) -> Tensor:
    """Sums [6, C] of some columns, counted from a maximum [C] over more columns instead of their own.

    ``others``, ``squares``, ``expected`` and ``mass`` of disjoint columns may then be added up; of ``own`` the maximum.
    """
    own_maximum, others, squares, own, expected, mass = sums.unbind()
    behind = torch.where(own_maximum == maximum, 0, own_maximum - maximum)  # both may be −inf
    by = behind.exp()
    shifted = expected + torch.where(mass == 0, 0, behind * mass)
    return torch.stack([maximum, others * by, squares * by.square(), own, shifted, mass])


@triton.jit
def row_kernel(
    z_ptr,  # float32 [C, V]
    z_stride,
    bias_ptr,  # [V] or None
    target_ptr,  # int64 [C]; SOFT: floating [., V]
    target_stride,
    target_step,
    target_rows_ptr,  # int64 [C] or None
    weight_ptr,  # float32 [classes] or None
    weight_total_ptr,  # float32 [] or None
    scale_ptr,  # float32 [C] or None
    upstream_ptr,  # float32 [C] or None
    sums_ptr,  # float32 [6, C] or None
    loss_ptr,  # float32 [C] or None
    square_ptr,  # float32 [C] or None
    g_ptr,  # [C, V] or None
    g_stride,
    count,
    columns,
    first,
    classes,
    smoothing,
    softcap,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    SUM: tl.constexpr,
    KEEP: tl.constexpr,
    CONCLUDE: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    p_z = z_ptr + i_row.to(tl.int64) * z_stride
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + i_row)
    if scale == 0:
        _nothing(i_row, sums_ptr, loss_ptr, square_ptr, g_ptr, g_stride, count, columns, KEEP, BLOCK)
    else:
        own_column = -1
        p_target = target_ptr
        p_weight = weight_ptr
        if weight_ptr is not None:
            p_weight += first
        if SOFT:
            target_row = i_row.to(tl.int64)
            if target_rows_ptr is not None:
                target_row = tl.load(target_rows_ptr + i_row)
            p_target += target_row * target_stride
        else:
            own_column = (tl.load(target_ptr + i_row) - first).to(tl.int32)
            if own_column >= columns:
                own_column = -1
        if SUM:
            maximum, others, squares, own, expected, mass = _sums(
                p_z, bias_ptr, p_target, target_step, p_weight, own_column, columns, classes, smoothing, softcap,
                SOFT, SMOOTHED, CAPPED, SQUARE or KEEP, BLOCK,
            )  # fmt: skip
            if KEEP:
                tl.store(sums_ptr + i_row, maximum)
                tl.store(sums_ptr + count + i_row, others)
                tl.store(sums_ptr + 2 * count + i_row, squares)
                tl.store(sums_ptr + 3 * count + i_row, own)
                tl.store(sums_ptr + 4 * count + i_row, expected)
                tl.store(sums_ptr + 5 * count + i_row, mass)
        else:
            maximum = tl.load(sums_ptr + i_row)
            others = tl.load(sums_ptr + count + i_row)
            squares = tl.load(sums_ptr + 2 * count + i_row)
            own = tl.load(sums_ptr + 3 * count + i_row)
            expected = tl.load(sums_ptr + 4 * count + i_row)
            mass = tl.load(sums_ptr + 5 * count + i_row)
        if CONCLUDE:
            own_slope = 1.0
            if SOFT:
                normaliser = others
                loss = mass * tl.log(normaliser) - expected
                own_entry = 0.0
            else:
                if CAPPED:
                    own, own_slope = capped(own, softcap)
                normaliser = others + tl.exp(own - maximum)
                log_normaliser = tl.where(own == maximum, log1p(others), tl.log(normaliser))
                missed = others / normaliser  # 1 − p_y
                if SMOOTHED:
                    own_weight = 1.0
                    total = classes.to(tl.float32)
                    if weight_ptr is not None:
                        own_weight = tl.load(weight_ptr + tl.load(target_ptr + i_row))
                        total = tl.load(weight_total_ptr)
                    spread = smoothing / classes
                    kept = (1.0 - smoothing) * own_weight
                    mass = kept + spread * total
                    on_own = kept * tl.where(kept == 0, 0.0, own - maximum)
                    loss = mass * log_normaliser - (on_own + spread * expected)
                    p_own = tl.exp(own - maximum) / normaliser
                    own_entry = tl.where(
                        missed < 0.5,
                        spread * (total - own_weight) - mass * missed,
                        mass * p_own - kept - spread * own_weight,
                    )
                else:
                    mass = 1.0
                    loss = log_normaliser - (own - maximum)
                    own_entry = -missed
            tl.store(loss_ptr + i_row, loss * scale)
            FROM_SUMS: tl.constexpr = not (SOFT or SMOOTHED)
            if SQUARE and FROM_SUMS:
                own_square = own_slope * own_entry
                square = own_square * own_square + squares / (normaliser * normaliser)
                tl.store(square_ptr + i_row, square * scale * scale)
            if g_ptr is not None or (SQUARE and not FROM_SUMS):
                factor = scale
                if upstream_ptr is not None:
                    factor *= tl.load(upstream_ptr + i_row)
                square = _gradient(
                    p_z, bias_ptr, p_target, target_step, p_weight, g_ptr, i_row.to(tl.int64) * g_stride, own_column,
                    columns, classes, smoothing, softcap, maximum, mass / normaliser, own_entry, factor,
                    SOFT, SMOOTHED, CAPPED, BLOCK,
                )  # fmt: skip
                if SQUARE and not FROM_SUMS:
                    tl.store(square_ptr + i_row, square * scale * scale)


@triton.jit
def _nothing(
    i_row, sums_ptr, loss_ptr, square_ptr, g_ptr, g_stride, count, columns, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row that counts for nothing: zeros, whatever its logits are."""
    if loss_ptr is not None:
        tl.store(loss_ptr + i_row, 0.0)
    if square_ptr is not None:
        tl.store(square_ptr + i_row, 0.0)
    if KEEP:
        for i in tl.static_range(6):
            tl.store(sums_ptr + i * count + i_row, 0.0)
    if g_ptr is not None:
        p_g = g_ptr + i_row.to(tl.int64) * g_stride
        for start in range(0, columns, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            tl.store(p_g + o_v, tl.zeros([BLOCK], tl.float32).to(g_ptr.dtype.element_ty), mask=o_v < columns)


@triton.jit
def _logits(p_z, bias_ptr, o_v, columns, softcap, CAPPED: tl.constexpr):
    """Capped logits [BLOCK] of a row, −inf beyond the last column, and their slopes."""
    m_v = o_v < columns
    z = tl.load(p_z + o_v, mask=m_v, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        z, slope = capped(z, softcap)
    return tl.where(m_v, z, -float("inf")), slope


@triton.jit
def _masses(
    p_target, target_step, weight_ptr, o_v, columns, classes, smoothing, SOFT: tl.constexpr, SMOOTHED: tl.constexpr
):
    """What a target spreads over these columns [BLOCK]: SOFT: m_v; smoothed indices: the class weight alone."""
    m_v = o_v < columns
    if SOFT:
        mass = tl.load(p_target + o_v.to(tl.int64) * target_step, mask=m_v, other=0.0).to(tl.float32)
        if SMOOTHED:
            mass = mass * (1.0 - smoothing) + smoothing / classes
    else:
        mass = tl.full(o_v.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        mass *= tl.load(weight_ptr + o_v, mask=m_v, other=0.0)
    return tl.where(m_v, mass, 0.0)


@triton.jit
def _sums(
    p_z, bias_ptr, p_target, target_step, weight_ptr, own_column, columns, classes, smoothing, softcap,
    SOFT: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first read: maximum, others, squares, own (raw), expected, mass."""
    own = -float("inf")
    maximum = own
    if own_column >= 0:
        own = tl.load(p_z + own_column)
        if bias_ptr is not None:
            own += tl.load(bias_ptr + own_column).to(tl.float32)
        maximum = own
        if CAPPED:
            maximum, _ = capped(own, softcap)
    others = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    expected = 0.0
    mass = 0.0
    for start in range(0, columns, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        z, slope = _logits(p_z, bias_ptr, o_v, columns, softcap, CAPPED)  # [BLOCK]
        higher = tl.maximum(maximum, tl.max(z, 0))
        pivot = tl.where(higher == -float("inf"), 0.0, higher)  # no class yet that is not ruled out
        by = tl.exp(maximum - pivot)
        e = tl.where(o_v == own_column, 0.0, tl.exp(z - pivot))
        others = others * by + e
        if SQUARES:
            e *= slope
            squares = squares * (by * by) + e * e
        if SOFT or SMOOTHED:
            m = _masses(p_target, target_step, weight_ptr, o_v, columns, classes, smoothing, SOFT, SMOOTHED)
            expected += mass * tl.where(mass == 0, 0.0, maximum - pivot)  # 0 times −inf is 0, here and below
            expected += tl.sum(m * tl.where(m == 0, 0.0, z - pivot), 0)
            mass += tl.sum(m, 0)
        maximum = higher
    return maximum, tl.sum(others, 0), tl.sum(squares, 0), own, expected, mass


@triton.jit
def _gradient(
    p_z, bias_ptr, p_target, target_step, weight_ptr, g_ptr, g_offset, own_column,
    columns, classes, smoothing, softcap, maximum, of_exponential, own_entry, factor,
    SOFT: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second read: writes factor · g where it is wanted; returns ‖g‖²."""
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        z, slope = _logits(p_z, bias_ptr, o_v, columns, softcap, CAPPED)  # [BLOCK]
        g = tl.exp(z - maximum) * of_exponential
        if SOFT or SMOOTHED:
            m = _masses(p_target, target_step, weight_ptr, o_v, columns, classes, smoothing, SOFT, SMOOTHED)
            if not SOFT:
                m *= smoothing / classes
            g -= m
        g = tl.where(o_v == own_column, own_entry, g) * slope
        square += tl.where(o_v < columns, g * g, 0.0)
        if g_ptr is not None:
            tl.store(g_ptr + g_offset + o_v, rounded(g * factor, g_ptr.dtype.element_ty), mask=o_v < columns)
    return tl.sum(square, 0)
