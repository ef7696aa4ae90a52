"""Linear cross-entropy's Triton backend against the specification: every option, chunk, slab and form of the scores.

In Triton's interpreter, which runs the kernels on the CPU: that proves values, not ordering or speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import reference
from attent.ops import triton_chunks, triton_head
from attent_kernels.linear_cross_entropy import gram, rows

from .linear_cross_entropy_problems import (
    NAMES,
    PER_EXAMPLE,
    REDUCTIONS,
    Problem,
    no_looking,
    problems,
)

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@contextmanager
def small(max_bytes: int, tile: int = 128, block: int = 4096) -> Iterator[None]:
    """Buffers of so many bytes, so that chunks, parts, slabs and groups are several, and examples are long; Gram tiles
    of so many rows, and columns read so many at a time."""
    with ExitStack() as stack:
        for name in ("LOGITS_BYTES", "GRADIENT_BYTES"):
            stack.enter_context(mock.patch.object(triton_chunks, name, max_bytes))
        stack.enter_context(mock.patch.object(triton_head, "SLAB_BYTES", max_bytes))
        if max_bytes < 1 << 20:
            stack.enter_context(mock.patch.object(triton_head, "SLAB_TOKENS", 8))
            stack.enter_context(mock.patch.object(triton_head, "SLAB_COLUMNS", 4))
        stack.enter_context(mock.patch.object(gram, "TILE", tile))
        stack.enter_context(mock.patch.object(gram, "SUBTILE", tile // 2))
        stack.enter_context(mock.patch.object(rows, "MAX_BLOCK", block))
        yield


@contextmanager
def forms(name: str) -> Iterator[None]:
    """Exact "head" scores by "gram" or "direct" products wherever there is a choice; "cheaper": as it is chosen."""
    with ExitStack() as stack:
        if name != "cheaper":
            stack.enter_context(mock.patch.object(triton_head, "gram_is_cheaper", lambda *_: name == "gram"))
        yield


# ------------------------------------------------------------------------------------------------- every option, drawn


def leaves_of(problem: Problem, wanted: tuple[bool, ...]) -> tuple[Problem, list[Tensor]]:
    """The same problem with fresh leaves for input, weight and bias, and those whose gradient is wanted."""
    values = (problem.input, problem.linear_weight, problem.options.get("linear_bias"))
    hidden, weight, bias = (
        None if value is None else value.detach().requires_grad_(want)
        for value, want in zip(values, wanted, strict=True)
    )
    assert hidden is not None and weight is not None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return Problem(hidden, weight, problem.target, {**problem.options, "linear_bias": bias}), leaves


def largest(value: Tensor | None, otherwise: float = 0.0) -> float:
    return otherwise if value is None or not value.numel() else float(value.detach().abs().amax())


def float32_unit(problem: Problem) -> tuple[float, float]:
    """How far off, relatively, any probability may be in float32, and the largest mass M of a target.

    A logit is a sum of D products and a bias: off by D + 1 units of what they sum to. The exponential of its distance X
    from the maximum is off by X + 3 units of itself and by what the logit is; sums of V of them add log₂V < 4, and
    the handful of operations after (the division, factors, the accumulation over a few tokens) 16.
    """
    width = problem.input.shape[-1]
    terms = width * largest(problem.input) * largest(problem.linear_weight) + largest(problem.options["linear_bias"])
    mass = max(1.0, largest(problem.options["weight"])) * (2 if problem.target.is_floating_point() else 1)
    return UNIT[torch.float32] * ((width + 1) * terms + 2 * terms + 3 + 4 + 16), mass


def assert_equals_reference(problem: Problem, *, poisoned: Problem | None = None, **arguments: Any) -> None:
    """Loss, scores and gradients under an arbitrary upstream gradient are the specification's, in float32 units."""
    wanted = arguments.pop("wanted", (True, True, True))
    names = arguments.pop("score", NAMES)
    mine, leaves = leaves_of((problem if poisoned is None else poisoned).to(torch.float32), wanted)
    theirs, reference_leaves = leaves_of(problem.to(torch.float32).to(torch.float64), wanted)
    loss, scores = attent.linear_cross_entropy(*mine[:3], **mine.options, score=names, **arguments, backend="triton")
    right, right_scores = reference.linear_cross_entropy(*theirs[:3], **theirs.options, score=names, **arguments)
    assert loss.dtype == torch.float32 and not any(score.requires_grad for score in scores.values())

    unit, mass = float32_unit(theirs)
    width = theirs.input.shape[-1]
    classes, total = len(theirs.linear_weight), max(1, sum(theirs.lengths))
    reach = 2 * unit / UNIT[torch.float32]  # more than any logit's distance from the maximum, and log V
    weight = max(1.0, largest(theirs.options["example_weight"]))
    per_loss = unit * mass * reach * 0.1 * weight * (total if arguments["reduction"] == "sum" else 1)
    torch.testing.assert_close(loss.double(), right, rtol=unit, atol=per_loss)

    # ‖g‖ ≤ 2M for each token, so these are what sums of squares are units of.
    longest = max(theirs.lengths, default=0)
    h = math.sqrt(width) * largest(theirs.input) + 1
    w = math.sqrt(width) * largest(theirs.linear_weight) * math.sqrt(classes)
    scales = {"loss": mass * reach * 0.1, "logit": 2 * mass, "hidden": 2 * mass * w, "head": 2 * mass * h}
    for name, score in scores.items():
        of_token = scales[name] * (1 if name == "loss" else math.sqrt(max(1, longest)))
        if name == "head":
            # Each g_t is off by a unit of 2M, so the norm by T of those times ‖h‖; and the Gram form sums up terms
            # g_t·g_s h_t·h_s of either sign, of at most T Σ‖g_t‖² ‖h‖² together: its square is off by a unit of that.
            truth, norm = right_scores[name], of_token * math.sqrt(max(1, longest))
            summed = longest * h**2 * (right_scores["logit"] + 2 * mass * unit).square()
            error = (score.double().square() - truth.square()).abs()
            allowed = unit * (2 * truth * norm + unit * norm**2 + summed + truth.square())
            assert bool((error <= allowed).all()), (name, score, truth, allowed)
        else:
            torch.testing.assert_close(
                score.double(),
                right_scores[name],
                rtol=unit,
                atol=unit * of_token,
                msg=lambda text, n=name: f"{n}: {text}",
            )
    if not leaves:
        assert not loss.requires_grad
        return
    upstream = torch.randn(loss.shape, dtype=torch.float64)
    actual = torch.autograd.grad(loss, leaves, upstream.float())
    expected = torch.autograd.grad(right, reference_leaves, upstream)
    scale = 2 * mass * weight * max(1.0, largest(upstream)) * (1 if arguments["reduction"] == "mean" else total)
    if arguments["reduction"] == "mean" and theirs.options["weight"] is not None:
        per_token = 1.0  # the denominator may be any sum of class weights
        counted = torch.cat([theirs.valid(i) for i in range(len(theirs.lengths))] or [torch.zeros(0)]).bool()
        if not theirs.target.is_floating_point() and counted.any():
            labels = torch.cat([y[theirs.valid(i)] for i, (_, y) in enumerate(theirs.examples())]).long()
            per_token = float(theirs.options["weight"][labels].sum()) or 1.0
        scale *= max(1.0, total / per_token)
    for gradient, truth, by in zip(actual, expected, [w, h, 1.0], strict=False):
        torch.testing.assert_close(gradient.double(), truth, rtol=unit, atol=unit * scale * by)


