"""The op behind :func:`attent.scored_attention`: one schema returns everything, so that one launch may compute it.

Its arguments travel as two records, :class:`Problem` and :class:`Scoring`, in the order of the schema. A backend is a
pair of functions, registered with :mod:`.dispatch` as ``scored_attention`` and ``scored_attention_backward``::

    forward(problem, scoring) -> Results
    backward(problem, saved, gradients, wanted) -> gradients in query, key, value, readout weight, readout bias

What was not asked for is an empty tensor: an op's schema cannot leave an output out. Lengths, cu_seqlens and labels
come unread where reading them would wait for a device: a backend has to clamp them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attent_kernels.runtime import Allocate

from . import dispatch
from .plain_eager import nobody_listens
from .torch_attention import empty_rows_first, working_dtype


class Problem(NamedTuple):
    """What is computed and differentiated, of padded examples or, with both cu_seqlens, of packed ones."""

    query: Tensor  # [B, Hq, Tq, D] | [total_q, Hq, D]
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
        """B."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them; what is not there is None."""
        return self[:_TENSORS]  # type: ignore[return-value]  # of a slice mypy forgets what the fields are

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Query, key, value, readout weight and bias: what gradients come back for, in this order."""
        return self.query, self.key, self.value, self.readout_weight, self.readout_bias


class Scoring(NamedTuple):
    """What is scored and chosen, without gradient."""

    score: str | None
    per_example: str
    top_k: int | None
    temperature: float
    floor: float
    seed: Tensor | None  # [1] int64


class Results(NamedTuple):
    """Everything the launch returns; acc is float32, float64 for float64 inputs."""

    output: Tensor  # [B, Hq, Tq, Dv] stored as [B, Tq, Hq, Dv] | [total_q, Hq, Dv]
    logsumexp: Tensor  # acc [B, Hq, Tq] | [Hq, total_q]
    losses: Tensor  # acc [B]
    logits: Tensor  # [B, C]
    pooled: Tensor  # [B, Hq * Dv]
    logit_gradient: Tensor  # acc [B, C], of an example's loss in its logits: the score's and the backward's
    scores: Tensor  # acc [B]
    chosen: Tensor  # int64 [k]
    chosen_score: Tensor  # acc [k]
    inclusion: Tensor  # acc [k]


class Saved(NamedTuple):
    """The results that the backward reads again."""

    output: Tensor
    logsumexp: Tensor
    pooled: Tensor
    logit_gradient: Tensor


class Gradients(NamedTuple):
    """What comes back from the loss; None: nothing."""

    output: Tensor | None
    losses: Tensor | None
    logits: Tensor | None
    pooled: Tensor | None


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_FIELDS = len(Problem._fields)
_TENSORS = Problem._fields.index("is_causal")  # the fields before it are tensors, or None


# ------------------------------------------------------------------------------------------------------------- schema

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? target, Tensor? readout_weight, Tensor? readout_bias, "
    "Tensor? labels, Tensor? query_lengths, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "bool is_causal, float scale, SymInt window_left, SymInt window_right, float? softcap, str pool, str rows, "
    "str backend"
)
torch.library.define(
    "attent::scored_attention",
    f"({_PROBLEM}, str? score, str per_example, SymInt? top_k, float temperature, float floor, Tensor? seed) -> ("
    "Tensor output, Tensor logsumexp, Tensor losses, Tensor logits, Tensor pooled, Tensor logit_gradient, "
    "Tensor scores, Tensor chosen, Tensor chosen_score, Tensor inclusion)",
)
torch.library.define(
    "attent::scored_attention_backward",
    f"({_PROBLEM}, Tensor output, Tensor logsumexp, Tensor pooled, Tensor logit_gradient, Tensor? grad_output, "
    "Tensor? grad_losses, Tensor? grad_logits, Tensor? grad_pooled, bool[] wanted) -> ("
    "Tensor query, Tensor key, Tensor value, Tensor readout_weight, Tensor readout_bias)",
)


def _compute(problem: Problem, scoring: Scoring) -> Results:
    chosen = dispatch.choose("scored_attention", problem.backend, problem.query.device, problem)
    results: Results = dispatch.implementation("scored_attention", chosen)(problem, scoring)
    return results


def _compute_backward(problem: Problem, saved: Saved, gradients: Gradients, wanted: list[bool]) -> FiveTensors:
    chosen = dispatch.choose("scored_attention_backward", problem.backend, problem.query.device, problem)
    backward = dispatch.implementation("scored_attention_backward", chosen)
    five: FiveTensors = backward(problem, saved, gradients, wanted)
    return five


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_compute(Problem(*arguments[:_FIELDS]), Scoring(*arguments[_FIELDS:])))


def _backward(*arguments: Any) -> FiveTensors:
    problem, saved = Problem(*arguments[:_FIELDS]), Saved(*arguments[_FIELDS:-5])
    return _compute_backward(problem, saved, Gradients(*arguments[-5:-1]), arguments[-1])


# ------------------------------------------------------------------------------------------------------- shapes alone


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[:_FIELDS])

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return problem.query.new_empty_strided(shape, strides, dtype=dtype)

    return tuple(empty_results(problem, Scoring(*arguments[_FIELDS:]), empty))


def _backward_fake(*arguments: Any) -> FiveTensors:
    return empty_gradients(Problem(*arguments[:_FIELDS]), arguments[-1])


def empty_results(problem: Problem, scoring: Scoring, empty: Allocate) -> Results:
    """Results of the right shapes, dtypes and strides from an allocator, their values not set."""
    heads, width = problem.query.shape[1], problem.value.shape[-1]
    dtype, acc = problem.query.dtype, working_dtype(problem.query)
    batch, top_k = problem.batch, scoring.top_k or 0

    if problem.rows == "none":
        output, logsumexp = empty((0,), (1,), dtype), empty((0,), (1,), acc)
    elif problem.cu_seqlens_q is not None:
        rows = batch if problem.rows == "pooled" else problem.query.shape[0]
        output = empty((rows, heads, width), (heads * width, width, 1), dtype)
        logsumexp = empty((heads, rows), (max(rows, 1), 1), acc)
    else:
        rows = 1 if problem.rows == "pooled" else problem.query.shape[2]
        least = max(rows, 1)
        output = empty((batch, heads, rows, width), (least * heads * width, width, heads * width, 1), dtype)
        logsumexp = empty((batch, heads, rows), (heads * least, least, 1), acc)
    if problem.readout_weight is None:
        logits, pooled, logit_gradient = empty((0,), (1,), dtype), empty((0,), (1,), dtype), empty((0,), (1,), acc)
    else:
        classes = problem.readout_weight.shape[0]
        logits = empty((batch, classes), (classes, 1), dtype)
        pooled = empty((batch, heads * width), (heads * width, 1), dtype)
        logit_gradient = empty((batch, classes), (classes, 1), acc)
    return Results(
        output,
        logsumexp,
        empty((batch,), (1,), acc),
        logits,
        pooled,
        logit_gradient,
        scores=empty((0 if scoring.score is None else batch,), (1,), acc),
        chosen=empty((top_k,), (1,), torch.int64),
        chosen_score=empty((top_k,), (1,), acc),
        inclusion=empty((top_k,), (1,), acc),
    )


def empty_gradients(problem: Problem, wanted: list[bool]) -> FiveTensors:
    """Gradients of the right shapes, dtypes and strides, their values not set; those not wanted are empty."""
    gradients = []
    for tensor, want in zip(problem.differentiable(), wanted, strict=True):
        if not want or tensor is None:
            gradients.append(problem.query.new_empty(0))
        elif tensor.dim() == 4:
            batch, heads, rows, width = tensor.shape
            gradients.append(empty_rows_first(tensor, batch, heads, rows, width))
        else:
            gradients.append(tensor.new_empty(tensor.shape))
    query, key, value, weight, bias = gradients
    return query, key, value, weight, bias


# ----------------------------------------------------------------------------------------------------------- autograd

# By hand and not by torch.library.register_autograd: what that puts around a call asks the schema for its arguments
# once per argument, and each time gets a new list of all of them. For these 25 that took 0.4 ms a call on a CPU core.


class _ScoredAttention(torch.autograd.Function):
    """Takes the differentiable tensors one by one, so that autograd sees them, and the problem that holds them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        scoring: Scoring,
        is_plain: bool,
    ) -> tuple[Tensor, ...]:
        results = _below_autograd(problem, scoring, is_plain)
        without_gradient = [results.logsumexp, *results[5:]]
        if problem.rows == "none":
            without_gradient.append(results.output)
        if problem.target is not None:
            without_gradient += [results.logits, results.pooled]
        ctx.mark_non_differentiable(*without_gradient)
        ctx.set_materialize_grads(False)  # what a loss does not use costs nothing
        saved = Saved(results.output, results.logsumexp, results.pooled, results.logit_gradient)
        ctx.save_for_backward(*problem.tensors(), *saved)
        ctx.options = problem[_TENSORS:]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = Gradients(grads[0], *grads[2:5])
        if all(gradient is None for gradient in gradients):
            return (None,) * 8
        # once_differentiable would let a second derivative pass as 0. (What a compiler traces is not a plain Tensor.)
        if torch.is_grad_enabled() and any(type(gradient) is Tensor for gradient in gradients):
            raise RuntimeError("scored_attention is differentiable once: call backward without create_graph=True")
        to_readout = gradients.losses is not None or gradients.logits is not None
        query, key, value, weight, bias, *_ = ctx.needs_input_grad
        wanted = [query, key, value, weight and to_readout, bias and to_readout]
        tensors = ctx.saved_tensors
        problem, saved = Problem(*tensors[:_TENSORS], *ctx.options), Saved(*tensors[_TENSORS:])
        with torch._C._AutoDispatchBelowAutograd():
            if nobody_listens((*problem.tensors(), *gradients)):
                five = _compute_backward(problem, saved, gradients, wanted)
            else:
                five = torch.ops.attent.scored_attention_backward(*problem, *saved, *gradients, wanted)
        return *(gradient if want else None for gradient, want in zip(five, wanted, strict=True)), None, None, None


