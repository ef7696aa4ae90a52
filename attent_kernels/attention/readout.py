"""A linear classifier of the pooled output: logits, cross-entropy, its gradient in the logits, and the scores.

Of one example, pooled h [F] with F = heads × DV, logits z = W h + b [C], label y, p = softmax(z):
loss -log p_y; "logit" ‖p - onehot(y)‖; "head" that times ‖h‖, or √(‖h‖² + 1) with a bias. Nothing is subtracted that
could cancel: with m the largest logit, a = Σ_{v≠y} exp(z_v - m), s = Σ_{v≠y} exp(z_v - m)² and l = a + exp(z_y - m),
1 - p_y is a/l and the squared norm (a² + s)/l².

Examples are read out in groups of GROUP, what a matrix product's tile takes at least: a group's last example computes
the logits of all of it, so that the weight is read B / GROUP times and not B times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arithmetic import LN_2, LOG2_E, add_product, log1p

GROUP = tl.constexpr(16)
#: Classes and features of one step of a group's product: the weight's tile.
CLASSES = tl.constexpr(64)
FEATURES = tl.constexpr(64)
#: The same of a product in float32, whose operands are all in registers: more spill.
FLOAT32_FEATURES = tl.constexpr(16)


class Classifier(NamedTuple):
    """W [C, F] in any strides, its bias, and where its results go; results are contiguous."""

    weight_ptr: Any
    weight_class: int  # strides
    weight_feature: int
    bias_ptr: Any  # [C], or None
    bias_class: int
    label_ptr: Any  # int32 or int64 [B]
    label_example: int
    classes: int
    pooled_ptr: Any  # [B, F]
    logit_ptr: Any  # [B, C]
    gradient_ptr: Any  # float32 [B, C]: dloss / dlogits


@triton.jit
def store_columns(pooled_ptr, b_column, example, head, HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One head's part of an example's pooled output [BLOCK_DV], in the callers' dtype."""
    o_dv = tl.arange(0, BLOCK_DV)
    at = (example.to(tl.int64) * HEADS + head) * DV + o_dv
    tl.store(pooled_ptr + at, b_column.to(pooled_ptr.dtype.element_ty), o_dv < DV)