options_of_a_call = {
    "reduction": st.sampled_from(REDUCTIONS),
    "per_example": st.sampled_from(PER_EXAMPLE),
    "wanted": st.sampled_from([(True, True, True), (True, False, False), (False, True, False)]),
    "max_bytes": st.sampled_from([1, 60, 200, 64 << 20]),
    "form": st.sampled_from(["cheaper", "gram", "direct"]),
}


def few_and_many(test: Any) -> Any:
    """Some examples in the fast tests, many in the slow ones: a row takes the interpreter 10 ms."""
    many = pytest.param(60, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [4, many])(test)


@few_and_many
def test_loss_scores_and_gradients_are_the_specifications(examples: int) -> None:
    @settings(max_examples=examples)
    @given(problem=problems(), **options_of_a_call)
    def check(problem: Problem, max_bytes: int, form: str, **arguments: Any) -> None:
        with small(max_bytes, tile=4, block=32), forms(form):
            assert_equals_reference(problem, **arguments)

    check()


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_long_examples_are_computed_again_slab_by_slab_with_every_option(kind: str, form: str) -> None:
    double = {"dtype": torch.float64}
    target = torch.randint(7, (5,)) if kind == "indices" else torch.randn(5, 7, **double).softmax(-1)
    options = {
        "cu_seqlens": torch.tensor([0, 4, 5], dtype=torch.int32),
        "linear_bias": torch.randn(7, **double),
        "weight": torch.rand(7, **double),
        "label_smoothing": 0.1,
        "softcap": 2.0,
        "shift": True,
        "example_weight": None,
    }
    problem = Problem(torch.randn(5, 3, **double), torch.randn(7, 3, **double), target, options)
    with small(60, tile=4), forms(form):  # chunks of two rows, slabs of two columns
        assert_equals_reference(problem, reduction="mean")