def _with_autograd(problem: Problem, scoring: Scoring, is_plain: bool) -> Results:
    if torch.is_grad_enabled():
        tensors = problem.differentiable()
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                apply: Any = _ScoredAttention.apply
                return Results(*apply(*tensors, problem, scoring, is_plain))
    return _below_autograd(problem, scoring, is_plain)


def _below_autograd(problem: Problem, scoring: Scoring, is_plain: bool) -> Results:
    with torch._C._AutoDispatchBelowAutograd():
        if is_plain:
            return _compute(problem, scoring)
        return Results(*torch.ops.attent.scored_attention(*problem, *scoring))


def _autograd(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_with_autograd(Problem(*arguments[:_FIELDS]), Scoring(*arguments[_FIELDS:]), False))


def run(problem: Problem, scoring: Scoring) -> Results:
    """Call the op, past the dispatcher where nobody listens there: it took 0.15 ms of a training step on a CPU core."""
    if nobody_listens(problem.tensors()):
        return _with_autograd(problem, scoring, True)
    return Results(*torch.ops.attent.scored_attention(*problem, *scoring))


torch.library.impl("attent::scored_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("attent::scored_attention", "Autograd", _autograd)
torch.library.register_fake("attent::scored_attention", _fake)
torch.library.impl("attent::scored_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("attent::scored_attention_backward", _backward_fake)
