"""One-pass teaching refuses what it cannot serve exactly and says what it was: no wrong gradient, and no silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attent
from attent.one_pass import OnePass, OnePassError
from tests.one_pass_learners import GPT, Block, ViT, classify, gradients, relative_error

B = 7


@pytest.fixture(autouse=True)
def double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def two_layers(between: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A learner of [B, 6] that does something to [B, 8] between its layers."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    return model, lambda x: model[1](between(model[0](x).tanh()))[:, 0].square()


def contrast(z: Tensor) -> Tensor:
    return z * F.softmax(z @ z.mT, 1).sum(1, keepdim=True)


def flattened(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: function(z.view(-1)).view(z.shape)


CROSS_EXAMPLE = {
    "flip": (lambda z: z + z.flip(0), "aten.flip"),
    "roll": (lambda z: z * z.roll(1, 0), "aten.roll"),
    "mean": (lambda z: z - z.mean(0), "aten.mean"),
    "softmax": (lambda z: z.softmax(0), "aten._softmax"),
    "in-batch contrast": (contrast, "aten.mm"),
    "first row": (lambda z: z + z[0], "aten.select"),
    "batch size": (lambda z: z / len(z), "aten.div"),
    "mixup": (lambda z: 0.7 * z + 0.3 * z[torch.randperm(len(z))], "aten.index"),
    "cumsum": (lambda z: z.cumsum(0), "aten.cumsum"),
    "capacity": (lambda z: z * (z[:, :1].argsort(0) < 2), "aten.sort"),
    "flattened": (flattened(lambda z: z + z.flip(0)), "aten.flip"),
}


@pytest.mark.parametrize("name", CROSS_EXAMPLE)
def test_cross_example_operations_are_refused_by_name(name: str) -> None:
    between, operation = CROSS_EXAMPLE[name]
    model, function = two_layers(between)
    step, x = OnePass(function, engine="eager"), torch.randn(B, 6)
    with pytest.raises(OnePassError, match=r"cross-example|cannot find the batch") as refusal:
        step(x)
    assert operation in str(refusal.value) and "saved tensor" in str(refusal.value)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dimensions", [1, 2])
def test_batch_norm_in_training_is_refused_and_its_statistics_are_as_before(dimensions: int) -> None:
    norm = nn.BatchNorm1d(8) if dimensions == 1 else nn.BatchNorm2d(8)
    shape = (8,) if dimensions == 1 else (8, 3, 3)
    function = lambda x: norm(x).flatten(1).square().mean(1)  # noqa: E731
    step, x = OnePass(function, engine="eager"), torch.randn(B, *shape)
    with pytest.raises(OnePassError, match=r"batch_norm.*statistics of the batch.*BatchNorm in training mode"):
        step(x)
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    norm.eval()
    step.backward(step(x), torch.tensor([2, 5]))
    assert step.report().engine == "eager"


def test_auto_says_why_it_teaches_in_two_passes_and_is_exact_then() -> None:
    norm, head = nn.BatchNorm1d(6), nn.Linear(6, 1)
    model = nn.Sequential(norm, head)
    step = OnePass(lambda x: model(x)[:, 0].square())
    x, index = torch.randn(B, 6), torch.tensor([1, 5, 6])
    with pytest.warns(UserWarning, match=r"two passes.*BatchNorm in training mode"):
        losses = step(x)
    assert not norm.running_mean.any()  # the pool's statistics are not those trained with
    step.loss(losses, index).backward()
    torch.testing.assert_close(norm.running_mean, 0.1 * x[index].mean(0))
    ours = gradients(model)
    model(x[index])[:, 0].square().mean().backward()
    assert relative_error(ours, gradients(model)) < 1e-10
    report = step.report()
    assert report.engine == "two_pass" and "BatchNorm" in report.refused["eager"]
    step(x)  # warned of once
    assert step.report().probes == 1


def test_rows_that_are_all_alike_teach_the_probe_nothing_so_it_looks_again() -> None:
    _, function = two_layers(torch.relu)
    step, alike = OnePass(function, engine="eager"), torch.randn(1, 6).expand(B, -1).clone()
    for probes in (1, 2):
        step.backward(step(alike), torch.tensor([2, 5]))
        assert step.report().probes == probes
    for _ in range(2):
        step.backward(step(torch.randn(B, 6)), torch.tensor([2, 5]))
        assert step.report().probes == 3
    _, function = two_layers(lambda z: z + z.flip(0))
    step = OnePass(function, engine="eager")
    losses = step(alike)  # the flip of equal rows is themselves, as far as values tell
    with pytest.raises(OnePassError, match=r"aten.flip.default works along the batch"):
        step.loss(losses, torch.tensor([2, 5]))


class CountsRows(torch.autograd.Function):
    """Keeps rows apart in its forward, and in its backward divides by how many there are."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad / torch.ones_like(grad).sum()


