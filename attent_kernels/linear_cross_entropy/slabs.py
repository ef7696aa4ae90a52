"""A slab of the vocabulary's columns at a time: running sums of every row, and p̃ of the slab for a Gram matrix.

The logits z [N, S] of a slab have been written by a GEMM into a workspace that stays in L2. One program takes one row,
reads it once (S ≤ 4,096 columns fit in its registers) and writes p̃ = d exp(z̃ − m) with the target's column 0, m the
largest z̃ of the other columns so far, 0.5 to 1 times as many bytes again. What was counted from the former m is to be
multiplied by ``rescale`` = exp(m before − m now): the sums here, the Gram matrix in :meth:`.gram.Gram.add`.

p̃ is bfloat16 for half-precision inputs of either kind: it has float32's range, so nothing underflows that matters; it
is off by 2⁻⁹ of itself at most. Float32 inputs have float32 p̃.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import capped, rounded
from ..runtime import on_device_of
from .rows import MAX_BLOCK, SUMS


def first_sums(count: int, device: torch.device) -> Tensor:
    """Sums [6, N] of no column yet, in the order of :data:`.rows.SUMS`; maximum is that of v ≠ y."""
    sums = torch.zeros(len(SUMS), count, dtype=torch.float32, device=device)
    sums[0] = sums[3] = -torch.inf
    return sums


def slab_pass(
    logits: Tensor,
    target: Tensor,
    sums: Tensor,
    p: Tensor,
    *,
    first: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Add a slab's columns to the rows' sums, in place, and write its p̃; returns ``rescale`` [N].

    Args:
        logits: float32 ``[N, S]`` of classes [first, first + S), a row's elements adjacent, without the bias.
        target: int64 ``[N]``.
        sums: float32 ``[6, N]``.
        p: ``[N, S]``, overwritten.
        bias: ``[S]``.
        softcap: c.
        scale: float32 ``[N]``; a row of scale 0 is not read, its p̃ is 0.
    """
    count, columns = logits.shape
    rescale = logits.new_empty(count)
    assert columns <= MAX_BLOCK
    if count:
        block = max(32, triton.next_power_of_2(columns))
        with on_device_of(logits):
            slab_kernel[(count,)](
                logits,
                logits.stride(0),
                bias,
                target,
                scale,
                sums,
                rescale,
                p,
                p.stride(0),
                count,
                columns,
                first,
                1.0 if softcap is None else float(softcap),
                CAPPED=softcap is not None,
                BLOCK=block,
                num_warps=max(1, min(8, block // 256)),
            )
    return rescale


@triton.jit
def slab_kernel(
    z_ptr,  # float32 [N, S]
    z_stride,
    bias_ptr,  # [S] or None
    target_ptr,  # int64 [N]
    scale_ptr,  # float32 [N] or None
    sums_ptr,  # float32 [6, N]
    rescale_ptr,  # float32 [N]
    p_ptr,  # [N, S]
    p_stride,
    count,
    columns,
    first,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < columns
    p_z = z_ptr + i_row.to(tl.int64) * z_stride
    p_p = p_ptr + i_row.to(tl.int64) * p_stride
    counts = True
    if scale_ptr is not None:
        counts = tl.load(scale_ptr + i_row) != 0
    if counts:
        # Read before anything is written: between here and there lie the barriers of the sums below.
        before = tl.load(sums_ptr + i_row)
        others = tl.load(sums_ptr + count + i_row)
        squares = tl.load(sums_ptr + 2 * count + i_row)
        own_column = tl.load(target_ptr + i_row) - first
        z = tl.load(p_z + o_v, mask=m_v, other=0.0)  # [BLOCK]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
        if (own_column >= 0) & (own_column < columns):
            own = tl.load(p_z + own_column)
            if bias_ptr is not None:
                own += tl.load(bias_ptr + own_column).to(tl.float32)
            tl.store(sums_ptr + 3 * count + i_row, own)
        slope = 1.0
        if CAPPED:
            z, slope = capped(z, softcap)
        z = tl.where(m_v & (o_v != own_column), z, -float("inf"))
        maximum = tl.maximum(before, tl.max(z, 0))
        pivot = tl.where(maximum == -float("inf"), 0.0, maximum)
        by = tl.exp(before - pivot)
        e = tl.exp(z - pivot)
        others = others * by + tl.sum(e, 0)
        e *= slope
        squares = squares * (by * by) + tl.sum(e * e, 0)
        tl.store(sums_ptr + i_row, maximum)
        tl.store(sums_ptr + count + i_row, others)
        tl.store(sums_ptr + 2 * count + i_row, squares)
        tl.store(rescale_ptr + i_row, by)
        tl.store(p_p + o_v, rounded(e, p_ptr.dtype.element_ty), mask=m_v)
    else:
        tl.store(rescale_ptr + i_row, 1.0)
        tl.store(p_p + o_v, tl.zeros([BLOCK], tl.float32).to(p_ptr.dtype.element_ty), mask=m_v)
