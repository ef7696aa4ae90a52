"""‖Σ_t g_t h_tᵀ‖² of each example from Gram matrices: Σ_ts (g_t·g_s) (h_t·h_s), tile by tile, lower triangle.

The rows p_t [N, V] arrive a slab of columns at a time (or all at once): :meth:`Gram.add` adds each slab's products to
float32 tiles [128, 128], one for each pair of row tiles that have an example in common. Tiles are cut from all rows,
not from each example, so that any mix of lengths is one launch: row tile i has the pairs (i, i − lag), lag < ``lags``,
as many as the longest example needs. A pair without an example in common costs a program that ends at once.

:meth:`Gram.squares` multiplies by h_t·h_s, computed on the spot, and sums each row up: two launches without atomics, so
results are the same on every run. Of T tokens, that is T² V multiplications in tiles of the triangle and T² D after,
beside the T V D of the logits' GEMM: T/2D of it, and the diagonal's other half.

Where p_t is the gradient g_t written out, that is all. Where it is p̃_t = exp(z̃_t − m_t) with the target's column 0 (d_t
times it under a softcap), the rest of g_t = p̃_t − a_t onehot(y_t) enters at the end, without cancellation:

    g_t·g_s = p̃_t·p̃_s − a_t p̃_s[y_t] − a_s p̃_t[y_s] + [y_t = y_s] a_t a_s

with a = d_y (1 − p_y), and p̃_t[y_s] from h_t·W[y_s]: two more products T² D.

Errors: p̃ in bfloat16 is off by 2⁻⁹ of itself at most, so g_t·g_s by 2⁻⁸ p̃_t·p̃_s and the square by 2⁻⁸ Σ_ts p̃_t·p̃_s
|h_t·h_s| at most; sums are float32, off by some units of the same. A square that comes out below 0 is 0 by as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import add_product, capped
from ..runtime import on_device_of

#: Rows and columns of a tile. At 128 × 128 each byte loaded serves 64 operations: tensor cores then wait for L2, but
#: the next larger tile would leave half the processors without one where a chunk holds one example of 512 tokens.
TILE = 128
#: Columns of p read at a time; 128 bytes of half precision, a whole line.
STEP = 64
#: Tiles of the second launch: four products at a time fit the registers of 256 threads.
SUBTILE = 64
#: Programs that a launch should have: two for each processor of the GPUs at hand (H100, H200: 132; B200: 148).
PROGRAMS = 264
#: Columns of a program at least: what it then reads is twice the tile that it reads and writes.
MIN_COLUMNS = 512


class Own(NamedTuple):
    """What the target's column needs where the rows are p̃."""

    label: Tensor  # [N] int64 in [0, V)
    linear_weight: Tensor  # [V, D]
    linear_bias: Tensor | None  # [V]
    softcap: float | None
    maximum: Tensor  # [N] m_t that p̃ was counted from
    logsumexp: Tensor  # [N]
    missed: Tensor  # [N] a_t


class Gram:
    """Gram matrices of N rows within their examples."""

    def __init__(self, starts: Tensor, longest: int, columns: int) -> None:
        """``starts`` int32 [N]: the first row of each row's example; slabs have up to ``columns`` columns."""
        self.starts, self.longest = starts, longest
        self.rows = len(starts)
        tiles = triton.cdiv(self.rows, TILE)
        self.lags = min(tiles, _lags(longest, TILE))
        self.pairs = tiles * self.lags
        self.splits = max(1, min(triton.cdiv(PROGRAMS, max(1, self.pairs)), triton.cdiv(columns, MIN_COLUMNS)))
        self.tiles = starts.new_empty((self.pairs * self.splits, TILE, TILE), dtype=torch.float32)
        self.empty = True

    def add(self, p: Tensor, rescale: Tensor | None = None) -> None:
        """Add p pᵀ of a slab [N, ·]; first multiply what is there by the rows' ``rescale`` [N] on both sides."""
        if self.rows == 0:
            return
        columns = p.shape[1]
        with on_device_of(p):
            gram_kernel[(self.pairs, self.splits)](
                p,
                p.stride(0),
                self.starts,
                rescale,
                self.tiles,
                self.rows,
                columns,
                self.lags,
                triton.cdiv(triton.cdiv(columns, self.splits), STEP) * STEP,
                ACCUMULATE=not self.empty,
                TILE=TILE,
                STEP=STEP if p.element_size() == 2 else STEP // 4,  # float32 operands are in registers
                num_warps=8,
                num_stages=3 if p.element_size() == 2 else 2,
            )
        self.empty = False

    def squares(self, hidden: Tensor, factor: Tensor | None, with_bias: bool, own: Own | None = None) -> Tensor:
        """[N], whose sum over an example is Σ_ts f_t f_s (g_t·g_s) (h_t·h_s [+ 1]); rows of factor 0 are in none.

        Args:
            hidden: ``[N, D]``, any strides; what rows of factor 0 hold does not matter.
            factor: float32 ``[N]`` f; None: 1.
            with_bias: whether the head has one, which is a feature that is 1.
            own: where the rows added were p̃.
        """
        lags = min(triton.cdiv(self.rows, SUBTILE), _lags(self.longest, SUBTILE))
        parts = self.tiles.new_empty(lags, self.rows)
        if self.rows == 0:
            return parts.sum(0)
        weight = None if own is None else own.linear_weight
        with on_device_of(hidden):
            finish_kernel[(triton.cdiv(self.rows, SUBTILE), lags)](
                self.tiles,
                self.starts,
                hidden,
                hidden.stride(0),
                hidden.stride(1),
                factor,
                None if own is None else own.label,
                weight,
                0 if weight is None else weight.stride(0),
                0 if weight is None else weight.stride(1),
                None if own is None else own.linear_bias,
                None if own is None else own.maximum,
                None if own is None else own.logsumexp,
                None if own is None else own.missed,
                1.0 if own is None or own.softcap is None else own.softcap,
                parts,
                self.rows,
                hidden.shape[1],
                self.lags,
                self.splits,
                1.0 if with_bias else 0.0,
                CAPPED=own is not None and own.softcap is not None,
                TILE=TILE,
                SUBTILE=SUBTILE,
                STEP=STEP if hidden.element_size() == 2 else STEP // 2,
                num_warps=8,
                num_stages=2,
            )
        return parts.sum(0)