def test_the_first_gradient_is_compared_with_the_full_backward() -> None:
    model, function = two_layers(CountsRows.apply)
    x, index = torch.randn(B, 6), torch.tensor([2, 5])
    step = OnePass(function, engine="eager")
    losses = step(x)
    with pytest.raises(OnePassError, match="differs from the whole batch's masked backward by"):
        step.loss(losses, index)
    step = OnePass(function)
    losses = step(x)
    with pytest.warns(UserWarning, match="differs from the whole batch's masked backward by"):
        loss = step.loss(losses, index)
    loss.backward()
    ours = gradients(model)
    function(x)[index].mean().backward()
    assert relative_error(ours, gradients(model)) < 1e-10
    assert step.report().engine == "whole"
    step.loss(step(x), index)
    assert step.report().engine == "two_pass"


def test_verify_every_raises_when_a_learner_turns_bad() -> None:
    sneaky = {"on": False}

    class Later(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad / torch.ones_like(grad).sum() if sneaky["on"] else grad * 1

    for engine in ("eager", "auto"):
        sneaky["on"] = False
        _, function = two_layers(Later.apply)
        step, index = OnePass(function, engine=engine, verify_every=2), torch.tensor([2, 5])
        for _ in range(3):
            step.loss(step(torch.randn(B, 6)), index)
        sneaky["on"] = True
        losses = step(torch.randn(B, 6))
        with pytest.raises(OnePassError, match="differs from the whole batch's masked backward by"):
            step.loss(losses, index)


def test_a_fused_attention_with_dropout_is_refused() -> None:
    library = torch.library.Library("one_pass_refusals", "FRAGMENT")
    library.define("dropout_attention(Tensor x, float dropout_p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    library.impl("dropout_attention", lambda x, p: F.dropout(x, p), "CompositeExplicitAutograd")
    operation = torch.ops.one_pass_refusals.dropout_attention
    _, function = two_layers(lambda z: operation(z, 0.1).detach() * z)
    with pytest.raises(OnePassError, match=r"dropout_attention.* with dropout 0.1 replays its random numbers"):
        OnePass(function, engine="eager")(torch.randn(B, 6))


def test_an_operation_without_a_kernel_for_shapes_is_refused_by_name() -> None:
    library = torch.library.Library("one_pass_refusals", "FRAGMENT")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x * 2, "CPU")

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return torch.ops.one_pass_refusals.opaque(grad)

    _, function = two_layers(Opaque.apply)
    step = OnePass(function, engine="eager")
    losses = step(torch.randn(B, 6))
    with pytest.raises(OnePassError, match=r"one_pass_refusals.opaque.default has no rule for its results' shapes"):
        step.loss(losses, torch.tensor([2, 5]))


def test_an_operation_with_the_batch_size_among_its_strides_is_refused_by_name() -> None:
    _, function = two_layers(lambda z: z.as_strided(z.shape, z.stride()) * 2)
    step = OnePass(function, engine="eager")
    losses = step(torch.randn(B, 6))
    with pytest.raises(OnePassError, match=r"aten\.\w+\.\w+ (carries the batch's size|of sizes)"):
        step.loss(losses, torch.tensor([2, 5]))


def test_rows_indexed_by_the_same_numbers_whatever_they_are_in_a_checkpointed_region_are_refused() -> None:
    neighbour = torch.arange(B).roll(1)
    layer = nn.Linear(6, 6)
    step = OnePass(
        lambda x: checkpoint(lambda h: layer(h)[neighbour[: len(h)] % len(h)], x, use_reentrant=False).square().sum(1),
        engine="eager",
    )
    with pytest.raises(OnePassError):
        step.backward(step(torch.randn(B, 6)), torch.tensor([2, 5]))


def test_a_mask_belongs_among_a_checkpointed_regions_arguments() -> None:
    block, head = Block(), nn.Linear(16, 1)
    x, mask, index = torch.randn(B, 5, 16), torch.rand(B, 5, 1), torch.tensor([2, 5, 0])

    def closed_over(x: Tensor, mask: Tensor) -> Tensor:
        return head(checkpoint(lambda h: block(h * mask), x, use_reentrant=False).mean(1))[:, 0].square()

    def handed_over(x: Tensor, mask: Tensor) -> Tensor:
        return head(checkpoint(lambda h, m: block(h * m), x, mask, use_reentrant=False).mean(1))[:, 0].square()

    step = OnePass(closed_over, engine="eager")
    losses = step(x, mask)
    with pytest.raises(
        OnePassError, match=r"aten.mul.Tensor cannot run on 3 of 7 rows.*a checkpointed region closes over"
    ):
        step.loss(losses, index)
    step = OnePass(handed_over, engine="eager")
    step.backward(step(x, mask), index)
    ours = gradients(block)
    handed_over(x[index], mask[index]).mean().backward()
    assert relative_error(ours, gradients(block)) < 1e-10


@contextmanager
def a_warning_of_torchs_own() -> Iterator[None]:
    """torch warns of create_graph=True, once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_what_a_backward_cannot_do_is_an_error() -> None:
    model = ViT()
    step, x, labels = OnePass(classify(model), engine="eager"), torch.randn(B, 1, 8, 8), torch.randint(5, (B,))
    one, two = torch.tensor([1, 2]), torch.tensor([3, 4])
    losses = step(x, labels)
    with pytest.raises(OnePassError, match="two choices of rows from one forward"):
        (step.loss(losses, one) + step.loss(losses, two)).backward()
    losses = step(x, labels)
    with pytest.raises(OnePassError, match="cannot run on 2 of 7 rows"):
        (step.loss(losses, one) + 0.1 * losses.mean()).backward()
    losses = step(x, labels)
    with pytest.raises(OnePassError, match="create_graph=True"), a_warning_of_torchs_own():
        step.loss(losses, one).backward(create_graph=True)
    losses = step(x, labels)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        step.backward(losses, one)


def test_the_eager_engine_refuses_a_compiled_region() -> None:
    model = nn.Linear(6, 1)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(
        OnePassError, match=r"OptimizedModule: the eager engine cannot cut a compiled.*engine='compile'"
    ):
        OnePass(lambda x: compiled(x)[:, 0].square(), engine="eager")(torch.randn(B, 6))
    hidden = [lambda x: compiled(x)[:, 0].square()]
    hidden[0](torch.randn(B, 6))
    step = OnePass(lambda x, which: which["loss"](x), engine="eager")
    with pytest.raises(OnePassError, match="CompiledFunctionBackward: the eager engine cannot cut a compiled region's"):
        step(torch.randn(B, 6), {"loss": hidden[0]})


def test_a_learner_made_for_one_batch_size_is_refused() -> None:
    layer = nn.Linear(6, 6)
    step = OnePass(lambda x: layer(x).view(B, 3, 2).sum((1, 2)), engine="eager")
    with pytest.raises(OnePassError, match="does not run on 5 of the batch's rows"):
        step(torch.randn(B, 6))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: OnePass(ViT(), compile_backend="cudagraphs"), "compile_backend"),
        (lambda: OnePass(ViT(), engine="fast"), "engine"),
        (lambda: OnePass(None), "per_example_loss"),
        (lambda: OnePass(ViT(), verify_every=-1), "verify_every"),
        (lambda: OnePass(GPT())(), "batch"),
        (lambda: OnePass(GPT())(3.0), "batch"),
        (lambda: OnePass(lambda x: x.sum(), engine="two_pass")(torch.randn(B, 3)), "per_example_loss.*losses"),
        (lambda: OnePass(lambda x: x[:3].sum(1), engine="two_pass")(torch.randn(B, 3)), "packed batch"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        call()


@pytest.mark.parametrize("engine", ["eager", "two_pass"])
def test_bad_choices_are_named(engine: str) -> None:
    model = GPT()
    step = OnePass(model, engine=engine)
    losses = step(torch.randint(11, (B, 6)))
    index = torch.tensor([0, 1])
    for argument, call in {
        "losses": lambda: step.loss(losses * 1, index),
        "index: got a bool": lambda: step.loss(losses, torch.ones(B, dtype=torch.bool)),
        "index: got rows 0 to 7": lambda: step.loss(losses, torch.tensor([0, B])),
        "index: got rows -1": lambda: step.loss(losses, torch.tensor([0, -1])),
        "weights": lambda: step.loss(losses, index, torch.ones(3)),
        "denominator": lambda: step.loss(losses, index, denominator=torch.ones(2)),
    }.items():
        with pytest.raises(ValueError, match=argument):
            call()


def test_the_public_name() -> None:
    assert attent.OnePass is OnePass
