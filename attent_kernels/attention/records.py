"""What a launch of scored attention computes, and where its results go: the same for every kind of kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """What is computed: padded [B, H, T, ·] or, with cu_seqlens, packed [total, H, ·]; float16, bfloat16 or float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    is_causal: bool
    scale: float
    window_left: int  # -1: no limit
    window_right: int
    softcap: float | None


class Loss(NamedTuple):
    """What of the output is scored: a target, or a classifier of the pooled rows."""

    target: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    labels: Tensor | None
    pool: str
    score: str | None
    per_example: str


class TopK(NamedTuple):
    """What is chosen; k_floor of the k uniformly."""

    k: int
    k_floor: int
    temperature: float
    seed: Tensor | None


class Into(NamedTuple):
    """Where results go; empty tensors: not wanted. ``output`` holds all rows, or each example's pooled row."""

    output: Tensor
    logsumexp: Tensor
    losses: Tensor
    logits: Tensor
    pooled: Tensor
    logit_gradient: Tensor
    scores: Tensor
    chosen: Tensor
    chosen_score: Tensor
    inclusion: Tensor
