"""Scored attention in PyTorch operations: attention in tiles, then the losses, scores and lesson of its output.

On CPU, packed examples are computed one by one and keys that no row looks at are left out. Elsewhere nothing is read
back to the host, so packed examples attend under a mask of all keys: right, but total_q × total_k instead of Σ Lq × Lk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .attention_batch import Batch, as_batch
from .readout_gradients import readout_gradients
from .scored_attention_op import FiveTensors, Gradients, Problem, Results, Saved, Scoring
from .torch_attention import as_dtype, attention_backward, attention_forward, on_cpu, working_dtype


@dispatch.register("scored_attention", "torch")
def scored_attention_forward(problem: Problem, scoring: Scoring) -> Results:
    """Output, losses, scores and lesson."""
    batch = as_batch(problem)
    output, logsumexp = attention_forward(batch.query, batch.key, batch.value, batch.attention)
    dtype, acc = problem.query.dtype, output.dtype

    def empty(dtype: torch.dtype = acc) -> Tensor:
        return output.new_empty(0, dtype=dtype)

    logits, pooled, logit_gradient, scores = empty(dtype), empty(dtype), empty(), empty()
    if problem.target is not None:
        n = batch.counts.clamp(min=1)
        per_row = _residual(batch, output, problem.target).square_().sum((1, 3))
        square = batch.sum_by_example(per_row)  # Σ_t ‖f_t − y_t‖², [B]
        losses = square / (2 * n)
        if scoring.score == "residual":
            scores = square.sqrt_()
            if scoring.per_example != "sum":
                scores /= n if scoring.per_example == "mean" else n.sqrt_()
    else:
        pooled = batch.pool(output)
        logits = _readout(problem, pooled)
        assert problem.labels is not None
        losses, logit_gradient = _cross_entropy(logits, problem.labels, batch.valid, bounded=on_cpu(output))
        if scoring.score in ("logit", "head"):  # one token per example: per_example makes no difference
            scores = torch.linalg.vector_norm(logit_gradient, dim=1)
        if scoring.score == "head":  # ‖g hᵀ‖ = ‖g‖ ‖h‖, and with a bias h is one longer
            square = as_dtype(pooled, acc).square().sum(1)
            scores *= (square if problem.readout_bias is None else square + 1).sqrt_()
    if scoring.score == "loss":
        scores = losses.clone()  # an op's outputs share no memory
    if scoring.top_k is None:
        chosen, chosen_score, inclusion = empty(torch.int64), empty(), empty()
    else:
        chosen, chosen_score, inclusion = torch.ops.attent.select_top_k(
            scores, scoring.top_k, scoring.temperature, scoring.floor, batch.valid, scoring.seed, True, problem.backend
        )
    if problem.rows == "none":
        output, logsumexp = empty(dtype), empty()
    else:
        output = batch.from_rows(output)
        logsumexp = logsumexp if batch.offsets is None else logsumexp[0]
    logits = as_dtype(logits, dtype)
    return Results(
        output, logsumexp, losses, logits, pooled, logit_gradient, scores, chosen, chosen_score, inclusion
    )  # fmt: skip


@dispatch.register("scored_attention_backward", "torch")
def scored_attention_backward(problem: Problem, saved: Saved, grads: Gradients, wanted: list[bool]) -> FiveTensors:
    """Gradients in query, key, value, readout weight and bias: back through the losses, the readout, then attention."""
    weight, bias, grad_pooled = readout_gradients(problem, saved, grads, wanted)
    if not any(wanted[:3]):  # frozen features: only the readout learns
        query, key, value = (problem.query.new_empty(0) for _ in range(3))
        return query, key, value, weight, bias

    batch = as_batch(problem)
    output = batch.to_rows(saved.output)
    parts = []  # of the gradient in output [B, H, R, Dv]
    if grads.output is not None:
        parts.append(batch.blank(batch.to_rows(grads.output)))
    if grad_pooled is not None:
        parts.append(batch.unpool(grad_pooled, output.shape[3]))
    if grads.losses is not None and problem.target is not None:
        scale = batch.to_each_row(grads.losses / batch.counts.clamp(min=1))
        parts.append(batch.blank(_residual(batch, output, problem.target).mul_(scale)))
    grad_output = sum(parts[1:], start=parts[0])
    logsumexp = saved.logsumexp if batch.offsets is None else saved.logsumexp[None]
    query, key, value = attention_backward(
        grad_output, batch.query, batch.key, batch.value, output, logsumexp, batch.attention
    )
    if batch.is_only_row:
        query = batch.from_only_row(query, problem.query.shape[2 if batch.offsets is None else 0])
    return batch.from_rows(query), batch.from_rows(key), batch.from_rows(value), weight, bias


def _residual(batch: Batch, output: Tensor, target: Tensor) -> Tensor:
    """f_t − y_t, [B, H, R, Dv] in the working dtype."""
    return output - batch.to_rows(target)


def _readout(problem: Problem, pooled: Tensor) -> Tensor:
    """Logits [B, C] in the working dtype, of features rounded to the inputs' dtype as at any module's boundary."""
    assert problem.readout_weight is not None
    acc, bias = working_dtype(pooled), problem.readout_bias
    return torch.nn.functional.linear(
        as_dtype(pooled, acc), as_dtype(problem.readout_weight, acc), None if bias is None else as_dtype(bias, acc)
    )


def _cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor | None, *, bounded: bool) -> tuple[Tensor, Tensor]:
    """Losses [B] and their gradients in the logits [B, C]; 0 for an example without a query.

    A label outside [0, C) makes both NaN; where PyTorch itself refuses such a label, labels are ``bounded`` already.
    """
    labels, outside = as_dtype(labels, torch.int64), None
    if valid is not None:
        labels = labels.where(valid, 0)
    if not bounded:
        outside = (labels < 0) | (labels >= logits.shape[1])
        labels = labels.clamp(0, logits.shape[1] - 1)
    log_p = logits.log_softmax(1)
    losses = torch.nn.functional.nll_loss(log_p, labels, reduction="none")
    # p − onehot(y), but its own class as −Σ_{v≠y} p_v: p_y − 1 would cancel where the example is sure.
    index = labels[:, None]
    gradient = log_p.exp_().scatter_(1, index, 0)
    gradient.scatter_(1, index, gradient.sum(1, keepdim=True).neg_())
    if outside is not None:
        losses, gradient = losses.masked_fill_(outside, torch.nan), gradient.masked_fill_(outside[:, None], torch.nan)
    if valid is not None:
        losses, gradient = losses.where(valid, 0), gradient.where(valid[:, None], 0)
    return losses, gradient
