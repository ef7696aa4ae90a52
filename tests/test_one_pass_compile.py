"""The compile engine: gradients of the chosen rows alone, and refusals by name, under torch.compile."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attent
from attent.one_pass import OnePass, OnePassError
from attent.one_pass.lowering import interpreted
from tests.one_pass_learners import GPT, classify, gradients, relative_error
from tests.test_one_pass import DROPPING, EXACT, LEARNERS, B, double, losses_only  # noqa: F401
from tests.test_one_pass_refusals import CROSS_EXAMPLE, CountsRows, a_warning_of_torchs_own, two_layers

#: The eager engine serves it, Dynamo does not trace it.
WITHOUT_LSTM = [name for name in LEARNERS if "lstm" not in name]
#: The rest take long to compile; below, other quick tests compile a GPT and both of attent's last layers.
QUICK = ("mlp",)


def compiling(function: Callable[..., object], backend: str = "aot_eager", **options: object) -> OnePass:
    torch._dynamo.reset()
    return OnePass(function, engine="compile", compile_backend=backend, **options)


def slow_unless(condition: bool, *values: object) -> object:
    return pytest.param(*values, marks=[] if condition else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "backend"),
    [slow_unless(name in QUICK, name, "aot_eager") for name in WITHOUT_LSTM]
    + [slow_unless(False, name, "inductor") for name in WITHOUT_LSTM],
)
def test_gradients_equal_training_on_the_chosen_rows_alone(name: str, backend: str) -> None:
    model, function, batch = LEARNERS[name]()
    step = compiling(function, backend)
    for chosen in ([5, 0, 3], [2], [6, 1, 1], list(range(B))):  # in any order, one, one twice, all
        index = torch.tensor(chosen)
        step.backward(losses_only(step(*batch)), index)
        ours = gradients(model)
        losses_only(function(*(x[index] for x in batch))).mean().backward()
        assert relative_error(ours, gradients(model)) < EXACT
        assert step.report().engine == ("compile" if len(chosen) < B else "whole")
        assert ("the whole batch's" in str(step.report())) == (len(chosen) == B)
    assert step.report().probes == 1 and step.report().verified == 2  # of three rows, and of one


@pytest.mark.parametrize(
    ("name", "backend"),
    [slow_unless(name == "gpt checkpointed", name, "aot_eager") for name in DROPPING]
    + [slow_unless(False, name, "inductor") for name in DROPPING if name != "vit checkpointed"],
)
def test_dropout_is_that_of_the_forward_that_was_run(name: str, backend: str) -> None:
    model, function, batch = DROPPING[name]()
    step = compiling(function, backend)
    for chosen in ([5, 0, 3], [6, 1, 2]):
        index = torch.tensor(chosen)
        losses = step(*batch)
        torch.autograd.backward(losses[index].mean(), retain_graph=True)  # the same graph, not cut
        truth = gradients(model)
        step.backward(losses, index)
        assert relative_error(gradients(model), truth) < EXACT
        assert step.report().engine == "compile"
    again = step(*batch)
    assert not torch.equal(losses, again)  # dropout has drawn anew


@pytest.mark.slow
def test_a_dropout_mask_that_inductor_packs_across_rows_is_refused() -> None:
    _, function, batch = DROPPING["vit checkpointed"]()
    with pytest.raises(OnePassError, match=r"\(uint8\) has no batch dimension but depends on the rows"):
        compiling(function, "inductor")(*batch)


def two_linear() -> tuple[nn.Module, Callable[..., Tensor]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    return model, classify(model)


def a_batch(size: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 6), torch.randint(5, (size,))


def test_several_forwards_wait_accumulate_and_join_in_one_backward() -> None:
    model, function = two_linear()
    batches = [a_batch(), a_batch(), a_batch(5)]
    step = compiling(function)
    choices = [torch.tensor(x) for x in ([0, 3, 5], [1, 2], [4, 0, 2])]
    pending = [step(*batch) for batch in batches]
    for i in (2, 0, 1):
        step.loss(pending[i], choices[i], denominator=8).backward()
    ours = gradients(model)
    sum(function(*(x[i] for x in batch)).sum() / 8 for batch, i in zip(batches, choices, strict=True)).backward()
    assert relative_error(ours, gradients(model)) < EXACT
    together = [step(*batch) for batch in batches]
    sum(step.loss(losses, i, denominator=8) for losses, i in zip(together, choices, strict=True)).backward()
    assert relative_error(gradients(model), ours) < EXACT


def test_weights_keywords_shared_arguments_and_gradients_of_arguments() -> None:
    model = nn.Linear(6, 5)
    x, labels = a_batch()
    offset, class_weight = torch.randn(B, 5, requires_grad=True), torch.rand(6)[1:]
    index, weights = torch.tensor([4, 1, 2]), torch.tensor([0.5, 2.0, 0.0])

    def function(inputs: dict[str, Tensor], *, labels: Tensor, class_weight: Tensor) -> Tensor:
        logits = model(inputs["x"]) + inputs["offset"]
        return F.cross_entropy(logits, labels, class_weight, reduction="none")

    inputs = {"x": x, "offset": offset}
    step = compiling(function)
    step.loss(step(inputs, labels=labels, class_weight=class_weight), index, weights, 10).backward()
    ours, of_offset = gradients(model), offset.grad
    offset.grad = None
    ((function(inputs, labels=labels, class_weight=class_weight)[index] * weights).sum() / 10).backward()
    assert relative_error(ours, gradients(model)) < EXACT
    torch.testing.assert_close(of_offset, offset.grad)
    assert not hasattr(x, "_dynamo_dynamic_indices")  # the caller's tensor stays unmarked


def test_the_backward_computes_the_chosen_rows_alone() -> None:
    _, function = two_linear()
    step, batch = compiling(function), a_batch()
    for count in (2, 5, B):
        loss = step.loss(step(*batch), torch.arange(count))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        # Weight gradients of both layers, and the gradient of the second's input.
        assert counter.get_total_flops() == 2 * count * (6 * 8 + 8 * 5 + 8 * 5)


def test_another_loss_of_the_same_losses_makes_the_backward_whole_and_right() -> None:
    model, function = two_linear()
    batch, index = a_batch(), torch.tensor([1, 2])
    step = compiling(function)
    losses = step(*batch)
    (step.loss(losses, index) + 0.1 * losses.mean()).backward()
    ours = gradients(model)
    losses = function(*batch)
    (losses[index].mean() + 0.1 * losses.mean()).backward()
    assert relative_error(ours, gradients(model)) < EXACT


def test_frozen_parameters_and_tied_ones() -> None:
    model = GPT()
    for parameter in model.block.feed.parameters():
        parameter.requires_grad_(False)
    tokens, index = torch.randint(11, (B, 6)), torch.tensor([6, 2])
    step = compiling(model)
    step.backward(step(tokens), index)
    ours = gradients(model)
    model(tokens[index]).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT


def test_the_probe_leaves_no_trace_and_refusals_neither() -> None:
    norm, head = nn.BatchNorm1d(6), nn.Linear(6, 5)
    model = nn.Sequential(norm, head)
    torch.manual_seed(3)
    with pytest.raises(OnePassError, match="BatchNorm in training mode"):
        compiling(classify(model))(*a_batch())
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    model.eval()
    dropping = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    step, batch = compiling(classify(dropping)), a_batch()
    torch.manual_seed(3)
    first = step(*batch)
    torch.manual_seed(3)
    assert torch.equal(first, step(*batch))  # the first call, which probes, draws what any call draws
    assert all(parameter.grad is None for parameter in dropping.parameters())


def test_training_modes_and_sizes_are_compiled_anew() -> None:
    model, index = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5)), torch.tensor([1, 2])
    step = compiling(classify(model))
    for probes, (size, training) in enumerate([(7, True), (6, True), (6, False)], 1):
        model.train(training)
        for _ in range(2):
            step.backward(step(*a_batch(size)), index)
        assert step.report().probes == probes
    assert len(step(*a_batch(1))) == 1  # too few to choose from: not compiled
    assert step.report().probes == probes


def test_rows_that_are_all_alike_are_probed_and_compared_again() -> None:
    _, function = two_layers(torch.relu)
    step, alike = compiling(function), torch.randn(1, 6).expand(B, -1).clone()
    for count in (1, 2):
        step.backward(step(alike), torch.tensor([2, 5]))
        assert step.report().probes == step.report().verified == count
    for _ in range(2):
        step.backward(step(torch.randn(B, 6)), torch.tensor([2, 5]))
        assert step.report().probes == step.report().verified == 3
    _, function = two_layers(lambda z: z + z.flip(0))
    step = compiling(function)
    step.backward(step(alike), torch.tensor([2, 5]))  # of equal rows the flip is themselves: this gradient is right
    with pytest.raises(OnePassError, match=r"cross-example computation.*aten.flip"):
        step(torch.randn(B, 6))


# What is refused


@pytest.mark.parametrize(
    "name", [slow_unless(name in ("flip", "in-batch contrast", "batch size"), name) for name in CROSS_EXAMPLE]
)
def test_cross_example_operations_are_refused(name: str) -> None:
    between, operation = CROSS_EXAMPLE[name]
    model, function = two_layers(between)
    with pytest.raises(OnePassError, match=r"cross-example|cannot find the batch") as refusal:
        compiling(function)(torch.randn(B, 6))
    assert operation in str(refusal.value)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_backward_that_counts_rows_is_caught_by_the_first_gradient() -> None:
    _, function = two_layers(CountsRows.apply)
    step = compiling(function)
    losses = step(torch.randn(B, 6))
    with pytest.raises(OnePassError, match="differs from the whole batch's masked backward by"):
        step.loss(losses, torch.tensor([2, 5]))


def test_what_torch_compile_cannot_serve_is_refused_by_name() -> None:
    linear = nn.Linear(6, 1)

    def breaks(x: Tensor) -> Tensor:
        print("a side effect that no graph holds", float(x.sum()))
        return linear(x)[:, 0]

    def of_one_size(x: Tensor) -> Tensor:
        return linear(x).view(B)

    def asks_for_many(x: Tensor) -> Tensor:
        return linear(x)[:, 0] * (2.0 if len(x) > 4 else 1.0)

    def keeps(x: Tensor) -> Tensor:
        linear.kept = linear(x)
        return linear.kept[:, 0] * 2

    with pytest.raises(OnePassError, match="graph break: "):
        compiling(breaks)(torch.randn(B, 6))
    with pytest.raises(OnePassError, match="made for one batch size"):
        compiling(of_one_size)(torch.randn(B, 6))
    with pytest.raises(OnePassError, match="2 tensors with gradient where one, the losses, is taken"):
        compiling(keeps)(torch.randn(B, 6))
    step = compiling(asks_for_many)
    losses = step(torch.randn(B, 6))
    with pytest.raises(OnePassError, match=r"compiled for .*> 4, which k = 2 chosen rows break"):
        step.loss(losses, torch.tensor([2, 5]))
    step.backward(step(torch.randn(B, 6)), torch.tensor([0, 1, 2, 3, 5]))
    with torch.compiler.set_stance("force_eager"), pytest.raises(OnePassError, match="is switched off"):
        compiling(two_linear()[1])(*a_batch())


def test_two_choices_and_second_derivatives_are_refused() -> None:
    _, function = two_linear()
    step, batch = compiling(function), a_batch()
    one, two = torch.tensor([1, 2]), torch.tensor([3, 4])
    losses = step(*batch)
    with pytest.raises(OnePassError, match="two choices of rows from one forward"):
        (step.loss(losses, one) + step.loss(losses, two)).backward()
    losses = step(*batch)
    with pytest.raises(OnePassError, match="create_graph=True"), a_warning_of_torchs_own():
        step.loss(losses, one).backward(create_graph=True)


@pytest.mark.slow
def test_a_fifth_number_of_chosen_rows_is_refused_with_a_way_out() -> None:
    model = nn.Linear(6, 5)
    step, batch = compiling(classify(model), "inductor"), a_batch(9)
    for count in (2, 3, 4, 5):
        step.backward(step(*batch), torch.arange(count))
    losses = step(*batch)
    with pytest.raises(OnePassError, match=r"k = 6 would be a fifth number.*keep k the same.*engine='eager'"):
        step.loss(losses, torch.arange(6))
    gradients(model)
    step.backward(step(*batch), torch.arange(9))  # the whole batch is no choice
    step.backward(step(*batch), torch.arange(3))


def test_auto_compiles_what_is_compiled_already() -> None:
    torch._dynamo.reset()
    model = nn.Linear(6, 5)
    compiled, batch, index = torch.compile(model, backend="aot_eager"), a_batch(), torch.tensor([3, 1])
    step = OnePass(classify(compiled), compile_backend="aot_eager")
    step.backward(step(*batch), index)
    ours = gradients(model)
    classify(model)(*(x[index] for x in batch)).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    assert step.report().engine == "compile"
    norm = torch.compile(nn.Sequential(nn.BatchNorm1d(6), model), backend="aot_eager")
    step = OnePass(classify(norm), compile_backend="aot_eager")
    with pytest.warns(UserWarning, match=r"two passes, for the compile engine cannot serve this: .*BatchNorm"):
        step.backward(step(*batch), index)
    assert step.report().engine == "two_pass" and "BatchNorm" in step.report().refused["compile"]


def test_scores_come_back_without_gradient_and_the_lesson_from_the_forwards_own_launch() -> None:
    model = nn.Linear(6, 16)
    classifier = attent.AttentiveClassifier(16, 2, 5)
    x, labels = torch.randn(10, 4, 6), torch.randint(5, (10,))

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = classifier(model(x), labels, top_k=len(x) // 2)
        return out.losses, out.selection.index

    step = compiling(function)
    losses, index = step(x, labels)
    assert losses.requires_grad and not index.requires_grad and len(index) == 5
    step.backward(losses, index)
    ours = gradients(model)
    function(x, labels)[0][index].mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    with torch.no_grad():
        torch.testing.assert_close(step(x, labels)[0], losses.detach())


def test_scores_that_are_views_of_what_the_losses_come_from() -> None:
    model = nn.Linear(6, 5)

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses, {"first": logits[:, 0], "loss": losses, "flat": logits.view(-1)}

    step, batch, index = compiling(function), a_batch(), torch.tensor([3, 1])
    losses, scores = step(*batch)
    torch.testing.assert_close(scores["first"], model(batch[0])[:, 0].detach())
    assert not any(score.requires_grad for score in scores.values())
    step.backward(losses, index)
    ours = gradients(model)
    function(*(x[index] for x in batch))[0].mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT


def test_a_mode_that_is_hidden_from_the_step_is_noticed_by_torch_compile() -> None:
    model, hidden = nn.Linear(6, 5), {"dropout": 0.0}

    def function(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(F.dropout(x, hidden["dropout"])), labels, reduction="none")

    step, batch, index = compiling(function), a_batch(), torch.tensor([1, 2])
    step.backward(step(*batch), index)
    hidden["dropout"] = 0.5
    gradients(model)
    losses = step(*batch)
    losses[index].mean().backward(retain_graph=True)
    truth = gradients(model)
    step.backward(losses, index)
    assert relative_error(gradients(model), truth) < EXACT and step.report().engine == "compile"
    assert step.report().probes == 2


def test_losses_that_are_let_go_let_go_of_their_batch() -> None:
    step, (x, labels) = compiling(two_linear()[1]), a_batch()
    losses, gone = step(x, labels), weakref.ref(x)
    step.backward(losses, torch.tensor([1, 2]))
    del x, losses
    assert gone() is None


@pytest.mark.parametrize("generated", [True, False], ids=["generated", "PyTorch 2.9"])
def test_a_graph_drops_each_argument_after_its_last_use(generated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not generated:
        monkeypatch.delattr(fx.graph, "_BoxedCodeGen", raising=False)
    alive: list[bool] = []

    def look(x: Tensor) -> Tensor:
        alive.append(held() is not None)
        return x + 1

    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output(graph.call_function(look, (graph.call_function(torch.add, (a, b)),)))
    arguments = [torch.ones(2), torch.ones(2)]
    held = weakref.ref(arguments[0])
    assert interpreted(fx.GraphModule(nn.Module(), graph))(arguments).tolist() == [3.0, 3.0]
    assert arguments == [] and alive == [False]
