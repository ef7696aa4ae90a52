"""The specification is right: held against PyTorch's autograd of each example's own loss, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attent import reference

from .linear_cross_entropy_problems import NAMES, PER_EXAMPLE, REDUCTIONS, Problem, problems

# Numbers of order one, sums of some tens of them, in float64: rounding stays below 1e-13 of the terms, and a norm that
# autograd gets from terms that cancel to nothing is known to that absolutely.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def factor(per_example: str, n: int) -> float:
    return {"mean": 1 / n, "sum": 1.0, "rms": n**-0.5}[per_example]


def norm(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def own_gradient_norms(problem: Problem, i: int, per_example: str) -> dict[str, float]:
    """Autograd of example i's own loss L_i = s Σ_t ℓ_t, which is built from nothing but that example."""
    hidden, target = problem.examples()[i]
    n = int(problem.valid(i).sum())
    example_weight, bias = problem.options["example_weight"], problem.options["linear_bias"]
    if n == 0 or (example_weight is not None and example_weight[i] == 0):
        return dict.fromkeys(NAMES, 0.0)
    hidden = hidden.detach().clone().requires_grad_()
    head = [problem.linear_weight.detach().clone().requires_grad_()]
    if bias is not None:
        head.append(bias.detach().clone().requires_grad_())
    logits = F.linear(hidden, *head)
    total = problem.token_losses(logits, target, "sum")
    own_loss = factor(per_example, n) * total
    return {
        "loss": total.item() / n,
        "logit": float(norm(torch.autograd.grad(own_loss, (logits,), retain_graph=True))),
        "hidden": float(norm(torch.autograd.grad(own_loss, (hidden,), retain_graph=True))),
        "head": float(norm(torch.autograd.grad(own_loss, tuple(head)))),
    }


