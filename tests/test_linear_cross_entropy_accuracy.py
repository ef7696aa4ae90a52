"""What linear cross-entropy computes in lower precision is as right as PyTorch's, and where p → 1, more so.

Truth is the specification in float64 on the same rounded inputs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attent
from attent import reference

from .linear_cross_entropy_problems import NAMES, Problem, no_looking, passes_of, small_chunks

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BOTH_PASSES = pytest.mark.parametrize("passes", ["native", "PyTorch"])


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest error, of the largest value."""
    return float((actual.double() - truth).abs().max() / truth.abs().max())


# ------------------------------------------------------------------------------------------------- budgets, by dtype


def random_problem(dtype: torch.dtype, **options: Any) -> Problem:
    """Four examples of 24 tokens under a head whose logits have a standard deviation of 3, as a trained model's."""
    hidden, weight = torch.randn(4, 24, 48), torch.randn(300, 48) * (3 / 48**0.5)
    return Problem(hidden, weight, torch.randint(300, (4, 24)), options).to(dtype)


def everything(function: Any, problem: Problem) -> dict[str, Tensor]:
    """Loss, scores and gradients under a mean."""
    hidden, weight = (value.detach().clone().requires_grad_() for value in problem[:2])
    loss, scores = function(hidden, weight, problem.target, **problem.options, score=NAMES)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return {"the loss": loss.detach(), **scores, "d input": gradients[0], "d weight": gradients[1]}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "shifted and weighted": {"shift": True, "weight": torch.linspace(0.5, 2, 300)},
}


