"""Linear cross-entropy's Triton backend in a training loop: bad labels, autograd, autocast, compilation."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attent
from attent.ops import triton_chunks, triton_head
from attent.ops.dispatch import implementation

from .linear_cross_entropy_problems import NAMES, REDUCTIONS, no_looking
from .test_triton_linear_cross_entropy_memory import TOKENS, WIDTH, WITHOUT_LOGITS, call

# ------------------------------------------------------------------------------------------------- bad labels, nothing


@pytest.mark.parametrize("label", [7, -1, 10**9])
def test_a_label_that_is_no_class_makes_its_example_nan_and_no_other(label: int) -> None:
    hidden, weight, target = torch.randn(3, 2, 4), torch.randn(7, 4), torch.randint(7, (3, 2))
    target[1, 0] = label
    arguments = call("indices", "rows", "example")._replace(
        input=hidden, linear_weight=weight, target=target, linear_bias=None, score=list(WITHOUT_LOGITS)
    )
    for wanted in (False, True):
        changed = arguments._replace(input_gradient=wanted, weight_gradient=False, bias_gradient=False)
        with no_looking():
            loss, scores, *_ = implementation("linear_cross_entropy", "triton")(changed)
        for values in (loss, *scores):
            assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_when_all_tokens_are_ignored_loss_scores_and_gradients_are_zero(reduction: str, looking: bool) -> None:
    arguments = call("indices", "short", reduction)._replace(target=torch.full((TOKENS,), -100))
    arguments = arguments._replace(input=torch.full((TOKENS, WIDTH), torch.nan))
    with mock.patch.object(triton_chunks, "LOGITS_BYTES", 1 << 15) if looking else no_looking():
        loss, scores, _, *gradients = implementation("linear_cross_entropy", "triton")(arguments)
        gradients += implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)
    for values in (loss, scores, *gradients):
        assert not values.count_nonzero()


def test_smoothed_targets_without_class_weight_have_scores_but_no_gradients_under_a_mean() -> None:
    # The mean's denominator is the sum of the targets' class weights, 0 here; smoothing leaves gradients to score.
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target, class_weight = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.0, 1, 1, 2, 1, 1, 1])
    options = {"weight": class_weight, "label_smoothing": 0.5, "score": NAMES}
    loss, scores = attent.linear_cross_entropy(hidden, weight, target, **options, backend="triton")
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert not any(values.count_nonzero() for values in (loss, *gradients))
    _, right = attent.linear_cross_entropy(hidden, weight, target, **options)
    for name in NAMES:
        torch.testing.assert_close(scores[name], right[name], rtol=1e-5, atol=0)
        assert bool((scores[name] > 0).all())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_tokens_give_zero_losses_and_gradients(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(shape, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    for reduction in REDUCTIONS:
        loss, scores = attent.linear_cross_entropy(
            hidden, weight, target, score=NAMES, reduction=reduction, backend="triton"
        )
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        for values in (loss, *scores.values(), *gradients):
            assert not values.count_nonzero()


def test_float64_is_refused() -> None:
    arguments = torch.randn(2, 3).double(), torch.randn(5, 3).double(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="it takes float16, bfloat16 and float32"):
        attent.linear_cross_entropy(*arguments, backend="triton")


# --------------------------------------------------------------------------------------------------- autograd, compile


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of 2 x 3 tokens, weight, bias and targets, one of them ignored."""
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 4), (7, 4), (7,)))
    target = torch.randint(7, (2, 3))
    target[1, 0] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_computed_that_nobody_wants(reduction: str, wanted: tuple[bool, ...]) -> None:
    hidden, weight, bias, target = leaves()
    for leaf, want in zip((hidden, weight, bias), wanted, strict=True):
        leaf.requires_grad_(want)
    with mock.patch.object(triton_chunks, "product", wraps=triton_chunks.product) as product:
        loss = attent.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, backend="triton"
        )
        loss.sum().backward()
    # The logits, once here (the forward of "none" is the scorer's one launch); a frozen head costs no GEMM.
    assert product.call_count == 1 + wanted[0] + wanted[1]
    assert [leaf.grad is not None for leaf in (hidden, weight, bias)] == list(wanted)


def test_a_head_tied_to_the_embedding_gets_the_sum_of_both_gradients() -> None:
    table, tokens, target = torch.randn(7, 4, requires_grad=True), torch.randint(7, (2, 3)), torch.randint(7, (2, 3))
    loss = attent.linear_cross_entropy(F.embedding(tokens, table).tanh(), table, target, backend="triton")
    right = F.cross_entropy((F.embedding(tokens, table).tanh() @ table.T).flatten(0, 1), target.flatten())
    gradients = [torch.autograd.grad(of, table)[0] for of in (loss, right)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)  # float32 sums of numbers of order one


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_several_backward_calls_add_up(reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    options = {"linear_bias": bias, "reduction": reduction, "backend": "triton"}
    loss = attent.linear_cross_entropy(hidden, weight, target, **options).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (hidden, weight, bias)]
    (2 * loss).backward()
    attent.linear_cross_entropy(hidden, weight, target, **options).sum().backward()
    for leaf, gradient in zip((hidden, weight, bias), once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_what_casting_by_hand_does(reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    options = {"reduction": reduction, "score": "head", "backend": "triton"}

    def outcome(loss: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return loss, scores, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))

    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(*attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options))
    halves = [leaf.bfloat16() for leaf in (hidden, weight, bias)]
    by_hand = outcome(*attent.linear_cross_entropy(*halves[:2], target, linear_bias=halves[2], **options))
    assert all(torch.equal(a, b) for a, b in zip(inside, by_hand, strict=True))


def test_a_checkpointed_loss_has_the_same_gradients_and_scores() -> None:
    hidden, weight, _, target = leaves()

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, score="head", backend="triton"
        )
        return result

    expected, right = loss(hidden)
    actual, scores = checkpoint(loss, hidden, use_reentrant=False)
    assert torch.equal(actual, expected) and torch.equal(scores, right)
    gradients = [torch.autograd.grad(of, (hidden, weight)) for of in (expected, actual)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_compiles_to_one_graph(reduction: str) -> None:
    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, scores = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, linear_bias=bias, reduction=reduction, score="head", backend="triton"
        )
        return loss.sum(), scores

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    hidden, weight, bias, target = leaves()
    outcomes = []
    for function in (step, compiled):
        loss, score = function(hidden, weight, bias, target)
        outcomes.append([loss, score, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for eager, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("reduction", ["mean", "example"])
def test_the_op_keeps_the_rules_of_torch_library(reduction: str) -> None:
    hidden, weight, bias, target = leaves(torch.bfloat16)
    arguments = (
        hidden, weight, target, bias, torch.rand(7), torch.rand(2), None, reduction, -100, 0.1, 3.0, True,
        list(NAMES), "rms", None, "triton", True, True, True,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.attent.linear_cross_entropy, arguments, test_utils=checks)


def test_head_scores_of_long_examples_have_another_form() -> None:
    assert triton_head.gram_is_cheaper(512, 1024, 4096, 2)
    assert not triton_head.gram_is_cheaper(512, 1024, 128, 2)  # T > 2D
    assert triton_head.gram_is_cheaper(512, 1024, 128, 4)  # but not 4D, where the other form needs the logits twice
    assert not triton_head.gram_is_cheaper(8192, 8192, 8192, 2)  # 64 tiles square: beyond TILE_BYTES
    assert math.isclose(triton_head.TILE_BYTES, 64 * 2**20)