@settings(max_examples=150)
@given(problem=problems())
def test_each_score_is_the_norm_of_the_gradient_of_the_examples_own_loss(problem: Problem) -> None:
    for per_example in PER_EXAMPLE:
        arguments: dict[str, Any] = {**problem.options, "score": NAMES, "per_example": per_example}
        _, scores = reference.linear_cross_entropy(*problem[:3], **arguments)
        expected = [own_gradient_norms(problem, i, per_example) for i in range(len(problem.lengths))]
        for name in NAMES:
            wanted = torch.tensor([of_example[name] for of_example in expected], dtype=torch.float64)
            torch.testing.assert_close(scores[name], wanted, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            alone = reference.linear_cross_entropy(*problem[:3], **{**arguments, "score": name})[1]
            assert torch.equal(alone, scores[name])


@settings(max_examples=200)
@given(problem=problems(), reduction=st.sampled_from(REDUCTIONS))
def test_the_loss_and_its_gradients_are_pytorchs(problem: Problem, reduction: str) -> None:
    options = {**problem.options, "example_weight": None}
    leaves = [problem.input, problem.linear_weight, options["linear_bias"]]
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    problem = Problem(hidden, weight, problem.target, options | {"linear_bias": bias})
    loss = reference.linear_cross_entropy(*problem[:3], **problem.options, reduction=reduction)

    parts = [(F.linear(h, weight, bias), y) for h, y in problem.examples()]
    losses = [problem.token_losses(z, y) for z, y in parts]  # of each example, [T]
    counts = [int(problem.valid(i).sum()) for i in range(len(parts))]
    if reduction == "none":
        if options.get("shift"):  # what the last token is given is the test of shift below
            losses = [
                torch.cat([of, of.new_zeros(min(1, length))])
                for of, length in zip(losses, problem.lengths, strict=True)
            ]
        expected = torch.cat([*losses, hidden[..., 0].flatten()[:0]]).view(hidden.shape[:-1])
    elif reduction == "example":
        means = [of.sum() / max(1, n) for of, n in zip(losses, counts, strict=True)]
        expected = torch.stack(means) if means else hidden[..., 0].flatten()[:0]
    elif sum(counts) == 0:
        expected = hidden.sum() * 0
    else:
        logits, target = (torch.cat(of) for of in zip(*parts, strict=True))
        expected = problem.token_losses(logits, target, reduction)
        if expected.isnan():  # every token's class weight is 0, and so is the loss
            expected = hidden.sum() * 0
    torch.testing.assert_close(loss, expected, **CLOSE)

    upstream = torch.randn(loss.shape, dtype=loss.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    actual = torch.autograd.grad(loss, wanted, upstream, materialize_grads=True)
    for got, truth in zip(
        actual, torch.autograd.grad(expected, wanted, upstream, allow_unused=True, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(got, truth, **CLOSE)


@settings(max_examples=50)
@given(problem=problems(), reduction=st.sampled_from(REDUCTIONS))
def test_the_loss_is_linear_in_example_weight(problem: Problem, reduction: str) -> None:
    batch = len(problem.lengths)
    options = {**problem.options, "reduction": reduction, "score": NAMES}

    def at(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return reference.linear_cross_entropy(*problem[:3], **{**options, "example_weight": weight})

    one_by_one = [at(row) for row in torch.eye(batch, dtype=torch.float64)]
    weight = torch.rand(batch, dtype=torch.float64)
    loss, scores = at(weight)
    unweighted = reference.linear_cross_entropy(*problem[:3], **{**options, "example_weight": None})[1]
    expected = sum((w * part for w, (part, _) in zip(weight, one_by_one, strict=True)), torch.zeros_like(loss))
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name in NAMES:  # scores see of the weight only whether it is 0
        assert torch.equal(scores[name], unweighted[name].where(weight != 0, 0))
        for i, (_, alone) in enumerate(one_by_one):
            assert torch.equal(alone[name], unweighted[name] * (torch.arange(batch) == i))


def test_shift_predicts_the_next_token_within_an_example() -> None:
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    target = torch.randint(5, (2, 3))
    losses = reference.linear_cross_entropy(hidden, weight, target, shift=True, reduction="none")
    expected = F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses[:, :-1].flatten(), expected, **CLOSE)
    assert torch.equal(losses[:, -1], torch.zeros(2, dtype=torch.float64))

    packed = torch.tensor([0, 0, 3, 3, 6], dtype=torch.int32)  # empty examples before and between
    same = reference.linear_cross_entropy(
        hidden.flatten(0, 1), weight, target.flatten(), shift=True, reduction="none", cu_seqlens=packed
    )
    assert torch.equal(same, losses.flatten())


# ------------------------------------------------------------------------------------------ predictions already in hand


@pytest.mark.parametrize("per_example", PER_EXAMPLE)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("layout", ["rows", "padded", "packed"])
def test_scores_of_predictions_are_gradient_norms(loss: str, layout: str, per_example: str) -> None:
    shape = {"rows": (4,), "padded": (4, 3), "packed": (12,)}[layout]
    cu_seqlens = torch.tensor([0, 0, 5, 6, 12], dtype=torch.int32) if layout == "packed" else None
    lengths = [1] * 4 if layout == "rows" else [3] * 4 if layout == "padded" else [0, 5, 1, 6]
    features, weight = torch.randn(*shape, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    prediction = features @ weight.T
    if loss == "squared":
        target = torch.randn(*shape, 5, dtype=torch.float64)
    else:
        target = torch.randint(5, shape)
        target.view(-1)[[1, 7 % target.numel()]] = -100

    expected: dict[str, list[float]] = {"loss": [], "logit": [], "hidden": [], "head": []}
    targets = target.reshape(-1, *target.shape[len(shape) :]).split(lengths)
    for hidden, own_target in zip(features.reshape(-1, 6).split(lengths), targets, strict=True):
        hidden, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = hidden @ head.T
        if loss == "squared":
            n = len(logits)
            total = 0.5 * (logits - own_target).square().sum()
        else:
            n = int((own_target != -100).sum())
            total = F.cross_entropy(logits, own_target, reduction="sum")
        s = factor(per_example, n) if n else 0.0
        expected["loss"].append(total.item() / max(1, n))
        for name, leaf in (("logit", logits), ("hidden", hidden), ("head", head)):
            expected[name].append(float(norm(torch.autograd.grad(s * total, (leaf,), retain_graph=True))))

    names = [*expected, "residual"] if loss == "squared" else list(expected)
    for name in names:
        scores = reference.example_scores(
            prediction,
            target,
            loss=loss,
            score=name,
            features=features,
            linear_weight=weight,
            per_example=per_example,
            cu_seqlens=cu_seqlens,
        )
        wanted = torch.tensor(expected["logit" if name == "residual" else name], dtype=torch.float64)
        torch.testing.assert_close(scores, wanted, **CLOSE)


def test_gradient_scores_are_those_of_a_loss_that_has_a_formula() -> None:
    hidden, weight = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    target = torch.randint(5, (4, 3))
    logits = (hidden @ weight.T).requires_grad_()
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    expected = reference.example_scores(logits.detach(), target, per_example="mean")
    torch.testing.assert_close(reference.gradient_scores(losses, logits), expected, **CLOSE)
    folded = reference.gradient_scores(losses[:2] + losses[2:], logits, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(folded, (expected[:2].square() + expected[2:].square()).sqrt(), **CLOSE)
    assert reference.gradient_scores(losses[:0], logits[:0]).shape == (0,)
