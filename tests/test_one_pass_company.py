"""One-pass teaching in company: LoRA, accelerate, scalers, custom operators, attent's own heads, a teacher's store."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.one_pass import OnePass, OnePassError
from tests.one_pass_learners import Block, classify, gradients, relative_error
from tests.test_one_pass import EXACT, B, double  # noqa: F401

ENGINES = ("eager", "compile", "two_pass")


def one_pass(function: Callable[..., object], engine: str) -> OnePass:
    torch._dynamo.reset()
    return OnePass(function, engine=engine, compile_backend="aot_eager")


# LoRA


@pytest.mark.parametrize("engine", ["eager", "two_pass", pytest.param("compile", marks=pytest.mark.slow)])
def test_lora_adapters_get_the_chosen_rows_gradient_and_the_frozen_rest_none(engine: str) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(16 * 4, 5))
    config = peft.LoraConfig(r=2, target_modules=["qkv", "0.out"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first, so that A would get no gradient
            nn.init.normal_(parameter)
    function, batch, index = classify(model), (torch.randn(B, 4, 16), torch.randint(5, (B,))), torch.tensor([5, 0, 3])
    step = one_pass(function, engine)
    step.backward(step(*batch), index)
    ours = gradients(model)
    function(*(x[index] for x in batch)).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    assert sum(x is not None for x in ours) == 4 and step.report().engine == engine


# Custom operators


@torch.library.custom_op("one_pass_company::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return x.square()


@squared.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("one_pass_company::twice_product", mutates_args=())
def twice_product(x: Tensor, grad: Tensor) -> Tensor:
    if x.shape != grad.shape:  # what a kernel that trusts its inputs would not notice
        raise RuntimeError(f"rows of {tuple(x.shape)} meet those of {tuple(grad.shape)}")
    return 2 * x * grad


@twice_product.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_input(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _squared_backward(ctx: object, grad: Tensor) -> Tensor:
    return twice_product(ctx.saved_tensors[0], grad)


squared.register_autograd(_squared_backward, setup_context=_keep_input)


@torch.library.custom_op("one_pass_company::without_shapes", mutates_args=())
def without_shapes(x: Tensor) -> Tensor:
    return x.sin()


without_shapes.register_autograd(lambda ctx, grad: without_shapes(grad), setup_context=_keep_input)


def with_operator(operator: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    return model, lambda x: model[1](operator(model[0](x)))[:, 0].square()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_custom_operator_with_shapes_and_gradient_registered_is_served(engine: str) -> None:
    model, function = with_operator(squared)
    x, index = torch.randn(B, 6), torch.tensor([2, 5, 0])
    step = one_pass(function, engine)
    step.backward(step(x), index)
    ours = gradients(model)
    function(x[index]).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT and step.report().engine == engine


def test_a_custom_operator_without_shapes_is_refused_by_name() -> None:
    _, function = with_operator(without_shapes)
    step = one_pass(function, "eager")
    losses = step(torch.randn(B, 6))
    with pytest.raises(OnePassError, match=r"one_pass_company.without_shapes.* has no rule for its results' shapes"):
        step.loss(losses, torch.tensor([2, 5]))
    with pytest.raises(OnePassError, match="without_shapes"):
        one_pass(function, "compile")(torch.randn(B, 6))


# attent's own heads


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scoring_head_gives_losses_and_scores_in_the_learners_one_forward(engine: str) -> None:
    embedding, block = nn.Embedding(11, 16), Block(causal=True)
    head = attent.ScoringHead(nn.Linear(16, 11), reduction="example", shift=True, score="head")
    model = nn.ModuleList([embedding, block, head])

    def function(tokens: Tensor) -> tuple[Tensor, Tensor]:
        losses, scores = head(block(embedding(tokens)), tokens)
        return losses, scores

    tokens = torch.randint(11, (B, 6))
    step = one_pass(function, engine)
    losses, scores = step(tokens)
    index = attent.select_top_k(scores, 3).index
    step.backward(losses, index)
    ours = gradients(model)
    expected, expected_scores = function(tokens[index])
    expected.mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    torch.testing.assert_close(scores[index], expected_scores)
    assert step.report().engine == engine


# Mixed precision and other people's loops


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_gradient_scaler(dtype: torch.dtype, engine: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    function, batch, index = classify(model), (torch.randn(B, 6), torch.randint(5, (B,))), torch.tensor([5, 2, 0])
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = one_pass(function, engine)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            losses = step(*batch)
        scaler.scale(step.loss(losses, index)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    ours = gradients(model)
    with torch.autocast("cpu", dtype):
        expected = function(*(x[index] for x in batch)).mean()
    expected.backward()
    # Gradients are rounded to the dtype at each of the two layers that they pass, and sums start from rounded terms.
    assert relative_error(ours, gradients(model)) < 4 * torch.finfo(dtype).eps


def test_accelerate_accumulates_and_clips() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.set_default_dtype(torch.float32)
    model = nn.Linear(6, 5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0))
    step = OnePass(classify(prepared), engine="eager")
    batches = [(torch.randn(B, 6), torch.randint(5, (B,))) for _ in range(2)]
    index, before = torch.tensor([4, 1]), copy.deepcopy(model)
    for batch in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(step.loss(step(*batch), index))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for x, labels in batches:
        (classify(before)(x[index], labels[index]).mean() / 2).backward()
    assert nn.utils.clip_grad_norm_(before.parameters(), 0.1) > 0.1
    # a step of 1.0 against the gradient; weights below 1 are kept to 2^-24, and the step is a difference of two
    torch.testing.assert_close(before.weight - model.weight, before.weight.grad, rtol=1e-5, atol=2 * 2**-24)


# Packed batches


def test_packed_batches_are_chosen_by_segment_in_two_passes_and_refused_by_name_elsewhere() -> None:
    embedding, head = nn.Embedding(11, 16), nn.Linear(16, 11)
    lengths = torch.tensor([3, 1, 4, 2, 5])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens, scale = torch.randint(11, (15,)), torch.rand(5)

    def function(tokens: Tensor, batch: dict[str, Tensor], scale: Tensor) -> Tensor:
        losses = attent.linear_cross_entropy(
            embedding(tokens), head.weight, tokens, linear_bias=head.bias, reduction="example", **batch
        )
        return losses * scale

    model, index = nn.ModuleList([embedding, head]), torch.tensor([4, 0, 2])
    for chosen in (index, torch.tensor([1])):
        step = OnePass(function, engine="two_pass")
        losses = step(tokens, {"cu_seqlens": cu_seqlens}, scale)
        loss = step.loss(losses, chosen)
        torch.testing.assert_close(loss, losses[chosen].mean())
        loss.backward()
        ours = gradients(model)
        function(tokens, {"cu_seqlens": cu_seqlens}, scale)[chosen].mean().backward()
        assert relative_error(ours, gradients(model)) < EXACT
    for engine in ("eager", "compile"):
        with pytest.raises(OnePassError, match=r"a packed batch \(cu_seqlens\).*engine='two_pass'"):
            OnePass(function, engine=engine)(tokens, {"cu_seqlens": cu_seqlens}, scale)
    step = OnePass(function)
    with pytest.warns(UserWarning, match="a packed batch"):
        step(tokens, {"cu_seqlens": cu_seqlens}, scale)
    for bad, named in ((cu_seqlens.float(), "cu_seqlens"), (cu_seqlens + 1, "no tensor with the 16 tokens")):
        with pytest.raises(ValueError, match=named):
            OnePass(function, engine="two_pass")(tokens, {"cu_seqlens": bad}, scale)


# A teacher


def test_in_pool_scores_update_the_harvest_store_and_inclusion_weights_are_honoured() -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    x = torch.randn(40, 6)
    labels = x[:, :3].argmax(1)

    def per_example_loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, labels, reduction="none"), attent.example_scores(logits, labels)

    step = OnePass(per_example_loss, engine="eager")
    teacher = attent.Teacher(40, total_steps=10, ratio=0.5, warmup=0, anneal=0, reweight="inverse")
    ids = torch.randperm(40)[:16]
    losses, scores = step(x[ids], labels[ids])
    lesson = teacher.choose(scores, example_ids=ids)
    weights = teacher.weights(lesson)
    assert len(lesson.index) == 8 and weights.std() > 0
    step.loss(losses, lesson.index, weights).backward()
    ours = gradients(model)
    chosen = ids[lesson.index]
    (F.cross_entropy(model(x[chosen]), labels[chosen], reduction="none") * weights.double()).mean().backward()
    assert relative_error(ours, gradients(model)) < EXACT
    never_seen = teacher.summary()["never_seen_ids"]
    assert set(never_seen.tolist()) == set(range(40)) - set(ids.tolist())


def test_nothing_is_read_back_to_the_host_once_a_signature_is_known() -> None:
    class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    step = OnePass(classify(model), engine="eager")
    x, labels = torch.randn(B, 6), torch.randint(3, (B,))
    index, weights = torch.tensor([3, 1]), torch.ones(2)
    step.backward(step(x, labels), index, weights)
    losses = step(x, labels)
    # Values on a device are not read to check them; those of a CPU index are, which is left out here.
    from attent.one_pass import step as module

    readable, module.values_readable = module.values_readable, lambda tensor: False
    try:
        with NoReading():
            step.backward(losses, index, weights)
    finally:
        module.values_readable = readable
