"""One-pass teaching: gradients are those of training on the chosen rows alone, whatever the learner is made of."""

from __future__ import annotations

import functools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.one_pass import OnePass
from tests.one_pass_learners import (
    GPT,
    Attentive,
    Encoder,
    GroupNormNet,
    LastState,
    ViT,
    classify,
    gradients,
    relative_error,
)

B = 7
# Sums over rows run in another order than on the chosen rows alone: some hundred roundings of 1e-16.
EXACT = 1e-10


@pytest.fixture(autouse=True)
def double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 1, 8, 8), torch.randint(5, (B,))


def losses_only(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


LEARNERS = {
    "vit": lambda: (model := ViT(), classify(model), images()),
    "vit checkpointed": lambda: (model := ViT(checkpointed=True), classify(model), images()),
    "gpt, tied": lambda: (model := GPT(), model, (torch.randint(11, (B, 6)),)),
    "gpt, linear_cross_entropy": lambda: (model := GPT(fused=True), model, (torch.randint(11, (B, 6)),)),
    "encoder, batch first": lambda: (model := Encoder(True, 0.0), model, (torch.randn(B, 4, 16),)),
    "encoder, time first": lambda: (model := Encoder(False, 0.0), model, (torch.randn(B, 4, 16),)),
    "group norm": lambda: (model := GroupNormNet(), classify(model), images()),
    "lstm, own last token": lambda: (
        model := LastState(),
        model,
        (torch.randn(B, 5, 4), torch.randint(5, (B,)), torch.randint(5, (B,))),
    ),
    "AttentiveClassifier": lambda: (model := Attentive(), model, (torch.randn(B, 5, 16), torch.randint(5, (B,)))),
    "mlp": lambda: (
        model := nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 5)),
        classify(model),
        images(),
    ),
}
DROPPING = {
    "vit": lambda: (model := ViT(0.2), classify(model), images()),
    "vit checkpointed": lambda: (model := ViT(0.2, checkpointed=True), classify(model), images()),
    "gpt checkpointed": lambda: (model := GPT(dropout=0.2, checkpointed=True), model, (torch.randint(11, (B, 6)),)),
    "encoder, batch first": lambda: (model := Encoder(True, 0.2), model, (torch.randn(B, 4, 16),)),
    "encoder, time first": lambda: (model := Encoder(False, 0.2), model, (torch.randn(B, 4, 16),)),
}


@pytest.mark.parametrize("engine", ["eager", "two_pass"])
@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_equal_training_on_the_chosen_rows_alone(name: str, engine: str) -> None:
    model, function, batch = LEARNERS[name]()
    step = OnePass(function, engine=engine)
    for chosen in ([5, 0, 3], [2], [6, 1, 1], list(range(B))):  # in any order, one, one twice, all
        index = torch.tensor(chosen)
        step.backward(losses_only(step(*batch)), index)
        ours = gradients(model)
        losses_only(function(*(x[index] for x in batch))).mean().backward()
        assert relative_error(ours, gradients(model)) < EXACT
    assert step.report().probes == (engine == "eager")


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_that_of_the_forward_that_was_run(name: str) -> None:
    model, function, batch = DROPPING[name]()
    step = OnePass(function, engine="eager")
    for chosen in ([5, 0, 3], [2], [6, 1]):
        index = torch.tensor(chosen)
        losses = step(*batch)
        torch.autograd.backward(losses[index].mean(), retain_graph=True)  # the same graph, not cut
        truth = gradients(model)
        step.backward(losses, index)
        assert relative_error(gradients(model), truth) < EXACT


def test_weights_and_denominator() -> None:
    model = ViT()
    function, batch = classify(model), images()
    index, weights = torch.tensor([4, 1, 2]), torch.tensor([0.5, 2.0, 0.0])
    for engine in ("eager", "two_pass"):
        step = OnePass(function, engine=engine)
        for denominator in (None, 10, torch.tensor(7.0)):
            loss = step.loss(step(*batch), index, weights, denominator)
            expected = (function(*batch)[index] * weights).sum() / (3 if denominator is None else denominator)
            torch.testing.assert_close(loss, expected)
            loss.backward()
            ours = gradients(model)
            expected.backward()
            assert relative_error(ours, gradients(model)) < EXACT


