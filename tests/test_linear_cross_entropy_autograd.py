"""Linear cross-entropy as a citizen of PyTorch: autograd, autocast, checkpointing, torch.compile, torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attent
from attent import reference

from .linear_cross_entropy_problems import NAMES, REDUCTIONS

CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64, numbers of order one


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of 2 x 3 tokens, weight, bias and targets, one of them ignored."""
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 4), (7, 4), (7,)))
    target = torch.randint(7, (2, 3))
    target[1, 0] = -100
    return hidden, weight, bias, target


def plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), target.flatten())


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0, "label_smoothing": 0.1}], ids=["plain", "capped and smoothed"]
)
def test_gradcheck(options: dict[str, Any], reduction: str) -> None:
    hidden, weight, bias, target = leaves()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = attent.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, **options
        )
        return result

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_several_backward_calls_add_up(reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    loss = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (hidden, weight, bias)]
    (2 * loss).backward()  # the same graph again
    other = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction).sum()
    other.backward()  # and another one, as in gradient accumulation
    for leaf, gradient in zip((hidden, weight, bias), once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient, **CLOSE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_no_gradient_is_computed_that_nobody_wants(wanted: tuple[bool, ...], reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    for leaf, want in zip((hidden, weight, bias), wanted, strict=True):
        leaf.requires_grad_(want)
    arguments = (
        hidden, weight, target, bias, None, None, None, reduction, -100, 0.0, None, False, [], "rms", None, "torch",
    )  # fmt: skip
    all_sizes = [leaf.numel() for leaf in (hidden, weight, bias)]
    loss, _, _, *in_forward = torch.ops.attent.linear_cross_entropy(*arguments, *wanted)
    computed = reduction in ("mean", "sum")
    assert [g.numel() for g in in_forward] == [
        n * (want and computed) for n, want in zip(all_sizes, wanted, strict=True)
    ]
    in_backward = torch.ops.attent.linear_cross_entropy_backward(torch.ones_like(loss), *arguments, *wanted)
    assert [g.numel() for g in in_backward] == [n * want for n, want in zip(all_sizes, wanted, strict=True)]
    loss = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.sum().backward()
    assert [leaf.grad is not None for leaf in (hidden, weight, bias)] == list(wanted)


def test_scores_carry_no_gradient() -> None:
    hidden, weight, bias, target = leaves()
    loss, scores = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, score=NAMES)
    assert loss.requires_grad and loss.grad_fn is not None
    assert not any(score.requires_grad for score in scores.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_is_differentiable_once(reduction: str) -> None:
    hidden, weight, _, target = leaves()
    loss = attent.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):  # and does not pass a second derivative off as 0
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_changed_in_place_before_the_backward_is_noticed(reduction: str) -> None:
    hidden, weight, _, target = leaves()
    loss = attent.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    with torch.no_grad():
        weight.mul_(2)
    if reduction == "mean":  # its gradient is there already, and that of the weight as it was
        assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_head_tied_to_the_embedding_gets_the_sum_of_both_gradients() -> None:
    tokens = torch.randint(9, (2, 6))

    def gradient(loss_of: Callable[[Tensor, nn.Embedding], Tensor]) -> Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, dtype=torch.float64)
        loss_of(torch.tanh(embedding(tokens)), embedding).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    mine = gradient(lambda hidden, embedding: attent.linear_cross_entropy(hidden, embedding.weight, tokens, shift=True))
    plain = gradient(lambda hidden, embedding: plain_loss(hidden[:, :-1], embedding.weight, None, tokens[:, 1:]))
    torch.testing.assert_close(mine, plain, **CLOSE)


# -------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_but_loss_and_scores_is_computed(mode: Callable[[], Any]) -> None:
    hidden, weight, bias, target = leaves()
    expected = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, score=NAMES)
    with mode():
        loss, scores = attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, score=NAMES)
    assert not loss.requires_grad and torch.equal(loss, expected[0])
    assert all(torch.equal(scores[name], expected[1][name]) for name in NAMES)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_what_casting_by_hand_does(reduction: str) -> None:
    hidden, weight, bias, target = leaves(torch.float32)

    def outcome(loss: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return loss, scores, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))

    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(
            *attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction, score="head")
        )
        assert F.linear(hidden, weight).dtype == torch.bfloat16
        same = attent.score_and_select(hidden, weight, target, 2, linear_bias=bias, score="head")
    halves = [leaf.bfloat16() for leaf in (hidden, weight, bias)]
    by_hand = outcome(
        *attent.linear_cross_entropy(
            halves[0], halves[1], target, linear_bias=halves[2], reduction=reduction, score="head"
        )
    )
    assert [value.dtype for value in inside] == [torch.float32] * 5
    assert all(torch.equal(a, b) for a, b in zip(inside, by_hand, strict=True))
    assert torch.equal(same.score, inside[1][same.index])
    double = [leaf.double() for leaf in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):  # float64 it leaves alone, as everywhere
        assert attent.linear_cross_entropy(*double, target).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_checkpointed_loss_has_the_same_gradients_and_scores(reduction: str, use_reentrant: bool) -> None:
    hidden, weight, bias, target = leaves()

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, linear_bias=bias, reduction=reduction, score="head"
        )
        return result

    expected, right = loss(hidden)
    actual, scores = checkpoint(loss, hidden, use_reentrant=use_reentrant)
    assert torch.equal(actual, expected) and torch.equal(scores, right)
    gradients = []
    for of in (expected, actual):
        of.sum().backward()
        gradients.append([leaf.grad.clone() for leaf in (hidden, weight, bias)])
        hidden.grad = weight.grad = bias.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ----------------------------------------------------------------------------------------------- torch.library, compile


