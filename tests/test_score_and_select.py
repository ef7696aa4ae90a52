"""score_and_select chooses what the scores of linear_cross_entropy and select_top_k choose together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import attent
from attent import reference

from .linear_cross_entropy_problems import NAMES, PER_EXAMPLE, Problem, problems


@settings(max_examples=100)
@given(data=st.data(), problem=problems(), score=st.sampled_from(NAMES), per_example=st.sampled_from(PER_EXAMPLE))
def test_the_lesson_is_the_choice_by_the_scores(
    data: st.DataObject, problem: Problem, score: str, per_example: str
) -> None:
    k = data.draw(st.integers(0, len(problem.lengths)))
    how = {
        "temperature": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "floor": data.draw(st.sampled_from([0.0, 0.5])),
        "seed": 7,
    }
    options: dict[str, Any] = {**problem.options, "score": score, "per_example": per_example}
    lesson = attent.score_and_select(*problem[:3], k, **options, **how)

    valid = torch.tensor([bool(problem.valid(i).any()) for i in range(len(problem.lengths))], dtype=torch.bool)
    if problem.options["example_weight"] is not None:
        valid &= problem.options["example_weight"] != 0
    _, scores = attent.linear_cross_entropy(*problem[:3], **options)
    for field, expected in zip(lesson, attent.select_top_k(scores, k, valid=valid, **how), strict=True):
        assert torch.equal(field, expected)

    # The specification's scores differ in the last digits, which may decide where scores are equal but for them.
    values = reference.linear_cross_entropy(*problem[:3], **options)[1][valid].sort().values
    if bool((values > 1e-6).all()) and bool((values.diff() > 1e-6).all()):
        specified = reference.score_and_select(*problem[:3], k, **options, **how)
        assert torch.equal(lesson.index, specified.index)
        torch.testing.assert_close(lesson.score, specified.score, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(lesson.inclusion, specified.inclusion, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", NAMES)
def test_the_hardest_examples_come_first(score: str) -> None:
    hidden, weight, target = torch.randn(50, 8), torch.randn(11, 8), torch.randint(11, (50,))
    lesson = attent.score_and_select(hidden, weight, target, 12, score=score)
    _, scores = attent.linear_cross_entropy(hidden, weight, target, score=score)
    order = scores.argsort(descending=True)[:12]
    assert torch.equal(lesson.index, order) and torch.equal(lesson.score, scores[order])
    assert torch.equal(lesson.inclusion, torch.ones(12))


def test_examples_without_tokens_or_weight_are_chosen_last() -> None:
    hidden, weight, target = torch.randn(5, 3, 4), torch.randn(7, 4), torch.randint(7, (5, 3))
    target[1] = -100
    example_weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])
    lesson = attent.score_and_select(hidden, weight, target, 5, example_weight=example_weight, temperature=1.0, seed=0)
    assert sorted(lesson.index[:3].tolist()) == [0, 3, 4] and lesson.index[3:].tolist() == [1, 2]
    assert torch.equal(lesson.score[3:], torch.zeros(2)) and torch.equal(lesson.inclusion, torch.ones(5))
    drawn = [
        attent.score_and_select(
            hidden, weight, target, 3, example_weight=example_weight, temperature=9.0, floor=1.0, seed=i
        )
        for i in range(20)
    ]
    assert all(set(lesson.index.tolist()) == {0, 3, 4} for lesson in drawn)


def test_it_keeps_no_graph_and_computes_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    lesson = attent.score_and_select(hidden, weight, torch.randint(7, (5,)), 2)
    assert not any(field.requires_grad for field in lesson)


def test_an_empty_pool_and_an_empty_choice() -> None:
    hidden, weight, target = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    assert attent.score_and_select(hidden, weight, target, 0).index.shape == (0,)
    assert attent.score_and_select(hidden[:0], weight, target[:0], 0).index.shape == (0,)


def test_it_compiles_to_one_graph() -> None:
    def lesson(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chosen = attent.score_and_select(hidden.tanh(), weight, target, 3, score="head")
        return F.one_hot(chosen.index, 6).sum(0)

    arguments = torch.randn(6, 2, 4), torch.randn(7, 4), torch.randint(7, (6, 2))
    compiled = torch.compile(lesson, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), lesson(*arguments))