def test_an_empty_choice_has_no_gradient() -> None:
    model = ViT()
    for engine in ("eager", "two_pass"):
        step = OnePass(classify(model), engine=engine)
        loss = step.loss(step(*images()), torch.tensor([], dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0
        assert all(grad is None or not grad.any() for grad in gradients(model))


def test_several_forwards_wait_for_their_backwards_in_any_order_and_accumulate() -> None:
    model = ViT()
    function, batches = classify(model), [images(), images(), (torch.randn(5, 1, 8, 8), torch.randint(5, (5,)))]
    step = OnePass(function, engine="eager")
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


def test_a_backward_of_the_losses_themselves_is_the_whole_batchs() -> None:
    model = ViT()
    function, batch = classify(model), images()
    step = OnePass(function, engine="eager")
    losses = step(*batch)
    step.loss(losses, torch.tensor([1, 4])).backward(retain_graph=True)
    model.zero_grad()
    losses.mean().backward()
    ours = gradients(model)
    function(*batch).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT


def test_frozen_parameters_get_no_gradient_and_the_rest_is_exact() -> None:
    model = ViT()
    for parameter in [*model.patches.parameters(), *model.blocks[0].parameters()]:
        parameter.requires_grad_(False)
    function, batch, index = classify(model), images(), torch.tensor([6, 2])
    step = OnePass(function, engine="eager")
    step.backward(step(*batch), index)
    ours = gradients(model)
    function(*(x[index] for x in batch)).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    assert ours[2] is None


def test_batches_of_dicts_and_keywords_and_shared_arguments() -> None:
    model = ViT()

    def function(inputs: dict[str, Tensor], *, labels: Tensor, class_weight: Tensor, smoothing: float) -> Tensor:
        logits = model(inputs["pixels"]) + inputs["offset"]
        return F.cross_entropy(logits, labels, class_weight, reduction="none", label_smoothing=smoothing)

    x, labels = images()
    weight, offset, index = torch.rand(5), torch.randn(B, 5), torch.tensor([5, 2, 0])
    for engine in ("eager", "two_pass"):
        step = OnePass(functools.partial(function, smoothing=0.1), engine=engine)
        step.backward(step({"pixels": x, "offset": offset}, labels=labels, class_weight=weight), index)
        ours = gradients(model)
        inputs = {"pixels": x[index], "offset": offset[index]}
        function(inputs, labels=labels[index], class_weight=weight, smoothing=0.1).mean().backward()
        assert relative_error(ours, gradients(model)) < EXACT


def test_batch_arguments_that_want_gradients_get_them_in_the_chosen_rows() -> None:
    model, index = ViT(), torch.tensor([5, 2])
    x, labels = images()
    for engine in ("eager", "two_pass"):
        x.requires_grad_().grad = None
        step = OnePass(classify(model), engine=engine)
        step.backward(step(x, labels), index)
        (expected,) = torch.autograd.grad(classify(model)(x, labels)[index].mean(), x)
        torch.testing.assert_close(x.grad, expected)


def test_two_batches_concatenated_within_the_loss_as_in_preference_training() -> None:
    model = ViT()

    def function(better: Tensor, worse: Tensor) -> Tensor:
        values = model(torch.cat([better, worse]))[:, 0]
        return -F.logsigmoid(values[: len(better)] - values[len(better) :])

    batch, index = (torch.randn(B, 1, 8, 8), torch.randn(B, 1, 8, 8)), torch.tensor([5, 2, 0])
    step = OnePass(function, engine="eager")
    step.backward(step(*batch), index)
    ours = gradients(model)
    function(*(x[index] for x in batch)).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT


def test_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    model = ViT()
    function, batch, index = classify(model), images(), torch.tensor([5, 2, 0])
    for engine in ("eager", "two_pass"):
        step = OnePass(function, engine=engine)
        with torch.autocast("cpu", torch.bfloat16):
            losses = step(*batch)
            inside = step.loss(losses, index)
        inside.backward()
        ours = gradients(model)
        with torch.autocast("cpu", torch.bfloat16):
            expected = function(*(x[index] for x in batch)).mean()
        expected.backward()
        # Gradients are rounded to bfloat16, to 2^-9, at every layer that they pass: two blocks of four.
        assert relative_error(ours, gradients(model)) < 8 * 2**-9


def test_autocast_after_none_is_probed_anew() -> None:
    torch.set_default_dtype(torch.float32)
    model = ViT()
    step, batch, index = OnePass(classify(model), engine="eager"), images(), torch.tensor([5, 2, 0])
    step.backward(step(*batch), index)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(*batch)
    step.backward(losses, index)
    assert step.report().probes == step.report().verified == 2


def test_shapes_and_training_modes_are_probed_anew() -> None:
    model = ViT(0.1)
    step, index = OnePass(classify(model), engine="eager"), torch.tensor([1, 2])
    for probes, (size, training) in enumerate([(7, True), (6, True), (6, False)], 1):
        model.train(training)
        x, labels = torch.randn(size, 1, 8, 8), torch.randint(5, (size,))
        step.backward(step(x, labels), index)
        step.backward(step(x, labels), index)
        assert step.report().probes == probes


def test_a_mode_that_is_hidden_from_the_step_is_noticed_by_what_the_forward_saves() -> None:
    model, hidden = ViT(), {"dropout": 0.0}
    head = classify(model)

    def function(x: Tensor, labels: Tensor) -> Tensor:
        return head(F.dropout(x, hidden["dropout"]) if hidden["dropout"] else x * x, labels)

    step, batch, index = OnePass(function, engine="eager"), images(), torch.tensor([1, 2])
    step.backward(step(*batch), index)
    hidden["dropout"] = 0.5
    gradients(model)
    losses = step(*batch)
    losses[index].mean().backward(retain_graph=True)
    truth = gradients(model)
    step.backward(losses, index)
    assert relative_error(gradients(model), truth) < EXACT


def test_scores_come_back_without_gradient_and_without_grad_mode_the_function_is_just_called() -> None:
    model, batch = Attentive(), (torch.randn(B, 5, 16), torch.randint(5, (B,)))
    step = OnePass(model)
    losses, scores = step(*batch)
    assert losses.requires_grad and not scores.requires_grad and scores.shape == (B,)
    with torch.no_grad():
        torch.testing.assert_close(step(*batch)[0], losses.detach())
    assert step.report().probes == 1


def test_the_lesson_may_come_from_the_forwards_own_launch() -> None:
    model, (x, labels) = Attentive(), (torch.randn(B, 5, 16), torch.randint(5, (B,)))

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, attent.Selection]:
        out = model.classifier(model.block(x), labels, top_k=len(x) // 2)
        return out.losses, out.selection

    step = OnePass(function, engine="eager")
    losses, lesson = step(x, labels)
    step.backward(losses, lesson.index)
    ours = gradients(model)
    model(x[lesson.index], labels[lesson.index])[0].mean().backward()
    assert len(lesson.index) == 3 and relative_error(ours, gradients(model)) < EXACT


@pytest.mark.parametrize("engine", ["eager", "two_pass"])
def test_losses_that_are_let_go_let_go_of_their_batch(engine: str) -> None:
    step, (x, labels) = OnePass(classify(ViT()), engine=engine), images()
    losses, gone = step(x, labels), weakref.ref(x)
    step.backward(losses, torch.tensor([1, 2]))
    del x, losses
    assert gone() is None


def test_the_probe_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rolled = ViT(0.3), 0
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            return self.net(x) * (1 + 0.1 * random.random() + 0.1 * np.random.random())  # noqa: NPY002

    model, (x, labels) = Counting(), images()
    model.net.head.eval()
    function, plain = classify(model), Counting()
    plain.load_state_dict(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = classify(plain)(x, labels)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    step = OnePass(function, engine="eager")
    losses = step(x, labels)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert step.report().probes == 1
    assert model.seen == B and torch.equal(model.mean, plain.mean)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [module.training for module in model.modules()]
    step.loss(losses, torch.tensor([1, 2]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_verify_every_compares_with_the_masked_full_backward() -> None:
    model = ViT()
    step, batch = OnePass(classify(model), engine="eager", verify_every=2), images()
    for _ in range(6):
        step.backward(step(*batch), torch.tensor([1, 2]))
    assert step.report().verified == 1 + 3
    assert step.report().largest_error < EXACT


def test_the_report_says_engine_cost_and_reasons() -> None:
    model, batch = ViT(), images()
    step = OnePass(classify(model))
    assert step.report().engine is None
    step.backward(step(*batch), torch.arange(3))
    report = step.report()
    assert (report.engine, report.keep_ratio, report.cost) == ("eager", 3 / B, (1 + 2 * 3 / B) / 3)
    assert not report.refused and "engine: eager" in str(report)
    step = OnePass(classify(model), engine="two_pass")
    step.backward(step(*batch), torch.arange(3))
    assert step.report().cost == (1 + 3 * 3 / B) / 3


@pytest.mark.parametrize("engine", ["eager", "two_pass"])
def test_a_stream_is_taught_with_a_teacher(engine: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))

    def per_example_loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, labels, reduction="none"), attent.example_scores(logits, labels)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    step = OnePass(per_example_loss, engine=engine)
    teacher = attent.Teacher(total_steps=60, ratio=0.5, reweight="inverse")
    means, sizes = [], []
    for _ in range(60):
        x = torch.randn(32, 8)
        losses, scores = step(x, x[:, :3].argmax(1))
        lesson = teacher.choose(scores)
        step.loss(losses, lesson.index, teacher.weights(lesson).double()).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(losses.detach().mean()))
        sizes.append(len(lesson.index))
    assert sum(means[-5:]) < 0.6 * sum(means[:5])
    assert set(sizes) == {16, 32} and sizes.count(16) > 40
