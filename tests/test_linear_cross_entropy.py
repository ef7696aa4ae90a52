"""The torch backend of linear cross-entropy against the specification, in float64: every option, chunk and form."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import _checks, reference
from attent.ops import head_scores, torch_linear_cross_entropy
from attent.ops import linear_cross_entropy as arguments_of_the_call

from .linear_cross_entropy_problems import (
    NAMES,
    PER_EXAMPLE,
    REDUCTIONS,
    Problem,
    no_looking,
    passes_of,
    problems,
    small_chunks,
    with_layout,
)

# Numbers of order one and sums of some hundred of them, whose order differs: below 1e-13 of the terms in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
NAN = float("nan")


def assert_scores_close(actual: dict[str, Tensor], expected: dict[str, Tensor], problem: Problem) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        if name == "head":
            # From a Gram matrix the square is a sum of terms g_t·g_s h_t·h_s of either sign, of at most
            # T Σ‖g_t‖² ‖h_t‖² together, and it is right to so many units; and as far as everything else is.
            longest = max(problem.lengths, default=0)
            widest = problem.input.square().sum(-1).amax() + 1 if problem.input.numel() else 0
            terms = longest * widest * expected["logit"].square()
            error = (actual[name].square() - expected[name].square()).abs()
            allowed = 1e-13 * terms + 1e-10 * expected[name].square() + 1e-24
            assert bool((error <= allowed).all()), (actual[name], expected[name])
        else:
            torch.testing.assert_close(
                actual[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


def leaves_of(problem: Problem, wanted: tuple[bool, ...]) -> tuple[Problem, list[Tensor]]:
    """The same problem with fresh leaves for input, weight and bias, and those whose gradient is wanted."""
    hidden, weight, bias = (
        None if value is None else value.detach().requires_grad_(want)
        for value, want in zip(
            (problem.input, problem.linear_weight, problem.options.get("linear_bias")), wanted, strict=True
        )
    )
    assert hidden is not None and weight is not None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return Problem(hidden, weight, problem.target, {**problem.options, "linear_bias": bias}), leaves


def assert_equals_reference(problem: Problem, *, poisoned: Problem | None = None, **arguments: Any) -> None:
    """Loss, scores and gradients under an arbitrary upstream gradient are the specification's."""
    wanted = arguments.pop("wanted", (True, True, True))
    mine, leaves = leaves_of(problem if poisoned is None else poisoned, wanted)
    theirs, reference_leaves = leaves_of(problem, wanted)
    loss, scores = attent.linear_cross_entropy(*mine[:3], **mine.options, score=NAMES, **arguments)
    expected, expected_scores = reference.linear_cross_entropy(*theirs[:3], **theirs.options, score=NAMES, **arguments)
    assert loss.dtype == torch.float64 and not any(score.requires_grad for score in scores.values())
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert_scores_close(scores, expected_scores, problem)
    if not leaves:
        assert not loss.requires_grad
        return
    upstream = torch.randn(loss.shape, dtype=loss.dtype)
    actual = torch.autograd.grad(loss, leaves, upstream)
    for gradient, truth in zip(actual, torch.autograd.grad(expected, reference_leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, truth, **CLOSE)


# ------------------------------------------------------------------------------------------------- every option, drawn

options_of_a_call = {
    "reduction": st.sampled_from(REDUCTIONS),
    "per_example": st.sampled_from(PER_EXAMPLE),
    "wanted": st.sampled_from([(True, True, True), (True, False, False), (False, True, False), (False, False, False)]),
    "max_bytes": st.sampled_from([1, 200, 600, 64 << 20]),
}


@pytest.mark.parametrize("passes", ["native", "PyTorch"])
@settings(max_examples=200)
@given(problem=problems(), **options_of_a_call)
def test_loss_scores_and_gradients_are_the_specifications(
    passes: str, problem: Problem, max_bytes: int, **arguments: Any
) -> None:
    with small_chunks(max_bytes), passes_of(passes):
        assert_equals_reference(problem, **arguments)


@settings(max_examples=200)
@given(problem=problems(), **options_of_a_call)
def test_masked_tokens_are_as_good_as_left_out_whatever_their_hidden_states_hold(
    problem: Problem, max_bytes: int, **arguments: Any
) -> None:
    hidden, target = problem.input.clone(), problem.target.clone()
    computed = computed_tokens(problem)
    hidden[~computed.view(hidden.shape[:-1])] = NAN
    if target.is_floating_point():  # with shift, the target of a token is in the next row
        used = computed.roll(1) if problem.options.get("shift") else computed
        target[~used.view(hidden.shape[:-1])] = NAN
    with small_chunks(max_bytes), no_looking():
        assert_equals_reference(problem, poisoned=problem._replace(input=hidden, target=target), **arguments)


def computed_tokens(problem: Problem) -> Tensor:
    """Which of all tokens have a target, in an example whose weight is not 0."""
    computed = [torch.zeros(0, dtype=torch.bool)]
    for i, length in enumerate(problem.lengths):
        of_example = torch.zeros(length, dtype=torch.bool)
        of_example[: len(problem.valid(i))] = problem.valid(i)  # with shift the last token predicts nothing
        example_weight = problem.options["example_weight"]
        computed.append(of_example if example_weight is None else of_example & (example_weight[i] != 0))
    return torch.cat(computed)


def test_one_score_or_several_or_none() -> None:
    hidden, weight, target = torch.randn(4, 3), torch.randn(7, 3), torch.randint(7, (4,))
    loss = attent.linear_cross_entropy(hidden, weight, target)
    assert isinstance(loss, Tensor)
    same_loss, scores = attent.linear_cross_entropy(hidden, weight, target, score="head")
    again, by_name = attent.linear_cross_entropy(hidden, weight, target, score=("head", "loss"))
    assert torch.equal(loss, same_loss) and torch.equal(loss, again)
    assert list(by_name) == ["head", "loss"] and torch.equal(by_name["head"], scores)


# ------------------------------------------------------------------------------------------ chunks, slabs, Gram, direct


def packed_problem(lengths: list[int], classes: int, width: int, **options: Any) -> Problem:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    hidden, weight = torch.randn(total, width, dtype=torch.float64), torch.randn(classes, width, dtype=torch.float64)
    return Problem(hidden, weight, torch.randint(classes, (total,)), {"cu_seqlens": cu_seqlens, **options})


# The Gram form costs T²(V + D), the direct form T V D: with V = 12, D = 6 the Gram form pays up to T = 4 (bias: D = 7).
# max_bytes 384 holds 4 rows of 12 float64 logits, or a Gram matrix of 6 x 6: what is longer than 4 is long. 48 holds
# half a row: everything is long but single tokens, and no Gram matrix larger than 2 x 2 fits.
PATHS = {
    "Gram": ([4, 3, 0, 1], 384, {"whole Gram"}),
    "direct": ([6, 5], 768, {"whole direct"}),
    "long direct": ([9, 7], 384, {"long direct"}),
    "mixed": ([9, 2, 0, 4, 5], 384, {"whole Gram", "long direct"}),
    "tiny": ([2, 1, 3], 48, {"whole Gram", "long Gram", "long direct"}),
}


def record_paths(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[int]]:
    """Notes which form each example's "head" score takes, and how many columns each slab has."""
    taken: set[str] = set()
    slabs: list[int] = []
    cheaper, whole, long = head_scores.gram_is_cheaper, head_scores.head_square, head_scores.long_head_square
    where = ""

    def gram_is_cheaper(*sizes: int) -> bool:
        answer = cheaper(*sizes)
        taken.add(f"{where} {'Gram' if answer else 'direct'}")
        return answer

    def head_square(*arguments: Any) -> Tensor:
        nonlocal where
        where = "whole"
        return whole(*arguments)

    def long_head_square(write_gradient: Any, classes: int, slab: int, features: Tensor) -> Tensor:
        nonlocal where
        where = "long"
        slabs.append(-(-classes // slab))
        return long(write_gradient, classes, slab, features)

    monkeypatch.setattr(head_scores, "gram_is_cheaper", gram_is_cheaper)
    monkeypatch.setattr(torch_linear_cross_entropy, "head_square", head_square)
    monkeypatch.setattr(torch_linear_cross_entropy, "long_head_square", long_head_square)
    return taken, slabs


@pytest.mark.parametrize("passes", ["native", "PyTorch"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities", "capped", "weighted"])
def test_every_form_of_the_head_score_is_exact(
    kind: str, path: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, max_bytes, forms = PATHS[path]
    problem = packed_problem(lengths, 12, 6, linear_bias=torch.randn(12, dtype=torch.float64))
    options = {
        "smoothed": {"label_smoothing": 0.1},
        "capped": {"softcap": 3.0},
        "weighted": {"weight": torch.rand(12, dtype=torch.float64), "label_smoothing": 0.1, "softcap": 3.0},
    }
    problem.options.update(options.get(kind, {}))
    if "softcap" in problem.options:  # logits and their slopes: fewer rows in a chunk, so other forms
        max_bytes, forms = max_bytes * 2, set()
        problem.options["shift"] = True
    if kind == "probabilities":
        problem = problem._replace(target=torch.randn(sum(lengths), 12, dtype=torch.float64).softmax(1))
    taken, slabs = record_paths(monkeypatch)
    with small_chunks(max_bytes), passes_of(passes):
        assert_equals_reference(problem)
    assert taken >= forms
    if "long" in path:
        assert max(slabs) > 1


def test_long_examples_take_the_gram_form_over_several_slabs_where_that_is_cheaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = packed_problem([5, 6], 200, 40)  # a row of logits takes 1600 bytes, a Gram matrix 288 at most
    taken, slabs = record_paths(monkeypatch)
    with small_chunks(1600):
        assert_equals_reference(problem)
    assert taken == {"long Gram"} and min(slabs) > 1


def test_examples_of_one_token_take_neither_form_even_where_some_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.randint(12, (40,))
    target[::3] = -100
    hidden, weight = torch.randn(40, 6, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    taken, _ = record_paths(monkeypatch)
    assert_equals_reference(Problem(hidden, weight, target, {"linear_bias": weight[:, 0].clone()}))
    assert taken == set()  # ‖g hᵀ‖ = ‖g‖ ‖h‖, not a product for each example


def test_chunks_end_where_rows_no_longer_fit() -> None:
    plan = torch_linear_cross_entropy.plan
    assert [chunk[:2] for chunk in plan(7, 3, None)] == [(0, 3), (3, 6), (6, 7)]
    chunks = plan(16, 4, [0, 0, 2, 4, 9, 9, 10, 16, 16])  # lengths 0 2 2 5 0 1 6 0
    assert chunks == [
        (0, 4, range(3)),  # whole examples, as many as fit
        (4, 8, range(0)),  # a long one in pieces
        (8, 9, range(0)),
        (9, 10, range(4, 6)),
        (10, 14, range(0)),
        (14, 16, range(0)),
    ]
    assert plan(0, 4, None) == [] and plan(0, 4, [0, 0, 0]) == []


# ------------------------------------------------------------------------------------------------------- odd layouts


def test_targets_at_any_stride_are_read_where_they_lie() -> None:
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    wide = torch.randint(5, (6, 3))
    for target in (wide[:, 1], torch.tensor(3).expand(6), wide.T.contiguous().T[:, 2].int()):
        assert_equals_reference(Problem(hidden, weight, target, {}))
    probabilities = with_layout(torch.randn(6, 5, dtype=torch.float64).softmax(1), "transposed")
    assert_equals_reference(Problem(hidden, weight, probabilities, {}))


def test_expanded_inputs_get_the_gradient_of_each_copy() -> None:
    row, weight = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    target = torch.randint(5, (2, 3))
    loss = attent.linear_cross_entropy(row.expand(2, 3, 4), weight, target, reduction="sum")
    expected = reference.linear_cross_entropy(row.expand(2, 3, 4), weight, target, reduction="sum")
    torch.testing.assert_close(*(torch.autograd.grad(of, row)[0] for of in (loss, expected)), **CLOSE)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (3, 0, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_give_zero_losses_and_gradients(shape: tuple[int, ...], reduction: str) -> None:
    problem = Problem(
        torch.zeros(shape, dtype=torch.float64),
        torch.randn(5, 4, dtype=torch.float64),
        torch.zeros(shape[:-1], dtype=torch.int64),
        {},
    )
    assert_equals_reference(problem, reduction=reduction)
    with no_looking():
        assert_equals_reference(problem, reduction=reduction)
    for lengths in ([], [0, 0]):
        assert_equals_reference(packed_problem(lengths, 5, 4, shift=True), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("looking", [True, False])
def test_when_all_tokens_are_ignored_loss_scores_and_gradients_are_zero(looking: bool, reduction: str) -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    target = torch.full((2, 3), -100)
    with no_looking() if not looking else small_chunks(64 << 20):
        loss, scores = attent.linear_cross_entropy(hidden, weight, target, reduction=reduction, score=NAMES)
        loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    for zero in (*scores.values(), hidden.grad, weight.grad):
        assert zero is not None and torch.equal(zero, torch.zeros_like(zero))


# ------------------------------------------------------------------------------------------ values that nobody checked


def unchecked(*tensors: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A call that reads no values to check them, as compiled ones and those on a GPU."""
    with (
        mock.patch.object(_checks, "values_readable", lambda value: False),
        mock.patch.object(arguments_of_the_call, "values_readable", lambda value: False),
    ):
        loss, scores = attent.linear_cross_entropy(*tensors, score=NAMES, **options)
    return loss, scores


@pytest.mark.parametrize("label", [-1, 5, 2**40])
@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(5)}], ids=["", "smoothed", "weighted"]
)
def test_a_label_that_is_no_class_makes_its_example_nan_and_no_other(
    options: dict[str, Any], looking: bool, label: int
) -> None:
    hidden, weight, target = torch.randn(3, 2, 4), torch.randn(5, 4), torch.randint(5, (3, 2))
    expected = attent.linear_cross_entropy(hidden, weight, target, reduction="example", score=NAMES, **options)
    target[1, 0] = label
    with no_looking() if not looking else small_chunks(64 << 20):
        loss, scores = unchecked(hidden, weight, target, reduction="example", **options)
    for actual, right in zip((loss, *scores.values()), (expected[0], *expected[1].values()), strict=True):
        assert bool(actual[1].isnan())
        torch.testing.assert_close(actual[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("cu_seqlens", [[3, 9], [0, 4, 2, 6], [-5, 3, 99], [0, 2, 4], [7, 7, 7]])
@pytest.mark.parametrize("looking", [True, False])
def test_malformed_cu_seqlens_that_nobody_checked_reach_no_foreign_memory(looking: bool, cu_seqlens: list[int]) -> None:
    hidden, weight, target = torch.randn(6, 4), torch.randn(5, 4), torch.randint(5, (6,))
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
    with no_looking() if not looking else small_chunks(64 << 20):
        _, scores = unchecked(hidden, weight, target, cu_seqlens=offsets, example_weight=torch.ones(len(offsets) - 1))
    tokens_in = offsets.clamp(0, 6).cummax(0).values
    tokens_in[0], tokens_in[-1] = 0, 6  # as they are taken: clamped, never falling, all tokens in some example
    for name, score in attent.linear_cross_entropy(hidden, weight, target, cu_seqlens=tokens_in, score=NAMES)[
        1
    ].items():
        assert torch.equal(scores[name], score)


# ---------------------------------------------------------------------------------------------------------- determinism


@settings(max_examples=20)
@given(problem=problems(), reduction=st.sampled_from(REDUCTIONS))
def test_the_same_call_twice_is_bit_identical(problem: Problem, reduction: str) -> None:
    problem = problem.to(torch.float32)

    def results() -> list[Tensor]:
        mine, leaves = leaves_of(problem, (True, True, True))
        loss, scores = attent.linear_cross_entropy(*mine[:3], **mine.options, reduction=reduction, score=NAMES)
        return [loss, *scores.values(), *torch.autograd.grad(loss.sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))
