"""From a tile of raw logits in registers to what is kept of them, some columns at a time.

The sums take several numbers for each logit. All of a tile at once they would not fit in registers beside it, so the
tile is cut in halves until its parts do. In the accumulators' layout a thread has columns of each half, so that the cut
moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online import cap, keep


@triton.jit
def halves(z):
    """The left and the right columns of [BM, BN], a power of two."""
    return tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def keep_columns(
    own,  # [BM] raw logit of the target's class, of the columns so far
    kept,  # of the columns so far
    z,  # [BM, BN] raw logits before the bias, of classes `first` and on
    first, label, bias, class_weight,
    p_target,  # [BM] each token's probabilities, if SOFT
    target_column_stride, computed, classes, label_smoothing, softcap,
    SOFT: tl.constexpr, SPREAD: tl.constexpr, UNIFORM: tl.constexpr, CAPPED: tl.constexpr,
    EVEN_CLASSES: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """own and kept with the columns of z."""
    if BN > BS:
        left, right = halves(z)
        own, kept = keep_columns(
            own, kept, left, first, label, bias, class_weight, p_target, target_column_stride, computed, classes,
            label_smoothing, softcap, SOFT, SPREAD, UNIFORM, CAPPED,
            EVEN_CLASSES, BN // 2, BS,
        )  # fmt: skip
        own, kept = keep_columns(
            own, kept, right, first + BN // 2, label, bias, class_weight, p_target, target_column_stride, computed,
            classes, label_smoothing, softcap, SOFT, SPREAD, UNIFORM, CAPPED,
            EVEN_CLASSES, BN // 2, BS,
        )  # fmt: skip
    else:
        column = first + tl.arange(0, BN)
        is_class = column < classes  # [BN]
        is_own = column[None, :] == label[:, None]  # [BM, BN]
        if bias is not None:
            z += tl.load(bias.ptr + column * bias.stride, is_class, other=0.0).to(tl.float32)[None, :]
        own += tl.sum(tl.where(is_own, z, 0.0), 1)
        z, d = cap(z, softcap, CAPPED)
        is_left_out = is_own
        if not EVEN_CLASSES:
            is_left_out |= ~is_class[None, :]
        mass, masses = z, own
        if UNIFORM:
            mass = ~is_left_out
            has_own = (label >= first) & (label < first + BN)
            inside = tl.maximum(tl.minimum(BN, classes - first), 0)  # columns may all lie behind the last class
            masses = (inside - has_own.to(tl.int32)).to(tl.float32)
        elif SPREAD:
            of_class = label_smoothing / classes
            if SOFT:
                p_q = p_target[:, None] + (column.to(tl.int64) * target_column_stride)[None, :]
                q = tl.load(p_q, computed[:, None] & is_class[None, :], other=0.0).to(tl.float32)
                mass = (1.0 - label_smoothing) * q + of_class
            else:
                mass = tl.where(is_own, 0.0, of_class)
            mass = tl.where(is_class[None, :], mass, 0.0)
            if class_weight is not None:
                weights = tl.load(class_weight.ptr + column * class_weight.stride, is_class, other=0.0)
                mass *= weights.to(tl.float32)[None, :]
        z = tl.where(is_left_out, float("-inf"), z)
        kept = keep(kept, z, d, mass, masses, SPREAD, UNIFORM, CAPPED)
    return own, kept