@BOTH_PASSES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_errors_stay_within_twice_those_of_pytorch_in_the_same_dtype(
    dtype: torch.dtype, options: str, passes: str
) -> None:
    problem = random_problem(dtype, **OPTIONS[options])
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    plain = everything(reference.linear_cross_entropy, problem)  # the same formulas in PyTorch operations of that dtype
    with passes_of(passes):
        actual = everything(attent.linear_cross_entropy, problem)
    for name, right in truth.items():
        allowed = 2 * error(plain[name], right) + UNIT[dtype]  # one rounding, of the output
        if name == "head":  # a sum of T² terms, so off by T units, or half as many after the root
            allowed += 24 / 2 * UNIT[torch.float32]
        assert error(actual[name], right) <= allowed, name
        expected = dtype if name in ("d input", "d weight") else torch.float32
        assert actual[name].dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_the_logits_are_rounded_to_half_precision(dtype: torch.dtype) -> None:
    problem = random_problem(dtype)
    rounded = F.linear(*problem[:2]).double()  # the same matrix product, rounded as any half-precision model's
    loss, score = attent.linear_cross_entropy(*problem[:3], score="logit", reduction="none")
    expected = F.cross_entropy(rounded.flatten(0, 1), problem.target.flatten(), reduction="none").view(4, 24)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)  # float32 of numbers below 20
    torch.testing.assert_close(score.double(), reference.example_scores(rounded, problem.target), rtol=1e-6, atol=0)


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    # A loss scaler multiplies the loss so that small gradients keep their digits in float16, where numbers below 6e-5
    # have fewer and those below 6e-8 none: they must not be rounded before they meet the factor.
    tokens, scale = 2**18, 2.0**14
    hidden, weight, target = torch.randn(tokens, 4).half(), torch.randn(8, 4).half(), torch.randint(8, (tokens,))

    def usual(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def gradients(loss_of: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
        return torch.autograd.grad(loss_of(*leaves, target) * scale, leaves)

    truth = gradients(reference.linear_cross_entropy, hidden.double(), weight.double())
    plain = gradients(usual, hidden, weight)
    actual = gradients(attent.linear_cross_entropy, hidden, weight)
    for right, other, mine in zip(truth, plain, actual, strict=True):
        assert error(mine, right) <= 2 * error(other, right) + UNIT[torch.float16]


# --------------------------------------------------------------------------------------------------- confident tokens


def confident_logits(miss: float, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of tokens whose target has probability 1 − miss: what the others share is spread unevenly."""
    target = torch.arange(rows) * 5 % classes
    logits = torch.randn(rows, classes)
    logits[torch.arange(rows), target] = -math.inf
    ahead = logits.logsumexp(1) - math.log(miss)
    logits[torch.arange(rows), target] = ahead
    return logits, target


@BOTH_PASSES
@pytest.mark.parametrize("miss", [1e-3, 1e-5, 1e-7, 1e-9])
def test_scores_and_gradients_of_confident_tokens_keep_their_digits(miss: float, passes: str) -> None:
    logits, target = confident_logits(miss, 8, 60)
    head = torch.eye(60)  # hidden states times this head are the logits, exactly
    cu_seqlens = torch.tensor([0, 1, 4, 8], dtype=torch.int32)
    problem = Problem(logits, head, target, {"cu_seqlens": cu_seqlens})
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    for max_bytes in (64 << 20, 4 * 60 * 2):  # whole examples by Gram matrix; two rows at a time, so long ones
        with passes_of(passes), small_chunks(max_bytes):
            actual = everything(attent.linear_cross_entropy, problem)
        for name, right in truth.items():
            assert error(actual[name], right) < 1e-5, name
        for name in NAMES:  # the smallest of them too
            torch.testing.assert_close(actual[name].double(), truth[name], rtol=1e-5, atol=0)


def test_the_expanded_forms_would_be_wrong_for_confident_tokens() -> None:
    # Why nothing is subtracted: in float32 these are off by a tenth and more where the forms above keep five digits.
    logits, target = confident_logits(1e-7, 8, 60)
    p, own = logits.softmax(1), (torch.arange(8), target)
    expanded = (p.square().sum(1) - 2 * p[own] + 1).clamp(min=0).sqrt()
    right = reference.example_scores(logits.double(), target)
    assert float(((expanded - right) / right).abs().max()) > 0.1

    residual = p - F.one_hot(target, 60)  # and the Gram matrix of what a subtraction has rounded
    gram = ((residual @ residual.T) * (logits @ logits.T)).sum().sqrt()
    features = logits.double()
    exact = reference.example_scores(
        features[None], target[None], score="head", per_example="sum", features=features[None]
    )
    assert abs(float(gram) / float(exact) - 1) > 0.1


@BOTH_PASSES
def test_smoothed_targets_at_their_optimum_are_as_right_as_the_probabilities(passes: str) -> None:
    # p = q in exact arithmetic: what is left of p − q is the rounding of p, a few units of each entry.
    classes, smoothing = 60, 0.1
    q = torch.full((4, classes), smoothing / classes, dtype=torch.float64)
    target = torch.arange(4)
    q[target, target] += 1 - smoothing
    with passes_of(passes):
        _, score = attent.linear_cross_entropy(
            q.log().float(), torch.eye(classes), target, label_smoothing=smoothing, score="logit"
        )
    assert float(score.max()) < 8 * UNIT[torch.float32]


# ------------------------------------------------------------------------------------------------------ extreme logits


@BOTH_PASSES
@pytest.mark.parametrize("behind", [80.0, 200.0, 1e4])
def test_a_target_whose_probability_underflows_has_its_loss(behind: float, passes: str) -> None:
    logits = torch.randn(5, 60)
    target = torch.arange(5)
    logits[target, target] = -behind
    problem = Problem(logits, torch.eye(60), target, {})
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    with passes_of(passes):
        actual = everything(attent.linear_cross_entropy, problem)
    for name, right in truth.items():
        assert error(actual[name], right) < 1e-5, name


@BOTH_PASSES
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand_lose_no_more_than_their_own_rounding(size: float, passes: str) -> None:
    # Rounded to float32 at 1e4 a logit is off by 5e-4; these are given exactly, so only their differences count.
    logits = torch.randint(-64, 64, (6, 60)) / 8 + size
    target = torch.randint(60, (6,))
    problem = Problem(logits, torch.eye(60), target, {})
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    plain = everything(reference.linear_cross_entropy, problem)
    with passes_of(passes):
        actual = everything(attent.linear_cross_entropy, problem)
    for name, right in truth.items():
        assert error(actual[name], right) <= 2 * error(plain[name], right) + 16 * UNIT[torch.float32], name


KINDS = ["indices", "capped", "probabilities", "weighted", "smoothed over weights"]


@BOTH_PASSES
@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_are_ruled_out_by_minus_infinity_count_for_nothing(kind: str, passes: str) -> None:
    hidden, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    bias, target = torch.zeros(8, dtype=torch.float64), torch.randint(6, (2, 3))
    bias[6:] = -math.inf
    class_weight = torch.tensor([1.0, 2, 1, 1, 0.5, 1, 0, 0], dtype=torch.float64)
    options: dict[str, dict[str, Any]] = {
        "capped": {"softcap": 3.0},  # −c instead of −inf: counts for little
        "weighted": {"weight": class_weight},
        "smoothed over weights": {"weight": class_weight, "label_smoothing": 0.1},
    }
    if kind == "probabilities":
        target = F.one_hot(target, 8).double() * 0.7 + F.one_hot((target + 1) % 6, 8) * 0.3
    problem = Problem(hidden, weight, target, {"linear_bias": bias, **options.get(kind, {})})
    expected = everything(reference.linear_cross_entropy, problem)
    assert all(bool(value.isfinite().all()) for value in expected.values())
    for max_bytes in (64 << 20, 8 * 8):
        with passes_of(passes), small_chunks(max_bytes):
            actual = everything(attent.linear_cross_entropy, problem)
        for name, right in expected.items():
            torch.testing.assert_close(actual[name], right, rtol=1e-10, atol=1e-12)


@BOTH_PASSES
def test_a_target_that_is_ruled_out_has_infinite_loss_and_a_finite_gradient(passes: str) -> None:
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
    hidden, weight, target = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    with passes_of(passes):
        losses, scores = attent.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction="none", score=NAMES
        )
    expected, right = reference.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, reduction="none", score=NAMES
    )
    torch.testing.assert_close(losses, expected)
    assert float(losses[0]) == math.inf
    for name in NAMES:
        torch.testing.assert_close(scores[name], right[name])


@BOTH_PASSES
@pytest.mark.parametrize("looking", [True, False])
def test_what_does_not_count_is_nothing_even_where_its_loss_is_infinite(looking: bool, passes: str) -> None:
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    hidden, weight = torch.randn(3, 2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    target = torch.tensor([[0, 1], [-100, 2], [3, 3]])  # what is ignored is computed, where it is, as class 0
    class_weight = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    problem = Problem(hidden, weight, target, {"linear_bias": bias, "weight": class_weight})
    expected = everything(reference.linear_cross_entropy, problem)
    assert all(bool(value.isfinite().all()) for value in expected.values())
    with passes_of(passes), small_chunks(64 << 20) if looking else no_looking():
        actual = everything(attent.linear_cross_entropy, problem)
    for name, right in expected.items():
        torch.testing.assert_close(actual[name], right, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ long sums


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_mean_loss_of_a_long_example_does_not_drift(layout: str) -> None:
    # Added up one after the other, 100,000 float32 losses would be off by 1e-5 and more.
    tokens = 100_000
    hidden, weight, target = torch.rand(tokens, 1) * 10, torch.randn(3, 1), torch.randint(3, (tokens,))
    exact = reference.linear_cross_entropy(hidden.double(), weight.double(), target)
    if layout == "padded":
        options: dict[str, Any] = {}
        hidden, target = hidden[None], target[None]
    else:
        options = {"cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32)}
    _, score = attent.linear_cross_entropy(hidden, weight, target, score="loss", **options)
    assert abs(float(score) / float(exact) - 1) < 1e-6
