"""What scored attention's kernels, Triton's and CUDA C++'s, share: the op's records as those of their launchers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attent_kernels import pools
from attent_kernels.attention.records import Attention, Into, Loss, TopK
from attent_kernels.runtime import allocator

from .scored_attention_op import Problem, Results, Scoring, empty_results
from .select_top_k import floor_count

MAX_WIDTH = 256


def too_wide(problem: Problem) -> str | None:
    """Why a kernel does not take these head dimensions; None if it does."""
    widest = max(problem.query.shape[-1], problem.value.shape[-1])
    return None if widest <= MAX_WIDTH else f"it takes head dimensions up to {MAX_WIDTH}, not {widest}"


def launched(problem: Problem, scoring: Scoring, launch: Callable[..., None]) -> Results:
    """The results of ``launch``, a launcher of one of the two."""
    results = empty_results(problem, scoring, allocator(problem.query.device))
    if problem.batch == 0:
        return results
    attention = Attention(
        problem.query, problem.key, problem.value, problem.query_lengths, problem.key_lengths, problem.cu_seqlens_q,
        problem.cu_seqlens_k, problem.is_causal, problem.scale, problem.window_left, problem.window_right,
        problem.softcap,
    )  # fmt: skip
    loss = Loss(
        problem.target, problem.readout_weight, problem.readout_bias, problem.labels, problem.pool, scoring.score,
        scoring.per_example,
    )  # fmt: skip
    top_k, later = None, False
    if scoring.top_k is not None:
        top_k = TopK(scoring.top_k, floor_count(scoring.top_k, scoring.floor), scoring.temperature, scoring.seed)
        later = problem.batch > pools.MAX_IN_LAUNCH
    launch(
        attention,
        loss,
        None if later else top_k,
        Into(*results),
        only_pooled_row=problem.pool != "mean" and problem.rows != "all",
        store=problem.rows != "none",
    )
    if later:
        chosen, chosen_score, inclusion = torch.ops.attent.select_top_k(
            results.scores, scoring.top_k, scoring.temperature, scoring.floor, _valid(problem), scoring.seed, True,
            problem.backend,
        )  # fmt: skip
        results = results._replace(chosen=chosen, chosen_score=chosen_score, inclusion=inclusion)
    return results


def _valid(problem: Problem) -> Tensor | None:
    """Which examples have a query [B]; None: all."""
    if problem.cu_seqlens_q is not None:
        return problem.cu_seqlens_q.clamp(0, problem.query.shape[0]).cummax(0).values.diff() > 0
    if problem.query_lengths is not None:
        return problem.query_lengths.clamp(0, problem.query.shape[2]) > 0
    return (
        None
        if problem.query.shape[2] > 0
        else torch.zeros(problem.batch, dtype=torch.bool, device=problem.query.device)
    )
