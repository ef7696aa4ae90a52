"""Scores of what a training step has in hand: predictions, or losses of any kind and the outputs they came from."""

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

from .linear_cross_entropy_problems import (
    BATCHES,
    LENGTHS,
    PER_EXAMPLE,
    SIZES,
    no_looking,
    passes_of,
    small_chunks,
    with_layout,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64, numbers of order one, some hundred of them in a sum
NAMES = {
    "cross_entropy": ("loss", "logit", "hidden", "head"),
    "squared": ("loss", "residual", "logit", "hidden", "head"),
}


@st.composite
def predictions(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of example_scores in any layout, with features and a weight for every score."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    loss = draw(st.sampled_from(["cross_entropy", "squared"]))
    layout = draw(st.sampled_from(["rows", "padded", "packed"]))
    classes, width, batch = draw(SIZES), draw(SIZES), draw(BATCHES)
    cu_seqlens = None
    if layout == "packed":
        cu_seqlens = torch.tensor([0, *(draw(LENGTHS) for _ in range(batch))]).cumsum(0).to(torch.int32)
        shape: tuple[int, ...] = (int(cu_seqlens[-1]),)
    else:
        shape = (batch, *([] if layout == "rows" else [draw(LENGTHS)]))
    kind = draw(st.sampled_from(["indices", "probabilities"])) if loss == "cross_entropy" else "values"
    if kind == "indices":
        target = torch.randint(classes, shape, generator=generator)
        target[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.4, 0.0, 1.0]))] = -7
    else:
        target = normal(*shape, classes)
        target = target.softmax(-1) if kind == "probabilities" else target
    return {
        "prediction": with_layout(normal(*shape, classes), draw(st.sampled_from(["contiguous", "transposed"]))),
        "target": target,
        "loss": loss,
        "features": normal(*shape, width),
        "linear_weight": normal(classes, width),
        "ignore_index": -7,
        "per_example": draw(st.sampled_from(PER_EXAMPLE)),
        "cu_seqlens": cu_seqlens,
    }


@pytest.mark.parametrize("where", ["native", "PyTorch", "no looking"])
@settings(max_examples=100)
@given(arguments=predictions(), max_bytes=st.sampled_from([1, 200, 600, 64 << 20]))
def test_scores_of_predictions_are_the_specifications(where: str, arguments: dict[str, Any], max_bytes: int) -> None:
    poisoned = dict(arguments)
    if where == "no looking" and not arguments["target"].is_floating_point():  # what is masked may hold anything
        poisoned["prediction"], poisoned["features"] = (arguments[name].clone() for name in ("prediction", "features"))
        ignored = arguments["target"] == -7
        poisoned["prediction"][ignored], poisoned["features"][ignored] = torch.nan, torch.inf
    for name in NAMES[arguments["loss"]]:
        with no_looking() if where == "no looking" else passes_of(where), small_chunks(max_bytes):
            actual = attent.example_scores(**poisoned, score=name)
        expected = reference.example_scores(**arguments, score=name)
        assert actual.dtype == torch.float64 and not actual.requires_grad
        # "head" from a Gram matrix is the root of a sum that is right to some units of terms as large as 10^3.
        close = {"rtol": 1e-7, "atol": 1e-6} if name == "head" else CLOSE
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_they_are_what_the_loss_returns() -> None:
    hidden, weight, target = torch.randn(3, 5, 4), torch.randn(7, 4), torch.randint(7, (3, 5))
    _, scores = attent.linear_cross_entropy(hidden, weight, target, score=("loss", "logit", "hidden", "head"))
    for name, score in scores.items():
        in_hand = attent.example_scores(hidden @ weight.T, target, score=name, features=hidden, linear_weight=weight)
        torch.testing.assert_close(in_hand, score)


def test_a_column_of_ones_stands_for_the_bias() -> None:
    hidden, weight, bias, target = torch.randn(6, 4), torch.randn(7, 4), torch.randn(7), torch.randint(7, (6,))
    _, expected = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, score="head")
    features = torch.cat([hidden, torch.ones(6, 1)], 1)
    logits = F.linear(hidden, weight, bias)
    torch.testing.assert_close(attent.example_scores(logits, target, score="head", features=features), expected)


def test_one_number_per_example_under_squared_loss() -> None:
    prediction, target = torch.randn(5), torch.randn(5)
    scores = attent.example_scores(prediction, target, loss="squared", score="residual")
    torch.testing.assert_close(scores, (prediction - target).abs())
    losses = attent.example_scores(prediction, target, loss="squared", score="loss")
    torch.testing.assert_close(losses, (prediction - target).square() / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", NAMES)
def test_scores_are_float32_and_computed_in_float32(loss: str, dtype: torch.dtype) -> None:
    prediction = torch.randn(4, 3, 9).to(dtype)
    target = torch.randn(4, 3, 9).to(dtype) if loss == "squared" else torch.randint(9, (4, 3))
    actual = attent.example_scores(prediction, target, loss=loss)
    exact = reference.example_scores(prediction.double(), target.double() if loss == "squared" else target, loss=loss)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=0)