@triton.jit
def pool_mean(
    pooled_ptr, slot_ptr, example, first_tile, tiles, all_tiles, rows,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The mean of an example's rows, from the column sums [HEADS, all_tiles, BLOCK_DV] that its tiles left."""
    o_dv = tl.arange(0, BLOCK_DV)
    n = tl.maximum(rows, 1).to(tl.float32)
    for head in range(HEADS):
        b_sum = tl.zeros([BLOCK_DV], tl.float32)
        at = (tl.cast(head, tl.int64) * all_tiles + first_tile) * BLOCK_DV + o_dv
        for tile in range(tiles):
            b_sum += tl.load(slot_ptr + at + tile * BLOCK_DV, cache_modifier=".cg")
        store_columns(pooled_ptr, b_sum / n, example, head, HEADS, DV, BLOCK_DV)


@triton.jit
def read_out(classifier, group, num_examples, features, valid_ptr, loss_ptr, score_ptr, SCORE: tl.constexpr):
    """Logits, losses, gradients and scores of one group of examples whose pooled output and validity are stored."""
    o_example = group * GROUP + tl.arange(0, GROUP)
    inside = o_example < num_examples
    row = o_example.to(tl.int64) * classifier.classes
    label = tl.load(classifier.label_ptr + o_example.to(tl.int64) * classifier.label_example, inside, other=0)
    is_label = (label >= 0) & (label < classifier.classes)
    valid = tl.load(valid_ptr + o_example, inside, other=0, cache_modifier=".cg") != 0

    m = tl.full([GROUP], float("-inf"), tl.float32)  # of all classes
    others = tl.zeros([GROUP], tl.float32)  # a
    square = tl.zeros([GROUP], tl.float32)  # s
    own = tl.full([GROUP], float("-inf"), tl.float32)  # z_y
    feature_square = tl.zeros([GROUP], tl.float32)  # ‖h‖²
    for start in range(0, classifier.classes, CLASSES):
        o_class = start + tl.arange(0, CLASSES)
        b_z, b_square = _logits(classifier, o_example, inside, o_class, features)  # [GROUP, CLASSES], [GROUP]
        feature_square = b_square
        at = row[:, None] + o_class[None, :]
        here = inside[:, None] & (o_class < classifier.classes)[None, :]
        tl.store(classifier.logit_ptr + at, b_z.to(classifier.logit_ptr.dtype.element_ty), here)
        tl.store(classifier.gradient_ptr + at, b_z, here)  # for now: the logits, not rounded
        is_own = o_class[None, :] == label[:, None]
        b_z = tl.where((o_class < classifier.classes)[None, :], b_z, float("-inf"))
        own = tl.maximum(own, tl.max(tl.where(is_own, b_z, float("-inf")), 1))
        new = tl.maximum(m, tl.max(b_z, 1))
        pivot = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2((m - pivot) * LOG2_E)
        b_p = tl.where(is_own, 0.0, tl.exp2((b_z - pivot[:, None]) * LOG2_E))
        others = others * shrink + tl.sum(b_p, 1)
        square = square * shrink * shrink + tl.sum(b_p * b_p, 1)
        m = new

    own -= m  # 0 or below
    normaliser = others + tl.exp2(own * LOG2_E)
    log_normaliser = tl.where(own == 0, log1p(others), tl.log2(normaliser) * LN_2)
    not_own = others / normaliser  # 1 - p_y
    bad = tl.where(valid & (is_label == 0), float("nan"), 0.0)  # a label outside [0, C)
    loss = tl.where(valid, log_normaliser - own, 0.0) + bad
    norm = tl.where(valid, tl.sqrt_rn(others * others + square) / normaliser, 0.0) + bad
    tl.store(loss_ptr + o_example, loss, inside)
    if SCORE == "loss":
        tl.store(score_ptr + o_example, loss, inside)
    elif SCORE == "logit":
        tl.store(score_ptr + o_example, norm, inside)
    elif SCORE == "head":
        if classifier.bias_ptr is not None:
            feature_square += 1.0
        tl.store(score_ptr + o_example, norm * tl.sqrt_rn(feature_square), inside)

    # The gradient over the logits that were left in its place: p - onehot(y), 0 of an invalid example.
    tl.debug_barrier()  # other threads of this program stored them
    scale = tl.where(valid, 1.0 / normaliser, 0.0)
    for start in range(0, classifier.classes, CLASSES):
        o_class = start + tl.arange(0, CLASSES)
        at = row[:, None] + o_class[None, :]
        here = inside[:, None] & (o_class < classifier.classes)[None, :]
        b_z = tl.load(classifier.gradient_ptr + at, here, other=0.0)
        b_g = tl.exp2((b_z - m[:, None]) * LOG2_E) * scale[:, None]
        b_g = tl.where(o_class[None, :] == label[:, None], tl.where(valid, -not_own, 0.0)[:, None], b_g) + bad[:, None]
        tl.store(classifier.gradient_ptr + at, b_g, here)


@triton.jit
def _logits(classifier, o_example, inside, o_class, features):
    """Logits [GROUP, CLASSES] of examples and classes, and ‖h‖² [GROUP]."""
    b_z = tl.zeros([GROUP, CLASSES], tl.float32)
    b_square = tl.zeros([GROUP], tl.float32)
    in_classes = o_class < classifier.classes
    p_weight = classifier.weight_ptr + o_class[:, None].to(tl.int64) * classifier.weight_class
    p_pooled = classifier.pooled_ptr + o_example[:, None].to(tl.int64) * features
    IS_HALF: tl.constexpr = (
        classifier.weight_ptr.dtype == classifier.pooled_ptr.dtype
        and classifier.weight_ptr.dtype.element_ty != tl.float32
    )
    STEP: tl.constexpr = FEATURES if IS_HALF else FLOAT32_FEATURES
    for start in range(0, features, STEP):
        o_feature = start + tl.arange(0, STEP)
        in_features = o_feature < features
        # [GROUP, FEATURES], by other programs; [CLASSES, FEATURES]
        b_h = tl.load(
            p_pooled + o_feature[None, :], inside[:, None] & in_features[None, :], other=0.0, cache_modifier=".cg"
        )
        b_w = tl.load(
            p_weight + o_feature[None, :].to(tl.int64) * classifier.weight_feature,
            in_classes[:, None] & in_features[None, :],
            other=0.0,
        )
        wide = b_h.to(tl.float32)
        b_square += tl.sum(wide * wide, 1)
        if not IS_HALF:
            b_h = wide
            b_w = b_w.to(tl.float32)
        b_z = add_product(b_h, tl.trans(b_w), b_z)
    if classifier.bias_ptr is not None:
        p_bias = classifier.bias_ptr + o_class.to(tl.int64) * classifier.bias_class
        b_z += tl.load(p_bias, in_classes, other=0.0).to(tl.float32)[None, :]
    return b_z, b_square
