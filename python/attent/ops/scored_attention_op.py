"""The op behind :func:`attent.scored_attention`: one schema returns everything, so that one launch may compute it.

Its arguments travel as two records, :class:`Problem` and :class:`Scoring`, in the order of the schema. A backend is a pair of
functions registered with :mod:`.dispatch` under the names ``scored_attention`` and ``scored_attention_backward``::

    forward(problem, scoring) -> Results
    backward(problem, saved, gradients, wanted) -> gradients in query, key, value, readout weight, readout bias

What was not asked for is an empty tensor: an op's schema cannot leave an output out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .torch_attention import empty_rows_first, working_dtype


class Problem(NamedTuple):
    """What is computed and differentiated. Padded: query [B, Hq, Tq, D]; packed, with both cu_seqlens: [total_q, Hq, D]."""

    query: Tensor
    key: Tensor  # [B, Hkv, Tk, D] | [total_k, Hkv, D]
    value: Tensor  # [B, Hkv, Tk, Dv] | [total_k, Hkv, Dv]
    target: Tensor | None  # like output
    readout_weight: Tensor | None  # [C, Hq * Dv]
    readout_bias: Tensor | None  # [C]
    labels: Tensor | None  # [B] int32 or int64
    query_lengths: Tensor | None  # [B] int32 or int64
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None  # [B + 1] int32
    cu_seqlens_k: Tensor | None
    is_causal: bool
    scale: float
    window_left: int  # -1: unbounded
    window_right: int
    softcap: float | None
    pool: str  # mean | first | last
    rows: str  # which rows of output and logsumexp to return: all | pooled (first or last: that one row) | none
    backend: str

    @property
    def batch(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]  # in either layout


class Scoring(NamedTuple):
    """What is scored and chosen, without gradient."""

    score: str | None
    per_example: str
    top_k: int | None
    temperature: float
    floor: float
    seed: Tensor | None  # [] int64


class Results(NamedTuple):
    """Everything the launch returns; acc is float32, float64 for float64 inputs."""

    output: Tensor  # [B, Hq, Tq, Dv] stored as [B, Tq, Hq, Dv] | [total_q, Hq, Dv]
    logsumexp: Tensor  # acc [B, Hq, Tq] | [Hq, total_q]
    losses: Tensor  # acc [B]
    logits: Tensor  # [B, C]
    pooled: Tensor  # [B, Hq * Dv]
    logit_gradient: Tensor  # acc [B, C], of an example's loss in its logits: the score's and the backward's
    scores: Tensor  # acc [B]
    index: Tensor  # int64 [k]
    chosen_score: Tensor  # acc [k]
    inclusion: Tensor  # acc [k]


class Gradients(NamedTuple):
    """What comes back from the loss; None: nothing."""

    output: Tensor | None
    losses: Tensor | None
    logits: Tensor | None
    pooled: Tensor | None


class Saved(NamedTuple):
    """The results that the backward reads again."""

    output: Tensor
    logsumexp: Tensor
    pooled: Tensor
    logit_gradient: Tensor


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? target, Tensor? readout_weight, Tensor? readout_bias, Tensor? labels, "
    "Tensor? query_lengths, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal, float scale, "
    "SymInt window_left, SymInt window_right, float? softcap, str pool, str rows, str backend"
)
torch.library.define(
    "attent::scored_attention",
    f"({_PROBLEM}, str? score, str per_example, SymInt? top_k, float temperature, float floor, Tensor? seed) -> (Tensor output, "
    "Tensor logsumexp, Tensor losses, Tensor logits, Tensor pooled, Tensor logit_gradient, Tensor scores, Tensor index, "
    "Tensor chosen_score, Tensor inclusion)",
)
torch.library.define(
    "attent::scored_attention_backward",
    f"({_PROBLEM}, Tensor output, Tensor logsumexp, Tensor pooled, Tensor logit_gradient, Tensor? grad_output, Tensor? grad_losses, "
    "Tensor? grad_logits, Tensor? grad_pooled, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_FIELDS = len(Problem._fields)


# ------------------------------------------------------------------------------------------------------- the kernels


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, scoring = Problem(*arguments[:_FIELDS]), Scoring(*arguments[_FIELDS:])
    chosen = dispatch.choose("scored_attention", problem.backend, problem.query.device)
    results: Results = dispatch.implementation("scored_attention", chosen)(problem, scoring)
    return tuple(results)


def _backward(*arguments: Any) -> FiveTensors:
    problem = Problem(*arguments[:_FIELDS])
    saved, gradients, wanted = Saved(*arguments[_FIELDS:-5]), Gradients(*arguments[-5:-1]), arguments[-1]
    chosen = dispatch.choose("scored_attention_backward", problem.backend, problem.query.device)
    backward = dispatch.implementation("scored_attention_backward", chosen)
    five: FiveTensors = backward(problem, saved, gradients, wanted)
    return five


# ---------------------------------------------------------------------------------------------------- shapes alone


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, scoring = Problem(*arguments[:_FIELDS]), Scoring(*arguments[_FIELDS:])
    return tuple(empty_results(problem, scoring))


def empty_results(problem: Problem, scoring: Scoring) -> Results:
    """Results of the right shapes, dtypes and strides, their values not set."""
    query, width = problem.query, problem.value.shape[-1]
    batch, heads, acc = problem.batch, problem.heads, working_dtype(query)

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    if problem.rows == "none":
        output, logsumexp = empty(0, dtype=query.dtype), empty(0)
    elif problem.cu_seqlens_q is not None:
        rows = batch if problem.rows == "pooled" else query.shape[0]
        output, logsumexp = empty(rows, heads, width, dtype=query.dtype), empty(heads, rows)
    else:
        rows = 1 if problem.rows == "pooled" else query.shape[2]
        output, logsumexp = empty_rows_first(query, batch, heads, rows, width, query.dtype), empty(batch, heads, rows)
    classes = None if problem.readout_weight is None else problem.readout_weight.shape[0]
    return Results(
        output,
        logsumexp,
        losses=empty(batch),
        logits=empty(0, dtype=query.dtype) if classes is None else empty(batch, classes, dtype=query.dtype),
        pooled=empty(0, dtype=query.dtype) if classes is None else empty(batch, heads * width, dtype=query.dtype),
        logit_gradient=empty(0) if classes is None else empty(batch, classes),
        scores=empty(0 if scoring.score is None else batch),
        index=empty(scoring.top_k or 0, dtype=torch.int64),
        chosen_score=empty(scoring.top_k or 0),
        inclusion=empty(scoring.top_k or 0),
    )


def _backward_fake(*arguments: Any) -> FiveTensors:
    return empty_gradients(Problem(*arguments[:_FIELDS]), arguments[-1])


def empty_gradients(problem: Problem, wanted: list[bool]) -> FiveTensors:
    """Gradients of the right shapes, dtypes and strides, their values not set; those not wanted are empty."""
    gradients = []
    for name, want in zip(("query", "key", "value", "readout_weight", "readout_bias"), wanted, strict=True):
        tensor = getattr(problem, name)
        if not want:
            gradients.append(problem.query.new_empty(0))
        elif tensor.dim() == 4:
            batch, heads, rows, width = tensor.shape
            gradients.append(empty_rows_first(tensor, batch, heads, rows, width, tensor.dtype))
        else:
            gradients.append(tensor.new_empty(tensor.shape))
    query, key, value, weight, bias = gradients
    return query, key, value, weight, bias


# -------------------------------------------------------------------------------------------------------- autograd

# By hand and not by torch.library.register_autograd: what that puts around each call reads the schema once per argument,
# each time as a new list of all of them. With 25 arguments it took 0.4 ms of a call on a CPU core.

_TENSORS = 11  # the first fields of Problem are tensors, or None
_DIFFERENTIABLE = (0, 1, 2, 4, 5)  # of them: query, key, value, readout weight and bias


class _ScoredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = torch.ops.attent.scored_attention(*arguments)
        output, logsumexp, _, logits, pooled, *rest = results
        problem = Problem(*arguments[:_FIELDS])
        left_out = [] if problem.target is None else [logits, pooled]
        left_out += [output] if problem.rows == "none" else []
        ctx.mark_non_differentiable(logsumexp, *rest, *left_out)
        ctx.set_materialize_grads(False)  # what a loss does not use costs nothing
        ctx.save_for_backward(*arguments[:_TENSORS], output, logsumexp, pooled, rest[0])
        ctx.options = arguments[_TENSORS:_FIELDS]
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        grad_output, _, grad_losses, grad_logits, grad_pooled = grads[:5]
        if grad_output is None and grad_losses is None and grad_logits is None and grad_pooled is None:
            return (None,) * len(needs)
        to_readout = grad_losses is not None or grad_logits is not None
        wanted = [needs[0], needs[1], needs[2], needs[4] and to_readout, needs[5] and to_readout]
        tensors = ctx.saved_tensors
        gradients = torch.ops.attent.scored_attention_backward(
            *tensors[:_TENSORS],
            *ctx.options,
            *tensors[_TENSORS:],
            grad_output,
            grad_losses,
            grad_logits,
            grad_pooled,
            wanted,
        )
        query, key, value, weight, bias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return query, key, value, None, weight, bias, *(None,) * (len(needs) - 6)  # the target takes no gradient


def _with_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        for i in _DIFFERENTIABLE:
            if arguments[i] is not None and arguments[i].requires_grad:
                results: tuple[Tensor, ...] = _ScoredAttention.apply(*arguments)
                return results
    with torch._C._AutoDispatchBelowAutograd():
        results = torch.ops.attent.scored_attention(*arguments)
    return results


torch.library.impl("attent::scored_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("attent::scored_attention", "Autograd", _with_autograd)
torch.library.register_fake("attent::scored_attention", _fake)
torch.library.impl("attent::scored_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("attent::scored_attention_backward", _backward_fake)