def test_predictions_with_a_graph_are_scored_without_touching_it() -> None:
    prediction = torch.randn(4, 3, requires_grad=True)
    loss = F.cross_entropy(prediction, torch.tensor([0, 1, 2, 0]))
    scores = attent.example_scores(prediction, torch.tensor([0, 1, 2, 0]), per_example="sum")
    assert not scores.requires_grad
    loss.backward()
    assert prediction.grad is not None
    torch.testing.assert_close(scores / 4, prediction.grad.norm(dim=1))


def test_scores_of_predictions_compile_and_keep_the_rules_of_torch_library() -> None:
    prediction, target, features = torch.randn(4, 3, 9), torch.randint(9, (4, 3)), torch.randn(4, 3, 2)
    packed = torch.tensor([0, 4, 12], dtype=torch.int32)
    op = torch.ops.attent.example_scores
    torch.library.opcheck(op, (prediction, target, None, None, None, False, "logit", -100, "rms"))
    rows = [tensor.flatten(0, 1) for tensor in (prediction, target[..., None], features)]
    torch.library.opcheck(op, (rows[0], rows[1].squeeze(1), rows[2], None, packed, False, "head", -100, "rms"))

    def score(prediction: Tensor, target: Tensor) -> Tensor:
        return attent.example_scores(prediction.tanh(), target)

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (4, 2):
        torch.testing.assert_close(
            compiled(prediction[:batch], target[:batch]), score(prediction[:batch], target[:batch])
        )


def test_a_label_that_nobody_checked_and_is_no_class_makes_its_example_nan() -> None:
    prediction, target = torch.randn(3, 2, 5), torch.tensor([[0, 1], [5, 1], [2, 3]])
    compiled = torch.compile(attent.example_scores, backend="eager", fullgraph=True)
    for looking in (True, False):
        with passes_of("native") if looking else no_looking():
            scores = compiled(prediction, target)
        assert scores.isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------------ any other loss


def test_gradient_scores_are_gradient_norms_of_each_loss() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(4, 3, 6, dtype=torch.float64) @ weight
    losses = outputs.sin().square().mean((1, 2)) + outputs[:, 0, 0].exp()
    scores = attent.gradient_scores(losses, outputs)
    one_by_one = [torch.autograd.grad(loss, outputs, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(scores, torch.stack(one_by_one), **CLOSE)
    torch.testing.assert_close(scores, reference.gradient_scores(losses, outputs), **CLOSE)
    assert not scores.requires_grad
    losses.mean().backward()  # the graph is still there
    assert weight.grad is not None


def test_several_outputs_give_the_root_of_the_sum_of_squares() -> None:
    logits, boxes = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (7, 2))
    target = torch.randint(7, (4,))
    losses = F.cross_entropy(logits, target, reduction="none") + boxes.pow(4).sum(1)
    both = attent.gradient_scores(losses, (logits, boxes))
    each = [attent.gradient_scores(losses, output) for output in (logits, boxes)]
    torch.testing.assert_close(both, torch.stack(each).square().sum(0).sqrt(), **CLOSE)
    torch.testing.assert_close(each[0], attent.example_scores(logits, target), **CLOSE)
    assert torch.equal(both, attent.gradient_scores(losses, [logits, boxes]))


def test_a_preference_pair_is_one_example_of_two_rows() -> None:
    # DPO: rows 0, 2, 4 are chosen answers, rows 1, 3, 5 rejected ones.
    log_p = torch.randn(6, dtype=torch.float64, requires_grad=True)
    margin = log_p.view(3, 2).diff(dim=1).squeeze(1)
    losses = -F.logsigmoid(-0.1 * margin)
    pair = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = attent.gradient_scores(losses, log_p, pair)
    expected = 0.1 * torch.sigmoid(0.1 * margin) * 2**0.5  # both rows get the same, with opposite signs
    torch.testing.assert_close(scores, expected.detach(), **CLOSE)
    torch.testing.assert_close(scores, reference.gradient_scores(losses, log_p, pair), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    outputs = torch.full((2, 70_000), 3.0).to(dtype).requires_grad_()  # squares sum to 630,000: float16 ends at 65,504
    losses = (outputs * 3).float().sum(1)
    scores = attent.gradient_scores(losses, outputs)
    torch.testing.assert_close(scores, torch.full((2,), 3 * 70_000**0.5))


def test_no_examples_have_no_scores() -> None:
    outputs = torch.zeros(0, 3, requires_grad=True)
    assert attent.gradient_scores(outputs.sum(1), outputs).shape == (0,)
    none_of_two = attent.gradient_scores(outputs.sum() + torch.zeros(2), outputs, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(none_of_two, torch.zeros(2))
    for loss in NAMES:
        target = torch.zeros(0, 3) if loss == "squared" else torch.zeros(0, dtype=torch.int64)
        assert attent.example_scores(torch.zeros(0, 3), target, loss=loss).shape == (0,)