@few_and_many
def test_masked_tokens_are_as_good_as_left_out_whatever_their_hidden_states_hold(examples: int) -> None:
    @settings(max_examples=examples)
    @given(problem=problems(), **options_of_a_call)
    def check(problem: Problem, max_bytes: int, form: str, **arguments: Any) -> None:
        hidden, target = problem.input.clone(), problem.target.clone()
        computed = computed_tokens(problem)
        hidden[~computed.view(hidden.shape[:-1])] = math.nan
        if target.is_floating_point():  # with shift, the target of a token is in the next row
            used = computed.roll(1) if problem.options.get("shift") else computed
            target[~used.view(hidden.shape[:-1])] = math.nan
        with small(max_bytes, tile=4), forms(form), no_looking():
            assert_equals_reference(problem, poisoned=problem._replace(input=hidden, target=target), **arguments)

    check()


@few_and_many
def test_head_scores_without_logits_in_memory_are_the_specifications(examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        problem=problems().filter(lambda p: not p.target.is_floating_point()),
        max_bytes=st.sampled_from([1, 60, 64 << 20]),
        per_example=st.sampled_from(PER_EXAMPLE),
        looking=st.booleans(),
    )
    def check(problem: Problem, max_bytes: int, per_example: str, looking: bool) -> None:
        problem.options["label_smoothing"] = 0.0
        arguments = {"score": ("loss", "logit", "head"), "reduction": "example", "per_example": per_example}
        with ExitStack() as stack:
            stack.enter_context(small(max_bytes, tile=4))
            stack.enter_context(forms("gram"))
            if not looking:
                stack.enter_context(no_looking())
            run = stack.enter_context(mock.patch.object(triton_head, "run", wraps=triton_head.run))
            assert_equals_reference(problem, wanted=(False, False, False), **arguments)
        single = "cu_seqlens" not in problem.options and problem.input.shape[1:-1].numel() == 1
        tokens = computed_tokens(problem).sum() if looking else sum(problem.lengths)
        assert run.called == (not single and tokens > 0)

    check()


def computed_tokens(problem: Problem) -> Tensor:
    """Which of all tokens have a target, in an example whose weight is not 0."""
    computed = [torch.zeros(0, dtype=torch.bool)]
    for i, length in enumerate(problem.lengths):
        of_example = torch.zeros(length, dtype=torch.bool)
        of_example[: len(problem.valid(i))] = problem.valid(i)  # with shift the last token predicts nothing
        example_weight = problem.options["example_weight"]
        computed.append(of_example if example_weight is None else of_example & (example_weight[i] != 0))
    return torch.cat(computed)