def op_arguments(reduction: str, dtype: torch.dtype, requires_grad: bool) -> tuple[Any, ...]:
    hidden, weight, bias, target = leaves(dtype)
    values = [hidden, weight, bias]
    values = [value if requires_grad else value.detach() for value in values]
    return (
        values[0], values[1], target, values[2], torch.rand(7), torch.rand(2), None, reduction, -100, 0.1, 3.0, True,
        list(NAMES), "rms", None, "torch", requires_grad, requires_grad, requires_grad,
    )  # fmt: skip


@pytest.mark.parametrize(("reduction", "requires_grad"), [*((of, True) for of in REDUCTIONS), ("mean", False)])
def test_the_op_keeps_the_rules_of_torch_library(reduction: str, requires_grad: bool) -> None:
    dtype = torch.float16 if reduction == "sum" else torch.float32
    arguments = op_arguments(reduction, dtype, requires_grad)
    torch.library.opcheck(torch.ops.attent.linear_cross_entropy, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_backward_op_keeps_the_rules_of_torch_library(reduction: str) -> None:
    shape = {"none": (2, 3), "example": (2,)}.get(reduction, ())
    arguments = list(op_arguments(reduction, torch.float32, False))
    arguments[12], arguments[-3:] = [], [True, True, False]
    torch.library.opcheck(torch.ops.attent.linear_cross_entropy_backward, (torch.ones(shape), *arguments))


def test_the_op_is_right_about_shapes_at_odd_strides_and_without_tokens() -> None:
    packed = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    for hidden in (torch.randn(4, 5).T, torch.randn(5, 8)[:, ::2], torch.randn(1, 4).expand(5, 4)):
        arguments = [*op_arguments("mean", torch.float32, True)]
        arguments[0], arguments[2], arguments[5], arguments[6] = hidden, torch.randint(7, (5,)), torch.rand(3), packed
        torch.library.opcheck(torch.ops.attent.linear_cross_entropy, tuple(arguments))
    for shape in ((0, 3, 4), (2, 0, 4)):
        arguments = [*op_arguments("none", torch.float32, True)]
        arguments[0], arguments[2], arguments[5] = (
            torch.randn(shape),
            torch.zeros(shape[:-1], dtype=torch.int64),
            torch.rand(shape[0]),
        )
        torch.library.opcheck(torch.ops.attent.linear_cross_entropy, tuple(arguments))


def train_step(reduction: str) -> Callable[..., tuple[Tensor, ...]]:
    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, scores = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, linear_bias=bias, reduction=reduction, score=("logit", "head")
        )
        return loss.sum(), scores["logit"], scores["head"]

    return step


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_compiles_to_one_graph_for_all_batch_sizes(reduction: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    step = train_step(reduction)
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for batch in (3, 5, 8):
        hidden = torch.randn(batch, 6, 4, dtype=torch.float64, requires_grad=True)
        weight, bias = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
        target = torch.randint(7, (batch, 6))
        outcomes = []
        for function in (step, compiled):
            loss, *scores = function(hidden, weight, bias, target)
            outcomes.append([loss, *scores, *torch.autograd.grad(loss, (hidden, weight))])
        for eager, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(other, eager, **CLOSE)
        if batch == 3:
            compiled_for_the_first = len(graphs)
    assert len(graphs) == compiled_for_the_first


def test_a_batch_marked_dynamic_stays_dynamic() -> None:
    compiled = torch.compile(train_step("mean"), backend="aot_eager", fullgraph=True)
    hidden, target = torch.randn(3, 6, 4), torch.randint(7, (3, 6))
    torch._dynamo.mark_dynamic(hidden, 0)
    torch._dynamo.mark_dynamic(target, 0)
    compiled(hidden, torch.randn(7, 4), torch.randn(7), target)  # raises where a size was pinned


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor_compiles_a_training_step_to_one_graph(reduction: str) -> None:
    step = train_step(reduction)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (3, 5):
        hidden, weight = torch.randn(batch, 6, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        bias, target = torch.randn(7), torch.randint(7, (batch, 6))
        outcomes = []
        for function in (step, compiled):
            loss, *scores = function(hidden, weight, bias, target)
            outcomes.append([loss, *scores, *torch.autograd.grad(loss, (hidden, weight))])
        for eager, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(other, eager)


def test_the_specification_and_the_op_take_the_same_arguments() -> None:
    import inspect

    public = inspect.signature(attent.linear_cross_entropy).parameters
    specified = inspect.signature(reference.linear_cross_entropy).parameters
    assert list(specified) == [name for name in public if name not in ("group", "backend")]
    assert all(specified[name].default == public[name].default for name in specified)