def tile_bytes(rows: int, longest: int) -> int:
    """What the tiles of :class:`Gram` take, before any splitting."""
    tiles = -(-rows // TILE)
    return tiles * min(tiles, _lags(longest, TILE)) * TILE * TILE * 4


def _lags(longest: int, tile: int) -> int:
    """How many tiles back the first token of an example can lie from its last, and 1 for their own."""
    return -(-max(0, longest - 1) // tile) + 1


@triton.jit
def gram_kernel(
    p_ptr,  # [N, V]
    p_stride,
    start_ptr,  # int32 [N]
    rescale_ptr,  # float32 [N] or None
    tile_ptr,  # float32 [pairs, splits, TILE, TILE]
    rows,
    columns,
    lags,
    split_columns,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    i_pair = tl.program_id(0)
    i_split = tl.program_id(1)
    i_t = i_pair // lags
    i_s = i_t - i_pair % lags
    if tl.load(start_ptr + i_t * TILE) < (i_s + 1) * TILE:  # an example in common; never where i_s < 0
        o = tl.arange(0, TILE)
        # Rows beyond the last are the last once more: their products are not read.
        o_t = tl.minimum(i_t * TILE + o, rows - 1)
        o_s = tl.minimum(i_s * TILE + o, rows - 1)
        p_t = p_ptr + o_t.to(tl.int64)[:, None] * p_stride  # [TILE, 1]
        p_s = p_ptr + o_s.to(tl.int64)[:, None] * p_stride
        i_tile = (i_pair * tl.num_programs(1) + i_split).to(tl.int64)
        p_tile = tile_ptr + i_tile * (TILE * TILE) + o[:, None] * TILE + o[None, :]  # [TILE, TILE]
        if ACCUMULATE:
            b_gram = tl.load(p_tile)
            if rescale_ptr is not None:
                b_gram *= tl.load(rescale_ptr + o_t)[:, None]
                b_gram *= tl.load(rescale_ptr + o_s)[None, :]
        else:
            b_gram = tl.zeros([TILE, TILE], tl.float32)
        first = i_split * split_columns
        for start in range(first, tl.minimum(first + split_columns, columns), STEP):
            o_v = (start + tl.arange(0, STEP))[None, :]
            b_t = tl.load(p_t + o_v, mask=o_v < columns, other=0.0)  # [TILE, STEP]
            b_s = tl.load(p_s + o_v, mask=o_v < columns, other=0.0)  # [TILE, STEP]
            b_gram = add_product(b_t, tl.trans(b_s), b_gram)
        tl.store(p_tile, b_gram)


@triton.jit
def finish_kernel(
    tile_ptr,  # float32 [pairs, splits, TILE, TILE]
    start_ptr,  # int32 [N]
    h_ptr,  # [N, D]
    h_stride,
    h_step,
    factor_ptr,  # float32 [N] or None
    label_ptr,  # int64 [N]; None: the rows are g
    w_ptr,  # [V, D]
    w_stride,
    w_step,
    bias_ptr,  # [V] or None
    maximum_ptr,  # float32 [N]
    logsumexp_ptr,  # float32 [N]
    missed_ptr,  # float32 [N]
    softcap,
    part_ptr,  # float32 [lags of subtiles, N]
    rows,
    width,
    lags,
    splits,
    one,  # 1 with a bias
    CAPPED: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    STEP: tl.constexpr,
):
    i_t = tl.program_id(0)
    lag = tl.program_id(1)
    i_s = i_t - lag
    o = tl.arange(0, SUBTILE)
    b_sum = tl.zeros([SUBTILE], tl.float32)
    if tl.load(start_ptr + i_t * SUBTILE) < (i_s + 1) * SUBTILE:  # an example in common
        o_t = tl.minimum(i_t * SUBTILE + o, rows - 1)
        o_s = tl.minimum(i_s * SUBTILE + o, rows - 1)
        p_ht = h_ptr + o_t.to(tl.int64)[:, None] * h_stride
        p_hs = h_ptr + o_s.to(tl.int64)[:, None] * h_stride
        b_value = _products(p_ht, h_step, p_hs, h_step, width, SUBTILE, STEP) + one  # h_t·h_s [SUBTILE, SUBTILE]

        inner = (i_t * SUBTILE % TILE + o)[:, None] * TILE + (i_s * SUBTILE % TILE + o)[None, :]
        i_tile = i_t * SUBTILE // TILE
        i_pair = i_tile * lags + i_tile - i_s * SUBTILE // TILE
        p_tile = tile_ptr + (i_pair * splits).to(tl.int64) * (TILE * TILE) + inner
        b_gram = tl.load(p_tile)
        for i in range(1, splits):
            b_gram += tl.load(p_tile + i * (TILE * TILE))

        if label_ptr is not None:
            label_t = tl.load(label_ptr + o_t)
            label_s = tl.load(label_ptr + o_s)
            lse_t = tl.load(logsumexp_ptr + o_t)
            lse_s = tl.load(logsumexp_ptr + o_s)
            missed_t = tl.load(missed_ptr + o_t)
            missed_s = tl.load(missed_ptr + o_s)
            same = label_t[:, None] == label_s[None, :]
            b_gram *= tl.exp(tl.load(maximum_ptr + o_t) - lse_t)[:, None]
            b_gram *= tl.exp(tl.load(maximum_ptr + o_s) - lse_s)[None, :]
            p_wt = w_ptr + label_t[:, None] * w_stride
            p_ws = w_ptr + label_s[:, None] * w_stride
            b_z = _products(p_ht, h_step, p_ws, w_step, width, SUBTILE, STEP)  # z_t[y_s]
            if bias_ptr is not None:
                b_z += tl.load(bias_ptr + label_s).to(tl.float32)[None, :]
            b_p = _probability(b_z, lse_t[:, None], softcap, CAPPED)
            b_gram -= tl.where(same, 0.0, b_p * missed_s[None, :])
            b_z = _products(p_wt, w_step, p_hs, h_step, width, SUBTILE, STEP)  # z_s[y_t]
            if bias_ptr is not None:
                b_z += tl.load(bias_ptr + label_t).to(tl.float32)[:, None]
            b_p = _probability(b_z, lse_s[None, :], softcap, CAPPED)
            b_gram -= tl.where(same, 0.0, b_p * missed_t[:, None])
            b_gram += tl.where(same, missed_t[:, None] * missed_s[None, :], 0.0)

        counts = tl.load(start_ptr + o_t)[:, None] == tl.load(start_ptr + o_s)[None, :]
        row_t = (i_t * SUBTILE + o)[:, None]
        row_s = (i_s * SUBTILE + o)[None, :]
        counts &= (row_s <= row_t) & (row_t < rows)
        b_value *= b_gram
        if factor_ptr is not None:
            factor_t = tl.load(factor_ptr + o_t)[:, None]
            factor_s = tl.load(factor_ptr + o_s)[None, :]
            counts &= (factor_t != 0) & (factor_s != 0)
            b_value = b_value * factor_t * factor_s
        b_sum = tl.sum(tl.where(counts, tl.where(row_s < row_t, 2.0 * b_value, b_value), 0.0), 1)
    row = i_t * SUBTILE + o
    tl.store(part_ptr + lag.to(tl.int64) * rows + row, b_sum, mask=row < rows)


@triton.jit
def _products(p_a, a_step, p_b, b_step, width, SUBTILE: tl.constexpr, STEP: tl.constexpr):
    """a bᵀ of rows at pointers p_a, p_b [SUBTILE, 1]."""
    b_product = tl.zeros([SUBTILE, SUBTILE], tl.float32)
    for start in range(0, width, STEP):
        o_d = (start + tl.arange(0, STEP))[None, :]
        b_a = tl.load(p_a + o_d * a_step, mask=o_d < width, other=0.0)  # [SUBTILE, STEP]
        b_b = tl.load(p_b + o_d * b_step, mask=o_d < width, other=0.0)  # [SUBTILE, STEP]
        b_product = add_product(b_a, tl.trans(b_b), b_product)
    return b_product


@triton.jit
def _probability(z, logsumexp, softcap, CAPPED: tl.constexpr):
    """p of raw logits, under a softcap times the slope."""
    if CAPPED:
        z, slope = capped(z, softcap)
        return tl.exp(z - logsumexp) * slope
    return tl.exp(z - logsumexp)
