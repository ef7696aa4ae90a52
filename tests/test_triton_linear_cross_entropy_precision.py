"""Linear cross-entropy's Triton backend in half precision and where p → 1: as right as PyTorch, and more so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent import reference

from .linear_cross_entropy_problems import NAMES, Problem
from .test_linear_cross_entropy_accuracy import UNIT, confident_logits, error

WITHOUT_LOGITS = ("loss", "logit", "head")


def everything(function: Any, problem: Problem, **arguments: Any) -> dict[str, Tensor]:
    """Loss, scores and gradients under a mean, and the "head" scores without gradients, by their own path."""
    leaves = {"d input": problem.input, "d weight": problem.linear_weight, "d bias": problem.options.get("linear_bias")}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    hidden, weight = leaves["d input"], leaves["d weight"]
    options = {**problem.options, "linear_bias": leaves.get("d bias"), **arguments}
    loss, scores = function(hidden, weight, problem.target, **options, score=NAMES)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    with torch.no_grad():
        alone = function(hidden, weight, problem.target, **options, score=WITHOUT_LOGITS)[1]["head"]
    named = dict(zip(leaves, gradients, strict=True))
    return {"the loss": loss.detach(), **scores, **named, "head without logits": alone}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "shifted and weighted": {"shift": True, "weight": torch.linspace(0.5, 2, 90)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_stay_within_twice_those_of_pytorch_in_the_same_dtype(dtype: torch.dtype, options: str) -> None:
    # Logits with a standard deviation of 3, as a trained model's.
    hidden, weight = torch.randn(2, 6, 40), torch.randn(90, 40) * (3 / 40**0.5)
    problem = Problem(hidden, weight, torch.randint(90, (2, 6)), OPTIONS[options]).to(dtype)
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    plain = everything(reference.linear_cross_entropy, problem)  # the same formulas in PyTorch operations of that dtype
    actual = everything(attent.linear_cross_entropy, problem, backend="triton")
    for name, right in truth.items():
        allowed = 2 * error(plain[name], right) + UNIT[dtype]  # one rounding, of the output
        assert error(actual[name], right) <= allowed, name
        assert actual[name].dtype == (dtype if name.startswith("d ") else torch.float32)


def test_logits_are_not_rounded_to_half_precision() -> None:
    hidden, weight, target = torch.randn(5, 40).bfloat16(), torch.randn(90, 40).bfloat16(), torch.randint(90, (5,))
    right, scores = reference.linear_cross_entropy(
        hidden.double(), weight.double(), target, score=("logit",), reduction="none"
    )
    loss, score = attent.linear_cross_entropy(hidden, weight, target, score="logit", reduction="none", backend="triton")
    # Float32 sums of 40 products of up to some 10: logits below 40, off by 1e-5 at most.
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.double(), scores["logit"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("miss", [1e-3, 1e-7])
def test_scores_and_gradients_of_confident_tokens_keep_their_digits(miss: float, dtype: torch.dtype) -> None:
    logits, target = confident_logits(miss, 7, 60)
    logits[0] += 1e-3  # examples of 1, 2 and 4 tokens, in two of which a target comes twice
    target[2], target[5] = target[1], target[4]
    logits[2], logits[5] = logits[1].flip(0).roll(int(target[1]) * 2 - 59), logits[4].roll(0) * 1.01
    cu_seqlens = torch.tensor([0, 1, 3, 7], dtype=torch.int32)
    # Hidden states times this head are the logits, exactly.
    problem = Problem(logits, torch.eye(60), target, {"cu_seqlens": cu_seqlens}).to(dtype)
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    actual = everything(attent.linear_cross_entropy, problem, backend="triton")
    # Float32 exponentials of distances below 40. What is written in the GEMM's dtype is off by half a unit of itself,
    # and so are sums of it that do not cancel: all entries of g but the target's are positive, and as h is the logits,
    # whose inner products are positive here, so do none of the Gram form's terms. Two factors: one unit, halved by
    # the root; and float16's p̃ is bfloat16.
    exact = 100 * UNIT[torch.float32]
    for name in NAMES:
        rounded = name in ("hidden", "head") and dtype != torch.float32
        allowed = exact + (UNIT[dtype] if rounded else 0)
        torch.testing.assert_close(actual[name].double(), truth[name], rtol=allowed, atol=0, msg=f"{name}")
    allowed = exact + (UNIT[torch.bfloat16] if dtype != torch.float32 else 0)
    torch.testing.assert_close(actual["head without logits"].double(), truth["head"], rtol=allowed, atol=0)


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    # What a mean over 2¹⁸ tokens leaves of a gradient is below float16's 6e-8; a loss scaler's factor is to save it.
    tokens, scale = 32, 2.0**14
    hidden, weight, target = torch.randn(tokens, 4).half(), torch.randn(8, 4).half(), torch.randint(8, (tokens,))
    example_weight = torch.full((tokens,), tokens / 2.0**18)

    def gradients(function: Any, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
        leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
        weights = example_weight.to(leaves[0].dtype) if leaves[0].dtype == torch.float64 else example_weight
        return torch.autograd.grad(function(*leaves, target, example_weight=weights, **options) * scale, leaves)

    truth = gradients(reference.linear_cross_entropy, hidden.double(), weight.double())
    actual = gradients(attent.linear_cross_entropy, hidden, weight, backend="triton")
    for right, mine in zip(truth, actual, strict=True):
        # g is rounded once, and so is the result, whose smallest step is 6e-8.
        assert float((mine.double() - right).abs().max()) <= 2 * UNIT[torch.float16] * float(right.abs().max()) + 6e-8


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values_at_any_stride_are_read_where_they_lie(reduction: str, kind: str) -> None:
    def spread(value: Tensor) -> Tensor:
        return torch.stack([value, torch.full_like(value, 99)], -1).flatten(-2)[..., ::2]

    hidden, weight, bias, class_weight = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randn(7), torch.rand(7)
    target = torch.randint(7, (2, 3)) if kind == "indices" else torch.randn(2, 3, 7).softmax(-1)
    outcomes = []
    for by in (lambda value: value, spread):
        leaf = by(hidden).detach().requires_grad_()
        loss = attent.linear_cross_entropy(
            leaf,
            by(weight),
            by(target),
            linear_bias=by(bias),
            weight=by(class_weight),
            label_smoothing=0.1,
            reduction=reduction,
            backend="triton",
        )
        upstream = torch.tensor(2.0).expand(loss.shape)  # every token's at one address
        outcomes.append([loss, *torch.autograd.grad(loss, leaf, upstream)])
    for plain, strided in zip(*outcomes, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-7)
    once = torch.autograd.grad(
        attent.linear_cross_entropy(
            leaf, weight, target, linear_bias=bias, weight=class_weight, label_smoothing=0.1, reduction=reduction
        ).sum(),
        leaf,
    )[0]
    torch.testing.assert_close(outcomes[0][1], 2 * once, rtol=1e-5, atol=1e-6)  # as the other backend has it


@pytest.mark.parametrize("bias", [False, True])
def test_each_score_is_the_norm_of_its_examples_own_gradient(bias: bool) -> None:
    hidden, target = torch.randn(3, 4, 5), torch.randint(7, (3, 4))
    target[1, 2:] = -100
    head = nn.Linear(5, 7, bias=bias)
    _, scores = attent.linear_cross_entropy(
        hidden, head.weight, target, linear_bias=head.bias, score=NAMES, per_example="mean", backend="triton"
    )
    head.double()
    for i in range(3):
        inputs = hidden[i].double().requires_grad_()
        logits = head(inputs)
        loss = F.cross_entropy(logits, target[i])
        of = {"loss": None, "logit": [logits], "hidden": [inputs], "head": list(head.parameters())}
        for name, score in scores.items():
            right = loss
            if of[name]:
                right = torch.cat([g.flatten() for g in torch.autograd.grad(loss, of[name], retain_graph=True)]).norm()
            torch.testing.assert_close(score[i].double(), right, rtol=1e-5, atol=1e-6, check_dtype=False)
