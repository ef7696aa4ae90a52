"""score_and_select on Triton: the lesson of the launch's own scores, in that launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent.ops.dispatch import implementation
from attent_kernels import pools, runtime, select

from .launches import counted_launches
from .linear_cross_entropy_problems import Problem, problems
from .scorer_tiles import small_tiles

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN slice):RuntimeWarning")

HARD: dict[str, Any] = {"temperature": 0.0, "floor": 0.0}
DRAWN: dict[str, Any] = {"temperature": 0.7, "floor": 0.4, "seed": 5}


def assert_is_the_choice(
    problem: Problem, k: int, score: str, how: dict[str, Any], launches: Sequence[str] = ("score_kernel",)
) -> None:
    """The lesson equals PyTorch's choice by the scores that the same kernel gives, and that in these launches."""
    with counted_launches() as launched:
        lesson = attent.score_and_select(*problem[:3], k, **problem.options, score=score, **how, backend="triton")
    assert launched == list(launches) and runtime.open_tickets() == 0
    _, scores = attent.linear_cross_entropy(*problem[:3], **problem.options, score=score, backend="triton")
    valid = torch.tensor([bool(problem.valid(i).any()) for i in range(len(problem.lengths))], dtype=torch.bool)
    if problem.options.get("example_weight") is not None:
        valid &= problem.options["example_weight"] != 0
    expected = attent.select_top_k(scores, k, valid=valid, **how, backend="torch")
    assert torch.equal(lesson.index, expected.index) and torch.equal(lesson.score, expected.score)
    # Exponentials and logarithms of two libraries, each right to a unit or two, of numbers below a hundred.
    torch.testing.assert_close(lesson.inclusion, expected.inclusion, rtol=1e-5, atol=1e-6)


@settings(max_examples=8)
@given(data=st.data(), problem=problems(), how=st.sampled_from([HARD, DRAWN]))
def test_the_lesson_is_the_choice_by_the_scores(data: st.DataObject, problem: Problem, how: dict[str, Any]) -> None:
    batch = len(problem.lengths)
    single = "cu_seqlens" not in problem.options and problem.input.shape[1:-1].numel() == 1
    name = data.draw(st.sampled_from(["logit", "loss", "head"] if single else ["logit", "loss"]))
    with small_tiles(rows=8, classes=8, width=8):
        assert_is_the_choice(
            problem.to(torch.float32), data.draw(st.integers(0, batch)), name, how, ["score_kernel"] * (batch > 0)
        )


def test_it_is_one_launch_under_the_profiler_too() -> None:
    """Who counts launches must see those that there are when nobody counts."""
    problem = Problem(torch.randn(9, 4), torch.randn(5, 4), torch.randint(5, (9,)), {})
    with small_tiles(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert_is_the_choice(problem, 3, "logit", HARD)


@pytest.mark.parametrize("how", [HARD, DRAWN], ids=["hard", "drawn"])
@pytest.mark.parametrize("score", ["loss", "logit", "head"])
def test_a_pool_of_rows_in_several_tiles(score: str, how: dict[str, Any]) -> None:
    target = torch.randint(9, (50,))
    target[::7] = -100
    problem = Problem(torch.randn(50, 6), torch.randn(9, 6), target, {"linear_bias": torch.randn(9)})
    with small_tiles(rows=16, classes=8, width=8):
        assert_is_the_choice(problem, 47, score, how)  # some that are chosen are invalid
        assert_is_the_choice(problem, 13, score, how)


def test_equal_scores_are_taken_in_order_and_nan_comes_first() -> None:
    hidden, weight, target = torch.ones(6, 4), torch.randn(5, 4), torch.tensor([1, 1, -100, 1, 5, 1])
    with small_tiles(), mock.patch("attent.ops.linear_cross_entropy.values_readable", lambda _: False):
        lesson = attent.score_and_select(hidden, weight, target, 6, backend="triton")
    assert lesson.index.tolist() == [4, 0, 1, 3, 5, 2]
    assert lesson.score.isnan().tolist() == [True] + [False] * 5 and float(lesson.score[5]) == 0


def test_examples_of_weight_0_are_chosen_last() -> None:
    example_weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])
    target = torch.randint(7, (5, 3))
    target[1] = -100
    lesson = attent.score_and_select(
        torch.randn(5, 3, 4), torch.randn(7, 4), target, 5, example_weight=example_weight, backend="triton"
    )
    assert sorted(lesson.index[:3].tolist()) == [0, 3, 4] and lesson.index[3:].tolist() == [1, 2]


def test_a_larger_pool_is_scored_and_then_chosen_from() -> None:
    problem = Problem(torch.randn(20, 6), torch.randn(9, 6), torch.randint(9, (20,)), {})
    assert select.ONE_LAUNCH > 19  # copied from there when it was imported
    with mock.patch.object(pools, "MAX_IN_LAUNCH", 19):
        assert_is_the_choice(problem, 7, "logit", HARD, ["score_kernel", "_select_kernel"])
    lesson = attent.score_and_select(*problem[:3], 7, score="hidden", backend="triton")
    assert torch.equal(lesson.index, attent.score_and_select(*problem[:3], 7, score="hidden").index)


def test_lessons_are_the_same_to_the_bit_whatever_was_in_the_workspace() -> None:
    arguments = torch.randn(30, 6), torch.randn(9, 6), torch.randint(9, (30,)), 11
    with small_tiles(rows=8, classes=8, width=8):
        first = attent.score_and_select(*arguments, **DRAWN, backend="triton")
        for _ in range(2):
            runtime.poison_workspaces()
            again = attent.score_and_select(*arguments, **DRAWN, backend="triton")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_empty_pool_and_an_empty_choice() -> None:
    hidden, weight, target = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    assert attent.score_and_select(hidden, weight, target, 0, backend="triton").index.shape == (0,)
    assert attent.score_and_select(hidden[:0], weight, target[:0], 0, backend="triton").index.shape == (0,)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("k", {"k": 6}), ("k", {"k": -1}), ("temperature", {"temperature": -1.0}), ("floor", {"floor": 2.0}),
     ("seed", {"seed": 0.5, "temperature": 1.0})],
)  # fmt: skip
def test_what_the_choice_refuses(argument: str, wrong: dict[str, Any]) -> None:
    hidden, weight, target = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        attent.score_and_select(hidden, weight, target, **{"k": 2, **wrong}, backend="triton")


def test_float64_is_refused_by_name() -> None:
    assert implementation("linear_cross_entropy", "triton")
    with pytest.raises(ValueError, match="float16, bfloat16 and float32"):
        attent.score_and_select(
            torch.randn(5, 4).double(), torch.randn(7, 4).double(), torch.randint(7, (5,)), 2, backend="triton"
        )


def test_it_compiles_to_one_graph() -> None:
    def lesson(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return attent.score_and_select(hidden.tanh(), weight, target, 3, backend="triton").index * 2

    arguments = torch.randn(6, 2, 4), torch.randn(7, 4), torch.randint(7, (6, 2))
    compiled = torch.compile(lesson, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), lesson(*arguments))
